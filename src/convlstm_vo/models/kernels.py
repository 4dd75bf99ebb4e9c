"""The inner loops of the default network's flow, fused for a CPU: images, matching, Lucas-Kanade and the last mean.

They do exactly what the torch code in `flow.py` does (those of `solver_kernels.py`, what that in `solver.py` does),
which stays the definition, carries the gradients and runs on other devices; the tests hold them against it. In
torch a frame costs some thousand small operations and passes over full images; compiled once (some seconds, kept on
disk) they cost a tenth.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
CHANNELS = 4  # that Lucas-Kanade can take; others are torch's


def usable(*tensors: Tensor, differentiable: bool = False, half: bool = False) -> bool:
    """Whether the kernels can take these: float32 on the CPU, no export going on, no gradient wanted of them.

    Args:
        differentiable: the kernels are those of `kernel_gradients.py`, of which gradients may be wanted.
        half: bfloat16 will do, too; they are made float32 of.
    """
    if torch.compiler.is_compiling() or torch.onnx.is_in_onnx_export():
        return False
    wanted = torch.is_grad_enabled() and not differentiable
    kinds = (torch.float32, torch.bfloat16) if half else (torch.float32,)
    return all(t.device.type == "cpu" and t.dtype in kinds and not (wanted and t.requires_grad) for t in tensors)


def compiled() -> bool:
    """Whether this machine has compiled the kernels before; if not, the first frame takes up to a minute."""
    stats = getattr(_step, "stats", None)  # None where a user has switched compiling off
    if stats is None:
        return True
    changed = Path(__file__).stat().st_mtime  # what an older version has left is compiled anew
    return any(index.stat().st_mtime >= changed for index in Path(stats.cache_path).glob("kernels._step-*.nbi"))


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
    height, width = np.uintp(image.shape[0]), np.uintp(image.shape[1])
    us, vs = np.empty(width, np.float32), np.empty(width, np.float32)
    corner, shares = np.empty(width, np.int32), np.empty((4, width), np.float32)
    w00, w01, w10, w11 = shares[0], shares[1], shares[2], shares[3]
    pixels = image.ravel()
    for y in range(np.uintp(first), np.uintp(last)):
        _field_row(np.float32(y), flow, us, vs)
        _corners(np.float32(y), us, vs, height, width, corner, shares)
        for x in range(width):
            p = np.uintp(corner[x])
            above = w00[x] * pixels[p] + w01[x] * pixels[p + _1]
            out[y, x] = above + w10[x] * pixels[p + width] + w11[x] * pixels[p + width + _1]


def warp(features: Tensor, flow: Tensor) -> Tensor:
    """`flow.warp` of features (batch, channels, height, width) by a flow (batch, 2, height, width)."""
    cells, field = _cells(features), flow.contiguous().numpy()
    out = np.empty_like(cells)
    for i in range(len(cells)):
        by_rows(_warp_features, cells.shape[1], cells[i], field[i], out[i])
    return torch.from_numpy(out).permute(0, 3, 1, 2)


@njit
def _warp_features(first, last, features, flow, out):  # type: ignore[no-untyped-def]
    height, width = np.uintp(features.shape[0]), np.uintp(features.shape[1])
    corner, shares = np.empty(width, np.int32), np.empty((4, width), np.float32)
    cells = features.reshape(height * width, features.shape[2])
    for y in range(np.uintp(first), np.uintp(last)):
        _corners(np.float32(y), flow[0, y], flow[1, y], height, width, corner, shares)
        for x in range(width):
            p = np.uintp(corner[x])
            a, b, c, d = cells[p], cells[p + _1], cells[p + width], cells[p + width + _1]
            w00, w01, w10, w11 = shares[0, x], shares[1, x], shares[2, x], shares[3, x]
            for k in range(np.uintp(features.shape[2])):
                out[y, x, k] = w00 * a[k] + w01 * b[k] + w10 * c[k] + w11 * d[k]


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


def blend(flow: Tensor, logits: Tensor) -> Tensor:
    """`flow.blend`: flow (batch, 2, rows, columns), logits (batch, taps, rows, columns)."""
    field, told = flow.contiguous().numpy(), logits.permute(0, 2, 3, 1).numpy()
    reach = int(told.shape[3] ** 0.5) // 2
    padded = np.pad(field, ((0, 0), (0, 0), (reach, reach), (reach, reach)), "edge")
    out = np.empty_like(field)
    for i in range(len(field)):
        by_rows(_blend, out.shape[2], padded[i], told[i], out[i])
    return torch.from_numpy(out)


@njit
def _blend(first, last, padded, logits, out):  # type: ignore[no-untyped-def]
    columns, taps = np.uintp(out.shape[2]), np.uintp(logits.shape[2])
    size = np.uintp(np.sqrt(taps))
    most, total = np.empty(columns, np.float32), np.empty(columns, np.float32)
    shares, power = np.empty((taps, columns), np.float32), np.empty(columns, np.int32)
    for i in range(np.uintp(first), np.uintp(last)):
        u, v = out[0, i], out[1, i]
        most[:], total[:], u[:], v[:] = -np.inf, np.float32(0), np.float32(0), np.float32(0)
        for j in range(columns):
            for k in range(taps):
                shares[k, j] = logits[i, j, k]
        for k in range(taps):
            for j in range(columns):
                most[j] = max(most[j], shares[k, j])
        for k in range(taps):
            share, xs, ys = shares[k], padded[0, i + k // size], padded[1, i + k // size]
            for j in range(columns):
                share[j] -= most[j]
            _exponential(share, power)
            for j in range(columns):
                total[j] += share[j]
                u[j] += share[j] * xs[j + k % size]
                v[j] += share[j] * ys[j + k % size]
        for j in range(columns):
            u[j] /= total[j]
            v[j] /= total[j]


# --- matching -----------------------------------------------------------------------------------------------------


def correlate(prev: Tensor, curr: Tensor, radius: int) -> Tensor:
    """`correlation.correlate` of features (batch, channels, height, width)."""
    batch, _, height, width = prev.shape
    out = np.empty((batch, (2 * radius + 1) ** 2, height, width), np.float32)
    for before, after, result in zip(_cells(prev), _cells(curr), out, strict=True):
        by_rows(_correlate, height, before, after, radius, False, np.float32(0), result)
    return torch.from_numpy(out)


@njit
def _correlate(first, last, prev, curr, radius, normalise, least, out):  # type: ignore[no-untyped-def]
    """Products of each cell with those around it, of features (height, width, channels), or their cosines."""
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


def matched(
    prev: Tensor, curr: Tensor, radius: int, least: float, sharpness: float, more: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """`correlation.matched` of features (batch, channels, height, width)."""
    batch, channels, height, width = prev.shape
    count = (2 * radius + 1) ** 2
    features, others = (_cells(x) for x in (prev, curr))
    whole = np.empty((batch, height, width, count + channels + 3 + sum(part.shape[1] for part in more)), np.float32)
    matches, expected = (np.empty((batch, n, height, width), np.float32) for n in (count, 3))
    for i in range(batch):
        by_rows(
            _match, height, features[i], others[i], radius, np.float32(least), np.float32(sharpness), matches[i],
            expected[i], whole[i],
        )  # fmt: skip
        _place([part[i] for part in more], count + channels + 3, whole[i])
    return torch.from_numpy(whole).permute(0, 3, 1, 2), torch.from_numpy(expected)[:, :2]


@njit
def _match(first, last, prev, curr, radius, least, sharpness, matches, expected, out):  # type: ignore[no-untyped-def]
    _correlate(first, last, prev, curr, radius, True, least, matches)
    _expect(first, last, matches, sharpness, expected)
    _place_planes(first, last, matches, 0, out)
    _place_cells(first, last, prev, len(matches), out)
    _place_planes(first, last, expected, len(matches) + prev.shape[2], out)


def _cells(features: Tensor) -> NDArray[np.float32]:
    """(batch, channels, height, width) as (batch, height, width, channels), close together."""
    return np.ascontiguousarray(features.permute(0, 2, 3, 1).numpy())


@njit
def _expect(first, last, matches, sharpness, out):  # type: ignore[no-untyped-def]
    """Mean displacement in x and in y under a softmax, and the sum of its squares."""
    width, count = np.uintp(out.shape[2]), np.uintp(matches.shape[0])
    size = np.uintp(np.sqrt(count))
    radius = np.float32(size // _2)
    most, total, share = np.empty(width, np.float32), np.empty(width, np.float32), np.empty(width, np.float32)
    power = np.empty(width, np.int32)
    for i in range(np.uintp(first), np.uintp(last)):
        most[:], total[:], out[:, i] = -np.inf, np.float32(0), np.float32(0)
        x, y, squares = out[0, i], out[1, i], out[2, i]
        for k in range(count):
            row = matches[k, i]
            for j in range(width):
                most[j] = max(most[j], sharpness * row[j])
        for k in range(count):
            row = matches[k, i]
            for j in range(width):
                share[j] = sharpness * row[j] - most[j]
            _exponential(share, power)
            down, right = np.float32(k // size) - radius, np.float32(k % size) - radius
            for j in range(width):
                total[j] += share[j]
                x[j] += right * share[j]
                y[j] += down * share[j]
                squares[j] += share[j] * share[j]
        for j in range(width):
            x[j] /= total[j]
            y[j] /= total[j]
            squares[j] /= total[j] * total[j]


@njit
def _exponential(values, power):  # type: ignore[no-untyped-def]
    """exp of a row of numbers that are 0 or less, in place, as exact as these are; ``power`` is work space. That of
    numba takes them one by one.

    2 to the whole part is made of a float's exponent bits, 2 to the rest is a polynomial (Chebyshev).
    """
    scale = power.view(np.float32)
    for j in range(np.uintp(len(values))):
        x = max(values[j] * np.float32(1.4426950408889634), np.float32(-126))
        whole = np.floor(x)
        rest = x - whole
        power[j] = (np.int32(whole) + np.int32(127)) << np.int32(23)
        p = np.float32(0.000218657848)
        p = p * rest + np.float32(0.00123913318)
        p = p * rest + np.float32(0.00968418631)
        p = p * rest + np.float32(0.0554806302)
        p = p * rest + np.float32(0.240230454)
        p = p * rest + np.float32(0.693146933)
        values[j] = p * rest + np.float32(1)
    for j in range(np.uintp(len(values))):
        values[j] *= scale[j]


# --- what convolutions see ----------------------------------------------------------------------------------------


def together(parts: Sequence[Tensor]) -> Tensor:
    """`correlation.together` of parts (batch, channels, rows, columns)."""
    batch, _, rows, columns = parts[0].shape
    if any((len(part), *part.shape[2:]) != (batch, rows, columns) for part in parts):
        raise ValueError(f"parts of shapes {[tuple(part.shape) for part in parts]} do not lie side by side")
    out = np.empty((batch, rows, columns, sum(part.shape[1] for part in parts)), np.float32)
    for i in range(batch):
        _place([part[i] for part in parts], 0, out[i])
    return torch.from_numpy(out).permute(0, 3, 1, 2)


def _place(parts: Sequence[Tensor], at: int, out: NDArray[np.float32]) -> None:
    """Parts (channels, rows, columns) side by side in (rows, columns, channels), from a channel on."""
    for part in parts:
        cells = part.permute(1, 2, 0)
        if cells.is_contiguous():
            _place_cells(0, len(out), cells.numpy(), at, out)
        else:
            _place_planes(0, len(out), part.contiguous().numpy(), at, out)
        at += len(part)


@njit
def _place_cells(first, last, cells, at, out):  # type: ignore[no-untyped-def]
    width, channels, left = np.uintp(out.shape[1]), np.uintp(cells.shape[2]), np.uintp(at)
    for y in range(np.uintp(first), np.uintp(last)):
        for x in range(width):
            for c in range(channels):
                out[y, x, left + c] = cells[y, x, c]


@njit
def _place_planes(first, last, planes, at, out):  # type: ignore[no-untyped-def]
    width, channels, left = np.uintp(out.shape[1]), np.uintp(planes.shape[0]), np.uintp(at)
    for y in range(np.uintp(first), np.uintp(last)):
        for start in range(_0, width, np.uintp(16)):  # as many cells as stay at hand
            for c in range(channels):
                row = planes[c, y]
                for x in range(start, min(start + np.uintp(16), width)):
                    out[y, x, left + c] = row[x]


# --- Lucas-Kanade -------------------------------------------------------------------------------------------------


def refine(
    images: Tensor, predicted: Tensor, flow: Tensor, damping: float, outlier: float, steps: int
) -> tuple[Tensor, Tensor]:
    """`FlowNet._refine`: the refined residual and its evidence.

    Args:
        images: (2 batch, 4, height, width). predicted, flow: (batch, 2, height / 4, width / 4).
        damping, outlier: the learned ones. steps: of Lucas-Kanade.
    """
    before, after = images.chunk(2)
    here, there = before.contiguous().numpy(), after.contiguous().numpy()
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
    pixels = np.empty((height, width, channels), np.float32)  # of `there`, a pixel's channels together
    by_rows(_hessians, rows, here, there, gradient, hessian, pixels)
    pooled = np.empty((rows, columns, 4), np.float32)
    for step in range(steps):
        np.add(predicted, flow, out=total)
        learned = np.float32(damping), np.float32(outlier)
        by_rows(_step, rows, here, pixels, gradient, hessian, total, *learned, pooled, flow)
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
def _hessians(first, last, here, there, gradient, hessian, pixels):  # type: ignore[no-untyped-def]
    """Gradients, and their products around each cell of some rows (at the edge of a strip twice, but alike); and
    these rows of the other image, channels last."""
    top, bottom = max(0, 2 * first - 1), min(here.shape[1] // 2, 2 * last + 1)  # of blocks of 2x2 that these see
    blocks = np.empty((bottom - top, here.shape[2] // 2, 4), np.float32)
    _gradients(top, bottom, here, gradient, blocks)
    _pool(first, last, top, blocks, hessian)
    _place_planes(4 * first, 4 * last, there, 0, pixels)


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
    sums = np.empty((columns, 4), np.float32)
    for i in range(first, last):
        top, bottom = max(0, 2 * i - 1 - start), min(rows, 2 * i + 3 - start)
        sums[:] = np.float32(0)
        for y in range(top, bottom):
            sums += blocks[y]
        for j in range(out.shape[1]):
            left, right = max(0, 2 * j - 1), min(columns, 2 * j + 3)
            a, b, c, d = np.float32(0), np.float32(0), np.float32(0), np.float32(0)
            for x in range(np.uintp(left), np.uintp(right)):
                a += sums[x, 0]
                b += sums[x, 1]
                c += sums[x, 2]
                d += sums[x, 3]
            share = np.float32(1) / np.float32(4 * (bottom - top) * (right - left))
            out[i, j, 0] = a * share
            out[i, j, 1] = b * share
            out[i, j, 2] = c * share
            out[i, j, 3] = d * share


@njit
def _misfits(first, last, here, there, gradient, total, outlier, blocks):  # type: ignore[no-untyped-def]
    """Gradient times error, energy and trust of the second image warped onto the first, summed over 2x2 pixels.

    Indices are unsigned, or numba asks at each access whether one counts from the end; and the four channels are
    written out, or it reads a pixel's one by one.
    """
    height, width = np.uintp(here.shape[1]), np.uintp(here.shape[2])
    zero, pixels = np.float32(0), there.reshape(height * width, 4)
    us, vs = np.empty(width, np.float32), np.empty(width, np.float32)
    corner, shares = np.empty(width, np.int32), np.empty((4, width), np.float32)
    errors, sums = np.empty((width, 4), np.float32), np.empty((4, width), np.float32)
    for i in range(np.uintp(first), np.uintp(last)):
        sums[:] = zero
        bx, by, energies, trusts = sums[0], sums[1], sums[2], sums[3]
        for y in (_2 * i, _2 * i + _1):
            _field_row(np.float32(y), total, us, vs)
            _corners(np.float32(y), us, vs, height, width, corner, shares)
            for x in range(width):
                p = np.uintp(corner[x])
                a, b, c, d = pixels[p], pixels[p + _1], pixels[p + width], pixels[p + width + _1]
                w00, w01, w10, w11 = shares[0, x], shares[1, x], shares[2, x], shares[3, x]
                errors[x, 0] = w00 * a[0] + w01 * b[0] + w10 * c[0] + w11 * d[0]
                errors[x, 1] = w00 * a[1] + w01 * b[1] + w10 * c[1] + w11 * d[1]
                errors[x, 2] = w00 * a[2] + w01 * b[2] + w10 * c[2] + w11 * d[2]
                errors[x, 3] = w00 * a[3] + w01 * b[3] + w10 * c[3] + w11 * d[3]
            h0, h1, h2, h3 = here[0, y], here[1, y], here[2, y], here[3, y]
            gx, gy = gradient[y, 0], gradient[y, 1]
            gx0, gx1, gx2, gx3 = gx[0], gx[1], gx[2], gx[3]
            gy0, gy1, gy2, gy3 = gy[0], gy[1], gy[2], gy[3]
            for x in range(width):
                e0, e1 = errors[x, 0] - h0[x], errors[x, 1] - h1[x]
                e2, e3 = errors[x, 2] - h2[x], errors[x, 3] - h3[x]
                energy = e0 * e0 + e1 * e1 + e2 * e2 + e3 * e3
                trust = outlier / (outlier + energy)
                bx[x] += (gx0[x] * e0 + gx1[x] * e1 + gx2[x] * e2 + gx3[x] * e3) * trust
                by[x] += (gy0[x] * e0 + gy1[x] * e1 + gy2[x] * e2 + gy3[x] * e3) * trust
                energies[x] += energy * trust
                trusts[x] += trust
        for j in range(width // _2):
            for k in range(4):
                blocks[i - np.uintp(first), j, k] = sums[k, _2 * j] + sums[k, _2 * j + _1]


@njit
def _corners(y, us, vs, height, width, corner, shares):  # type: ignore[no-untyped-def]
    """Of each pixel of row y, moved by (us, vs): the first of the four pixels around it, none beyond the border, as
    an index into the image; and the weights of these (upper left, upper right, lower left, lower right)."""
    zero, one = np.float32(0), np.float32(1)
    right, bottom = np.float32(width - _1), np.float32(height - _1)
    w00, w01, w10, w11 = shares[0], shares[1], shares[2], shares[3]
    for x in range(width):
        u, v = np.float32(x) + us[x], y + vs[x]
        u, v = (u if u > zero else zero), (v if v > zero else zero)  # also what is not a number
        u, v = min(u, right), min(v, bottom)
        left, top = np.int32(min(u, right - one)), np.int32(min(v, bottom - one))
        wx, wy = u - np.float32(left), v - np.float32(top)
        corner[x] = top * np.int32(width) + left
        w00[x], w01[x] = (one - wy) * (one - wx), (one - wy) * wx
        w10[x], w11[x] = wy * (one - wx), wy * wx


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
    """One step of Lucas-Kanade at each cell, of at most two pixels: twice the hyperbolic tangent of its half."""
    columns, one, two = np.uintp(flow.shape[2]), np.float32(1), np.float32(2)
    step, power = np.empty((2, columns), np.float32), np.empty(columns, np.int32)
    fall = np.empty(columns, np.float32)  # exp(-|step|)
    for i in range(np.uintp(first), np.uintp(last)):
        for j in range(columns):
            share = pooled[i, j, 3] + np.float32(1e-3)
            bx, by = pooled[i, j, 0] / share, pooled[i, j, 1] / share
            hxx, hxy, hyy = hessian[i, j, 0] + damping, hessian[i, j, 1], hessian[i, j, 2] + damping
            determinant = hxx * hyy - hxy * hxy
            step[0, j] = (hyy * bx - hxy * by) / determinant
            step[1, j] = (hxx * by - hxy * bx) / determinant
        for k in range(2):
            for j in range(columns):
                fall[j] = -abs(step[k, j])
            _exponential(fall, power)
            for j in range(columns):
                size, s = two * (one - fall[j]) / (one + fall[j]), step[k, j]
                flow[k, i, j] -= size if s > 0 else (-size if s < 0 else s)  # 0, or what is not a number
