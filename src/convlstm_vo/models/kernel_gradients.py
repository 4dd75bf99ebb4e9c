"""Lucas-Kanade on a CPU with its gradient: the loops of `kernels.py`, and those of their derivatives.

For training, where a gradient is wanted. The torch code in `flow.py` is the definition of these too.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

# Numba compiles these into the loops below, and keeps those until *this* file changes.
from convlstm_vo.models.kernels import (
    _0,
    _1,
    _2,
    _3,
    _4,
    _between,
    _field_row,
    _gradients,
    _misfits,
    _pool,
    by_strips,
    njit,
)


def gradient_products(here: Tensor) -> Tensor:
    """`flow.gradient_products`."""
    return _GradientProducts.apply(here)


def misfits(here: Tensor, there: Tensor, total: Tensor, outlier: Tensor) -> Tensor:
    """`flow.misfits`."""
    return _Misfits.apply(here, there, total, outlier)


class _GradientProducts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, here: Tensor) -> Tensor:
        ctx.save_for_backward(here)
        images = here.detach().contiguous().numpy()
        batch, _, height, width = images.shape
        out = np.empty((batch, height // 4, width // 4, 4), np.float32)
        by_strips(_all_hessians, batch, 1, images, out)
        return torch.from_numpy(out[..., :3]).permute(0, 3, 1, 2).contiguous()

    @staticmethod
    def backward(ctx: Any, wanted: Tensor) -> Tensor:
        (here,) = ctx.saved_tensors
        images = here.detach().contiguous().numpy()
        cells = np.ascontiguousarray(wanted.permute(0, 2, 3, 1).numpy())
        out = np.zeros_like(images)
        by_strips(_hessians_back, len(images), 1, images, cells, out)
        return torch.from_numpy(out)


class _Misfits(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, here: Tensor, there: Tensor, total: Tensor, outlier: Tensor) -> Tensor:
        ctx.save_for_backward(here, there, total, outlier)
        images, others, flow = _laid_out(here, there, total)
        batch, _, height, width = images.shape
        out = np.empty((batch, height // 4, width // 4, 4), np.float32)
        by_strips(_all_misfits, batch, 1, images, others, flow, np.float32(outlier), out)
        return torch.from_numpy(out).permute(0, 3, 1, 2).contiguous()

    @staticmethod
    def backward(ctx: Any, wanted: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        here, there, total, outlier = ctx.saved_tensors
        images, others, flow = _laid_out(here, there, total)
        cells = np.ascontiguousarray(wanted.permute(0, 2, 3, 1).numpy())
        d_here, d_there, d_flow = np.zeros_like(images), np.zeros_like(others), np.zeros_like(flow)
        d_outlier = np.zeros(len(images), np.float64)
        by_strips(
            _misfits_back, len(images), 1, images, others, flow, np.float32(outlier), cells,
            d_here, d_there, d_flow, d_outlier,
        )  # fmt: skip
        return (
            torch.from_numpy(d_here),
            torch.from_numpy(d_there).permute(0, 3, 1, 2),
            torch.from_numpy(d_flow),
            torch.tensor(d_outlier.sum(), dtype=outlier.dtype).reshape(outlier.shape),
        )


def _laid_out(here: Tensor, there: Tensor, total: Tensor) -> tuple[NDArray[np.float32], ...]:
    """As the loops want them: channels first, channels last, channels first."""
    other = np.ascontiguousarray(there.detach().permute(0, 2, 3, 1).numpy())
    return here.detach().contiguous().numpy(), other, total.detach().contiguous().numpy()


@njit
def _all_hessians(first, last, here, out):  # type: ignore[no-untyped-def]
    channels, height, width = here.shape[1:]
    gradient = np.empty((height, 2, channels, width), np.float32)
    blocks = np.empty((height // 2, width // 2, 4), np.float32)
    for i in range(first, last):
        _gradients(0, height // 2, here[i], gradient, blocks)
        _pool(0, height // 4, 0, blocks, out[i])


@njit
def _all_misfits(first, last, here, there, flow, outlier, out):  # type: ignore[no-untyped-def]
    channels, height, width = here.shape[1:]
    gradient = np.empty((height, 2, channels, width), np.float32)
    blocks = np.empty((height // 2, width // 2, 4), np.float32)
    for i in range(first, last):
        _gradients(0, height // 2, here[i], gradient, blocks)
        _misfits(0, height // 2, here[i], there[i], gradient, flow[i], outlier, blocks)
        _pool(0, height // 4, 0, blocks, out[i])


@njit
def _pool_back(wanted, out):  # type: ignore[no-untyped-def]
    """Gradient of `_pool`: of means over windows to each pixel of a block of 2x2."""
    rows, columns = out.shape[0], out.shape[1]
    out[:] = np.float32(0)
    for i in range(wanted.shape[0]):
        top, bottom = max(0, 2 * i - 1), min(rows, 2 * i + 3)
        for j in range(wanted.shape[1]):
            left, right = max(0, 2 * j - 1), min(columns, 2 * j + 3)
            share = np.float32(1) / np.float32(4 * (bottom - top) * (right - left))
            for k in range(wanted.shape[2]):
                value = wanted[i, j, k] * share
                for y in range(top, bottom):
                    for x in range(left, right):
                        out[y, x, k] += value


@njit
def _gradients_back(y, c, gx, gy, out):  # type: ignore[no-untyped-def]
    """Gradient of the central differences of `_gradients`, of row y of channel c."""
    height, width = np.uintp(out.shape[1]), np.uintp(out.shape[2])
    half = np.float32(0.5)
    row = out[c, y]
    for x in range(_1, width - _1):
        row[x + _1] += half * gx[x]
        row[x - _1] -= half * gx[x]
    if _0 < y < height - _1:
        above, below = out[c, y - _1], out[c, y + _1]
        for x in range(width):
            below[x] += half * gy[x]
            above[x] -= half * gy[x]


@njit
def _hessians_back(first, last, here, wanted, out):  # type: ignore[no-untyped-def]
    channels, height, width = np.uintp(here.shape[1]), np.uintp(here.shape[2]), np.uintp(here.shape[3])
    gradient = np.empty((height, 2, channels, width), np.float32)
    unused = np.empty((height // _2, width // _2, 4), np.float32)
    blocks = np.empty((height // _2, width // _2, 3), np.float32)
    dx, dy = np.empty(width, np.float32), np.empty(width, np.float32)
    two = np.float32(2)
    for i in range(first, last):
        _gradients(0, here.shape[2] // 2, here[i], gradient, unused)
        _pool_back(wanted[i], blocks)
        for y in range(height):
            block = blocks[y // _2]
            for c in range(channels):
                gx, gy = gradient[y, 0, c], gradient[y, 1, c]
                for x in range(width):
                    xx, xy, yy = block[x // _2, 0], block[x // _2, 1], block[x // _2, 2]
                    dx[x] = two * xx * gx[x] + xy * gy[x]
                    dy[x] = two * yy * gy[x] + xy * gx[x]
                _gradients_back(y, c, dx, dy, out[i])


@njit
def _misfits_back(first, last, here, there, flow, outlier, wanted, d_here, d_there, d_flow, d_outlier):  # type: ignore[no-untyped-def]
    channels, height, width = np.uintp(here.shape[1]), np.uintp(here.shape[2]), np.uintp(here.shape[3])
    zero, two = np.float32(0), np.float32(2)
    gradient = np.empty((height, 2, channels, width), np.float32)
    unused = np.empty((height // _2, width // _2, 4), np.float32)
    blocks = np.empty((height // _2, width // _2, 4), np.float32)
    us, vs = np.empty(width, np.float32), np.empty(width, np.float32)
    du, dv = np.empty(width, np.float32), np.empty(width, np.float32)
    energy, bx, by = np.empty(width, np.float32), np.empty(width, np.float32), np.empty(width, np.float32)
    tx, ty, twice = np.empty(width, np.float32), np.empty(width, np.float32), np.empty(width, np.float32)
    errors = np.empty((channels, width), np.float32)
    along, across = np.empty((channels, width), np.float32), np.empty((channels, width), np.float32)
    dx, dy = np.empty(width, np.float32), np.empty(width, np.float32)
    for i in range(first, last):
        image, other, d_other = here[i], there[i], d_there[i]
        _gradients(0, here.shape[2] // 2, image, gradient, unused)
        _pool_back(wanted[i], blocks)
        for y in range(height):
            _field_row(np.float32(y), flow[i], us, vs)
            energy[:], bx[:], by[:] = zero, zero, zero
            _read_row(y, other, us, vs, errors, along, across)
            for c in range(channels):
                e, row, gx, gy = errors[c], image[c, y], gradient[y, 0, c], gradient[y, 1, c]
                for x in range(width):
                    e[x] -= row[x]
                    energy[x] += e[x] * e[x]
                    bx[x] += gx[x] * e[x]
                    by[x] += gy[x] * e[x]
            block, total = blocks[y // _2], np.float32(0)
            for x in range(width):
                g = block[x // _2]
                t = outlier / (outlier + energy[x])
                d_trust = g[0] * bx[x] + g[1] * by[x] + g[2] * energy[x] + g[3]
                total += d_trust * energy[x] * (t / outlier) * (t / outlier)
                tx[x], ty[x] = g[0] * t, g[1] * t
                twice[x] = two * (g[2] * t - d_trust * t * t / outlier)
            d_outlier[i] += total
            for c in range(channels):
                e, gx, gy, d_row = errors[c], gradient[y, 0, c], gradient[y, 1, c], d_here[i, c, y]
                for x in range(width):
                    dx[x], dy[x] = tx[x] * e[x], ty[x] * e[x]
                    e[x] = tx[x] * gx[x] + ty[x] * gy[x] + twice[x] * e[x]  # now the gradient of the error
                    d_row[x] -= e[x]
                _gradients_back(y, c, dx, dy, d_here[i])
            _read_row_back(y, errors, us, vs, along, across, d_other, du, dv)
            _row_back(np.float32(y), du, d_flow[i, 0])
            _row_back(np.float32(y), dv, d_flow[i, 1])


@njit
def _read_row(y, image, us, vs, out, along, across):  # type: ignore[no-untyped-def]
    """An image (height, width, channels) where a flow leads from the pixels of row y, and its slopes there."""
    height, width, channels = np.uintp(image.shape[0]), np.uintp(image.shape[1]), np.uintp(image.shape[2])
    for x in range(width):
        x0, x1, wx = _between(np.float32(x) + us[x], width - _1)
        y0, y1, wy = _between(np.float32(y) + vs[x], height - _1)
        for c in range(channels):
            a, b = image[y0, x0, c], image[y0, x1, c]
            d, e = image[y1, x0, c], image[y1, x1, c]
            above, below = a + wx * (b - a), d + wx * (e - d)
            out[c, x] = above + wy * (below - above)
            along[c, x] = (np.float32(1) - wy) * (b - a) + wy * (e - d)
            across[c, x] = below - above


@njit
def _read_row_back(y, wanted, us, vs, along, across, image, du, dv):  # type: ignore[no-untyped-def]
    """Gradient of `_read_row`: to the image and to the flow, which beyond the border changes nothing."""
    height, width, channels = np.uintp(image.shape[0]), np.uintp(image.shape[1]), np.uintp(image.shape[2])
    zero, one = np.float32(0), np.float32(1)
    for x in range(width):
        at_x, at_y = np.float32(x) + us[x], np.float32(y) + vs[x]
        x0, x1, wx = _between(at_x, width - _1)
        y0, y1, wy = _between(at_y, height - _1)
        w00, w01 = (one - wy) * (one - wx), (one - wy) * wx
        w10, w11 = wy * (one - wx), wy * wx
        u, v = zero, zero
        for c in range(channels):
            e = wanted[c, x]
            u += e * along[c, x]
            v += e * across[c, x]
            image[y0, x0, c] += w00 * e
            image[y0, x1, c] += w01 * e
            image[y1, x0, c] += w10 * e
            image[y1, x1, c] += w11 * e
        du[x] = u if zero < at_x < np.float32(width - _1) else zero
        dv[x] = v if zero < at_y < np.float32(height - _1) else zero


@njit
def _row_back(y, wanted, out):  # type: ignore[no-untyped-def]
    """Gradient of `kernels._row`: of the pixels of row y to the cells."""
    half, quarter, eighth = np.float32(0.5), np.float32(0.25), np.float32(0.125)
    rows, columns = np.uintp(out.shape[0]), np.uintp(out.shape[1])
    y0, y1, wy = _between((y + half) * quarter - half, rows - _1)
    row = np.zeros(columns + _2, np.float32)
    for j in range(columns):
        x = _4 * j
        a, b, c, d = wanted[x], wanted[x + _1], wanted[x + _2], wanted[x + _3]
        row[j] += eighth * (np.float32(3) * a + b)
        row[j + _1] += eighth * (np.float32(5) * (a + d) + np.float32(7) * (b + c))
        row[j + _2] += eighth * (c + np.float32(3) * d)
    row[_1] += row[_0]
    row[columns] += row[columns + _1]
    for j in range(columns):
        out[y0, j] += (np.float32(1) - wy) * row[j + _1]
        out[y1, j] += wy * row[j + _1]
