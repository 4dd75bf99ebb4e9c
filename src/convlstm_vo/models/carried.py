"""Depth that is carried from frame to frame, in torch.

What a pair of frames says of how far away things are is passed on to the next one, at the places where they are
then seen. It makes no motion more precise whose length the road tells. Where no road does, it says how much longer
or shorter the way is than the one before, so that a scale once found is kept (`solver.Carried`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from convlstm_vo.geometry import se3
from convlstm_vo.models import cell_kernels, kernels
from convlstm_vo.models.scene import STRIDE
from convlstm_vo.models.solver import Residuals, Solution

_LEAST_SD, _LEAST_SHARE = 1e-3, 0.01  # of inverse depths: whatever the flow says, and a share of them
_REACH = 2  # nodes of the map, on which a cell's depth is spread: cells are two apart


def passed_on(rays: Tensor, seen: Tensor, solution: Solution, r: Residuals, told: Tensor) -> Tensor:
    """What a pair of frames says of its cells' depths, in the newer frame.

    Args:
        rays: (batch, 3, cells). seen: (batch, 2, cells), as in `solver.residuals`. r: at the solution.
        told: (batch, cells), information of the flow along an epipolar line.

    Returns:
        (batch, 4, cells): where they are seen, their inverse depth, and information on it.
    """
    T = se3.matrix_from_motion(solution.motion)
    last_row = T[:, :3, 2:3].transpose(1, 2)
    sz, mz = (last_row @ rays)[:, 0], (last_row @ T[:, :3, 3:])[:, 0]
    # What is not on its epipolar line moves by itself, or was measured wrongly.
    known = r.reach.square() * told / (1 + r.across.square() * told)
    variance = known.clamp_min(1e-6).reciprocal() + (_LEAST_SHARE * r.inverse_depth).square() + _LEAST_SD**2
    closer = (sz - r.inverse_depth * mz).clamp_min(0.05).reciprocal()
    there = r.inverse_depth * closer
    known = (told > 0) / (variance * (closer * closer * sz).square())
    return torch.cat([seen, there[:, None], known[:, None]], 1)


def mapped(points: Tensor, rotation: Tensor, intrinsics: Tensor, rows: int, columns: int) -> Tensor:
    """What the next frame is told, `spread` out: (batch, 2, rows, columns).

    Args:
        points: (batch, 4, cells), of `passed_on`. rotation: (batch, 3, 3), from their axes to the camera's.
    """
    if kernels.usable(points, rotation, intrinsics):
        return cell_kernels.mapped(points, rotation, intrinsics, rows, columns)
    return spread(turned(points, rotation), intrinsics, rows, columns)


def turned(points: Tensor, rotation: Tensor) -> Tensor:
    """`passed_on` in other axes, to which the rotation (batch, 3, 3) takes points."""
    rays = rotation @ torch.cat([points[:, :2], torch.ones_like(points[:, :1])], 1)
    z = rays[:, 2:].clamp_min(0.05)
    return torch.cat([rays[:, :2] / z, points[:, 2:3] / z, points[:, 3:] * z.square()], 1)


def spread(points: Tensor, intrinsics: Tensor, rows: int, columns: int) -> Tensor:
    """A map of depths on the flow's grid: (batch, 2, rows, columns), inverse depth and information on it.

    Where neighbours differ, at an edge or on a slope, their variance tells how little is known between them.

    Args:
        points: (batch, 4, cells), of `passed_on` in the camera's axes. intrinsics: fx, fy, cx, cy (batch, 4).
    """
    at = points[:, :2] * intrinsics[:, :2, None] + intrinsics[:, 2:, None]
    at = ((at - (STRIDE - 1) / 2) / STRIDE).clamp(-3.0 * _REACH, 3.0 * _REACH + max(rows, columns))
    offsets = torch.arange(1 - _REACH, 1 + _REACH, device=at.device)
    x, y = (at[:, i, None].floor() + offsets[:, None] for i in (0, 1))  # (batch, 4, cells)
    near_x, near_y = ((1 - (node - at[:, i, None]).abs() / _REACH).clamp_min(0.0) for i, node in ((0, x), (1, y)))
    near_x, near_y = near_x * ((x >= 0) & (x < columns)), near_y * ((y >= 0) & (y < rows))
    weight = (near_y[:, :, None] * near_x[:, None] * points[:, 3, None, None]).flatten(1)
    node = y.clamp(0, rows - 1)[:, :, None] * columns + x.clamp(0, columns - 1)[:, None]
    depth = points[:, 2, None, None].expand(-1, 2 * _REACH, 2 * _REACH, -1).flatten(1)
    sums = points.new_zeros(len(points), 3, rows * columns)
    sums.scatter_add_(
        2,
        node.flatten(1)[:, None].long().expand(-1, 3, -1),
        torch.stack([weight, weight * depth, weight * depth * depth], 1),
    )
    known = sums[:, 0]
    mean, square = (sums[:, i] / known.clamp_min(1e-12) for i in (1, 2))
    differ = (square - mean.square()).clamp_min(0.0)
    return torch.stack([mean, known / (1 + known * differ)], 1).unflatten(2, (rows, columns))


def at_cells(depth: Tensor, rays: Tensor, intrinsics: Tensor) -> Tensor:
    """(batch, 2, rows, columns): what a map of `spread` says at cells, whose rays (batch, 3, rows, columns) are
    those of its nodes, in the camera's axes."""
    at = rays[:, :2] * intrinsics[:, :2, None, None] + intrinsics[:, 2:, None, None]
    x, y = ((at - (STRIDE - 1) / 2) / STRIDE).round().long().unbind(1)
    node = (y * depth.shape[-1] + x).flatten(1)
    return depth.flatten(2).gather(2, node[:, None].expand(-1, 2, -1)).unflatten(2, rays.shape[2:])
