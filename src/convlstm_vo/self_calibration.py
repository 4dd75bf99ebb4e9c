"""How far a lens bends straight lines, found from a drive: for cameras that nobody has calibrated.

Whatever moves past a camera moves along epipolar lines, and the road as a plane does. Through a lens that distorts
they do not, whatever motion is assumed. So of all strengths of the distortion the likeliest is the one under which
the default network's solver is left with the least (Gauss-Newton, with motion and road of each pair of frames
eliminated).

One number describes the lens, the division model's (A. Fitzgibbon, *Simultaneous linear estimation of multiple
view geometry and lens distortion*, CVPR 2001): a point of the image at (x, y), in focal lengths from the principal
point, is seen along the ray (x, y) / (1 + bend * (x^2 + y^2)). Barrels, as of dash cams, have a negative one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from convlstm_vo.environment import bfloat16_pays
from convlstm_vo.errors import ConvlstmVoError
from convlstm_vo.geometry import se3
from convlstm_vo.geometry.camera import Camera
from convlstm_vo.models import fixed
from convlstm_vo.models.cells import State
from convlstm_vo.models.geometric import LEAST_EVIDENCE, Cells, Estimate, GeometricNet, View
from convlstm_vo.models.mounting import Memory, facing_ahead, looking_ahead
from convlstm_vo.models.solver import Residuals, residuals, shape_derivatives, with_priors
from convlstm_vo.odometer import working_size
from convlstm_vo.sequences.base import Frame, fit_image
from convlstm_vo.sequences.lens import Lens

_APART_S = 0.09  # between two frames that are compared, at least
_MOVING = 0.1  # camera heights; less than that between two frames tells little
ENOUGH, _FEWEST, _LONGEST_S = 60, 20, 60.0  # pairs that are looked at, that have to be, and for how long one looks
# Errors of cells lie alike, in one frame and the next: so many count as one. With 30, what was found on 12 streets
# by lenses that bend nothing is off by 0.7 standard deviations (rms), on KITTI's clips by 2.7, at most by 3.8.
_ALIKE, _CLEAR = 30.0, 5.0
_USUAL_SD = 0.15  # of lenses, before one looks
_ROUNDS, _LARGEST_CHANGE, _DONE = 8, 0.15, 0.003
_STEP = 1e-3  # of finite differences
_LEAST = 0.25  # of 1 + bend * r^2 in the image's corner: beyond, the model is none


class SelfCalibrationError(ConvlstmVoError):
    """Frames that do not tell how the lens distorts."""


@dataclasses.dataclass(frozen=True)
class Bend:
    """What was found.

    Attributes:
        bend: of the division model, for rays in focal lengths of the camera that was assumed; sd: its standard
            deviation. pairs: of frames that were looked at.
    """

    bend: float
    sd: float
    pairs: int

    @property
    def clear(self) -> bool:
        """Whether the lens bends lines at all, beyond doubt."""
        return abs(self.bend) > _CLEAR * self.sd

    def lens(self, camera: Camera, *, fov_deg: float | None = None) -> Lens:
        """As OpenCV has it, a rational polynomial (k1 k2 p1 p2 k3 k4 k5 k6).

        Args:
            camera: that was assumed.
            fov_deg: the horizontal field of view that the image has as it comes, if the camera is of no better
                source: its edges then are what subtends it, so the focal length is another one.
        """
        bend = self.bend
        if fov_deg is not None:
            scale = 1 / (1 + bend * (camera.width / 2 / camera.fx) ** 2)
            camera = dataclasses.replace(camera, fx=camera.fx * scale, fy=camera.fy * scale)
            bend *= scale**2  # in pixels the lens is what it was
        return Lens(camera, opencv_coefficients(bend, _corner(camera)))


def opencv_coefficients(bend: float, corner: float) -> tuple[float, ...]:
    """k1 k2 p1 p2 k3 k4 k5 k6 that distort as the division model does, to a few hundredths of a pixel.

    Sanathanan and Koerner's iteration (IEEE Trans. Automatic Control, 1963) for a quotient of cubics in r^2.

    Args:
        corner: distance of the image's farthest corner from the principal point, in focal lengths.
    """
    seen = (
        corner * (1 - np.cos(np.linspace(0, np.pi, 200))) / 2
    )  # most of it where polynomials err most: at the ends
    shrunk = 1 + bend * seen**2
    rays = seen / shrunk
    share = (rays / rays[-1]) ** 2
    powers = np.stack([share, share**2, share**3], 1)
    k = np.zeros(6)
    for _ in range(3):  # the quotient's error in the image, as the last round knows its denominator
        weight = (rays / (1 + powers @ k[3:]))[:, None]
        sides = np.concatenate([powers, -shrunk[:, None] * powers], 1)
        k, *_ = np.linalg.lstsq(weight * sides, weight[:, 0] * (shrunk - 1))
    k1, k2, k3, k4, k5, k6 = (k / np.tile(rays[-1] ** np.array([2, 4, 6]), 2)).tolist()
    return k1, k2, 0.0, 0.0, k3, k4, k5, k6


@torch.inference_mode()
def find_bend(
    net: GeometricNet,
    frames: Iterable[Frame],
    camera: Camera,
    advance: Callable[[int], None] = lambda count: None,
) -> Bend:
    """How far the lens bends lines, from the first seconds of driving: 6 are enough, straight ahead or not.

    Args:
        net: the default network.
        frames: as they come; as many are read as are needed, of a minute at most.
        camera: intrinsics that are assumed; the principal point is the distortion's middle.
        advance: called with 1 for each pair of frames that tells something.

    Raises:
        SelfCalibrationError: too few frames in which the camera moves and sees a road.
    """
    net.eval().mixed = bfloat16_pays(next(net.parameters()).device.type)
    pairs = _measured(net, frames, camera, advance)
    if len(pairs) < _FEWEST:
        raise SelfCalibrationError(
            f"the first minute has {len(pairs)} pairs of frames in which the camera drives on a road that it sees, "
            f"but to find the lens's distortion takes {_FEWEST} at least (better {ENOUGH}): begin where the car "
            "drives, or give the distortion (--distortion, --calib)"
        )
    bend, precision = 0.0, _USUAL_SD**-2
    lowest, highest = ((share - 1) / _corner(camera) ** 2 for share in (_LEAST, 2 - _LEAST))
    for _ in range(_ROUNDS):
        information, gradient = _told(net, pairs, bend)
        precision = information / _ALIKE + _USUAL_SD**-2
        change = -(gradient / _ALIKE + bend * _USUAL_SD**-2) / precision
        bend = min(highest, max(lowest, bend + max(-_LARGEST_CHANGE, min(_LARGEST_CHANGE, change))))
        if abs(change) < _DONE:
            break
    return Bend(bend, precision**-0.5, len(pairs))


@dataclasses.dataclass
class _Pair:
    """Two frames: cells in the camera's own axes, the state after them, and whether the pair before is among those
    that are looked at, too."""

    cells: Cells
    state: State
    follows: bool


def _measured(
    net: GeometricNet, frames: Iterable[Frame], camera: Camera, advance: Callable[[int], None]
) -> list[_Pair]:
    """The flow of pairs of frames in which the camera drives."""
    height, width = working_size(camera)
    K = torch.tensor(camera.resized(height=height, width=width).intrinsics[None], dtype=torch.float32)
    pairs: list[_Pair] = []
    prev, prev_s, first_s = None, 0.0, None
    state: State | None = None
    follows = False
    for frame in frames:
        first_s = frame.timestamp_s if first_s is None else first_s
        if prev is not None and frame.timestamp_s - prev_s < _APART_S:
            continue
        if len(pairs) == ENOUGH or frame.timestamp_s - first_s > _LONGEST_S:
            break
        image = np.array(fit_image(frame.image, height=height, width=width, channels=1))
        curr = torch.from_numpy(image).permute(2, 0, 1)
        if prev is not None and not torch.equal(prev, curr):
            estimate, state = net.track(torch.stack([prev, curr])[None], K, state)
            tells = _tells(estimate)
            if tells:
                view = View(prev[None].float(), curr[None].float(), K, fixed.hidden(state[-2]))
                pairs.append(_Pair(_cells(net, view, state), state, follows))
                advance(1)
            follows = tells
        prev, prev_s = curr, frame.timestamp_s
    return pairs


def _tells(estimate: Estimate) -> bool:
    way = float(estimate.solution.motion[0, :3].norm())
    return way > _MOVING and bool(estimate.metric) and float(estimate.evidence) >= LEAST_EVIDENCE


def _cells(net: GeometricNet, view: View, state: State) -> Cells:
    """The flow on top of the motion that has just been found, in the camera's own axes."""
    memory = Memory.unpack(state[-1])
    return net.look(view, memory).turned(looking_ahead(memory).transpose(1, 2))


def _told(net: GeometricNet, pairs: list[_Pair], bend: float) -> tuple[float, float]:
    """Information about the bend, and the gradient of the misfit, summed over pairs."""
    information, gradient = 0.0, 0.0
    state: State | None = None
    for pair in pairs:
        if state is None or not pair.follows:  # what was found through the lens as it is will do to begin with
            state = pair.state
            continue
        memory = Memory.unpack(state[-1])
        cells = _straightened(pair.cells, bend).turned(looking_ahead(memory))
        estimate, after = net.conclude(cells, memory, state[:-3])
        told = _of_pair(net, pair.cells, cells, estimate, memory, bend)
        information, gradient = information + told[0], gradient + told[1]
        lost = torch.zeros(1, dtype=torch.bool)
        state = (*after[:-1], *state[-3:-1], facing_ahead(Memory.unpack(after[-1]), lost).pack())
    return information, gradient


def _of_pair(
    net: GeometricNet, bent: Cells, cells: Cells, estimate: Estimate, memory: Memory, bend: float
) -> tuple[float, float]:
    """Information and gradient of one pair: Schur's complement, in which motion and road are free."""
    solution, priors = estimate.solution, net.priors(memory)
    open_road, stands = net.open_road(cells, memory, priors)
    across, along = net.trusted_weights(cells, memory, estimate.trust)
    across, along = net.shared(across * stands, along * open_road)
    rays, ahead = cells.rays.flatten(2), looking_ahead(memory)
    r = residuals(rays, cells.seen.flatten(2), solution.motion, solution.slopes)
    shape = shape_derivatives(rays, r, along)
    misfit = r.along + (solution.shape[..., None] * shape).sum(1)
    more, less = (_residuals(bent, ahead, estimate, bend + sign * _STEP) for sign in (1, -1))
    # A stronger barrel makes the image larger, and all that is off with it: by itself that is no reason.
    line = _epipolar_directions(_divided(bent.seen.flatten(2), bend), ahead, solution.motion)
    nothing = solution.information.new_zeros(1, 11, 11), solution.information.new_zeros(1, 11)
    H = with_priors(*nothing, solution, priors)[0][0].double()
    A, B, b = 0.0, torch.zeros(11, dtype=torch.float64), 0.0
    for way, off, J, weights, high, low in (
        (torch.stack([-line[:, 1], line[:, 0]], 1), r.across, F.pad(r.J_across, (0, 0, 0, 3)), across,
         more.across, less.across),
        (line, misfit, torch.cat([r.J_along, shape], 1), along, more.along, less.along),
    ):  # fmt: skip
        now, grown, shrunk = (_stretch_along(bent.seen, way, bend + sign * _STEP) for sign in (0, 1, -1))
        heard = (weights / (1 + off.square() * weights / 4))[0].double()
        by_bend = (high * (now / grown) - low * (now / shrunk))[0] / (2 * _STEP)  # (cells,)
        by_motion = J[0].double()
        A += float(heard @ by_bend.square())
        B += by_motion @ (heard * by_bend)
        b += float((heard * by_bend) @ off[0].double())
        H = H + (heard * by_motion) @ by_motion.T
    return A - float(B @ torch.linalg.solve(H, B)), b


def _residuals(bent: Cells, ahead: Tensor, estimate: Estimate, bend: float) -> Residuals:
    """In double precision, for finite differences."""
    straight = _straightened(bent, bend, torch.float64).turned(ahead.double())
    at = estimate.solution.motion.double(), estimate.solution.slopes.double()
    return residuals(straight.rays.flatten(2), straight.seen.flatten(2), *at)


def _straightened(cells: Cells, bend: float, dtype: torch.dtype = torch.float32) -> Cells:
    """Cells in the camera's own axes as a pinhole would see them."""
    rays, seen = cells.rays.to(dtype), cells.seen.to(dtype)
    flat = _divided(rays[:, :2] / rays[:, 2:], bend)
    rays = torch.cat([flat, torch.ones_like(flat[:, :1])], 1)
    around, away = _stretch(cells.seen.flatten(2), bend)
    sigma = cells.sigma * (around * away).sqrt().unflatten(1, cells.sigma.shape[-2:])
    return dataclasses.replace(cells, rays=rays, seen=_divided(seen, bend), sigma=sigma)


def _divided(points: Tensor, bend: float) -> Tensor:
    """Points (batch, 2, ...) of the image, along which rays they are seen."""
    return points / (1 + bend * points.square().sum(1, True)).clamp_min(_LEAST)


def _stretch(points: Tensor, bend: float) -> tuple[Tensor, Tensor]:
    """By how much what is seen at points (batch, 2, cells) of the image is larger along a ray: around the middle,
    and away from it, (batch, cells)."""
    by = bend * points.square().sum(1)
    around = 1 / (1 + by).clamp_min(_LEAST)
    return around, (1 - by).clamp_min(0.1) * around.square()


def _stretch_along(points: Tensor, way: Tensor, bend: float) -> Tensor:
    """(batch, cells) by how much an error of places (batch, 2, rows, columns) grows along unit vectors ``way``."""
    points = points.flatten(2).double()
    around, away = _stretch(points, bend)
    outward = (F.normalize(points, dim=1) * way).sum(1).square()
    return (around.square() * (1 - outward) + away.square() * outward).sqrt()


def _epipolar_directions(seen: Tensor, ahead: Tensor, motion: Tensor) -> Tensor:
    """Unit vectors (batch, 2, cells) along the epipolar lines at places seen (batch, 2, cells), in the camera's own
    axes; the motion (batch, 6) is in those of one that looks ahead."""
    T = se3.matrix_from_motion(motion)
    back = (ahead.transpose(1, 2) @ T[:, :3, :3].transpose(1, 2) @ T[:, :3, 3:]).double()
    return F.normalize(seen.double() * back[:, 2:] - back[:, :2], dim=1, eps=1e-9)


def _corner(camera: Camera) -> float:
    """Distance of the farthest corner from the principal point, in focal lengths."""
    x = max(camera.cx + 0.5, camera.width - 0.5 - camera.cx) / camera.fx
    y = max(camera.cy + 0.5, camera.height - 0.5 - camera.cy) / camera.fy
    return float(np.hypot(x, y))
