"""The loops over cells of `geometric.py` around its flow, fused for a CPU; see `kernels.py`."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from convlstm_vo.models.kernels import by_rows, njit
from convlstm_vo.models.scene import STRIDE


def chosen(rays: Tensor, flow: Tensor, log_scale: Tensor, intrinsics: Tensor, image: Tensor) -> Tensor:
    """`geometric.choose_cells`: (batch, 7, rows / 2, columns / 2) of rays, place in the other, sigma, texture.

    Args:
        rays: (batch, 3, rows, columns). flow: (batch, 2, rows, columns). log_scale: (batch, rows, columns).
        intrinsics: (batch, 4). image: (batch, height, width).
    """
    parts = [t.contiguous().numpy() for t in (rays, flow, log_scale, intrinsics, image)]
    batch, _, rows, columns = flow.shape
    out = np.empty((batch, 7, rows // 2, columns // 2), np.float32)
    for i in range(batch):
        by_rows(_choose, rows // 2, *(part[i] for part in parts), out[i])
    return torch.from_numpy(out)


@njit
def _choose(first, last, rays, flow, log_scale, intrinsics, image, out):  # type: ignore[no-untyped-def]
    height, width = image.shape
    fx, fy, cx, cy = intrinsics
    focal = np.sqrt(fx * fy)
    for i in range(np.uintp(first), np.uintp(last)):
        for j in range(np.uintp(out.shape[2])):
            least = np.float32(np.inf)
            for k in range(np.uintp(4)):
                y, x = np.uintp(2) * i + k // np.uintp(2), np.uintp(2) * j + k % np.uintp(2)
                u, v = rays[0, y, x] + flow[0, y, x] / fx, rays[1, y, x] + flow[1, y, x] / fy
                sigma = (np.exp(log_scale[y, x]) * np.float32(np.sqrt(2.0)) + np.float32(0.03)) / focal
                at_x, at_y = u * fx + cx, v * fy + cy
                if not (1 < at_x < width - 2 and 1 < at_y < height - 2):
                    sigma = np.float32(10)
                if k == 0 or sigma < least:
                    least = sigma
                    out[0, i, j], out[1, i, j], out[2, i, j] = rays[0, y, x], rays[1, y, x], rays[2, y, x]
                    out[3, i, j], out[4, i, j], out[5, i, j] = u, v, sigma
                    out[6, i, j] = _contrast(image, np.uintp(4) * y, np.uintp(4) * x)


@njit
def _contrast(image, top, left):  # type: ignore[no-untyped-def]
    """Standard deviation of 4x4 pixels."""
    mean, square = np.float32(0), np.float32(0)
    for y in range(top, top + np.uintp(4)):
        for x in range(left, left + np.uintp(4)):
            mean += image[y, x]
            square += image[y, x] * image[y, x]
    mean, square = mean / np.float32(16), square / np.float32(16)
    return np.sqrt(max(square - mean * mean, np.float32(0)))


def predicted_flow(
    rays: Tensor, intrinsics: Tensor, ahead: Tensor, normal: Tensor, T: Tensor, wall: float, far: float
) -> Tensor:
    """`geometric.expected_flow` in pixels, (batch, 2, rows, columns).

    Args:
        rays: (batch, 3, rows, columns), of the camera. intrinsics: (batch, 4). ahead: (batch, 3, 3), from its axes
            to those of one that looks ahead, in which the others are. normal: (batch, 3), of the road.
        T: (batch, 4, 4), the motion. wall, far: of the street, in camera heights.
    """
    back = (T[:, :3, :3] @ ahead).transpose(1, 2)
    parts = [t.contiguous().numpy() for t in (rays, intrinsics, ahead, back, normal, T[:, :3, 3])]
    out = np.empty((len(rays), 2, *rays.shape[2:]), np.float32)
    for i in range(len(out)):
        _predict(*(part[i] for part in parts), np.float32(wall), np.float32(1 / far), out[i])
    return torch.from_numpy(out)


@njit
def _predict(rays, intrinsics, ahead, back, normal, t, wall, least, out):  # type: ignore[no-untyped-def]
    nearest = np.float32(0.05)
    for i in range(np.uintp(rays.shape[1])):
        for j in range(np.uintp(rays.shape[2])):
            right, down = rays[0, i, j], rays[1, i, j]
            x, y, z = _turned(ahead, right, down, rays[2, i, j])
            depth = max(z, nearest)
            x, y, z = x / depth, y / depth, z / depth
            road = -(normal[0] * x + normal[1] * y + normal[2] * z)
            near = max(road, max(abs(x) / wall, least))
            x, y, z = _turned(back, x - near * t[0], y - near * t[1], z - near * t[2])
            depth = max(z, nearest)
            out[0, i, j] = (x / depth - right) * intrinsics[0]
            out[1, i, j] = (y / depth - down) * intrinsics[1]


def mapped(points: Tensor, rotation: Tensor, intrinsics: Tensor, rows: int, columns: int) -> Tensor:
    """`carried.mapped`."""
    parts = [t.contiguous().numpy() for t in (points, rotation, intrinsics)]
    out = np.empty((len(points), 2, rows, columns), np.float32)
    for i in range(len(out)):
        _map(*(part[i] for part in parts), out[i])
    return torch.from_numpy(out)


@njit
def _map(points, R, intrinsics, out):  # type: ignore[no-untyped-def]
    rows, columns = out.shape[1:]
    fx, fy, cx, cy = intrinsics
    middle, zero, one, half = np.float32((STRIDE - 1) / 2), np.float32(0), np.float32(1), np.float32(0.5)
    sums = np.zeros((3, rows, columns), np.float32)
    for i in range(points.shape[1]):
        if not points[3, i] > 0:
            continue
        x, y, z = _turned(R, points[0, i], points[1, i], one)
        z = max(z, np.float32(0.05))
        depth, known = points[2, i] / z, points[3, i] * z * z
        x = (x / z * fx + cx - middle) / np.float32(STRIDE)
        y = (y / z * fy + cy - middle) / np.float32(STRIDE)
        if not (-2 < x < columns + 1 and -2 < y < rows + 1):
            continue
        left, top = int(np.floor(x)) - 1, int(np.floor(y)) - 1
        for r in range(max(top, 0), min(top + 4, rows)):
            near_y = max(one - abs(np.float32(r) - y) * half, zero)
            for c in range(max(left, 0), min(left + 4, columns)):
                weight = near_y * max(one - abs(np.float32(c) - x) * half, zero) * known
                sums[0, r, c] += weight
                sums[1, r, c] += weight * depth
                sums[2, r, c] += weight * depth * depth
    for r in range(rows):
        for c in range(columns):
            known = sums[0, r, c]
            weight = max(known, np.float32(1e-12))
            mean = sums[1, r, c] / weight
            differ = max(sums[2, r, c] / weight - mean * mean, zero)
            out[0, r, c], out[1, r, c] = mean, known / (one + known * differ)


@njit
def _turned(R, x, y, z):  # type: ignore[no-untyped-def]
    return (
        R[0, 0] * x + R[0, 1] * y + R[0, 2] * z,
        R[1, 0] * x + R[1, 1] * y + R[1, 2] * z,
        R[2, 0] * x + R[2, 1] * y + R[2, 2] * z,
    )
