"""The inner loops of the default network's solver, fused for a CPU; see `kernels.py`."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

from convlstm_vo.models.kernels import by_strips, njit

# Sums over cells may be taken in any order, which is twice as fast; nothing there becomes an address.
_sums: Any = numba.njit(cache=True, nogil=True, error_model="numpy", fastmath={"contract", "nsz", "reassoc"})
PRIOR_TOLERANCE = 3.0  # standard deviations at which the prior of the motion counts half
STILL = 2e-3  # displacement for a unit of inverse depth under which an epipolar line has no direction
WIDEST = 2.0  # camera heights beside the lane up to which the road's sides go on to rise or fall
NO_WAY = 0.05  # camera heights, under which a motion has no direction to speak of
# Of the errors of cells whose depth is carried along: the share of their own that is the same, and in rays.
ALIKE, COMMON = 0.6, 3e-5
LEAST_DEPTH = 0.05  # of points in the current camera, in units of their depth in the previous one
_inline: Any = numba.njit(inline="always", error_model="numpy")
# Rows of what is known of each cell: the fields of `solver.Residuals`, derivatives by 8 unknowns each; and, for
# Gauss-Newton, those of the misfit along by the road's shape, this misfit with it, and three robust weights.
_ACROSS, _ALONG, _REACH, _BEST, _ROAD, _PARALLAX, _J_ACROSS, _J_ALONG = 0, 1, 2, 3, 4, 5, 6, 14
_J_SHAPE, _MISFIT, _W_ACROSS, _W_ALONG, _W_STILL, _ROWS = 22, 25, 26, 27, 28, 29
_N = 11  # unknowns
# Rows of cells whose depth is carried along: derivatives by this motion and the one before, misfit, weight.
_J_NOW, _J_BEFORE, _OFF, _W_CARRIED, _CARRIED_ROWS = 0, 6, 12, 13, 14


def gauss_newton(
    rays: Tensor,
    seen: Tensor,
    across: Tensor,
    along: Tensor,
    priors: tuple[Tensor, ...],
    carried: tuple[Tensor, ...] | None,
    start: Tensor,
    steps: int,
    tolerance: float,
) -> tuple[Tensor, Tensor]:
    """`solver.solve`: the unknowns (batch, 11) after some steps, and the last Hessian (batch, 11, 11).

    Args:
        rays: (batch, 3, cells). seen: (batch, 2, cells). across, along: (batch, cells) inverse variances.
        priors: motion (batch, 6) and its information, road (batch, 5) and its information, climb_sd, still.
        carried: inverse depth (batch, cells), information on it, and on the place now; the motion before
            (batch, 6) and information (batch, 6, 6) on what it is off; None for nothing.
        start: (batch, 11). steps, tolerance: as there.
    """
    cells = [np.ascontiguousarray(t.detach().numpy()) for t in (rays, seen, across, along)]
    known = [np.ascontiguousarray(t.detach().numpy().astype(np.float64)) for t in priors]
    at = start.detach().numpy().astype(np.float64)
    H = np.empty((len(at), _N, _N))
    if carried is None:
        nothing = start.new_zeros(len(at), 0)
        carried = nothing, nothing, nothing, start.new_zeros(len(at), 6), start.new_zeros(len(at), 6, 6)
    depth = [np.ascontiguousarray(t.detach().numpy()) for t in carried]
    before, of_before = (part.astype(np.float64) for part in depth[3:])
    by_strips(_solve_all, len(at), 1, *cells, *known, *depth[:3], before, of_before, at, H, steps, tolerance)
    return torch.from_numpy(at.astype(np.float32)), torch.from_numpy(H.astype(np.float32))


@njit
def _rotation(w, R):  # type: ignore[no-untyped-def]
    """Rodrigues."""
    s = w[0] * w[0] + w[1] * w[1] + w[2] * w[2]
    if s < 1e-8:
        a, b = 1 - s / 6, 0.5 - s / 24
    else:
        angle = np.sqrt(s)
        a, b = np.sin(angle) / angle, (1 - np.cos(angle)) / s
    x, y, z = w[0], w[1], w[2]
    R[0, 0], R[0, 1], R[0, 2] = 1 - b * (y * y + z * z), b * x * y - a * z, b * x * z + a * y
    R[1, 0], R[1, 1], R[1, 2] = b * x * y + a * z, 1 - b * (x * x + z * z), b * y * z - a * x
    R[2, 0], R[2, 1], R[2, 2] = b * x * z - a * y, b * y * z + a * x, 1 - b * (x * x + y * y)


@njit
def _quaternion(w, q):  # type: ignore[no-untyped-def]
    """(w, x, y, z) of a rotation vector."""
    s = w[0] * w[0] + w[1] * w[1] + w[2] * w[2]
    half = np.sqrt(s) / 2
    f = 0.5 - s / 48 if s < 1e-8 else np.sin(half) / (2 * half)
    q[0], q[1], q[2], q[3] = np.cos(half), f * w[0], f * w[1], f * w[2]


@njit
def _turned(w, d):  # type: ignore[no-untyped-def]
    """w becomes the rotation vector of exp(w) exp(d)."""
    p, q = np.empty(4), np.empty(4)
    _quaternion(w, p)
    _quaternion(d, q)
    r = p[0] * q[0] - p[1] * q[1] - p[2] * q[2] - p[3] * q[3]
    x = p[0] * q[1] + p[1] * q[0] + p[2] * q[3] - p[3] * q[2]
    y = p[0] * q[2] - p[1] * q[3] + p[2] * q[0] + p[3] * q[1]
    z = p[0] * q[3] + p[1] * q[2] - p[2] * q[1] + p[3] * q[0]
    if r < 0:
        r, x, y, z = -r, -x, -y, -z
    sine = np.sqrt(x * x + y * y + z * z)
    f = 2.0 / r if sine < 1e-8 else 2 * np.arctan2(sine, r) / sine
    w[0], w[1], w[2] = f * x, f * y, f * z


@njit
def _solved(H, b, x):  # type: ignore[no-untyped-def]
    """x of H x = b by Cholesky, rows and columns scaled to a unit diagonal and damped as the torch code does."""
    n = len(b)
    scale, L = np.empty(n), np.zeros((n, n))
    for i in range(n):
        scale[i] = 1 / np.sqrt(max(H[i, i], 1e-12))
    for i in range(n):
        for j in range(i + 1):
            total = H[i, j] * scale[i] * scale[j]
            if i == j:
                total += 1e-6
            for k in range(j):
                total -= L[i, k] * L[j, k]
            if i == j:
                L[i, i] = np.sqrt(max(total, 1e-9)) if total == total else total
            else:
                L[i, j] = total / L[j, j]
    for i in range(n):
        total = b[i] * scale[i]
        for k in range(i):
            total -= L[i, k] * x[k]
        x[i] = total / L[i, i]
    for i in range(n - 1, -1, -1):
        total = x[i]
        for k in range(i + 1, n):
            total -= L[k, i] * x[k]
        x[i] = total / L[i, i]
    for i in range(n):
        x[i] *= scale[i]


def residuals(rays: Tensor, seen: Tensor, motion: Tensor, slopes: Tensor) -> tuple[Tensor, ...]:
    """The fields of `solver.Residuals`, from the arguments of `solver.residuals`."""
    cells = [np.ascontiguousarray(t.detach().numpy()) for t in (rays, seen)]
    at = torch.cat([motion, slopes], 1).detach().numpy().astype(np.float64)
    rows = np.empty((len(at), _J_SHAPE, rays.shape[2]), np.float32)
    by_strips(_residuals_all, len(at), 1, *cells, at, rows)
    return unpacked(torch.from_numpy(rows))


def unpacked(rows: Tensor) -> tuple[Tensor, ...]:
    """The fields of `solver.Residuals` from rows of cells (batch, rows, cells)."""
    return (*rows[:, :_J_ACROSS].unbind(1), rows[:, _J_ACROSS:_J_ALONG], rows[:, _J_ALONG:_J_SHAPE])


@njit
def _residuals_all(first, last, rays, seen, at, out):  # type: ignore[no-untyped-def]
    """A strip of a batch."""
    for i in range(first, last):
        _residuals(rays[i], seen[i], at[i], out[i])


@_inline
def _seen_at(sx, sy, sz, m, rho):  # type: ignore[no-untyped-def]
    """`solver._seen`."""
    iz = 1 / max(sz - rho * m[2], LEAST_DEPTH)
    x, y = (sx - rho * m[0]) * iz, (sy - rho * m[1]) * iz
    return x, y, iz, (x * m[2] - m[0]) * iz, (y * m[2] - m[1]) * iz


@_inline
def _derivatives(x, y, close, R, wx, wy, first, i, out):  # type: ignore[no-untyped-def]
    """`solver._derivatives`, into six rows."""
    ahead = wx * x + wy * y
    for k in range(3):
        out[first + k, i] = close * (ahead * R[k, 2] - wx * R[k, 0] - wy * R[k, 1])
    out[first + 3, i], out[first + 4, i], out[first + 5, i] = wy + y * ahead, -wx - x * ahead, wx * y - wy * x


@njit
def _residuals(rays, seen, at, out):  # type: ignore[no-untyped-def]
    R, m, normal = np.empty((3, 3)), np.empty(3), np.empty(3)
    _rotation(at[3:6], R)
    for k in range(3):
        m[k] = R[0, k] * at[0] + R[1, k] * at[1] + R[2, k] * at[2]
    inverse_norm = 1 / np.sqrt(1 + at[6] * at[6] + at[7] * at[7])
    normal[0], normal[1], normal[2] = at[6] * inverse_norm, -inverse_norm, at[7] * inverse_norm
    for i in range(rays.shape[1]):
        rx, ry, rz = rays[0, i], rays[1, i], rays[2, i]
        u, v = seen[0, i], seen[1, i]
        sx = R[0, 0] * rx + R[1, 0] * ry + R[2, 0] * rz
        sy = R[0, 1] * rx + R[1, 1] * ry + R[2, 1] * rz
        sz = R[0, 2] * rx + R[1, 2] * ry + R[2, 2] * rz
        road = -(normal[0] * rx + normal[1] * ry + normal[2] * rz)
        on_road = max(road, 0.005)
        gx, gy = u * m[2] - m[0], v * m[2] - m[1]
        fx, fy = u * sz - sx, v * sz - sy
        best = (gx * fx + gy * fy + STILL**2 * on_road) / (gx * gx + gy * gy + STILL**2)
        best = min(max(best, 0.0), 2.0)
        x, y, iz, ax, ay = _seen_at(sx, sy, sz, m, best)
        length = np.sqrt(ax * ax + ay * ay + 1e-12)
        wy, wx = ax / length, -(ay + 1e-6) / length  # the line's normal
        out[_ACROSS, i] = (y - v) * wy + (x - u) * wx
        out[_REACH, i] = length
        out[_BEST, i], out[_ROAD, i] = best, road
        _derivatives(x, y, iz * best, R, wx, wy, _J_ACROSS, i, out)
        out[_J_ACROSS + 6, i], out[_J_ACROSS + 7, i] = 0.0, 0.0
        x, y, iz, ax, ay = _seen_at(sx, sy, sz, m, on_road)
        parallax = np.sqrt(ax * ax + ay * ay + 1e-12)
        wx, wy = ax / parallax, (ay + 1e-6) / parallax
        out[_ALONG, i], out[_PARALLAX, i] = (x - u) * wx + (y - v) * wy, parallax
        _derivatives(x, y, iz * on_road, R, wx, wy, _J_ALONG, i, out)
        out[_J_ALONG + 6, i] = (-inverse_norm * rx - road * at[6] * inverse_norm * inverse_norm) * parallax
        out[_J_ALONG + 7, i] = (-inverse_norm * rz - road * at[7] * inverse_norm * inverse_norm) * parallax


@_inline
def _at_rest(reach, square):  # type: ignore[no-untyped-def]
    """How far a cell tells of the motion along its line too; square: that of `Priors.still`."""
    return (square / (reach * reach + square)) ** 2


@_sums
def _weigh(rays, across, along, shape, still, tolerance, cells):  # type: ignore[no-untyped-def]
    """Rows for the road's shape and the robust weights, as `solver._normal_equations`."""
    total, weighted = 0.0, 0.0
    for i in range(np.uintp(cells.shape[1])):
        moved = cells[_PARALLAX, i] * max(cells[_ROAD, i], np.float32(0))
        weight = along[i] * moved * moved
        total += weight
        weighted += weight * cells[_ROAD, i]
    mean = np.float32(max(weighted / max(total, 1e-12), 0.05))
    zero, one, widest, tolerance = np.float32(0), np.float32(1), np.float32(WIDEST), np.float32(1 / tolerance**2)
    square = np.float32(still * still)
    bend, left, right = np.float32(shape[0]), np.float32(shape[1]), np.float32(shape[2])
    for i in range(np.uintp(cells.shape[1])):
        parallax, road = cells[_PARALLAX, i], max(cells[_ROAD, i], zero)
        nearer = parallax * road * min(max(cells[_ROAD, i] / mean - one, -one), np.float32(2))
        to_left = parallax * min(max(-rays[0, i] - road, zero), widest * road)
        to_right = parallax * min(max(rays[0, i] - road, zero), widest * road)
        off = cells[_ALONG, i] + bend * nearer + left * to_left + right * to_right
        cells[_J_SHAPE, i], cells[_J_SHAPE + 1, i], cells[_J_SHAPE + 2, i] = nearer, to_left, to_right
        cells[_MISFIT, i] = off
        cells[_W_ALONG, i] = along[i] / (one + off * off * along[i] * tolerance)
        off, w_still = cells[_ALONG, i], across[i] * _at_rest(cells[_REACH, i], square)
        cells[_W_STILL, i] = w_still / (one + off * off * w_still * tolerance)
        off = cells[_ACROSS, i]
        cells[_W_ACROSS, i] = across[i] / (one + off * off * across[i] * tolerance)


@_sums
def _normal_equations(cells, first, count, weight, misfit, H, b):  # type: ignore[no-untyped-def]
    """Add J' W J to H, below its diagonal, and J' W r to b; J: some rows of cells from the first on."""
    for p in range(np.uintp(count)):
        for q in range(p + np.uintp(1)):
            total = 0.0
            for i in range(np.uintp(cells.shape[1])):
                total += cells[weight, i] * cells[first + p, i] * cells[first + q, i]
            H[p, q] += total
        total = 0.0
        for i in range(np.uintp(cells.shape[1])):
            total += cells[weight, i] * cells[first + p, i] * cells[misfit, i]
        b[p] += total


@njit
def _equations(rays, seen, across, along, at, still, tolerance, cells, H, b):  # type: ignore[no-untyped-def]
    """All rows of cells at some unknowns, H below its diagonal and b."""
    _residuals(rays, seen, at, cells)
    _weigh(rays, across, along, at[8:], still, tolerance, cells)
    H[:] = 0
    b[:] = 0
    _normal_equations(cells, _J_ACROSS, 6, _W_ACROSS, _ACROSS, H, b)
    _normal_equations(cells, _J_ALONG, _N, _W_ALONG, _MISFIT, H, b)
    _normal_equations(cells, _J_ALONG, 6, _W_STILL, _ALONG, H, b)


@njit
def _carried_rows(rays, seen, at, before, inverse_depth, known, told, tolerance, rows):  # type: ignore[no-untyped-def]
    """`solver.carried_equations`: rows of all cells, with weights 0 where no depth is known."""
    R, Q, m, n = np.empty((3, 3)), np.empty((3, 3)), np.empty(3), np.empty(3)
    _rotation(at[3:6], R)
    _rotation(before[3:6], Q)
    for k in range(3):
        m[k] = R[0, k] * at[0] + R[1, k] * at[1] + R[2, k] * at[2]
        n[k] = Q[0, k] * before[0] + Q[1, k] * before[1] + Q[2, k] * before[2]
    total, square = 0.0, 0.0
    for i in range(rays.shape[1]):
        rows[:, i] = 0
        if known[i] < 1 or told[i] <= 0:
            continue
        rx, ry, rz = rays[0, i], rays[1, i], rays[2, i]
        sx = R[0, 0] * rx + R[1, 0] * ry + R[2, 0] * rz
        sy = R[0, 1] * rx + R[1, 1] * ry + R[2, 1] * rz
        sz = R[0, 2] * rx + R[1, 2] * ry + R[2, 2] * rz
        x, y, iz, ax, ay = _seen_at(sx, sy, sz, m, inverse_depth[i])
        parallax = np.sqrt(ax * ax + ay * ay + 1e-12)
        wx, wy = ax / parallax, (ay + 1e-6) / parallax
        off = (x - seen[0, i]) * wx + (y - seen[1, i]) * wy
        by_depth = parallax / known[i]
        variance = 1 / told[i] + parallax * by_depth
        rho = max(inverse_depth[i] - by_depth / variance * off, 0.0)
        _derivatives(x, y, iz * rho, R, wx, wy, _J_NOW, i, rows)
        lx, ly = rx * n[2] - n[0], ry * n[2] - n[1]
        line = np.sqrt(lx * lx + ly * ly + 1e-12)
        _derivatives(rx, ry, rho, Q, lx / line, ly / line, _J_BEFORE, i, rows)
        for k in range(6):
            rows[_J_BEFORE + k, i] *= -(1 + rho * n[2]) / line * parallax
        for k in range(3):
            rows[_J_BEFORE + k, i] += rho * rho * Q[k, 2] * parallax
        rows[_J_BEFORE + 3, i] += rho * ry * parallax
        rows[_J_BEFORE + 4, i] -= rho * rx * parallax
        rows[_OFF, i] = off
        rows[_W_CARRIED, i] = 1 / variance
        total += 1 / variance
        square += 1 / variance**2
    count = total * total / max(square, 1e-12)
    for i in range(rays.shape[1]):
        weight = rows[_W_CARRIED, i]
        weight = weight / (1 + rows[_OFF, i] ** 2 * weight / tolerance**2)
        rows[_W_CARRIED, i] = weight / (1 + count * (weight * COMMON**2 + ALIKE**2))


@njit
def _carried_along(rows, of_before, H, b):  # type: ignore[no-untyped-def]
    """Add what rows of `_carried_rows` say of the motion, whatever the one before was off (Schur's complement)."""
    M, c = np.zeros((12, 12)), np.zeros(12)
    _normal_equations(rows, _J_NOW, 12, _W_CARRIED, _OFF, M, c)
    S, G, x = np.empty((6, 6)), np.empty((7, 6)), np.zeros((7, 6))
    for p in range(6):
        for q in range(6):
            S[p, q] = M[6 + max(p, q), 6 + min(p, q)] + of_before[p, q]
            G[p, q] = M[6 + q, p]
        G[6, p] = c[6 + p]
    for p in range(7):
        _solved(S, G[p], x[p])
    for p in range(6):
        for q in range(p + 1):
            H[p, q] += M[p, q]
            for k in range(6):
                H[p, q] -= G[p, k] * x[q, k]
        b[p] += c[p]
        for k in range(6):
            b[p] -= G[p, k] * x[6, k]


@njit
def _gauss_newton(  # type: ignore[no-untyped-def]
    rays, seen, across, along, prior_motion, motion_information, prior_road, road_information, climb_sd, still,
    inverse_depth, of_depth, told, before, of_before, at, H, steps, tolerance,
):  # fmt: skip
    cells = np.empty((_ROWS, rays.shape[1]), np.float32)
    rows = np.empty((_CARRIED_ROWS, len(told)), np.float32)
    b, delta, normal, J = np.empty(_N), np.empty(_N), np.empty(3), np.zeros(_N)
    for _ in range(steps):
        _equations(rays, seen, across, along, at, still, tolerance, cells, H, b)
        if len(told):
            _carried_rows(rays, seen, at, before, inverse_depth, of_depth, told, tolerance, rows)
            _carried_along(rows, of_before, H, b)
        # Priors: the motion, the road, and that the camera stays at its height above it.
        for p in range(6):
            off = at[p] - prior_motion[p]
            information = motion_information[p] / (1 + off * off * motion_information[p] / PRIOR_TOLERANCE**2)
            H[p, p] += information
            b[p] += information * off
        for p in range(_N - 6):
            for q in range(_N - 6):
                if q <= p:
                    H[6 + p, 6 + q] += road_information[p, q]
                b[6 + p] += road_information[p, q] * (at[6 + q] - prior_road[q])
        inverse_norm = 1 / np.sqrt(1 + at[6] * at[6] + at[7] * at[7])
        normal[0], normal[1], normal[2] = at[6] * inverse_norm, -inverse_norm, at[7] * inverse_norm
        climb = normal[0] * at[0] + normal[1] * at[1] + normal[2] * at[2]
        share = climb / (at[0] * at[0] + at[1] * at[1] + at[2] * at[2] + NO_WAY**2)
        for k in range(3):
            J[k] = normal[k] - share * at[k]
        J[6], J[7] = at[0], at[2]
        for p in range(_N):
            for q in range(p + 1):
                H[p, q] += J[p] * J[q] / climb_sd**2
            b[p] += J[p] * climb / climb_sd**2
        for p in range(_N):
            for q in range(p):
                H[q, p] = H[p, q]
            b[p] = -b[p]
        _solved(H, b, delta)
        for k in range(3):
            at[k] += delta[k]
            delta[3 + k] = min(max(delta[3 + k], -0.2), 0.2)
        _turned(at[3:6], delta[3:6])
        for k in range(6, 8):
            at[k] = min(max(at[k] + min(max(delta[k], -0.1), 0.1), -0.3), 0.3)
        for k in range(8, _N):
            at[k] = min(max(at[k] + delta[k], -0.3), 0.3)


@njit
def _solve_all(  # type: ignore[no-untyped-def]
    first, last, rays, seen, across, along, motion, motion_information, road, road_information, climb_sd, still,
    inverse_depth, of_depth, told, before, of_before, at, H, steps, tolerance,
):  # fmt: skip
    """A strip of a batch."""
    for i in range(first, last):
        _gauss_newton(rays[i], seen[i], across[i], along[i], motion[i], motion_information[i], road[i],
                      road_information[i], climb_sd[i], still[i], inverse_depth[i], of_depth[i], told[i],
                      before[i], of_before[i], at[i], H[i], steps, tolerance)  # fmt: skip


class NormalEquations(torch.autograd.Function):
    """`solver._normal_equations` with gradients for the weights of cells, and `residuals` on the way.

    ``apply(rays, seen, across, along, at, still, tolerance)``, ``at`` (batch, 11) being the unknowns and ``still``
    (batch,) that of `solver.Priors`, returns H (batch, 11, 11), b (batch, 11) and what `unpacked` makes residuals
    of.
    """

    @staticmethod
    def forward(ctx: Any, rays: Tensor, seen: Tensor, across: Tensor, along: Tensor, at: Tensor, still: Tensor,
                tolerance: float) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        cells = [np.ascontiguousarray(t.detach().numpy()) for t in (rays, seen, across, along)]
        unknowns, rest = at.detach().numpy().astype(np.float64), still.detach().numpy().astype(np.float64)
        H, b = np.zeros((len(at), _N, _N)), np.zeros((len(at), _N))
        rows = np.empty((len(at), _ROWS, rays.shape[2]), np.float32)
        by_strips(_equations_all, len(at), 1, *cells, unknowns, rest, tolerance, rows, H, b)
        ctx.saved, ctx.tolerance = (cells[2], cells[3], rest, rows), tolerance
        known = torch.from_numpy(rows)
        ctx.mark_non_differentiable(known)
        return torch.from_numpy(H.astype(np.float32)), torch.from_numpy(b.astype(np.float32)), known

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        by_H, by_b = (np.ascontiguousarray(t.numpy()) for t in outer[:2])
        across, along, still, rows = ctx.saved
        by_across, by_along = np.empty_like(across), np.empty_like(along)
        by_strips(
            _equations_back,
            len(rows),
            1,
            across,
            along,
            still,
            rows,
            by_H,
            by_b,
            ctx.tolerance,
            by_across,
            by_along,
        )
        return None, None, torch.from_numpy(by_across), torch.from_numpy(by_along), None, None, None


@njit
def _equations_all(  # type: ignore[no-untyped-def]
    first, last, rays, seen, across, along, at, still, tolerance, rows, H, b
):
    """A strip of a batch."""
    for n in range(first, last):
        _equations(rays[n], seen[n], across[n], along[n], at[n], still[n], tolerance, rows[n], H[n], b[n])
        for p in range(_N):
            for q in range(p):
                H[n, q, p] = H[n, p, q]


@njit
def _equations_back(  # type: ignore[no-untyped-def]
    first, last, across, along, still, rows, by_H, by_b, tolerance, by_across, by_along
):
    """A strip of a batch."""
    one, narrow = np.float32(1), np.float32(1 / tolerance**2)
    by_still = np.empty_like(across[0])
    for n in range(first, last):
        square = np.float32(still[n] * still[n])
        _by_weights(rows[n], _J_ACROSS, 6, _ACROSS, by_H[n], by_b[n], by_across[n])
        _by_weights(rows[n], _J_ALONG, _N, _MISFIT, by_H[n], by_b[n], by_along[n])
        _by_weights(rows[n], _J_ALONG, 6, _ALONG, by_H[n], by_b[n], by_still)
        for i in range(across.shape[1]):
            # A robust weight w / (1 + w r^2 / tolerance^2), by w.
            shrunk = one + rows[n, _MISFIT, i] ** 2 * along[n, i] * narrow
            by_along[n, i] /= shrunk * shrunk
            rest = _at_rest(rows[n, _REACH, i], square)
            shrunk = one + rows[n, _ALONG, i] ** 2 * across[n, i] * rest * narrow
            by_still[i] *= rest / (shrunk * shrunk)
            shrunk = one + rows[n, _ACROSS, i] ** 2 * across[n, i] * narrow
            by_across[n, i] = by_across[n, i] / (shrunk * shrunk) + by_still[i]


@_sums
def _by_weights(cells, first, count, misfit, by_H, by_b, out):  # type: ignore[no-untyped-def]
    """Of the sum over all J' w J by_H + J' w r by_b, by each cell's w."""
    out[:] = 0
    for p in range(np.uintp(count)):
        for q in range(np.uintp(count)):
            factor = by_H[p, q]
            for i in range(np.uintp(out.shape[0])):
                out[i] += factor * cells[first + p, i] * cells[first + q, i]
        factor = by_b[p]
        for i in range(np.uintp(out.shape[0])):
            out[i] += factor * cells[first + p, i] * cells[misfit, i]
