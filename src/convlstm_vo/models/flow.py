"""A learned optical flow that is sub-pixel exact: match coarse features, then Lucas-Kanade on learned images.

The flow is measured on a grid of one cell for 4x4 pixels of the *previous* frame, as a residual on top of a flow
that the caller predicts (from the last motion). Each cell comes with the scale of its error, learned by maximum
likelihood.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convlstm_vo.models import kernel_gradients, kernels
from convlstm_vo.models.correlation import matched, together

STRIDE = 4  # pixels a cell
_COARSE_RADIUS, _FINE_RADIUS = 4, 2  # cells of 8 pixels, cells of 4
_IMAGES = kernels.CHANNELS  # learned, at full resolution
_STEPS = 3  # of Lucas-Kanade
_TAPS = 5  # cells in a row that the final flow is a mean of
_LEAST_CONTRAST = 1.5  # grey levels; asphalt has 3 to 8, sensor noise 1 to 3


class FlowNet(nn.Module):
    """Flow and its uncertainty on a grid of stride 4.

    Args:
        width: multiplies the number of channels.
    """

    def __init__(self, width: float = 1.0) -> None:
        super().__init__()
        c2, c4, c8 = (int(channels * width) for channels in (16, 32, 48))
        self.images = nn.Conv2d(1, _IMAGES, 5, padding=2)
        self.to2 = nn.Conv2d(1, c2, 5, stride=2, padding=2)
        self.to4 = nn.Sequential(_conv(c2, 24, 2), _conv(24, c4, last=True))
        self.to8 = nn.Sequential(nn.LeakyReLU(0.1), _conv(c4, c8, 2), _conv(c8, c8, last=True))
        self.coarse = nn.Sequential(_conv((2 * _COARSE_RADIUS + 1) ** 2 + c8 + 3, 64), _conv(64, 48))
        self.coarse_flow = nn.Conv2d(48, 2, 3, padding=1)
        fine = (2 * _FINE_RADIUS + 1) ** 2 + c4 + 3 + 48 + 2
        self.fine = nn.Sequential(_conv(fine, 48), _conv(48, 32))
        self.fine_flow = nn.Conv2d(32, 2, 3, padding=1)
        self.near = _conv(32 + 8 + 2, 32)
        self.around = nn.Sequential(_conv(32, 48, 2), _conv(48, 48), nn.Conv2d(48, 32, 1))
        self.judge = nn.Sequential(_conv(32, 32), nn.Conv2d(32, 3 + _TAPS**2, 3, padding=1))
        self.sharpness = nn.Parameter(torch.tensor([10.0, 10.0]))
        self.log_damping = nn.Parameter(torch.tensor(-5.0))
        self.log_outlier = nn.Parameter(torch.tensor(0.0))
        nn.init.dirac_(self.images.weight)
        for layer in (self.coarse_flow, self.fine_flow, self.judge[-1]):
            nn.init.zeros_(layer.weight)  # type: ignore[arg-type]
            nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
        with torch.no_grad():
            self.judge[-1].bias[3 + _TAPS**2 // 2] = 4.0  # type: ignore[operator]  # begin with the cell's own flow

    def forward(self, prev: Tensor, curr: Tensor, predicted: Tensor) -> FlowField:
        """The flow from prev to curr.

        Args:
            prev, curr: grey levels 0..255, (batch, 1, height, width), sides divisible by 8.
            predicted: flow in pixels (x, y) expected at the cells, (batch, 2, height / 4, width / 4).

        Returns:
            See `FlowField`.
        """
        both = normalise_contrast(torch.cat([prev, curr]).float())
        here, there = both.chunk(2)
        warped = warp_by_cells(there, predicted)
        # Coarse: where is each 8x8 block? Then 4x4 blocks.
        f2 = self.to2(torch.cat([here, warped]))
        f4 = self.to4(F.leaky_relu(f2, 0.1, inplace=True))
        f8 = self.to8(f4)
        coarse, features = self._match(
            f8.chunk(2), _COARSE_RADIUS, self.sharpness[0], self.coarse, self.coarse_flow
        )
        flow = 2.0 * F.interpolate(coarse, scale_factor=2.0, mode="bilinear", align_corners=False)  # cells of 4 px
        features = F.interpolate(features, scale_factor=2.0, mode="bilinear", align_corners=False)
        g4, w4 = f4.chunk(2)
        nearer, more = (g4, warp(w4.float(), flow).to(g4.dtype)), (features, flow / 4)
        step, features = self._match(nearer, _FINE_RADIUS, self.sharpness[1], self.fine, self.fine_flow, more)
        nearly = STRIDE * (flow + step)  # pixels
        refined, evidence = self._refine(self._channels(both), predicted, nearly)
        # What a cell alone cannot see, the cells around it know: a mean of them, by how well each one fits.
        near = self.near(together(features.dtype, features, evidence, refined))
        verdict = self.judge(near + coarse_up(self.around(near))).float()
        residual = blend(refined, verdict[:, 3:]) + 2.0 * torch.tanh(verdict[:, :2] / 2.0)
        return FlowField(
            predicted + residual,
            verdict[:, 2:3].clamp(-4.0, 5.0) - 1.0,
            (predicted + 8 * coarse_up(coarse), predicted + nearly, predicted + refined),
        )

    def _channels(self, images: Tensor) -> Tensor:
        """Learned channels of images, (batch, channels, height, width), in full precision: each bit counts."""
        weight, bias = self.images.parameters()
        if kernels.usable(images, weight, bias):
            return kernels.filtered(images, weight.detach(), bias.detach())
        with torch.autocast(images.device.type, enabled=False):
            return F.conv2d(images, weight, bias, padding="same").contiguous()

    def _match(
        self,
        both: Sequence[Tensor],
        radius: int,
        sharpness: Tensor,
        layers: nn.Module,
        head: nn.Module,
        more: tuple[Tensor, ...] = (),
    ) -> tuple[Tensor, Tensor]:
        """Displacement in cells (batch, 2, rows, columns) and features, from those (batch, ...) of both frames."""
        seen, guess = matched(both[0], both[1], radius, sharpness, more)
        features = layers(seen)
        return guess + head(features).float(), features

    def _refine(self, images: Tensor, predicted: Tensor, flow: Tensor) -> tuple[Tensor, Tensor]:
        """Lucas-Kanade (inverse compositional; Baker & Matthews 2004) in windows of 8x8 pixels around each cell.

        Args:
            images: learned channels of both frames, (2 batch, channels, height, width).
            predicted: flow in pixels at the cells. flow: residual to start from, (batch, 2, rows, columns).

        Returns:
            The refined residual; and how well it fits, (batch, 8, rows, columns).
        """
        damping, outlier = self.log_damping.exp(), self.log_outlier.exp()
        if images.shape[1] == kernels.CHANNELS and kernels.usable(images, predicted, flow, damping):
            return kernels.refine(images, predicted, flow, float(damping), float(outlier), _STEPS)
        here, there = images.chunk(2)
        hessian = gradient_products(here)
        hxx, hxy, hyy = hessian[:, :1] + damping, hessian[:, 1:2], hessian[:, 2:] + damping
        determinant = hxx * hyy - hxy * hxy
        start, errors = flow, []
        for _ in range(_STEPS):
            pooled = misfits(here, there, predicted + flow, outlier)
            share = pooled[:, 3:] + 1e-3
            bx, by = pooled[:, :1] / share, pooled[:, 1:2] / share
            dx, dy = (hyy * bx - hxy * by) / determinant, (hxx * by - hxy * bx) / determinant
            delta = -torch.cat([dx, dy], 1)
            flow = flow + 2.0 * torch.tanh(delta / 2.0)  # never more than two pixels at once
            errors.append(pooled[:, 2:])
        small = ((hxx + hyy) - ((hxx - hyy).square() + 4 * hxy.square() + 1e-9).sqrt()) / 2
        large = hxx + hyy - small
        evidence = torch.cat([errors[0], errors[-1], small.log() / 4, large.log() / 4, flow - start], 1)
        return flow, evidence


class FlowField(tuple[Tensor, Tensor, tuple[Tensor, ...]]):
    """What `FlowNet` measures.

    Attributes:
        flow: pixels (x, y), (batch, 2, rows, columns).
        log_scale: logarithm of the error's Laplace scale in pixels, for x as for y, (batch, 1, rows, columns).
        stages: the flow after matching blocks of 8 and of 4 pixels and after Lucas-Kanade, for the loss.
    """

    def __new__(cls, flow: Tensor, log_scale: Tensor, stages: tuple[Tensor, ...]) -> FlowField:
        return super().__new__(cls, (flow, log_scale, stages))

    @property
    def flow(self) -> Tensor:
        return self[0]

    @property
    def log_scale(self) -> Tensor:
        return self[1]

    @property
    def stages(self) -> tuple[Tensor, ...]:
        return self[2]


def normalise_contrast(images: Tensor) -> Tensor:
    """Grey levels less their local mean, over their deviation (12x12 pixels); exposure drops out."""
    if kernels.usable(images):
        return kernels.normalise_contrast(images, _LEAST_CONTRAST)
    blocks = F.avg_pool2d(torch.cat([images, images * images], 1), 4)
    blocks = F.avg_pool2d(blocks, 3, 1, 1, count_include_pad=False)
    mean, square = upsample(blocks, (images.shape[-2], images.shape[-1])).chunk(2, 1)
    deviation = (square - mean * mean).clamp_min(0).add(_LEAST_CONTRAST**2).rsqrt()
    return (images - mean) * deviation


def blend(flow: Tensor, logits: Tensor) -> Tensor:
    """At each cell a mean of the flow (batch, 2, rows, columns) of the cells around it, with weights given by
    logits (batch, taps, rows, columns)."""
    if kernels.usable(flow, logits):
        return kernels.blend(flow, logits)
    rows, columns = flow.shape[-2:]
    reach = _TAPS // 2
    padded = F.pad(flow, (reach, reach, reach, reach), mode="replicate")
    around = [padded[..., y : y + rows, x : x + columns] for y in range(_TAPS) for x in range(_TAPS)]
    return (torch.stack(around, 2) * logits.softmax(1)[:, None]).sum(2)


def gradient_products(images: Tensor) -> Tensor:
    """Products xx, xy and yy of the images' gradients, summed over channels: means in the windows of cells.

    Args:
        images: (batch, channels, height, width).

    Returns:
        (batch, 3, height / 4, width / 4).
    """
    if kernels.usable(images, differentiable=True):
        return kernel_gradients.gradient_products(images)
    gx, gy = gradients(images)
    return window(torch.cat([(gx * gx).sum(1, True), (gx * gy).sum(1, True), (gy * gy).sum(1, True)], 1))


def misfits(here: Tensor, there: Tensor, flow: Tensor, outlier: Tensor) -> Tensor:
    """How far ``there``, read at a flow (batch, 2, height / 4, width / 4), is from ``here``, and which way.

    Args:
        here, there: (batch, channels, height, width). outlier: energy at which a pixel is half trusted, a scalar.

    Returns:
        Means in the windows of cells, (batch, 4, height / 4, width / 4), of trust times: gradient in x times error,
        the same in y, energy, 1.
    """
    if here.shape[1] == kernels.CHANNELS and kernels.usable(here, there, flow, outlier, differentiable=True):
        return kernel_gradients.misfits(here, there, flow, outlier)
    gx, gy = gradients(here)
    error = warp(there, upsample(flow, (here.shape[-2], here.shape[-1]))) - here
    energy = (error * error).sum(1, True)
    trust = outlier / (outlier + energy)
    bx, by = (gx * error).sum(1, True) * trust, (gy * error).sum(1, True) * trust
    return window(torch.cat([bx, by, energy * trust, trust], 1))


def gradients(images: Tensor) -> tuple[Tensor, Tensor]:
    """Central differences in x and y, zero at the border."""
    gx = F.pad((images[..., 2:] - images[..., :-2]) / 2, (1, 1))
    return gx, F.pad((images[..., 2:, :] - images[..., :-2, :]) / 2, (0, 0, 1, 1))


def window(x: Tensor) -> Tensor:
    """Mean of the 8x8 pixels around each cell of 4x4: (..., height, width) to (..., height / 4, width / 4)."""
    x = F.avg_pool2d(x, 2)  # 2x2, then 4x4 of these: an eighth of the work
    return F.avg_pool2d(x, 4, 2, 1, count_include_pad=False)


def upsample(flow: Tensor, size: tuple[int, int]) -> Tensor:
    """A field at cells of 4x4 pixels, interpolated at each pixel."""
    return F.interpolate(flow, size=size, mode="bilinear", align_corners=False)


def coarse_up(flow: Tensor) -> Tensor:
    """A field at cells of 8x8 pixels at those of 4x4."""
    return F.interpolate(flow, scale_factor=2.0, mode="bilinear", align_corners=False)


def warp(images: Tensor, flow: Tensor) -> Tensor:
    """Read images (batch, channels, height, width) at each pixel + flow (batch, 2, height, width), in pixels."""
    if min(images.shape[-2:]) > 1 and kernels.usable(images, flow):
        return kernels.warp(images, flow)
    height, width = images.shape[-2:]
    y = torch.arange(height, device=images.device, dtype=images.dtype)[:, None]
    x = torch.arange(width, device=images.device, dtype=images.dtype)
    grid = torch.stack(
        [(x + flow[:, 0]) * (2 / width) + (1 / width - 1), (y + flow[:, 1]) * (2 / height) + (1 / height - 1)], -1
    )
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=False)


def warp_by_cells(images: Tensor, flow: Tensor) -> Tensor:
    """`warp` of images (batch, 1, height, width) by a flow at cells of 4x4 pixels."""
    if kernels.usable(images, flow):
        return kernels.warp_by_cells(images, flow)
    return warp(images, upsample(flow, (images.shape[-2], images.shape[-1])))


def _conv(inputs: int, outputs: int, stride: int = 1, *, last: bool = False) -> nn.Module:
    conv = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1)
    nn.init.kaiming_normal_(conv.weight, a=0.1)
    nn.init.zeros_(conv.bias)  # type: ignore[arg-type]
    return conv if last else nn.Sequential(conv, nn.LeakyReLU(0.1, inplace=True))
