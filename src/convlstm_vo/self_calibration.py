"""What a drive tells about the camera that filmed it: its focal length, and how far its lens bends straight lines.

Whatever moves past a camera moves along epipolar lines, and the road as a plane does. Through a lens that distorts
they do not, whatever motion is assumed; and in a turn they do not with a wrong focal length. So of all cameras the
likeliest is the one with which the default network's solver is left with the least (Gauss-Newton, with motion and
road of each pair of frames eliminated).

One number describes the lens, the division model's (A. Fitzgibbon, *Simultaneous linear estimation of multiple
view geometry and lens distortion*, CVPR 2001): a point of the image at (x, y), in focal lengths from the principal
point, is seen along the ray (x, y) / (1 + bend * (x^2 + y^2)). Barrels, as of dash cams, have a negative one.
"""

from __future__ import annotations

import dataclasses
import math
from collections import deque
from collections.abc import Callable, Iterable

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from convlstm_vo.environment import bfloat16_pays
from convlstm_vo.errors import ConvlstmVoError
from convlstm_vo.geometry import se3
from convlstm_vo.geometry.camera import Camera
from convlstm_vo.models import fixed
from convlstm_vo.models.cells import State
from convlstm_vo.models.geometric import LEAST_EVIDENCE, Cells, Estimate, GeometricNet, View
from convlstm_vo.models.mounting import Memory, facing_ahead, looking_ahead
from convlstm_vo.models.scene import road_normal
from convlstm_vo.models.solver import Priors, Residuals, Solution, residuals, shape_derivatives
from convlstm_vo.odometer import working_size
from convlstm_vo.sequences.base import Frame, fit_image
from convlstm_vo.sequences.lens import Lens

USUAL_FOV_DEG = 70.0  # of a camera of which nothing is known
_APART_S = 0.09  # between two frames that are compared, at least
_MOVING = 0.3  # camera heights; less than that between two frames tells little
ENOUGH, _FEWEST, _LONGEST_S = 60, 20, 60.0  # pairs that are looked at, that have to be, and for how long one looks
# For a focal length, for which a camera has to turn: so far, over the last so many pairs, found in so many seconds.
_TURNED_RAD, _MOST, _LONGEST_FOR_A_TURN_S = 1.6, 120, 180.0
# Errors of cells lie alike, in one frame and the next: so many count as one. With 30, what was found on 12 streets
# by lenses that bend nothing is off by 0.7 standard deviations (rms), on KITTI's clips by 2.7, at most by 3.8.
_ALIKE, _CLEAR = 30.0, 5.0
_USUAL_SD = np.array([0.4, 0.15])  # of log zoom and bend, before one looks
_CERTAIN, _HOPELESS = 0.03, 0.15  # standard deviations of log zoom: it is known; it will not be
_ROUNDS, _LARGEST_CHANGE, _DONE = 12, 0.15, 0.003
_FASTEST = 3.0  # times as far as Gauss-Newton goes
_PASSES, _NEAR = 4, 0.05  # over the film; log zoom, at which another one tells no more
_STEP = 1e-3  # of finite differences
_LEAST = 0.25  # of 1 + bend * r^2 in the image's corner: beyond, the model is none

_Vector = NDArray[np.float64]


class SelfCalibrationError(ConvlstmVoError):
    """Frames that do not tell what camera filmed them."""


@dataclasses.dataclass(frozen=True)
class FoundCamera:
    """What was found.

    Attributes:
        assumed: the camera with which one began.
        log_zoom: logarithm of its focal length over the one that was found. zoom_sd: standard deviation; 0 where
            the focal length was not asked for.
        bend: of the division model, for rays in focal lengths of the camera that was assumed; and bend_sd.
        pairs: of frames that were looked at.
    """

    assumed: Camera
    log_zoom: float
    zoom_sd: float
    bend: float
    bend_sd: float
    pairs: int

    @property
    def bends(self) -> bool:
        """Whether the lens bends lines at all, beyond doubt."""
        return abs(self.bend) > _CLEAR * self.bend_sd

    def lens(self, *, fov_deg: float | None = None) -> Lens:
        """The camera with its distortion as OpenCV has it: a rational polynomial (k1 k2 p1 p2 k3 k4 k5 k6), all 0
        where no distortion is clear.

        Args:
            fov_deg: the horizontal field of view that the image has as it comes, if the focal length is of no
                better source: its edges are what subtends it, so with a distortion it is another one.
        """
        camera, bend = self.assumed, self.bend if self.bends else 0.0
        scale = math.exp(-self.log_zoom)
        if fov_deg is not None:
            scale = 1 / (1 + bend * (camera.width / 2 / camera.fx) ** 2)
        camera = dataclasses.replace(camera, fx=camera.fx * scale, fy=camera.fy * scale)
        bend *= scale**2  # in pixels the lens is what it was
        return Lens(camera, opencv_coefficients(bend, _corner(camera)) if bend else (0.0,) * 8)


def opencv_coefficients(bend: float, corner: float) -> tuple[float, ...]:
    """k1 k2 p1 p2 k3 k4 k5 k6 that distort as the division model does, to a few hundredths of a pixel.

    Args:
        corner: distance of the image's farthest corner from the principal point, in focal lengths.
    """
    q = np.linspace(0, 1, 200) * (corner / (1 + bend * corner**2)) ** 2  # of rays that the image sees
    shrunk = 2 / (1 + np.sqrt(1 - 4 * bend * q))
    share = q / q[-1]
    powers = np.stack([share, share**2, share**3], 1)
    k, *_ = np.linalg.lstsq(np.concatenate([powers, -shrunk[:, None] * powers], 1), shrunk - 1)
    k1, k2, k3, k4, k5, k6 = (k / np.tile(q[-1] ** np.arange(1, 4), 2)).tolist()
    return k1, k2, 0.0, 0.0, k3, k4, k5, k6


@torch.inference_mode()
def find_camera(
    net: GeometricNet,
    frames: Callable[[], Iterable[Frame]],
    assumed: Camera,
    advance: Callable[[int], None] = lambda count: None,
    *,
    focal: bool = False,
) -> FoundCamera:
    """How far the lens bends lines, for which 6 seconds of driving are enough, straight ahead or not; and the focal
    length, for which the camera has to turn.

    Args:
        net: the default network.
        frames: gives the frames from the first one on, as they come; once for a distortion, up to four times for a
            focal length. As many are read as are needed, of three minutes at most.
        assumed: intrinsics to begin with. The principal point is kept, and is the distortion's middle.
        advance: called with 1 for each pair of frames that tells something.
        focal: whether the focal length is asked for, too.

    Raises:
        SelfCalibrationError: too few frames in which the camera moves and sees a road, or turns that are too small
            to tell the focal length.
    """
    net.eval().mixed = bfloat16_pays(next(net.parameters()).device.type)
    for _ in range(_PASSES):
        pairs = _measured(net, frames(), assumed, advance, turned_rad=_TURNED_RAD if focal else 0.0)
        if len(pairs) < _FEWEST:
            longest = _LONGEST_FOR_A_TURN_S if focal else _LONGEST_S
            raise SelfCalibrationError(
                f"the first {longest:.0f} s have {len(pairs)} pairs of frames in which the camera drives on a road "
                f"it sees, but to find what camera it is takes {_FEWEST} (better {ENOUGH}): begin where the car "
                "drives, or give the camera (--intrinsics, --distortion, --calib)"
            )
        (log_zoom, bend), (zoom_sd, bend_sd) = _likeliest(net, pairs, _corner(assumed), focal)
        found = FoundCamera(assumed, log_zoom, zoom_sd, bend, bend_sd, len(pairs))
        if abs(log_zoom) < _NEAR or zoom_sd > _HOPELESS:  # else more is seen with a better guess
            break
        scale = math.exp(-log_zoom)
        assumed = dataclasses.replace(assumed, fx=assumed.fx * scale, fy=assumed.fy * scale)
    if found.zoom_sd > _CERTAIN:
        raise SelfCalibrationError(
            f"the first {_LONGEST_FOR_A_TURN_S:.0f} s do not tell the focal length ({100 * found.zoom_sd:.0f} % "
            "standard deviation): the car has to turn for that, as at a junction; begin where it does, or give the "
            "field of view (--fov) and --find-distortion"
        )
    return found


def _likeliest(
    net: GeometricNet, pairs: list[_Pair], corner: float, focal: bool
) -> tuple[tuple[float, float], tuple[float, float]]:
    """Log zoom and bend, and their standard deviations."""
    asked = np.array([focal, True])
    prior = np.diag(_USUAL_SD**-2.0)[np.ix_(asked, asked)]
    lowest, highest = ((share - 1) / corner**2 for share in (_LEAST, 2 - _LEAST))
    at, before, suggested, sd = (np.zeros(2) for _ in range(4))
    for turn in range(_ROUNDS):
        information, gradient = _told(net, pairs, at)
        precision = information[np.ix_(asked, asked)] / _ALIKE + prior
        last, suggested = suggested, np.zeros(2)
        suggested[asked] = -np.linalg.solve(precision, gradient[asked] / _ALIKE + prior @ at[asked])
        factor = np.ones(2)
        if turn:  # where motion and road follow, Gauss-Newton goes too short a way: by the secant of two steps
            slower = last - suggested
            np.divide(at - before, slower, out=factor, where=np.abs(slower) > 1e-9)
        step = np.clip(np.clip(factor, 1.0, _FASTEST) * suggested, -_LARGEST_CHANGE, _LARGEST_CHANGE)
        before, at = at, at + step
        at[1] = min(highest, max(lowest, at[1]))
        sd[asked] = np.sqrt(np.diag(np.linalg.inv(precision)))
        if np.abs(step).max() < _DONE:
            break
    return (float(at[0]), float(at[1])), (float(sd[0]), float(sd[1]))


@dataclasses.dataclass
class _Pair:
    """Two frames: cells in the camera's own axes, the state after them, and whether the pair before is among those
    that are looked at, too."""

    cells: Cells
    state: State
    follows: bool


def _measured(
    net: GeometricNet,
    frames: Iterable[Frame],
    camera: Camera,
    advance: Callable[[int], None],
    *,
    turned_rad: float,
) -> list[_Pair]:
    """The flow of pairs of frames in which the camera drives, until it has turned so far."""
    height, width = working_size(camera)
    K = torch.tensor(camera.resized(height=height, width=width).intrinsics[None], dtype=torch.float32)
    longest = _LONGEST_FOR_A_TURN_S if turned_rad else _LONGEST_S
    pairs: deque[_Pair] = deque(maxlen=_MOST)
    turns: deque[float] = deque(maxlen=_MOST)
    prev, prev_s, first_s = None, 0.0, None
    state: State | None = None
    follows = False
    for frame in frames:
        first_s = frame.timestamp_s if first_s is None else first_s
        if prev is not None and frame.timestamp_s - prev_s < _APART_S:
            continue
        if (len(pairs) >= ENOUGH and sum(turns) >= turned_rad) or frame.timestamp_s - first_s > longest:
            break
        image = np.array(fit_image(frame.image, height=height, width=width, channels=1))
        curr = torch.from_numpy(image).permute(2, 0, 1)
        if prev is not None and not torch.equal(prev, curr):
            estimate, state = net.track(torch.stack([prev, curr])[None], K, state)
            tells = _tells(estimate)
            if tells:
                view = View(prev[None].float(), curr[None].float(), K, fixed.hidden(state[-2]))
                pairs.append(_Pair(_cells(net, view, state), state, follows))
                turns.append(abs(float(estimate.motion[0, 4])))
                advance(1)
            follows = tells
        prev, prev_s = curr, frame.timestamp_s
    return list(pairs)


def _tells(estimate: Estimate) -> bool:
    way = float(estimate.solution.motion[0, :3].norm())
    return way > _MOVING and bool(estimate.metric) and float(estimate.evidence) >= LEAST_EVIDENCE


def _cells(net: GeometricNet, view: View, state: State) -> Cells:
    """The flow on top of the motion that has just been found, in the camera's own axes."""
    memory = Memory.unpack(state[-1])
    return net.look(view, memory).turned(looking_ahead(memory).transpose(1, 2))


def _told(net: GeometricNet, pairs: list[_Pair], at: _Vector) -> tuple[_Vector, _Vector]:
    """Information (2, 2) about log zoom and bend, and the gradient (2,) of the misfit, summed over pairs."""
    information, gradient = np.zeros((2, 2)), np.zeros(2)
    state: State | None = None
    for pair in pairs:
        if state is None or not pair.follows:  # what was found with the assumed camera will do to begin with
            state = pair.state
            continue
        memory = Memory.unpack(state[-1])
        cells = _straightened(pair.cells, at).turned(looking_ahead(memory))
        estimate, after = net.conclude(cells, memory, state[:-2])
        told = _of_pair(net, pair.cells, cells, estimate, memory, at)
        information, gradient = information + told[0], gradient + told[1]
        lost = torch.zeros(1, dtype=torch.bool)
        state = (*after[:-1], state[-2], facing_ahead(Memory.unpack(after[-1]), lost).pack())
    return information, gradient


def _of_pair(
    net: GeometricNet, bent: Cells, cells: Cells, estimate: Estimate, memory: Memory, at: _Vector
) -> tuple[_Vector, _Vector]:
    """Information and gradient of one pair: Schur's complement, in which motion and road are free."""
    solution, priors = estimate.solution, net.priors(memory)
    open_road, stands = net.open_road(cells, memory, priors)
    across, along = net.trusted_weights(cells, memory, estimate.trust)
    across, along = net.shared(across * stands, along * open_road)
    rays, ahead = cells.rays.flatten(2), looking_ahead(memory)
    r = residuals(rays, cells.seen.flatten(2), solution.motion, solution.slopes)
    shape = shape_derivatives(rays, r, along)
    misfit = r.along + (solution.shape[..., None] * shape).sum(1)
    line = _epipolar_directions(_rays(bent.seen.flatten(2), at), ahead, solution.motion)
    normal = torch.stack([-line[:, 1], line[:, 0]], 1)
    now = [_stretch_along(bent.seen, way, at) for way in (normal, line)]
    derivatives: list[list[Tensor]] = [[], []]  # across and along, by log zoom and bend
    for step in _STEP * np.eye(2):
        sides = []
        for other in (at + step, at - step):
            off = _residuals(bent, ahead, estimate, other)
            # A camera that makes the image larger enlarges all that is off too: by itself that is no reason.
            sides.append(
                [
                    part * was / _stretch_along(bent.seen, way, other)
                    for part, was, way in zip((off.across, off.along), now, (normal, line), strict=True)
                ]
            )
        for derivative, high, low in zip(derivatives, *sides, strict=True):
            derivative.append((high - low)[0] / (2 * _STEP))
    H = _known_before(priors, solution)[0].double()
    A, B = torch.zeros(2, 2, dtype=torch.float64), torch.zeros(2, 11, dtype=torch.float64)
    b = torch.zeros(2, dtype=torch.float64)
    for off_line, J, weights, by in (
        (r.across, F.pad(r.J_across, (0, 0, 0, 3)), across, derivatives[0]),
        (misfit, torch.cat([r.J_along, shape], 1), along, derivatives[1]),
    ):
        heard = (weights / (1 + off_line.square() * weights / 4)).double()  # (1, cells)
        by_camera, by_motion = torch.stack(by), J[0].double()
        A += (heard * by_camera) @ by_camera.T
        B += (heard * by_camera) @ by_motion.T
        b += (heard * by_camera) @ off_line[0].double()
        H = H + (heard * by_motion) @ by_motion.T
    return (A - B @ torch.linalg.solve(H, B.T)).numpy(), b.numpy()


def _known_before(priors: Priors, solution: Solution) -> Tensor:
    """(batch, 11, 11) information about motion and road before cells are looked at, as the solver has it."""
    information = torch.diag_embed(F.pad(priors.motion_information, (0, 5)))
    information = information + F.pad(priors.road_information, (6, 0, 6, 0))
    normal, t = road_normal(solution.slopes), solution.motion[:, :3]
    climb = torch.cat([normal, torch.zeros_like(t), t[:, :1], t[:, 2:], torch.zeros_like(t)], 1)
    climb = climb / priors.climb_sd[:, None]
    return information + climb[:, :, None] * climb[:, None, :]


def _residuals(bent: Cells, ahead: Tensor, estimate: Estimate, at: _Vector) -> Residuals:
    """In double precision, for finite differences."""
    straight = _straightened(bent, at, torch.float64).turned(ahead.double())
    motion, slopes = estimate.solution.motion.double(), estimate.solution.slopes.double()
    return residuals(straight.rays.flatten(2), straight.seen.flatten(2), motion, slopes)


def _straightened(cells: Cells, at: _Vector, dtype: torch.dtype = torch.float32) -> Cells:
    """Cells in the camera's own axes as a pinhole of the right focal length would see them."""
    rays, seen = cells.rays.to(dtype), cells.seen.to(dtype)
    flat = _rays(rays[:, :2] / rays[:, 2:], at)
    rays = torch.cat([flat, torch.ones_like(flat[:, :1])], 1)
    around, away = _stretch(cells.seen.flatten(2), at)
    sigma = cells.sigma * (around * away).sqrt().unflatten(1, cells.sigma.shape[-2:])
    return dataclasses.replace(cells, rays=rays, seen=_rays(seen, at), sigma=sigma)


def _rays(points: Tensor, at: _Vector) -> Tensor:
    """Points (batch, 2, ...) of the image, along which rays they are seen."""
    return points * math.exp(at[0]) / (1 + at[1] * points.square().sum(1, True)).clamp_min(_LEAST)


def _stretch(points: Tensor, at: _Vector) -> tuple[Tensor, Tensor]:
    """By how much what is seen at points (batch, 2, cells) of the image is larger along a ray: around the middle,
    and away from it, (batch, cells)."""
    by, zoom = float(at[1]) * points.square().sum(1), math.exp(at[0])
    around = 1 / (1 + by).clamp_min(_LEAST)
    return zoom * around, zoom * (1 - by).clamp_min(0.1) * around.square()


def _stretch_along(points: Tensor, way: Tensor, at: _Vector) -> Tensor:
    """(batch, cells) by how much an error of places (batch, 2, rows, columns) grows along unit vectors ``way``."""
    points = points.flatten(2).double()
    around, away = _stretch(points, at)
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
