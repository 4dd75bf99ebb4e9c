"""Where points of one frame are seen in the next: the geometry that flow and solver share, in torch.

Lengths are in *camera heights*: the road lies at distance 1, so nothing here knows metres. A pixel is the ray
``(x, y, 1)``, a point on it is the ray over its inverse depth, and the road is ``n . point = -1`` with ``n`` the
direction of ``(a, -1, b)``: ``a`` its slope to the right, ``b`` its tilt towards the camera (both about 0).
"""

from __future__ import annotations

import torch
from torch import Tensor

from convlstm_vo.geometry import se3

STRIDE = 4
WALL = 7.3  # street canyon: walls 12 m to the side of a camera 1.65 m high
FAR = 60.0  # and something at about 100 m


def cell_rays(intrinsics: Tensor, rows: int, columns: int) -> Tensor:
    """Rays (x, y, 1) of the middles of cells: (batch, 3, rows, columns), of fx, fy, cx, cy (batch, 4)."""
    y = torch.arange(rows, device=intrinsics.device, dtype=intrinsics.dtype) * STRIDE + (STRIDE - 1) / 2
    x = torch.arange(columns, device=intrinsics.device, dtype=intrinsics.dtype) * STRIDE + (STRIDE - 1) / 2
    fx, fy, cx, cy = (value[:, None, None] for value in intrinsics.unbind(1))
    x = ((x[None, None] - cx) / fx).expand(-1, rows, -1)
    y = ((y[None, :, None] - cy) / fy).expand(-1, -1, columns)
    return torch.stack([x, y, torch.ones_like(x)], 1)


def road_normal(slopes: Tensor) -> Tensor:
    """Unit normal (batch, 3), towards the camera, of slopes a, b (batch, 2)."""
    n = torch.stack([slopes[:, 0], -torch.ones_like(slopes[:, 0]), slopes[:, 1]], 1)
    return n * (n * n).sum(1, keepdim=True).rsqrt()


def road_slopes(normal: Tensor) -> Tensor:
    """The inverse of `road_normal`, for normals (batch, 3) of any length."""
    return torch.stack([normal[:, 0], normal[:, 2]], 1) / (-normal[:, 1:2])


def road_inverse_depth(rays: Tensor, slopes: Tensor) -> Tensor:
    """Inverse depth (batch, rows, columns) of the road at rays (batch, 3, ...); negative above the horizon."""
    return -(road_normal(slopes)[:, :, None, None] * rays).sum(1)


def canyon_inverse_depth(rays: Tensor, slopes: Tensor) -> Tensor:
    """A guess of the inverse depth of a street: its road, and walls to both sides. (batch, rows, columns)."""
    walls = (rays[:, 0].abs() / WALL).clamp_min(1 / FAR)
    return torch.maximum(road_inverse_depth(rays, slopes), walls)


def seen_after(rays: Tensor, inverse_depth: Tensor, T_prev_curr: Tensor) -> Tensor:
    """Where points on rays of the previous frame lie in the current camera, up to scale: (batch, 3, rows, columns).

    Args:
        rays: (batch, 3, rows, columns). inverse_depth: (batch, rows, columns). T_prev_curr: (batch, 4, 4).
    """
    moved = rays - inverse_depth[:, None] * T_prev_curr[:, :3, 3, None, None]
    return (T_prev_curr[:, :3, :3].transpose(1, 2) @ moved.flatten(2)).unflatten(2, rays.shape[2:])


def flow_of(rays: Tensor, inverse_depth: Tensor, motion: Tensor, intrinsics: Tensor) -> Tensor:
    """Flow in pixels (batch, 2, rows, columns) of a motion (batch, 6) and inverse depths (batch, rows, columns)."""
    point = seen_after(rays, inverse_depth, se3.matrix_from_motion(motion))
    in_front = point[:, 2:].clamp_min(0.05)
    focal = intrinsics[:, :2, None, None]
    return (point[:, :2] / in_front - rays[:, :2]) * focal


def flow_to_rays(flow: Tensor, rays: Tensor, intrinsics: Tensor) -> Tensor:
    """Where cells are seen in the current frame, as ray coordinates (batch, 2, ...), of a flow in pixels."""
    return rays[:, :2] + flow / intrinsics[:, :2, None, None]
