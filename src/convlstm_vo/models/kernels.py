"""The inner loops of the default network's flow, fused for a CPU: images, matching, Lucas-Kanade and the last mean.

They do exactly what the torch code in `flow.py` does (those of `solver_kernels.py`, what that in `solver.py` does),
which stays the definition, carries the gradients and runs on other devices; the tests hold them against it. In
torch a frame costs some thousand small operations and passes over full images; compiled once (some seconds, kept on
disk) they cost a tenth.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import numba
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

# No reassociation and NaN is respected: a coordinate that is not a number must not become an address.
njit: Any = numba.njit(cache=True, nogil=True, error_model="numpy", fastmath={"contract", "nsz"})

_0, _1, _2, _3, _4 = (np.uintp(i) for i in range(5))


def usable(*tensors: Tensor, differentiable: bool = False) -> bool:
    """Whether the kernels can take these: float32 on the CPU, no export going on, no gradient wanted of them.

    Args:
        differentiable: the kernels are those of `kernel_gradients.py`, of which gradients may be wanted.
    """
    if torch.compiler.is_compiling() or torch.onnx.is_in_onnx_export():
        return False
    wanted = torch.is_grad_enabled() and not differentiable
    return all(
        t.device.type == "cpu" and t.dtype == torch.float32 and not (wanted and t.requires_grad) for t in tensors
    )


def compiled() -> bool:
    """Whether this machine has compiled the kernels before; if not, the first frame takes up to a minute."""
    return any(Path(_step.stats.cache_path).glob("kernels._step-*.nbi"))


# --- images -------------------------------------------------------------------------------------------------------


def normalise_contrast(images: Tensor, least: float) -> Tensor:
    """`flow.normalise_contrast` of images (batch, 1, height, width), sides divisible by 4."""
    grey = images.contiguous().numpy()[:, 0]
    out = np.empty_like(grey)
    by_strips(_normalise_images, len(grey), 1, grey, np.float32(least * least), out)
    return torch.from_numpy(out[:, None])


@njit
def _normalise_images(first, last, images, least, out):  # type: ignore[no-untyped-def]
    height, width = images.shape[1:]
    blocks = np.empty((height // 4, width // 4, 2), np.float32)
    moments = np.empty((2, height // 4, width // 4), np.float32)
    for i in range(first, last):
        _blocks_of_four(images[i], blocks)
        _mean_of_nine(blocks, moments)
        _normalise(images[i], moments, least, out[i])


@njit
def _blocks_of_four(image, blocks):  # type: ignore[no-untyped-def]
    """Mean grey and mean square of 4x4 pixels."""
    for i in range(blocks.shape[0]):
        for j in range(blocks.shape[1]):
            total, squares = np.float32(0), np.float32(0)
            for y in range(4 * i, 4 * i + 4):
                for x in range(4 * j, 4 * j + 4):
                    total += image[y, x]
                    squares += image[y, x] * image[y, x]
            blocks[i, j, 0] = total / np.float32(16)
            blocks[i, j, 1] = squares / np.float32(16)


@njit
def _mean_of_nine(blocks, out):  # type: ignore[no-untyped-def]
    """Mean of a cell and those around it, as far as there are any."""
    rows, columns = blocks.shape[:2]
    for i in range(rows):
        top, bottom = max(0, i - 1), min(rows, i + 2)
        for j in range(columns):
            left, right = max(0, j - 1), min(columns, j + 2)
            mean, square = np.float32(0), np.float32(0)
            for y in range(top, bottom):
                for x in range(left, right):
                    mean += blocks[y, x, 0]
                    square += blocks[y, x, 1]
            share = np.float32(1) / np.float32((bottom - top) * (right - left))
            out[0, i, j] = mean * share
            out[1, i, j] = square * share


@njit
def _normalise(image, moments, least, out):  # type: ignore[no-untyped-def]
    """Pixels less the mean, over the deviation around them, both interpolated between cells."""
    width = np.uintp(image.shape[1])
    means, squares = np.empty(width, np.float32), np.empty(width, np.float32)
    for y in range(np.uintp(image.shape[0])):
        _field_row(np.float32(y), moments, means, squares)
        for x in range(width):
            spread = max(squares[x] - means[x] * means[x], np.float32(0)) + least
            out[y, x] = (image[y, x] - means[x]) / np.sqrt(spread)


def slopes_and_change(prev: Tensor, curr: Tensor, side: int) -> Tensor:
    """`fixed.slopes_and_change` of images (batch, 1, height, width), in blocks of twice ``side`` pixels."""
    before, after = (images.contiguous().numpy()[:, 0] for images in (prev, curr))
    batch, height, width = before.shape
    out = np.empty((batch, 4, height // (2 * side), width // (2 * side)), np.float32)
    for a, b, result in zip(before, after, out, strict=True):
        by_rows(_slopes_and_change, result.shape[1], a, b, side, result)
    return torch.from_numpy(out)


@njit
def _slopes_and_change(first, last, prev, curr, side, out):  # type: ignore[no-untyped-def]
    rows, columns = prev.shape[0] // 2, prev.shape[1] // 2
    top, bottom = max(0, side * first - 1), min(rows, side * last + 1)  # of the half that these blocks see
    a, b = np.empty((bottom - top, columns), np.float32), np.empty((bottom - top, columns), np.float32)
    _halved(top, prev, a)
    _halved(top, curr, b)
    half, zero = np.float32(0.5), np.float32(0)
    out[:, first:last] = zero
    for y in range(side * first, side * last):
        i, row = y // side, y - top
        for x in range(side * out.shape[2]):
            gx = half * (a[row, x + 1] - a[row, x - 1]) if 0 < x < columns - 1 else zero
            gy = half * (a[row + 1, x] - a[row - 1, x]) if 0 < y < rows - 1 else zero
            change = b[row, x] - a[row, x]
            j = x // side
            out[0, i, j] += gx * gx
            out[1, i, j] += gx * gy
            out[2, i, j] += gy * gy
            out[3, i, j] += change * change
    out[:, first:last] /= np.float32(side * side)


@njit
def _halved(top, image, out):  # type: ignore[no-untyped-def]
    """Means of 2x2 pixels, of some rows of them."""
    for y in range(out.shape[0]):
        above, below = image[2 * (top + y)], image[2 * (top + y) + 1]
        for x in range(out.shape[1]):
            out[y, x] = np.float32(0.25) * (above[2 * x] + above[2 * x + 1] + below[2 * x] + below[2 * x + 1])


def filtered(images: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """`conv2d` of images (batch, 1, height, width) with few filters (channels, 1, 5, 5), zeros around."""
    grey, taps = images.contiguous().numpy()[:, 0], weight[:, 0].contiguous().numpy()
    height, width = grey.shape[1:]
    out = np.empty((len(grey), len(taps), height, width), np.float32)
    padded = np.zeros((len(grey), height + 4, width + 4), np.float32)
    padded[:, 2:-2, 2:-2] = grey
    by_strips(_filter, len(grey), 1, padded, taps, bias.numpy(), out)
    return torch.from_numpy(out)


@njit
def _filter(first, last, padded, taps, bias, out):  # type: ignore[no-untyped-def]
    channels, height, width = out.shape[1:]
    for i in range(first, last):
        for c in range(channels):
            for y in range(height):
                total = out[i, c, y]
                total[:] = bias[c]
                for dy in range(5):
                    row, tap = padded[i, y + dy], taps[c, dy]
                    for x in range(np.uintp(width)):
                        total[x] += (
                            tap[0] * row[x] + tap[1] * row[x + _1] + tap[2] * row[x + _2] + tap[3] * row[x + _3]
                            + tap[4] * row[x + _4]
                        )  # fmt: skip


def warp_by_cells(images: Tensor, flow: Tensor) -> Tensor:
    """`flow.warp_by_cells`: images (batch, 1, height, width), flow (batch, 2, height / 4, width / 4)."""
    grey, cells = images.contiguous().numpy()[:, 0], flow.contiguous().numpy()
    out = np.empty_like(grey)
    for image, field, result in zip(grey, cells, out, strict=True):
        by_rows(_warp, len(image), image, field, result)
    return torch.from_numpy(out[:, None])


@njit
def _warp(first, last, image, flow, out):  # type: ignore[no-untyped-def]
    height, width = image.shape
    one = np.float32(1)
    us, vs = np.empty(width, np.float32), np.empty(width, np.float32)
    bottom, right = np.uintp(height - 1), np.uintp(width - 1)
    for y in range(np.uintp(first), np.uintp(last)):
        _field_row(np.float32(y), flow, us, vs)
        for x in range(np.uintp(width)):
            x0, x1, wx = _between(np.float32(x) + us[x], right)
            y0, y1, wy = _between(np.float32(y) + vs[x], bottom)
            above = (one - wx) * image[y0, x0] + wx * image[y0, x1]
            below = (one - wx) * image[y1, x0] + wx * image[y1, x1]
            out[y, x] = (one - wy) * above + wy * below


@njit
def _between(at, most):  # type: ignore[no-untyped-def]
    """The two indices around a coordinate, none beyond the border, and the weight of the second."""
    zero = np.float32(0)
    if not at > zero:  # also what is not a number
        at = zero
    elif at > most:
        at = np.float32(most)
    low = np.uintp(at)
    return low, min(low + _1, most), at - np.float32(low)


def mean_around(flow: Tensor, weights: Tensor) -> Tensor:
    """At each cell a mean of a field (batch, 2, rows, columns) over the cells around it (beyond the border those on
    it), with weights (batch, size * size, rows, columns)."""
    field, share = flow.contiguous().numpy(), weights.contiguous().numpy()
    reach = int(share.shape[1] ** 0.5) // 2
    padded = np.pad(field, ((0, 0), (0, 0), (reach, reach), (reach, reach)), "edge")
    out = np.empty_like(field)
    for i in range(len(field)):
        _mean_around(padded[i], share[i], out[i])
    return torch.from_numpy(out)


@njit
def _mean_around(padded, share, out):  # type: ignore[no-untyped-def]
    columns = np.uintp(out.shape[2])
    size = np.uintp(np.sqrt(share.shape[0]))
    for i in range(np.uintp(out.shape[1])):
        u, v = out[0, i], out[1, i]
        u[:] = np.float32(0)
        v[:] = np.float32(0)
        for y in range(size):
            for x in range(size):
                weight, xs, ys = share[y * size + x, i], padded[0, i + y], padded[1, i + y]
                for j in range(columns):
                    u[j] += weight[j] * xs[j + x]
                    v[j] += weight[j] * ys[j + x]


# --- matching -----------------------------------------------------------------------------------------------------


def correlate(prev: Tensor, curr: Tensor, radius: int, least: float | None = None) -> Tensor:
    """`correlation.correlate` of features (batch, channels, height, width); with ``least``, its `cosines`."""
    batch, _, height, width = prev.shape
    out = np.empty((batch, (2 * radius + 1) ** 2, height, width), np.float32)
    pair = [np.ascontiguousarray(features.permute(0, 2, 3, 1).numpy()) for features in (prev, curr)]
    for i in range(batch):
        by_rows(
            _correlate, height, pair[0][i], pair[1][i], radius, least is not None, np.float32(least or 0), out[i]
        )
    return torch.from_numpy(out)


@njit
def _correlate(first, last, prev, curr, radius, normalise, least, out):  # type: ignore[no-untyped-def]
    """Products of each cell with those around it, of features (height, width, channels)."""
    height, width, channels = prev.shape
    size = np.uintp(2 * radius + 1)
    # Whole vectors only: what is left over of a row costs as much as the rest of it. Channels by four, likewise.
    whole, planes = np.uintp(-(-width // 32) * 32), np.uintp(-(-channels // 4) * 4)
    here = np.zeros((last - first, planes, whole), np.float32)
    there = np.zeros((last - first + 2 * radius, planes, whole + size - _1), np.float32)  # zeros around the image
    top = first - radius
    _planes(first, last, first, prev, normalise, least, 0, here)
    _planes(max(0, top), min(height, last + radius), top, curr, normalise, least, radius, there)
    sums = np.empty((size, whole), np.float32)
    for i in range(np.uintp(last - first)):
        for dy in range(size):
            sums[:] = np.float32(0)
            for c in range(_0, planes, _4):
                a0, a1, a2, a3 = here[i, c], here[i, c + _1], here[i, c + _2], here[i, c + _3]
                row = there[i + dy]
                b0, b1, b2, b3 = row[c], row[c + _1], row[c + _2], row[c + _3]
                for dx in range(size):
                    total = sums[dx]
                    for j in range(whole):
                        total[j] += (
                            a0[j] * b0[j + dx] + a1[j] * b1[j + dx] + a2[j] * b2[j + dx] + a3[j] * b3[j + dx]
                        )
            for dx in range(size):
                for j in range(np.uintp(width)):
                    out[dy * size + dx, i + np.uintp(first), j] = sums[dx, j]


@njit
def _planes(first, last, top, features, normalise, least, margin, out):  # type: ignore[no-untyped-def]
    """Some rows of features (height, width, channels), to length 1 if wanted, as (rows from ``top`` on, channels,
    columns after a margin)."""
    width, channels = np.uintp(features.shape[1]), np.uintp(features.shape[2])
    left, factor = np.uintp(margin), np.float32(1)
    for i in range(first, last):
        row, result = features[i], out[i - top]
        for j in range(width):
            if normalise:
                square = least
                for c in range(channels):
                    square += row[j, c] * row[j, c]
                factor = np.float32(1) / np.sqrt(square)
            for c in range(channels):
                result[c, j + left] = row[j, c] * factor


# --- Lucas-Kanade -------------------------------------------------------------------------------------------------


def refine(
    images: Tensor, predicted: Tensor, flow: Tensor, damping: float, outlier: float, steps: int
) -> tuple[Tensor, Tensor]:
    """`FlowNet._refine`: the refined residual and its evidence.

    Args:
        images: (2 batch, channels, height, width). predicted, flow: (batch, 2, height / 4, width / 4).
        damping, outlier: the learned ones. steps: of Lucas-Kanade.
    """
    before, after = images.chunk(2)
    here, there = before.contiguous().numpy(), np.ascontiguousarray(after.permute(0, 2, 3, 1).numpy())
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
    channels, height, width = here.shape
    rows, columns = height // 4, width // 4
    gradient = np.empty((height, 2, channels, width), np.float32)
    hessian = np.empty((rows, columns, 4), np.float32)
    evidence = np.empty((8, rows, columns), np.float32)
    flow = start.copy()
    total = np.empty_like(flow)
    by_rows(_hessians, rows, here, gradient, hessian)
    pooled = np.empty((rows, columns, 4), np.float32)
    for step in range(steps):
        np.add(predicted, flow, out=total)
        learned = np.float32(damping), np.float32(outlier)
        by_rows(_step, rows, here, there, gradient, hessian, total, *learned, pooled, flow)
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
def _hessians(first, last, here, gradient, hessian):  # type: ignore[no-untyped-def]
    """Gradients, and their products around each cell of some rows (at the edge of a strip twice, but alike)."""
    top, bottom = max(0, 2 * first - 1), min(here.shape[1] // 2, 2 * last + 1)  # of blocks of 2x2 that these see
    blocks = np.empty((bottom - top, here.shape[2] // 2, 4), np.float32)
    _gradients(top, bottom, here, gradient, blocks)
    _pool(first, last, top, blocks, hessian)


@njit
def _step(first, last, here, there, gradient, hessian, total, damping, outlier, pooled, flow):  # type: ignore[no-untyped-def]
    """One step at each cell of some rows, from the flow ``total`` of all cells; ``flow`` changes."""
    top, bottom = max(0, 2 * first - 1), min(here.shape[1] // 2, 2 * last + 1)
    blocks = np.empty((bottom - top, here.shape[2] // 2, 4), np.float32)
    _misfits(top, bottom, here, there, gradient, total, outlier, blocks)
    _pool(first, last, top, blocks, pooled)
    _update(first, last, hessian, pooled, damping, flow)


@njit
def _gradients(first, last, here, gradient, blocks):  # type: ignore[no-untyped-def]
    """Central differences, and their products summed over 2x2 pixels."""
    channels, height, width = np.uintp(here.shape[0]), np.uintp(here.shape[1]), np.uintp(here.shape[2])
    half, zero = np.float32(0.5), np.float32(0)
    xx, xy, yy = np.empty(width, np.float32), np.empty(width, np.float32), np.empty(width, np.float32)
    for i in range(np.uintp(first), np.uintp(last)):
        xx[:], xy[:], yy[:] = zero, zero, zero
        for y in (_2 * i, _2 * i + _1):
            for c in range(channels):
                row, gx, gy = here[c, y], gradient[y, 0, c], gradient[y, 1, c]
                gx[0], gx[width - _1], gy[:] = zero, zero, zero
                for x in range(_1, width - _1):
                    gx[x] = (row[x + _1] - row[x - _1]) * half
                if _0 < y < height - _1:
                    above, below = here[c, y - _1], here[c, y + _1]
                    for x in range(width):
                        gy[x] = (below[x] - above[x]) * half
                for x in range(width):
                    xx[x] += gx[x] * gx[x]
                    xy[x] += gx[x] * gy[x]
                    yy[x] += gy[x] * gy[x]
        sums = blocks[i - np.uintp(first)]
        for j in range(width // _2):
            sums[j, 0] = xx[_2 * j] + xx[_2 * j + _1]
            sums[j, 1] = xy[_2 * j] + xy[_2 * j + _1]
            sums[j, 2] = yy[_2 * j] + yy[_2 * j + _1]
            sums[j, 3] = 4


@njit
def _pool(first, last, start, blocks, out):  # type: ignore[no-untyped-def]
    """Mean of the 8x8 pixels around each cell of 4x4; sums over 2x2 are given, from row ``start`` on."""
    rows, columns = blocks.shape[0], blocks.shape[1]
    for i in range(first, last):
        top, bottom = max(0, 2 * i - 1 - start), min(rows, 2 * i + 3 - start)
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
    channels, height, width = np.uintp(here.shape[0]), np.uintp(here.shape[1]), np.uintp(here.shape[2])
    zero, one = np.float32(0), np.float32(1)
    us, vs = np.empty(width, np.float32), np.empty(width, np.float32)
    errors = np.empty((channels, width), np.float32)
    energy, trust = np.empty(width, np.float32), np.empty(width, np.float32)
    bx, by = np.empty(width, np.float32), np.empty(width, np.float32)
    sums = np.empty((4, width), np.float32)
    for i in range(np.uintp(first), np.uintp(last)):
        sums[:] = zero
        for y in (_2 * i, _2 * i + _1):
            _field_row(np.float32(y), total, us, vs)
            for x in range(width):
                x0, x1, wx = _between(np.float32(x) + us[x], width - _1)
                y0, y1, wy = _between(np.float32(y) + vs[x], height - _1)
                w00, w01 = (one - wy) * (one - wx), (one - wy) * wx
                w10, w11 = wy * (one - wx), wy * wx
                for c in range(channels):
                    e = w00 * there[y0, x0, c] + w01 * there[y0, x1, c]
                    errors[c, x] = e + w10 * there[y1, x0, c] + w11 * there[y1, x1, c]
            energy[:], bx[:], by[:] = zero, zero, zero
            for c in range(channels):
                e, row, gx, gy = errors[c], here[c, y], gradient[y, 0, c], gradient[y, 1, c]
                for x in range(width):
                    e[x] -= row[x]
                    energy[x] += e[x] * e[x]
                    bx[x] += gx[x] * e[x]
                    by[x] += gy[x] * e[x]
            for x in range(width):
                trust[x] = outlier / (outlier + energy[x])
                sums[0, x] += bx[x] * trust[x]
                sums[1, x] += by[x] * trust[x]
                sums[2, x] += energy[x] * trust[x]
                sums[3, x] += trust[x]
        for j in range(width // _2):
            for k in range(4):
                blocks[i - np.uintp(first), j, k] = sums[k, _2 * j] + sums[k, _2 * j + _1]


@njit
def _field_row(y, total, us, vs):  # type: ignore[no-untyped-def]
    """A field at cells of 4x4, at each pixel of row y, as torch interpolates it (align_corners=False)."""
    _row(y, total[0], us)
    _row(y, total[1], vs)


@njit
def _row(y, cells, out):  # type: ignore[no-untyped-def]
    half, quarter, eighth = np.float32(0.5), np.float32(0.25), np.float32(0.125)
    rows, columns = np.uintp(cells.shape[0]), np.uintp(cells.shape[1])
    y0, y1, wy = _between((y + half) * quarter - half, rows - _1)
    row = np.empty(columns + _2, np.float32)  # of cells, with those at its ends twice
    for j in range(columns):
        row[j + _1] = cells[y0, j] + wy * (cells[y1, j] - cells[y0, j])
    row[_0], row[columns + _1] = row[_1], row[columns]
    for j in range(columns):
        before, here, after = row[j], row[j + _1], row[j + _2]
        x = _4 * j
        out[x] = here + np.float32(3) * eighth * (before - here)
        out[x + _1] = here + eighth * (before - here)
        out[x + _2] = here + eighth * (after - here)
        out[x + _3] = here + np.float32(3) * eighth * (after - here)


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
