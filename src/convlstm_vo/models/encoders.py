"""Encoders: consecutive frames to one feature map for each pair of neighbours.

An encoder sees a whole clip, (batch, time + 1, channels, height, width), so that work on single frames is done once
for each frame although it belongs to two pairs; a pair of frames is a clip of time 1.

A new encoder is a class with `from_config`, `output_shape` and `forward`, and a line in `ENCODERS`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convlstm_vo.models.config import ModelConfig, ModelError
from convlstm_vo.models.correlation import correlate, expected_displacement
from convlstm_vo.models.flownets import FlowNetS, activation_layer, kaiming, load_flownet_weights, strided

__all__ = ["ENCODERS", "CorrelationEncoder", "FlowNetS", "load_flownet_weights"]


class _ZeroMeanConv2d(nn.Conv2d):
    """A convolution whose kernels sum to zero, so that it answers to structure only.

    Features with a local mean are alike among neighbours: every displacement matches, and nothing is learned.
    """

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.weight - self.weight.mean((2, 3), keepdim=True), self.bias)


class CorrelationEncoder(nn.Module):
    """A small encoder that matches the two frames explicitly and knows its camera; 1/16 of the size.

    Convolutions learn to match only slowly; a correlation of features does it from the first step (FlowNetC,
    Dosovitskiy et al. 2015, https://arxiv.org/abs/1504.06852, eq. 1). Its expected displacement, a coarse optical
    flow, and the viewing ray of each cell are given in units of the focal length, so that the network also works
    with cameras that it was not trained on: in these units flow is linear in the motion (Longuet-Higgins 1980).

    Args:
        frame_channels: channels of one frame.
        channels: of the features at strides 2 and 4, then of the motion layers at strides 4, 8 and 16.
        radius: largest displacement, in cells of 4 pixels.
        activation: relu or leaky_relu (slope 0.1).

    Raises:
        ModelError: other than five channel numbers.
    """

    STRIDE = 4  # of the features that are matched

    def __init__(
        self, frame_channels: int, channels: tuple[int, ...], *, radius: int = 4, activation: str = "leaky_relu"
    ) -> None:
        super().__init__()
        if len(channels) != 5:
            raise ModelError(
                "encoder_channels of correlation are 5 numbers (features at strides 2 and 4, motion at 4, 8 and "
                f"16), not {channels}"
            )
        half, quarter, motion, middle, last = channels
        self.channels, self.radius = channels, radius

        def conv(in_channels: int, out_channels: int, kernel: int, stride: int) -> nn.Sequential:
            layer, active = (
                nn.Conv2d(in_channels, out_channels, kernel, stride, kernel // 2),
                activation_layer(activation),
            )
            kaiming(layer, activation)
            return nn.Sequential(layer, active)

        self.features = nn.Sequential(
            conv(frame_channels, half, 5, 2),
            conv(half, quarter, 3, 2),
        )
        self.descriptors = _ZeroMeanConv2d(quarter, quarter, 3, padding=1, bias=False)
        self.context = conv(quarter, quarter // 2, 1, 1)
        # Sharpness of the match: the expected displacement starts out close to that of the best match.
        self.log_sharpness = nn.Parameter(torch.tensor(2.5))
        matches = (2 * radius + 1) ** 2
        self.motion = nn.Sequential(
            conv(matches + quarter // 2 + 5, motion, 1, 1),
            conv(motion, middle, 3, 2),
            conv(middle, last, 3, 2),
        )

    @classmethod
    def from_config(cls, config: ModelConfig) -> CorrelationEncoder:
        """The encoder of a network."""
        return cls(
            config.image_channels,
            config.encoder_channels,
            radius=config.correlation_radius,
            activation=config.activation,
        )

    def output_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """(channels, height, width) of the features of frames of the given size."""
        for _ in range(4):
            height, width = strided(height, 2), strided(width, 2)
        return self.channels[-1], height, width

    def forward(self, clip: Tensor, intrinsics: Tensor) -> Tensor:
        """Features of each pair of neighbours.

        Args:
            clip: normalised frames (batch, time + 1, channels, height, width).
            intrinsics: fx, fy, cx, cy in pixels of these frames, (batch, 4).

        Returns:
            (batch, time, features, height / 16, width / 16).
        """
        features = self.features(clip.flatten(0, 1))  # (b * (t + 1), c, h, w)
        descriptors = F.normalize(self.descriptors(features)).unflatten(0, clip.shape[:2])  # (b, t + 1, c, h, w)
        prev, curr = descriptors[:, :-1].flatten(0, 1), descriptors[:, 1:].flatten(0, 1)  # (b * t, c, h, w)
        matches = correlate(prev, curr, self.radius)  # (b * t, (2r + 1)^2, h, w)
        flow, confidence = expected_displacement(matches, self.log_sharpness.exp())  # (b * t, 2 / 1, h, w)
        cell = intrinsics.repeat_interleave(clip.shape[1] - 1, 0) / self.STRIDE  # (b * t, 4), in cells
        flow = flow / cell[:, :2, None, None] * _FLOW_GAIN
        context = self.context(features).unflatten(0, clip.shape[:2])[:, :-1].flatten(0, 1)  # (b * t, c / 2, h, w)
        parts = (matches, flow, confidence, _rays(cell, flow), context)
        x = torch.cat([part.to(features.dtype) for part in parts], 1)  # one type: cat would make the largest of all
        return self.motion(x).unflatten(0, (clip.shape[0], -1))


_FLOW_GAIN = 40.0  # brings flow in focal lengths, a tenth at most, above the many channels of matches


def _rays(intrinsics: Tensor, like: Tensor) -> Tensor:
    """Viewing rays (x, y at depth 1) of the cells of a map: (batch, 2, height, width).

    Args:
        intrinsics: fx, fy, cx, cy in cells, (batch, 4).
        like: a map (batch, ..., height, width) of that size.
    """
    fx, fy, cx, cy = intrinsics[:, :, None, None].unbind(1)  # (batch, 1, 1) each
    columns = torch.arange(like.shape[-1], device=like.device, dtype=intrinsics.dtype)
    rows = torch.arange(like.shape[-2], device=like.device, dtype=intrinsics.dtype)
    x, y = (columns - cx) / fx, (rows[:, None] - cy) / fy
    return torch.stack(torch.broadcast_tensors(x, y), 1)


ENCODERS: dict[str, type[nn.Module]] = {
    "flownets": FlowNetS,
    "correlation": CorrelationEncoder,
}
