"""Compiled kernel 1: which surface each sample of the image sees.

Surfaces are flat quads (a triangle repeats its last corner). A sample's ray r = ((x - cx)/fx, (y - cy)/fy, 1)
passes through a quad where all its edge planes, which contain the camera centre, have r on the inner side; its
inverse depth there is (N . r) / (N . corner), N the normal. Both are linear in x and y, so a row of the image is an
interval, found without clipping, subdivision or any snapping of coordinates: geometry is exact to rounding.
"""

from __future__ import annotations

import math

import numpy as np

from convlstm_vo.world.compiling import strict
from convlstm_vo.world.texels import log2, sample_fast

# Four samples a pixel, each with its own x and y: an edge of any slope has four steps of coverage.
SAMPLE_X = np.array([-0.125, 0.375, -0.375, 0.125])
SAMPLE_Y = np.array([-0.375, -0.125, 0.125, 0.375])
SAMPLES = 4
TILE_H, TILE_W = 8, 16
# Columns of a table of surfaces as one camera sees them. Inverse depth, and texture coordinates divided by depth,
# are linear in the pixel: value = X * x + Y * y + C.
IZ_X, IZ_Y, IZ_C, U_X, U_Y, U_C, U_0, V_X, V_Y, V_C, V_0, TONE, MATERIAL, FRAME, COLUMNS = range(15)
NEAR_M = 0.05
FAR_IZ = 1e-4  # 10 km


@strict
def _to_pixel_plane(n0, n1, n2, fx, fy, cx, cy):  # type: ignore[no-untyped-def]
    """n . ray as a function of the pixel: (X, Y, C)."""
    x, y = n0 / fx, n1 / fy
    return x, y, n2 - x * cx - y * cy


@strict
def _set_bound(edges, i, a, b, c):  # type: ignore[no-untyped-def]
    """Keep the half plane a x + b y + c >= 0 as a bound on x for a given y: (slope, offset, which side)."""
    if a > 1e-14 or a < -1e-14:
        edges[i, 0], edges[i, 1], edges[i, 2] = -b / a, -c / a, 1.0 if a > 0.0 else -1.0
    else:
        edges[i, 0], edges[i, 1], edges[i, 2] = b, c, 0.0


@strict
def _prepare(quad, uv, M, camera, corners, edges, row):  # type: ignore[no-untyped-def]
    """Fill ``edges`` (5, 3) and the geometry of a ``row``; False when the quad cannot be seen at all."""
    fx, fy, cx, cy, height, width = camera[0], camera[1], camera[2], camera[3], camera[4], camera[5]
    behind, left, right, above, below = 0, 0, 0, 0, 0
    for i in range(4):
        p0, p1, p2 = quad[i, 0], quad[i, 1], quad[i, 2]
        x = M[0, 0] * p0 + M[0, 1] * p1 + M[0, 2] * p2 + M[0, 3]
        y = M[1, 0] * p0 + M[1, 1] * p1 + M[1, 2] * p2 + M[1, 3]
        z = M[2, 0] * p0 + M[2, 1] * p1 + M[2, 2] * p2 + M[2, 3]
        corners[i, 0], corners[i, 1], corners[i, 2] = x, y, z
        behind += z < NEAR_M
        left += fx * x < (-0.5 - cx) * z
        right += fx * x > (width - 0.5 - cx) * z
        above += fy * y < (-0.5 - cy) * z
        below += fy * y > (height - 0.5 - cy) * z
    if behind == 4 or left == 4 or right == 4 or above == 4 or below == 4:
        return False
    a0, a1, a2 = corners[1, 0] - corners[0, 0], corners[1, 1] - corners[0, 1], corners[1, 2] - corners[0, 2]
    b0, b1, b2 = corners[2, 0] - corners[0, 0], corners[2, 1] - corners[0, 1], corners[2, 2] - corners[0, 2]
    n0, n1, n2 = a1 * b2 - a2 * b1, a2 * b0 - a0 * b2, a0 * b1 - a1 * b0
    facing = n0 * corners[0, 0] + n1 * corners[0, 1] + n2 * corners[0, 2]
    if abs(facing) < 1e-9:
        return False
    inverse = 1.0 / facing
    row[IZ_X], row[IZ_Y], row[IZ_C] = _to_pixel_plane(n0 * inverse, n1 * inverse, n2 * inverse, fx, fy, cx, cy)
    side = 1.0 if facing > 0 else -1.0
    for i in range(4):
        j = (i + 1) & 3
        e0 = corners[i, 1] * corners[j, 2] - corners[i, 2] * corners[j, 1]
        e1 = corners[i, 2] * corners[j, 0] - corners[i, 0] * corners[j, 2]
        e2 = corners[i, 0] * corners[j, 1] - corners[i, 1] * corners[j, 0]
        a, b, c = _to_pixel_plane(e0 * side, e1 * side, e2 * side, fx, fy, cx, cy)
        _set_bound(edges, i, a, b, c)
    _set_bound(edges, 4, row[IZ_X], row[IZ_Y], row[IZ_C] - FAR_IZ)
    for k in range(2):
        g0, g1, g2 = uv[4 * k], uv[4 * k + 1], uv[4 * k + 2]
        t0 = M[0, 0] * g0 + M[0, 1] * g1 + M[0, 2] * g2
        t1 = M[1, 0] * g0 + M[1, 1] * g1 + M[1, 2] * g2
        t2 = M[2, 0] * g0 + M[2, 1] * g1 + M[2, 2] * g2
        base = U_X + 4 * k
        row[base], row[base + 1], row[base + 2] = _to_pixel_plane(t0, t1, t2, fx, fy, cx, cy)
        row[base + 3] = uv[4 * k + 3] - (t0 * corners[0, 0] + t1 * corners[0, 1] + t2 * corners[0, 2])
    return True


@strict
def _rows(corners, camera):  # type: ignore[no-untyped-def]
    """First and last image row that a quad can touch."""
    height = int(camera[4])
    top, bottom = 1e9, -1e9
    for i in range(4):
        z = corners[i, 2]
        if z < NEAR_M:
            return 0, height - 1
        y = camera[1] * corners[i, 1] / z + camera[3]
        top, bottom = min(top, y), max(bottom, y)
    return max(0, math.ceil(top - 0.5)), min(height - 1, math.floor(bottom + 0.5))


@strict
def _interval(edges, y, width):  # type: ignore[no-untyped-def]
    """The x interval of a quad on the line y; empty when the first is greater."""
    low, high = -1.0, width + 0.0
    for i in range(5):
        bound, side = edges[i, 0] * y + edges[i, 1], edges[i, 2]
        if side > 0.0:
            low = max(low, bound)
        elif side < 0.0:
            high = min(high, bound)
        elif bound < 0.0:
            return 1.0, 0.0
    return low, high


@strict
def _draw_solid(k, edges, row, first, last, inverse_depth, seen):  # type: ignore[no-untyped-def]
    width = inverse_depth.shape[2]
    slope = row[IZ_X]
    for y in range(first, last + 1):
        for s in range(SAMPLES):
            low, high = _interval(edges, y + SAMPLE_Y[s], width)
            begin, end = max(0, math.ceil(low - SAMPLE_X[s])), min(width - 1, math.floor(high - SAMPLE_X[s]))
            start = row[IZ_Y] * (y + SAMPLE_Y[s]) + row[IZ_C] + slope * SAMPLE_X[s]
            for x in range(begin, end + 1):
                iz = np.float32(start + slope * x)
                if iz > inverse_depth[s, y, x]:
                    inverse_depth[s, y, x] = iz
                    seen[s, y, x] = k


@strict
def _mask_level(row, x, y, scale_u, scale_v):  # type: ignore[no-untyped-def]
    """Whole levels of detail of a mask around a pixel."""
    z = 1.0 / max(row[IZ_X] * x + row[IZ_Y] * y + row[IZ_C], FAR_IZ)
    u = (row[U_X] * x + row[U_Y] * y + row[U_C]) * z
    v = (row[V_X] * x + row[V_Y] * y + row[V_C]) * z
    size_u = (abs(row[U_X] - u * row[IZ_X]) + abs(row[U_Y] - u * row[IZ_Y])) * z * scale_u
    size_v = (abs(row[V_X] - v * row[IZ_X]) + abs(row[V_Y] - v * row[IZ_Y])) * z * scale_v
    return int(log2(max(size_u, 1.0)) + 0.3), int(log2(max(size_v, 1.0)) + 0.3)


@strict
def _draw_mask(k, edges, row, first, last, inverse_depth, seen, mask, atlas, textures, low, high):  # type: ignore[no-untyped-def]
    """As `_draw_solid`, where a texture says how many of a pixel's samples the surface covers."""
    width = inverse_depth.shape[2]
    texture, repeat_u, repeat_v = int(mask[0]), mask[1], mask[2]
    scale_u, scale_v = repeat_u * (1 << textures[texture, 1]), repeat_v * (1 << textures[texture, 2])
    begin_level, level_u, level_v = True, 0, 0
    for y in range(first, last + 1):
        begin, end = width, -1
        for s in range(SAMPLES):
            low[s], high[s] = _interval(edges, y + SAMPLE_Y[s], width)
            low[s], high[s] = low[s] - SAMPLE_X[s], high[s] - SAMPLE_X[s]
            if low[s] <= high[s]:
                begin, end = min(begin, math.ceil(low[s])), max(end, math.floor(high[s]))
        begin, end = max(0, begin), min(width - 1, end)
        if begin > end:
            continue
        if begin_level or (y & 15) == 0:
            begin_level = False
            level_u, level_v = _mask_level(row, 0.5 * (begin + end), y, scale_u, scale_v)
        # Depth of sample s is that of the pixel's middle plus a step; if even the nearest is hidden, so are all.
        reach = 0.375 * (abs(row[IZ_X]) + abs(row[IZ_Y]))
        inner_begin, inner_end = (
            max(max(low[0], low[1]), max(low[2], low[3])),
            min(min(high[0], high[1]), min(high[2], high[3])),
        )
        for x in range(begin, end + 1):
            iz = row[IZ_X] * x + row[IZ_Y] * y + row[IZ_C]
            nearest = np.float32(iz + reach)
            if (
                nearest <= inverse_depth[0, y, x]
                and nearest <= inverse_depth[1, y, x]
                and nearest <= inverse_depth[2, y, x]
                and nearest <= inverse_depth[3, y, x]
            ) or iz <= FAR_IZ:
                continue
            z = 1.0 / iz
            u = (row[U_X] * x + row[U_Y] * y + row[U_C]) * z + row[U_0]
            v = (row[V_X] * x + row[V_Y] * y + row[V_C]) * z + row[V_0]
            cover = sample_fast(atlas, textures, texture, u * repeat_u, v * repeat_v, level_u, level_v)
            count = int(cover * (SAMPLES / 255.0) + 0.5)
            if count == 0:
                continue
            inside = inner_begin <= x <= inner_end
            for step in range(count):
                # The order of samples differs between surfaces, so that what stands behind shows through gaps.
                s = (step + k) & 3
                here = np.float32(iz + row[IZ_X] * SAMPLE_X[s] + row[IZ_Y] * SAMPLE_Y[s])
                if here > inverse_depth[s, y, x] and (inside or low[s] <= x <= high[s]):
                    inverse_depth[s, y, x] = here
                    seen[s, y, x] = k


@strict
def _survey(inverse_depth, tiles):  # type: ignore[no-untyped-def]
    """Least inverse depth within each tile of TILE_H x TILE_W pixels: nothing behind it can be seen there."""
    samples, height, width = inverse_depth.shape
    for i in range(tiles.shape[0]):
        for j in range(tiles.shape[1]):
            tiles[i, j] = np.float32(1e9)
    for s in range(samples):
        for y in range(height):
            for j in range(tiles.shape[1]):
                least = tiles[y // TILE_H, j]
                for x in range(j * TILE_W, min((j + 1) * TILE_W, width)):
                    least = min(least, inverse_depth[s, y, x])
                tiles[y // TILE_H, j] = least


@strict
def _hidden(x, y, z, radius, tiles, camera):  # type: ignore[no-untyped-def]
    """Whether a sphere in the camera's frame lies wholly behind what is drawn."""
    near, far = z - radius, z + radius
    if near < 1.0:
        return False
    nearest = 1.0 / near
    left = (x - radius) / (near if x < radius else far) * camera[0] + camera[2]
    right = (x + radius) / (near if x > -radius else far) * camera[0] + camera[2]
    top = (y - radius) / (near if y < radius else far) * camera[1] + camera[3]
    bottom = (y + radius) / (near if y > -radius else far) * camera[1] + camera[3]
    rows, columns = tiles.shape
    i0, i1 = max(0, math.floor(top) // TILE_H), min(rows - 1, math.ceil(bottom) // TILE_H)
    j0, j1 = max(0, math.floor(left) // TILE_W), min(columns - 1, math.ceil(right) // TILE_W)
    for i in range(i0, i1 + 1):
        for j in range(j0, j1 + 1):
            if tiles[i, j] <= nearest:
                return False
    return True


@strict
def rasterise(  # type: ignore[no-untyped-def]
    order,
    ranges,
    spheres,
    frame,
    quads,
    uvs,
    tones,
    materials,
    transforms,
    masks,
    atlas,
    textures,
    camera,
    inverse_depth,
    seen,
    table,
    tiles,
    corners,
    edges,
    low,
    high,
):
    """Find the nearest surface of every sample.

    Args:
        order: (m,) objects to draw, nearest first; ranges: (m, 2) their quads; spheres: (m, 4) around
            each, in the camera's frame; frame: row of transforms by object.
        quads: (n, 4, 3) corners in metres; uvs: (n, 8) gradients and values of texture coordinates.
        transforms: (m, 3, 4) from an object's frame to the camera's. masks: (materials, 3) texture or -1, repeats.
        camera: fx, fy, cx, cy, height, width.
        inverse_depth, seen: outputs (samples, height, width): 1/z (0 for sky) and row of table (-1 for sky).
        table: output (at least n, COLUMNS), the visible quads.
        tiles, corners, edges, low, high: working memory, (height / TILE_H, width / TILE_W) rounded up, (4, 3),
            (5, 3), (samples,), (samples,).

    Returns:
        The number of rows of table in use.
    """
    inverse_depth[:] = 0.0
    seen[:] = -1
    k = 0
    surveyed = False
    for index in range(len(order)):
        thing = order[index]
        if index == 24 or index == 64 or index == 140 or index == 300:
            _survey(inverse_depth, tiles)
            surveyed = True
        x, y, z, radius = spheres[index, 0], spheres[index, 1], spheres[index, 2], spheres[index, 3]
        if surveyed and _hidden(x, y, z, radius, tiles, camera):
            continue
        for q in range(ranges[index, 0], ranges[index, 1]):
            row = table[k]
            if not _prepare(quads[q], uvs[q], transforms[frame[thing]], camera, corners, edges, row):
                continue
            first, last = _rows(corners, camera)
            if first > last:
                continue
            row[TONE], row[MATERIAL], row[FRAME] = tones[q], materials[q], frame[thing]
            mask = masks[materials[q]]
            if mask[0] < 0:
                _draw_solid(k, edges, row, first, last, inverse_depth, seen)
            else:
                _draw_mask(k, edges, row, first, last, inverse_depth, seen, mask, atlas, textures, low, high)
            k += 1
            if k == len(table):
                return k
    return k
