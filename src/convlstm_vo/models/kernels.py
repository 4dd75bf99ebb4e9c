"""The inner loops of the default network's flow, fused for a CPU: matching and Lucas-Kanade.

They do exactly what the torch code in `flow.py` does (those of `solver_kernels.py`, what that in `solver.py` does),
which stays the definition, carries the gradients and runs on other devices; the tests hold them against it. In
torch a frame costs some thousand small operations and passes over full images; compiled once (some seconds, kept on
disk) they cost a tenth.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import numba
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

# No reassociation and NaN is respected: a coordinate that is not a number must not become an address.
njit: Any = numba.njit(cache=True, nogil=True, error_model="numpy", fastmath={"contract", "nsz"})

_0, _1 = np.uintp(0), np.uintp(1)


def usable(*tensors: Tensor) -> bool:
    """Whether the kernels can take these: float32 on the CPU, no gradient wanted of them, no export going on."""
    if torch.compiler.is_compiling() or torch.onnx.is_in_onnx_export():
        return False
    wanted = torch.is_grad_enabled()
    return all(
        t.device.type == "cpu" and t.dtype == torch.float32 and not (wanted and t.requires_grad) for t in tensors
    )


# --- matching -----------------------------------------------------------------------------------------------------


def correlate(prev: Tensor, curr: Tensor, radius: int, least: float | None = None) -> Tensor:
    """`correlation.correlate` of features (batch, channels, height, width); with ``least``, its `cosines`."""
    batch, channels, height, width = prev.shape
    out = np.empty((batch, (2 * radius + 1) ** 2, height, width), np.float32)
    pair = [features.permute(0, 2, 3, 1).numpy() for features in (prev, curr)]
    here, there = (np.zeros((channels, height, width + 2 * margin), np.float32) for margin in (0, radius))
    for i in range(batch):
        by_rows(_planes, height, pair[0][i], least is not None, np.float32(least or 0), here)
        by_rows(_planes, height, pair[1][i], least is not None, np.float32(least or 0), there)
        by_rows(_correlate, height, here, there, radius, out[i])
    return torch.from_numpy(out)


@njit
def _planes(first, last, features, normalise, least, out):  # type: ignore[no-untyped-def]
    """Features (height, width, channels), to length 1 if wanted, as planes with a margin to the left and right."""
    width, channels = features.shape[1:]
    margin = np.uintp((out.shape[2] - width) // 2)
    factor = np.float32(1)
    for i in range(np.uintp(first), np.uintp(last)):
        for j in range(np.uintp(width)):
            if normalise:
                square = least
                for c in range(np.uintp(channels)):
                    square += features[i, j, c] * features[i, j, c]
                factor = np.float32(1) / np.sqrt(square)
            for c in range(np.uintp(channels)):
                out[c, i, j + margin] = features[i, j, c] * factor


@njit
def _correlate(first, last, here, there, radius, out):  # type: ignore[no-untyped-def]
    """Products of each cell with those around it; ``there`` has a margin of zeros to the left and right."""
    channels, height, width = here.shape
    size = 2 * radius + 1
    for i in range(first, last):
        for dy in range(size):
            y = i + dy - radius
            for dx in range(size):
                row = out[dy * size + dx, i]
                row[:] = np.float32(0)
                if y < 0 or y >= height:
                    continue
                for c in range(0, channels - 3, 4):
                    for j in range(width):
                        row[j] += (
                            here[c, i, j] * there[c, y, j + dx]
                            + here[c + 1, i, j] * there[c + 1, y, j + dx]
                            + here[c + 2, i, j] * there[c + 2, y, j + dx]
                            + here[c + 3, i, j] * there[c + 3, y, j + dx]
                        )
                for c in range(channels - channels % 4, channels):
                    for j in range(width):
                        row[j] += here[c, i, j] * there[c, y, j + dx]


# --- Lucas-Kanade -------------------------------------------------------------------------------------------------


def refine(
    images: Tensor, predicted: Tensor, flow: Tensor, damping: float, outlier: float, steps: int
) -> tuple[Tensor, Tensor]:
    """`FlowNet._refine`: the refined residual and its evidence.

    Args:
        images: (2 batch, channels, height, width). predicted, flow: (batch, 2, height / 4, width / 4).
        damping, outlier: the learned ones. steps: of Lucas-Kanade.
    """
    here, there = (np.ascontiguousarray(part.permute(0, 2, 3, 1).numpy()) for part in images.chunk(2))
    parts = [
        _refine_one(here[i], there[i], predicted[i].contiguous().numpy(), flow[i].numpy(), damping, outlier, steps)
        for i in range(len(flow))
    ]
    return torch.from_numpy(np.stack([p[0] for p in parts])), torch.from_numpy(np.stack([p[1] for p in parts]))


def _refine_one(
    here: NDArray[np.float32],
    there: NDArray[np.float32],
    predicted: NDArray[np.float32],
    start: NDArray[np.float32],
    damping: float,
    outlier: float,
    steps: int,
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    height, width, channels = here.shape
    rows, columns = height // 4, width // 4
    gradient = np.empty((height, width, 2, channels), np.float32)
    blocks = np.empty((height // 2, width // 2, 4), np.float32)
    hessian = np.empty((rows, columns, 4), np.float32)
    evidence = np.empty((8, rows, columns), np.float32)
    flow = start.copy()
    total = np.empty_like(flow)
    by_rows(_gradients, height // 2, here, gradient, blocks)
    by_rows(_pool, rows, blocks, hessian)
    pooled = np.empty((rows, columns, 4), np.float32)
    for step in range(steps):
        np.add(predicted, flow, out=total)
        by_rows(_misfits, height // 2, here, there, gradient, total, np.float32(outlier), blocks)
        by_rows(_pool, rows, blocks, pooled)
        by_rows(_update, rows, hessian, pooled, np.float32(damping), flow)
        if step == 0:
            evidence[0], evidence[1] = pooled[..., 2], pooled[..., 3]
    evidence[2], evidence[3] = pooled[..., 2], pooled[..., 3]
    hxx, hxy, hyy = hessian[..., 0] + np.float32(damping), hessian[..., 1], hessian[..., 2] + np.float32(damping)
    with np.errstate(invalid="ignore", divide="ignore"):  # as silent as torch
        small = ((hxx + hyy) - np.sqrt((hxx - hyy) ** 2 + 4 * hxy**2 + np.float32(1e-9))) / 2
        evidence[4], evidence[5] = np.log(small) / 4, np.log(hxx + hyy - small) / 4
        evidence[6:] = flow - start
    return flow, evidence


@cache
def _pool_of(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, "convlstm-vo-kernel")


def by_rows(kernel: Callable[..., None], rows: int, *arguments: Any) -> None:
    """Run a kernel (first row, last row, ...) on strips of rows, one for each thread that torch may use."""
    by_strips(kernel, rows, 8, *arguments)


def by_strips(kernel: Callable[..., None], rows: int, least: int, *arguments: Any) -> None:
    """`by_rows`, with at least so many rows in a strip."""
    threads = min(torch.get_num_threads(), max(1, rows // least))
    if threads == 1:
        kernel(0, rows, *arguments)
        return
    edges = [rows * i // threads for i in range(threads + 1)]
    others = [_pool_of(threads - 1).submit(kernel, edges[i], edges[i + 1], *arguments) for i in range(1, threads)]
    kernel(edges[0], edges[1], *arguments)
    for other in others:
        other.result()


@njit
def _gradients(first, last, here, gradient, blocks):  # type: ignore[no-untyped-def]
    """Central differences, and their products summed over 2x2 pixels."""
    height, width, channels = here.shape
    for i in range(first, last):
        for j in range(width // 2):
            xx, xy, yy = np.float32(0), np.float32(0), np.float32(0)
            for y in range(2 * i, 2 * i + 2):
                for x in range(2 * j, 2 * j + 2):
                    for c in range(channels):
                        gx, gy = np.float32(0), np.float32(0)
                        if 0 < x < width - 1:
                            gx = (here[y, x + 1, c] - here[y, x - 1, c]) * np.float32(0.5)
                        if 0 < y < height - 1:
                            gy = (here[y + 1, x, c] - here[y - 1, x, c]) * np.float32(0.5)
                        gradient[y, x, 0, c] = gx
                        gradient[y, x, 1, c] = gy
                        xx += gx * gx
                        xy += gx * gy
                        yy += gy * gy
            blocks[i, j, 0] = xx
            blocks[i, j, 1] = xy
            blocks[i, j, 2] = yy
            blocks[i, j, 3] = 4


@njit
def _pool(first, last, blocks, out):  # type: ignore[no-untyped-def]
    """Mean of the 8x8 pixels around each cell of 4x4; sums over 2x2 are given."""
    rows, columns = blocks.shape[0], blocks.shape[1]
    for i in range(first, last):
        top, bottom = max(0, 2 * i - 1), min(rows, 2 * i + 3)
        for j in range(out.shape[1]):
            left, right = max(0, 2 * j - 1), min(columns, 2 * j + 3)
            a, b, c, d = np.float32(0), np.float32(0), np.float32(0), np.float32(0)
            for y in range(top, bottom):
                for x in range(left, right):
                    a += blocks[y, x, 0]
                    b += blocks[y, x, 1]
                    c += blocks[y, x, 2]
                    d += blocks[y, x, 3]
            share = np.float32(1) / np.float32(4 * (bottom - top) * (right - left))
            out[i, j, 0] = a * share
            out[i, j, 1] = b * share
            out[i, j, 2] = c * share
            out[i, j, 3] = d * share


@njit
def _misfits(first, last, here, there, gradient, total, outlier, blocks):  # type: ignore[no-untyped-def]
    """Gradient times error, energy and trust of the second image warped onto the first, summed over 2x2 pixels.

    Indices are unsigned, or numba asks at each access whether one counts from the end.
    """
    height, width, channels = here.shape
    zero, one = np.float32(0), np.float32(1)
    bottom, right = np.uintp(height - 1), np.uintp(width - 1)
    us, vs = np.empty(width, np.float32), np.empty(width, np.float32)
    for i in range(first, last):
        blocks[i] = zero
        for y in (np.uintp(2 * i), np.uintp(2 * i + 1)):
            _field_row(np.float32(y), total, us, vs)
            for j in range(width // 2):
                sx, sy, se, st = zero, zero, zero, zero
                for x in (np.uintp(2 * j), np.uintp(2 * j + 1)):
                    px, py = np.float32(x) + us[x], np.float32(y) + vs[x]
                    if not px > 0:  # also what is not a number
                        px = zero
                    elif px > right:
                        px = np.float32(right)
                    if not py > 0:
                        py = zero
                    elif py > bottom:
                        py = np.float32(bottom)
                    x0, y0 = np.uintp(px), np.uintp(py)
                    x1, y1 = min(x0 + _1, right), min(y0 + _1, bottom)
                    wx, wy = px - np.float32(x0), py - np.float32(y0)
                    w00, w01 = (one - wy) * (one - wx), (one - wy) * wx
                    w10, w11 = wy * (one - wx), wy * wx
                    energy, bx, by = zero, zero, zero
                    for c in range(np.uintp(channels)):
                        e = w00 * there[y0, x0, c] + w01 * there[y0, x1, c]
                        e += w10 * there[y1, x0, c] + w11 * there[y1, x1, c] - here[y, x, c]
                        energy += e * e
                        bx += gradient[y, x, _0, c] * e
                        by += gradient[y, x, _1, c] * e
                    trust = outlier / (outlier + energy)
                    sx += bx * trust
                    sy += by * trust
                    se += energy * trust
                    st += trust
                blocks[i, j, 0] += sx
                blocks[i, j, 1] += sy
                blocks[i, j, 2] += se
                blocks[i, j, 3] += st


@njit
def _field_row(y, total, us, vs):  # type: ignore[no-untyped-def]
    """A field at cells of 4x4, at each pixel of row y, as torch interpolates it (align_corners=False)."""
    zero, one, half, quarter = np.float32(0), np.float32(1), np.float32(0.5), np.float32(0.25)
    bottom, right = np.uintp(total.shape[1] - 1), np.uintp(total.shape[2] - 1)
    fy = max(zero, (y + half) * quarter - half)
    y0 = np.uintp(fy)
    y1, wy = min(y0 + _1, bottom), fy - np.float32(y0)
    for x in range(np.uintp(len(us))):
        fx = max(zero, (np.float32(x) + half) * quarter - half)
        x0 = np.uintp(fx)
        x1, wx = min(x0 + _1, right), fx - np.float32(x0)
        w00, w01 = (one - wy) * (one - wx), (one - wy) * wx
        w10, w11 = wy * (one - wx), wy * wx
        us[x] = (
            w00 * total[_0, y0, x0] + w01 * total[_0, y0, x1] + w10 * total[_0, y1, x0] + w11 * total[_0, y1, x1]
        )
        vs[x] = (
            w00 * total[_1, y0, x0] + w01 * total[_1, y0, x1] + w10 * total[_1, y1, x0] + w11 * total[_1, y1, x1]
        )


@njit
def _update(first, last, hessian, pooled, damping, flow):  # type: ignore[no-untyped-def]
    """One step of Lucas-Kanade at each cell, of at most two pixels."""
    two = np.float32(2)
    for i in range(first, last):
        for j in range(flow.shape[2]):
            share = pooled[i, j, 3] + np.float32(1e-3)
            bx, by = pooled[i, j, 0] / share, pooled[i, j, 1] / share
            hxx, hxy, hyy = hessian[i, j, 0] + damping, hessian[i, j, 1], hessian[i, j, 2] + damping
            determinant = hxx * hyy - hxy * hxy
            flow[0, i, j] -= two * np.tanh((hyy * bx - hxy * by) / determinant / two)
            flow[1, i, j] -= two * np.tanh((hxx * by - hxy * bx) / determinant / two)
