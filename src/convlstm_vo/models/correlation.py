"""Matching of two feature maps: how alike is each cell to the cells around it in the other map?"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from convlstm_vo.models import kernels

_BLOCK = 8
_LEAST_SQUARE = 1e-6  # added to the square of a feature's length


def correlate(prev: Tensor, curr: Tensor, radius: int) -> Tensor:
    """Dot products of each cell of ``prev`` with the cells of ``curr`` around the same place.

    Computed as matrix products of blocks of 8x8 cells with their neighbourhoods, of which the wanted entries are
    then taken: about four times faster on a CPU than one product for each displacement.

    Args:
        prev: features (batch, channels, height, width).
        curr: features of the same shape.
        radius: largest displacement, in cells; beyond the border is zero.

    Returns:
        (batch, (2 radius + 1)^2, height, width); displacements row by row, from (-radius, -radius) as (y, x) on.
    """
    if kernels.usable(prev, curr):
        return kernels.correlate(prev, curr, radius)
    batch, _, height, width = prev.shape
    rows, columns = -(-height // _BLOCK), -(-width // _BLOCK)
    reach = _BLOCK + 2 * radius
    below, right = rows * _BLOCK - height, columns * _BLOCK - width
    queries = _windows(F.pad(prev, (0, right, 0, below)), rows, columns, _BLOCK)
    keys = _windows(F.pad(curr, (radius, radius + right, radius, radius + below)), rows, columns, reach)
    products = torch.bmm(queries, keys.transpose(1, 2))  # (batch * blocks, 64, reach^2)
    matches = _displaced(products, radius)  # (batch * blocks, 8, 8, 2 radius + 1, 2 radius + 1)
    matches = matches.unflatten(0, (batch, rows, columns)).flatten(5).permute(0, 5, 1, 3, 2, 4)
    return matches.reshape(batch, -1, rows * _BLOCK, columns * _BLOCK)[:, :, :height, :width]


def cosines(prev: Tensor, curr: Tensor, radius: int) -> Tensor:
    """`correlate` of features of length 1: the cosines of the angles between them; of no features, 0."""
    with torch.autocast(prev.device.type, enabled=False):  # which would multiply them in bfloat16 all the same
        return correlate(_unit(prev.float()), _unit(curr.float()), radius)


def matched(
    prev: Tensor, curr: Tensor, radius: int, sharpness: Tensor, more: Sequence[Tensor] = ()
) -> tuple[Tensor, Tensor]:
    """`cosines`, the features of ``prev``, `expected_displacement` and ``more`` side by side, in the features'
    precision; and the displacement, (batch, 2, height, width)."""
    if kernels.usable(prev, curr, *more, sharpness, half=True):
        rest = [part.float() for part in more]
        both, guess = kernels.matched(prev.float(), curr.float(), radius, _LEAST_SQUARE, float(sharpness), rest)
        return both.to(prev.dtype), guess
    matches = cosines(prev, curr, radius)
    guess, unique = expected_displacement(matches, sharpness)
    return together(prev.dtype, matches, prev, guess, unique, *more), guess


def together(dtype: torch.dtype, *parts: Tensor) -> Tensor:
    """Channels side by side, laid out as the convolutions of a CPU want them: they would sort them at each call."""
    if kernels.usable(*parts, half=True):
        return kernels.together([part.float() for part in parts]).to(dtype)
    return torch.cat([part.to(dtype, memory_format=torch.channels_last) for part in parts], 1)


def _unit(features: Tensor) -> Tensor:
    return features * (features * features).sum(1, keepdim=True).add(_LEAST_SQUARE).rsqrt()


def _windows(x: Tensor, rows: int, columns: int, size: int) -> Tensor:
    """Square windows that start at every eighth cell: (batch * rows * columns, size^2, channels)."""
    offsets = torch.arange(size, device=x.device)
    y = (torch.arange(rows, device=x.device)[:, None] * _BLOCK + offsets).flatten()
    z = (torch.arange(columns, device=x.device)[:, None] * _BLOCK + offsets).flatten()
    x = (
        x.permute(0, 2, 3, 1).index_select(1, y).index_select(2, z)
    )  # (batch, rows * size, columns * size, channels)
    x = x.view(x.shape[0], rows, size, columns, size, x.shape[3]).transpose(2, 3)
    return x.reshape(-1, size * size, x.shape[-1])


def _displaced(products: Tensor, radius: int) -> Tensor:
    """Of each cell's products with the whole neighbourhood of its block, those within the radius of the cell.

    Cell (y, x) wants rows y to y + 2 radius and columns x to x + 2 radius of the neighbourhood: a view with strides
    of its own, whose gradient is a copy, where that of an index is a slow sum.

    Args:
        products: (blocks, 64, reach^2), as they leave the matrix product.
        radius: largest displacement.

    Returns:
        (blocks, 8, 8, 2 radius + 1, 2 radius + 1).
    """
    blocks, cells, entries = products.shape
    reach, size = _BLOCK + 2 * radius, 2 * radius + 1
    strides = (cells * entries, _BLOCK * entries + reach, entries + 1, reach, 1)
    if torch.compiler.is_exporting():
        # An exporter writes a view as an index of each entry of each block, more constants than there are weights.
        # The index of one block serves them all.
        one = torch.arange(cells * entries, device=products.device)
        index = one.as_strided((_BLOCK, _BLOCK, size, size), strides[1:]).flatten()
        return products.flatten(1).index_select(1, index).unflatten(1, (_BLOCK, _BLOCK, size, size))
    return products.contiguous().as_strided((blocks, _BLOCK, _BLOCK, size, size), strides)


def expected_displacement(matches: Tensor, sharpness: Tensor) -> tuple[Tensor, Tensor]:
    """Mean displacement under a softmax of the matches, and how concentrated that softmax is.

    Args:
        matches: as `correlate` returns them, (batch, (2 radius + 1)^2, height, width).
        sharpness: factor on the matches, a scalar.

    Returns:
        Displacement (x, y) in cells (batch, 2, height, width), and the sum of squared probabilities
        (batch, 1, height, width), 1 for a unique match.
    """
    size = int(matches.shape[1] ** 0.5)
    probability = torch.softmax(matches.float() * sharpness, 1)
    step = torch.arange(size, device=matches.device, dtype=probability.dtype) - size // 2
    grid = probability.unflatten(1, (size, size))  # (batch, y, x, height, width)
    x = (grid.sum(1) * step[:, None, None]).sum(1)
    y = (grid.sum(2) * step[:, None, None]).sum(1)
    return torch.stack([x, y], 1), (probability * probability).sum(1, keepdim=True)
