"""Reading textures in compiled code: every texture is a ripmap, smaller versions for each axis on its own.

A road seen at a grazing angle is squeezed along one axis only; a ripmap follows that at the price of four times
the memory, so that asphalt keeps its grain across the image while it is averaged along the view. Layout of one
texture of (h, w): a block (2h, 2w) whose cell (j, i) holds the version of (h >> j, w >> i).
"""

from __future__ import annotations

import numpy as np

from convlstm_vo.world.compiling import quick_inline


@quick_inline
def version(textures, t, i, j):  # type: ignore[no-untyped-def]
    """Texture t halved i times along u and j times along v: (where it begins, stride, width, height)."""
    log_w, log_h = textures[t, 1], textures[t, 2]
    stride = 2 << log_w
    base = textures[t, 0] + ((2 << log_h) - (2 << (log_h - j))) * stride + stride - (2 << (log_w - i))
    return base, stride, 1 << (log_w - i), 1 << (log_h - j)


@quick_inline
def bilinear(atlas, base, stride, w, h, u, v):  # type: ignore[no-untyped-def]
    """Texture value at (u, v) in repeats of a version, see `version`."""
    x, y = u * w - 0.5, v * h - 0.5
    x0, y0 = np.floor(x), np.floor(y)
    fx, fy = x - x0, y - y0
    ix, iy = int(x0) & (w - 1), int(y0) & (h - 1)
    jx, jy = (ix + 1) & (w - 1), (iy + 1) & (h - 1)
    row0, row1 = base + iy * stride, base + jy * stride
    # Unsigned, since numba wraps negative indices around.
    a, b = np.int64(atlas[np.uint64(row0 + ix)]), np.int64(atlas[np.uint64(row0 + jx)])
    c, d = np.int64(atlas[np.uint64(row1 + ix)]), np.int64(atlas[np.uint64(row1 + jx)])
    top, bottom = a + (b - a) * fx, c + (d - c) * fx
    return top + (bottom - top) * fy


@quick_inline
def _at_level(atlas, textures, t, i, j, u, v):  # type: ignore[no-untyped-def]
    base, stride, w, h = version(textures, t, i, j)
    return bilinear(atlas, base, stride, w, h, u, v)


@quick_inline
def log2(x):  # type: ignore[no-untyped-def]
    """Logarithm of a positive number to within 0.01, continuous: its exponent, and a parabola for the rest."""
    bits = np.float64(x).view(np.int64)
    rest = np.int64((bits & 0xFFFFFFFFFFFFF) | 0x3FF0000000000000).view(np.float64)
    return (bits >> 52) - 1023 + (rest - 1.0) * (1.0 + 0.343 * (2.0 - rest))


@quick_inline
def _split_level(level, top):  # type: ignore[no-untyped-def]
    """(whole level, share of the next one) of a level of detail, clamped to 0 ... top."""
    if level <= 0.0:
        return 0, 0.0
    if level >= top:
        return top, 0.0
    whole = int(level)
    # Close to a level that level alone will do: it saves fetches, and nothing jumps.
    return whole, min(max((level - whole - 0.3) * (1.0 / 0.4), 0.0), 1.0)


@quick_inline
def sample(atlas, textures, t, u, v, level_u, level_v):  # type: ignore[no-untyped-def]
    """Texture t at (u, v) repeats, 0 to 255, averaged over 2^level_u by 2^level_v of its finest texels."""
    log_w, log_h = textures[t, 1], textures[t, 2]
    i, fi = _split_level(level_u, log_w)
    j, fj = _split_level(level_v, log_h)
    # Between the four neighbouring versions on a simplex: three fetches at most, and no jumps either.
    least, most = min(fi, fj), max(fi, fj)
    value = _at_level(atlas, textures, t, i, j, u, v)
    if most > least:
        di, dj = (1, 0) if fi > fj else (0, 1)
        one = _at_level(atlas, textures, t, i + di, j + dj, u, v)
        both = 0.0 if least == 0.0 else _at_level(atlas, textures, t, i + 1, j + 1, u, v)
        value += (most - least) * (one - value) + least * (both - value)
    elif most > 0.0:
        value += most * (_at_level(atlas, textures, t, i + 1, j + 1, u, v) - value)
    return value
