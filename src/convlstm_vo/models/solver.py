"""Motion and road from flow: robust, weighted Gauss-Newton, batched and differentiable from end to end.

Each cell of the flow gives two constraints, split along its epipolar line:

- *across* the line, whatever its depth: this is where rotation and direction come from;
- *along* the line, if it lies on the road: this carries the scale, since the road is 1 camera height away.

Where the frames before have told how far away a cell is (`Carried`), it counts along as well, whatever it shows:
its depth is as long or short as the motion by which it was found, so it says how much longer the way is now.

Unknown are the motion (6), the road's slopes (2) and its shape beyond a plane (3: bend, left, right); all have
Gaussian priors, as has the camera's height above the road, which hardly changes from frame to frame. Lengths are
camera heights (see `scene.py`).

The bend says by which share the road's flow is too large twice as near as on average (and too small farther off):
a road that curves ahead, or a systematic error of the flow. Without it the far rows, which are many and precise,
would fix the tilt to a hundredth of a degree and be wrong by a fifth; with it the tilt is what keeps the car on its
road for many frames. It is weighted such that it says nothing about the length of the way.

Left and right are the slopes by which the surface rises beside the car's own lane: a crown, which drains the lane
beyond the middle to the other side, or a pavement. Taken for one plane, both sides turn the car, by a third of a
degree in 100 m for a crown of 2 %.
"""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor

from convlstm_vo.geometry import se3
from convlstm_vo.models import kernels, solver_kernels
from convlstm_vo.models.scene import road_normal
from convlstm_vo.models.solver_kernels import (
    ALIKE,
    COMMON,
    LEAST_DEPTH,
    NO_WAY,
    PRIOR_TOLERANCE,
    STILL,
    WIDEST,
)


@dataclasses.dataclass
class Priors:
    """What is known before looking, as means and inverse variances.

    Attributes:
        motion: (batch, 6). motion_information: (batch, 6), of its numbers.
        slopes: (batch, 2), of the road in the previous frame. shape: (batch, 3), bend, left and right.
        road_information: (batch, 5, 5), of slopes and shape together.
        climb_sd: (batch,), by how much a motion leaves the road's direction, in camera heights.
        still: (batch,), displacement for a unit of inverse depth under which a cell tells of the motion along its
            epipolar line too; `STILL`, or more where the camera is believed to stand.
    """

    motion: Tensor
    motion_information: Tensor
    slopes: Tensor
    shape: Tensor
    road_information: Tensor
    climb_sd: Tensor
    still: Tensor


@dataclasses.dataclass
class Carried:
    """Cells whose depth the frames before have told, but for what the motion was off by which they did.

    Attributes:
        inverse_depth: (batch, cells) in the previous frame. known: (batch, cells), information on it; under 1 for
            next to nothing. told: (batch, cells), information on where a cell is seen now, along its epipolar line.
        motion: (batch, 6), the one before. of_motion: (batch, 6, 6), information on what it is off, in translation
            and rotation.
    """

    inverse_depth: Tensor
    known: Tensor
    told: Tensor
    motion: Tensor
    of_motion: Tensor

    @property
    def parts(self) -> tuple[Tensor, ...]:
        """All of them, in this order."""
        return self.inverse_depth, self.known, self.told, self.motion, self.of_motion


@dataclasses.dataclass
class Solution:
    """What Gauss-Newton found.

    Attributes:
        motion: (batch, 6) ``T_prev_curr``, translation in camera heights.
        slopes: (batch, 2), previous frame. shape: (batch, 3), bend, left and right.
        information: (batch, 11, 11) of (translation, rotation, slopes, shape), the Hessian at the solution.
    """

    motion: Tensor
    slopes: Tensor
    shape: Tensor
    information: Tensor


@dataclasses.dataclass
class Residuals:
    """How cells disagree with a motion and a road, in the current camera's ray coordinates.

    Attributes:
        across, along: (batch, cells) off the epipolar line; along it, from the road's place.
        reach: (batch, cells) displacement for a unit of inverse depth, at the one that fits best.
        inverse_depth: (batch, cells) that fits best. road: (batch, cells) the road's.
        parallax: (batch, cells) displacement for a unit of inverse depth.
        J_across: (batch, 8, cells), J_along: (batch, 8, cells): derivatives by (translation, rotation, slopes).
    """

    across: Tensor
    along: Tensor
    reach: Tensor
    inverse_depth: Tensor
    road: Tensor
    parallax: Tensor
    J_across: Tensor
    J_along: Tensor


def residuals(rays: Tensor, seen: Tensor, motion: Tensor, slopes: Tensor) -> Residuals:
    """Both constraints of all cells and their derivatives.

    Args:
        rays: (batch, 3, cells) in the previous camera. seen: (batch, 2, cells), where they are in the current one.
        motion: (batch, 6). slopes: (batch, 2).
    """
    if kernels.usable(rays, seen, motion, slopes):
        return Residuals(*solver_kernels.residuals(rays, seen, motion, slopes))
    T = se3.matrix_from_motion(motion)
    Rt, t = T[:, :3, :3].transpose(1, 2), T[:, :3, 3:]
    sx, sy, sz = (Rt @ rays).unbind(1)  # the ray in the current camera: (batch, cells)
    mx, my, mz = (Rt @ t)[:, :, 0].unbind(1)
    m = mx[:, None], my[:, None], mz[:, None]
    u, v = seen.unbind(1)
    normal = road_normal(slopes)
    road = -(normal[:, None] @ rays)[:, 0]
    on_road = road.clamp_min(0.005)
    # The inverse depth that fits best, in closed form: seen x (s - rho m) = 0 is linear in it.
    gx, gy = u * m[2] - m[0], v * m[2] - m[1]
    fx, fy = u * sz - sx, v * sz - sy
    best = (gx * fx + gy * fy + STILL**2 * on_road) / (gx * gx + gy * gy + STILL**2)
    best = best.clamp(0.0, 2.0)  # nothing lies behind the camera

    at_best = _seen((sx, sy, sz), m, best)
    x, y, iz, ax, ay = at_best
    length = (ax * ax + ay * ay + 1e-12).sqrt()
    ux, uy = ax / length, (ay + 1e-6) / length
    across = (y - v) * ux - (x - u) * uy
    J_across = _derivatives(x, y, iz * best, Rt, -uy, ux)
    x, y, iz, ax, ay = _seen((sx, sy, sz), m, on_road)
    parallax = (ax * ax + ay * ay + 1e-12).sqrt()
    ux, uy = ax / parallax, (ay + 1e-6) / parallax
    along = (x - u) * ux + (y - v) * uy
    J_along = _derivatives(x, y, iz * on_road, Rt, ux, uy)
    by_slopes = [_by_slope(rays[:, i], road, slopes, i // 2) * parallax for i in (0, 2)]
    nothing = torch.zeros_like(across)
    return Residuals(
        across,
        along,
        length,
        best,
        road,
        parallax,
        torch.stack([*J_across, nothing, nothing], 1),
        torch.stack([*J_along, *by_slopes], 1),
    )


def _seen(s: tuple[Tensor, Tensor, Tensor], m: tuple[Tensor, Tensor, Tensor], rho: Tensor) -> tuple[Tensor, ...]:
    """Place x, y; one over depth; and the derivative of the place by inverse depth: five of (batch, cells)."""
    iz = (s[2] - rho * m[2]).clamp_min(LEAST_DEPTH).reciprocal()
    x, y = (s[0] - rho * m[0]) * iz, (s[1] - rho * m[1]) * iz
    return x, y, iz, (x * m[2] - m[0]) * iz, (y * m[2] - m[1]) * iz


def _derivatives(x: Tensor, y: Tensor, closeness: Tensor, Rt: Tensor, wx: Tensor, wy: Tensor) -> list[Tensor]:
    """Of wx * x + wy * y by translation and rotation, six (batch, cells); closeness: inverse depth over depth."""
    ahead = wx * x + wy * y
    columns = [
        closeness * (ahead * Rt[:, 2, k, None] - wx * Rt[:, 0, k, None] - wy * Rt[:, 1, k, None]) for k in range(3)
    ]
    return [*columns, wy + y * ahead, -wx - x * ahead, wx * y - wy * x]


def _by_slope(ray: Tensor, road: Tensor, slopes: Tensor, which: int) -> Tensor:
    """Of the road's inverse depth (y - a x - b) / sqrt(1 + a^2 + b^2), by a (0) or b (1): (batch, cells)."""
    inverse_norm = (1 + (slopes * slopes).sum(1, keepdim=True)).rsqrt()
    return -inverse_norm * ray - road * slopes[:, which, None] * inverse_norm * inverse_norm


def solve(
    rays: Tensor,
    seen: Tensor,
    weights_across: Tensor,
    weights_along: Tensor,
    priors: Priors,
    start: tuple[Tensor, Tensor, Tensor],
    *,
    steps: int,
    tolerance: float = 2.0,
    carried: Carried | None = None,
) -> tuple[Solution, Residuals]:
    """Weighted robust least squares.

    Gradients flow through the last step alone. At the optimum that is the implicit function theorem with
    Gauss-Newton's Hessian: the way there does not matter, and nothing of it is kept in memory.

    Args:
        rays, seen: as in `residuals`; constants. weights_across, weights_along: (batch, cells), inverse variances
            in ray units. priors: what is known before. start: motion, slopes (batch, 2) and shape (batch, 3).
        steps: of Gauss-Newton. tolerance: standard deviations at which a constraint counts half (Cauchy).
        carried: depths from frames before; constants.

    Returns:
        The solution, and the residuals before the last step (without gradients: at the solution).

    Raises:
        ValueError: not a single step.
    """
    if steps < 1:
        raise ValueError("steps must be at least 1")
    differentiable = torch.is_grad_enabled()
    with torch.no_grad():
        before = steps - 1 if differentiable else steps
        at = Solution(start[0].detach(), start[1].detach(), start[2].detach(), start[0].new_zeros(0))
        if before and kernels.usable(rays, seen, weights_across, weights_along, at.motion):
            prior = (priors.motion, priors.motion_information, torch.cat([priors.slopes, priors.shape], 1),
                     priors.road_information, priors.climb_sd, priors.still)  # fmt: skip
            depths = None if carried is None else carried.parts
            found, H = solver_kernels.gauss_newton(
                rays, seen, weights_across, weights_along, prior, depths, _unknowns(at), before, tolerance
            )
            at = Solution(found[:, :6], found[:, 6:8], found[:, 8:], H)
        else:
            for _ in range(before):
                H, b, _ = _equations(rays, seen, weights_across, weights_along, at, priors.still, tolerance)
                at = _gauss_newton(*_with_carried(H, b, rays, seen, carried, at, tolerance), priors, at)
    if not differentiable:
        return at, residuals(rays, seen, at.motion, at.slopes)
    H, b, r = _equations(rays, seen, weights_across, weights_along, at, priors.still, tolerance)
    return _gauss_newton(*_with_carried(H, b, rays, seen, carried, at, tolerance), priors, at), r


def _equations(
    rays: Tensor, seen: Tensor, across: Tensor, along: Tensor, at: Solution, still: Tensor, tolerance: float
) -> tuple[Tensor, Tensor, Residuals]:
    """`_normal_equations` at a solution, with gradients for weights alone, and the residuals they are made of."""
    if kernels.usable(rays, seen, across.detach(), along.detach(), at.motion):
        H, b, rows = solver_kernels.NormalEquations.apply(
            rays, seen, across, along, _unknowns(at), still, tolerance
        )
        return H, b, Residuals(*solver_kernels.unpacked(rows))
    with torch.no_grad():
        r = residuals(rays, seen, at.motion, at.slopes)
    return *_normal_equations(rays, r, across, along, at, still, tolerance), r


def _unknowns(at: Solution) -> Tensor:
    return torch.cat([at.motion, at.slopes, at.shape], 1)


def _normal_equations(
    rays: Tensor, r: Residuals, across: Tensor, along: Tensor, at: Solution, still: Tensor, tolerance: float
) -> tuple[Tensor, Tensor]:
    """H (batch, 11, 11) and b (batch, 11) of all cells, by the robust weights that they have at a solution."""
    J_shape = shape_derivatives(rays, r, along)
    misfit = r.along + (at.shape[..., None] * J_shape).sum(1)
    # Where there is no epipolar line to move along (no translation, or the point we drive at) a cell counts along
    # whatever it shows, by the square of the share of its misfit that the depth that fits best leaves. It says
    # nothing about the road: let it pull at the slopes, and a thousand of them tilt it by a twentieth of a degree.
    square = still[:, None].square()
    at_rest = across * (square / (r.reach.square() + square)).square()
    motion_alone = F.pad(r.J_along[:, :6], (0, 0, 0, 5))
    H, b = at.motion.new_zeros(()), at.motion.new_zeros(())
    for weights, off, J in (
        (across, r.across, F.pad(r.J_across, (0, 0, 0, 3))),
        (along, misfit, torch.cat([r.J_along, J_shape], 1)),
        (at_rest, r.along, motion_alone),
    ):
        WJ = J * (weights / (1 + off.square() * weights / tolerance**2))[:, None]
        H, b = H + WJ @ J.transpose(1, 2), b + (WJ @ off[..., None])[..., 0]
    return H, b


def _with_carried(
    H: Tensor, b: Tensor, rays: Tensor, seen: Tensor, carried: Carried | None, at: Solution, tolerance: float
) -> tuple[Tensor, Tensor]:
    if carried is None:
        return H, b
    with torch.no_grad():
        more_H, more_b = carried_equations(rays, seen, carried, at.motion, tolerance)
    return H + F.pad(more_H, (0, 5, 0, 5)), b + F.pad(more_b, (0, 5))


def carried_equations(
    rays: Tensor, seen: Tensor, carried: Carried, motion: Tensor, tolerance: float
) -> tuple[Tensor, Tensor]:
    """H (batch, 6, 6) and b (batch, 6) for a motion, of cells whose depth is known; what the motion before was off
    is unknown too, and eliminated (Schur's complement).

    The depth is as uncertain as the place: a cell counts by the variance of both, and its derivatives are those at
    the depth that fits both best. With derivatives at the depth as it came, ways are too short, the more the less
    is known of it (an error in variables).
    """
    T = se3.matrix_from_motion(motion)
    Rt = T[:, :3, :3].transpose(1, 2)
    m = (Rt @ T[:, :3, 3:]).unbind(1)
    sx, sy, sz = (Rt @ rays).unbind(1)
    x, y, iz, ax, ay = _seen((sx, sy, sz), (m[0], m[1], m[2]), carried.inverse_depth)
    parallax = (ax * ax + ay * ay + 1e-12).sqrt()
    wx, wy = ax / parallax, (ay + 1e-6) / parallax
    off = (x - seen[:, 0]) * wx + (y - seen[:, 1]) * wy
    heard = (carried.known >= 1) & (carried.told > 0)
    by_depth = parallax / carried.known.clamp_min(1.0)
    variance = 1 / carried.told.clamp_min(1e-6) + parallax * by_depth
    rho = (carried.inverse_depth - by_depth / variance * off).clamp_min(0.0)
    now = _derivatives(x, y, iz * rho, Rt, wx, wy)
    before = depth_derivatives(rays, rho, carried.motion) * parallax[:, None]
    weights = heard / variance
    count = weights.sum(1, True).square() / weights.square().sum(1, True).clamp_min(1e-12)
    weights = weights / (1 + off.square() * weights / tolerance**2)
    weights = weights / (1 + count * (weights * COMMON**2 + ALIKE**2))
    J = torch.cat([torch.stack(now, 1), before], 1)
    WJ = J * weights[:, None]
    M, c = WJ @ J.transpose(1, 2), (WJ @ off[..., None])[..., 0]
    G = torch.cat([M[:, 6:, :6], c[:, 6:, None]], 2)
    x6 = _solve_scaled(M[:, 6:, 6:] + carried.of_motion, G)
    gone = G.transpose(1, 2)[:, :6] @ x6
    return M[:, :6, :6] - gone[..., :6], c[:, :6] - gone[..., 6]


def depth_derivatives(rays: Tensor, inverse_depth: Tensor, motion: Tensor) -> Tensor:
    """Of inverse depths (batch, cells) by the motion (batch, 6) that told them, (batch, 6, cells).

    Args:
        rays: (batch, 3, cells), where they are seen in its newer frame; the depths are that frame's.
    """
    T = se3.matrix_from_motion(motion)
    Rt = T[:, :3, :3].transpose(1, 2)
    m = (Rt @ T[:, :3, 3:]).unbind(1)
    x, y = rays[:, 0], rays[:, 1]
    lx, ly = x * m[2] - m[0], y * m[2] - m[1]
    line = (lx * lx + ly * ly + 1e-12).sqrt()
    # Whatever moves the place along its line is made up for by the depth; and the frame itself comes nearer.
    along = _derivatives(x, y, inverse_depth, Rt, lx / line, ly / line)
    nearer = [*(inverse_depth * Rt[:, 2, k, None] for k in range(3)), y, -x, torch.zeros_like(x)]
    factor = -(1 + inverse_depth * m[2]) / line
    return torch.stack([row * factor + more * inverse_depth for row, more in zip(along, nearer, strict=True)], 1)


def _gauss_newton(H: Tensor, b: Tensor, priors: Priors, at: Solution) -> Solution:
    """One step, from what all cells say."""
    H, b = with_priors(H, b, at, priors)
    return _moved(at, _solve_scaled(H, -b), H)


def shape_derivatives(rays: Tensor, r: Residuals, along: Tensor) -> Tensor:
    """Of ``along`` by bend, left and right, (batch, 3, cells).

    Bend: the way each cell has moved, times how much nearer it is than all. "All" is the mean that makes it
    orthogonal to a change of the way's length, for weights ``along``. Left, right: the way it has moved, times how
    far beside the car's lane it lies, which is a camera height to each side.
    """
    road = r.road.clamp_min(0.0)
    moved = r.parallax * road
    weights = along.detach() * moved.square()
    mean = ((weights * r.road).sum(1, True) / weights.sum(1, True).clamp_min(1e-12)).clamp_min(0.05)
    beside = [
        r.parallax * torch.minimum((side * rays[:, 0] - road).clamp_min(0.0), WIDEST * road) for side in (-1.0, 1.0)
    ]
    return torch.stack([moved * (r.road / mean - 1).clamp(-1.0, 2.0), *beside], 1)


def road_misfit(rays: Tensor, r: Residuals, shape: Tensor, along: Tensor) -> Tensor:
    """``along`` with the road's shape in it: (batch, cells)."""
    return r.along + (shape[..., None] * shape_derivatives(rays, r, along)).sum(1)


def _solve_scaled(H: Tensor, b: Tensor) -> Tensor:
    """Solve H x = b, of one or several columns, with rows and columns scaled to a unit diagonal: float32 is then
    enough."""
    scale = H.diagonal(dim1=1, dim2=2).clamp_min(1e-12).rsqrt()
    scaled = H * scale[:, :, None] * scale[:, None, :]
    scaled = scaled + 1e-6 * torch.eye(H.shape[1], dtype=H.dtype, device=H.device)
    if b.dim() == 3:
        return scale[..., None] * torch.linalg.solve(scaled, scale[..., None] * b)
    return scale * torch.linalg.solve(scaled, (scale * b)[..., None])[..., 0]


def with_priors(H: Tensor, b: Tensor, at: Solution, priors: Priors) -> tuple[Tensor, Tensor]:
    """H (batch, 11, 11) and b (batch, 11) with what was known before."""
    t, off = at.motion[:, :3], at.motion - priors.motion
    # Speed and turning change little, but for a dropped frame or a kerb: far from the prior, it fades (Cauchy).
    surprise = off.square() * priors.motion_information / PRIOR_TOLERANCE**2
    information = priors.motion_information / (1 + surprise.detach())
    off_road = torch.cat([at.slopes - priors.slopes, at.shape - priors.shape], 1)
    b_road = (priors.road_information @ off_road[..., None])[..., 0]
    H = H + torch.diag_embed(F.pad(information, (0, 5))) + F.pad(priors.road_information, (6, 0, 6, 0))
    b = b + torch.cat([information * off, b_road], 1)
    # The camera stays at its height: normal . translation is 0 but for the springs of the car. That is said of the
    # way's direction. A shorter way climbs less, too, but that is no reason for it: where no road says how long it
    # is, it would else become shorter with each frame.
    normal = road_normal(at.slopes)
    climb = (normal * t).sum(1)
    turned = normal - t * (climb / (t.square().sum(1) + NO_WAY**2))[:, None]
    J = torch.cat([turned, torch.zeros_like(t), t[:, :1], t[:, 2:], torch.zeros_like(at.shape)], 1)  # n: (a, -1, b)
    information = priors.climb_sd.square().reciprocal()
    H = H + information[:, None, None] * J[:, :, None] * J[:, None, :]
    return H, b + (information * climb)[:, None] * J


def _moved(at: Solution, delta: Tensor, information: Tensor) -> Solution:
    """The state after a step; the rotation is updated on its right side."""
    rotation = se3.so3_compose(at.motion[:, 3:], delta[:, 3:6].clamp(-0.2, 0.2))
    motion = torch.cat([at.motion[:, :3] + delta[:, :3], rotation], 1)
    slopes = (at.slopes + delta[:, 6:8].clamp(-0.1, 0.1)).clamp(-0.3, 0.3)
    return Solution(motion, slopes, (at.shape + delta[:, 8:]).clamp(-0.3, 0.3), information)
