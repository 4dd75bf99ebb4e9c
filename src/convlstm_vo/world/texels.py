"""Reading textures in compiled code: every texture is a ripmap, smaller versions for each axis on its own.

A road seen at a grazing angle is squeezed along one axis only; a ripmap follows that at the price of four times
the memory, so that asphalt keeps its grain across the image while it is averaged along the view. Layout of one
texture of (h, w): a block (2h, 2w) whose cell (j, i) holds the version of (h >> j, w >> i).
"""

from __future__ import annotations

import math

import numpy as np

from convlstm_vo.world.compiling import quick


@quick
def _bilinear(atlas, offset, log_w, log_h, i, j, u, v):  # type: ignore[no-untyped-def]
    """Texture value at (u, v) in repeats, from the version halved i times along u and j times along v."""
    w, h = 1 << (log_w - i), 1 << (log_h - j)
    stride = 2 << log_w
    base = offset + ((2 << log_h) - (2 << (log_h - j))) * stride + (2 << log_w) - (2 << (log_w - i))
    x, y = u * w - 0.5, v * h - 0.5
    x0, y0 = math.floor(x), math.floor(y)
    fx, fy = x - x0, y - y0
    ix, iy = int(x0) & (w - 1), int(y0) & (h - 1)
    jx, jy = (ix + 1) & (w - 1), (iy + 1) & (h - 1)
    row0, row1 = base + iy * stride, base + jy * stride
    top = atlas[row0 + ix] * (1.0 - fx) + atlas[row0 + jx] * fx
    bottom = atlas[row1 + ix] * (1.0 - fx) + atlas[row1 + jx] * fx
    return top * (1.0 - fy) + bottom * fy


@quick
def log2(x):  # type: ignore[no-untyped-def]
    """Logarithm of a positive number to within 0.01, continuous: its exponent, and a parabola for the rest."""
    bits = np.float64(x).view(np.int64)
    rest = np.int64((bits & 0xFFFFFFFFFFFFF) | 0x3FF0000000000000).view(np.float64)
    return (bits >> 52) - 1023 + (rest - 1.0) * (1.0 + 0.343 * (2.0 - rest))


@quick
def _split_level(level, top):  # type: ignore[no-untyped-def]
    """(whole level, share of the next one) of a level of detail, clamped to 0 ... top."""
    if level <= 0.0:
        return 0, 0.0
    if level >= top:
        return top, 0.0
    whole = int(level)
    # Close to a level that level alone will do: it saves fetches, and nothing jumps.
    return whole, min(max((level - whole - 0.3) * (1.0 / 0.4), 0.0), 1.0)


@quick
def sample(atlas, textures, t, u, v, level_u, level_v):  # type: ignore[no-untyped-def]
    """Texture t at (u, v) repeats, 0 to 255, averaged over 2^level_u by 2^level_v of its finest texels."""
    offset, log_w, log_h = textures[t, 0], textures[t, 1], textures[t, 2]
    i, fi = _split_level(level_u, log_w)
    j, fj = _split_level(level_v, log_h)
    # Between the four neighbouring versions on a simplex: three fetches at most, and no jumps either.
    least, most = min(fi, fj), max(fi, fj)
    value = _bilinear(atlas, offset, log_w, log_h, i, j, u, v)
    if most > least:
        di, dj = (1, 0) if fi > fj else (0, 1)
        one = _bilinear(atlas, offset, log_w, log_h, i + di, j + dj, u, v)
        both = 0.0 if least == 0.0 else _bilinear(atlas, offset, log_w, log_h, i + 1, j + 1, u, v)
        value += (most - least) * (one - value) + least * (both - value)
    elif most > 0.0:
        value += most * (_bilinear(atlas, offset, log_w, log_h, i + 1, j + 1, u, v) - value)
    return value


@quick
def sample_fast(atlas, textures, t, u, v, i, j):  # type: ignore[no-untyped-def]
    """Texture t at (u, v) repeats from one whole level, clamped: for masks, where speed matters more."""
    log_w, log_h = textures[t, 1], textures[t, 2]
    i, j = min(max(i, 0), log_w), min(max(j, 0), log_h)
    return _bilinear(atlas, textures[t, 0], log_w, log_h, i, j, u, v)
