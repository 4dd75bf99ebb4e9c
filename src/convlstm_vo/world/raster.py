"""Compiled kernel 1: which surface each sample of the image sees.

Surfaces are flat quads (a triangle repeats its last corner). A sample's ray r = ((x - cx)/fx, (y - cy)/fy, 1)
passes through a quad where all its edge planes, which contain the camera centre, have r on the inner side; its
inverse depth there is (N . r) / (N . corner), N the normal. Both are linear in x and y, so a row of the image is an
interval, found without clipping, subdivision or any snapping of coordinates: geometry is exact to rounding.
"""

from __future__ import annotations

import math

import numpy as np

from convlstm_vo.world.compiling import strict, strict_inline
from convlstm_vo.world.texels import bilinear, log2, version

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


@strict_inline
def _to_pixel_plane(n0, n1, n2, fx, fy, cx, cy):  # type: ignore[no-untyped-def]
    """n . ray as a function of the pixel: (X, Y, C)."""
    x, y = n0 / fx, n1 / fy
    return x, y, n2 - x * cx - y * cy


@strict_inline
def _set_bound(edges, i, a, b, c, width):  # type: ignore[no-untyped-def]
    """Keep the half plane a x + b y + c >= 0 as bounds on x for a given y; returns 1 if it bounds no x, else 0.

    Columns of edges: slope and offset of the least x, of the greatest x, and of what must not be negative.
    """
    edges[i, 0], edges[i, 1], edges[i, 2], edges[i, 3], edges[i, 4], edges[i, 5] = 0.0, -1.0, 0.0, width, 0.0, 0.0
    if a > 1e-14:
        edges[i, 0], edges[i, 1] = -b / a, -c / a
    elif a < -1e-14:
        edges[i, 2], edges[i, 3] = -b / a, -c / a
    else:
        edges[i, 4], edges[i, 5] = b, c
        return 1.0
    return 0.0


@strict_inline
def _prepare(quad, uv, M, camera, corners, edges, row):  # type: ignore[no-untyped-def]
    """Fill ``edges`` (6, 6) and the geometry of a ``row``; False when the quad cannot be seen at all.

    The last row of edges says how many of the others bound no x.
    """
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
    flat = 0.0
    for i in range(4):
        j = (i + 1) & 3
        e0 = corners[i, 1] * corners[j, 2] - corners[i, 2] * corners[j, 1]
        e1 = corners[i, 2] * corners[j, 0] - corners[i, 0] * corners[j, 2]
        e2 = corners[i, 0] * corners[j, 1] - corners[i, 1] * corners[j, 0]
        a, b, c = _to_pixel_plane(e0 * side, e1 * side, e2 * side, fx, fy, cx, cy)
        flat += _set_bound(edges, i, a, b, c, width)
    flat += _set_bound(edges, 4, row[IZ_X], row[IZ_Y], row[IZ_C] - FAR_IZ, width)
    edges[5, 0] = flat
    for k in range(2):
        g0, g1, g2 = uv[4 * k], uv[4 * k + 1], uv[4 * k + 2]
        t0 = M[0, 0] * g0 + M[0, 1] * g1 + M[0, 2] * g2
        t1 = M[1, 0] * g0 + M[1, 1] * g1 + M[1, 2] * g2
        t2 = M[2, 0] * g0 + M[2, 1] * g1 + M[2, 2] * g2
        base = U_X + 4 * k
        row[base], row[base + 1], row[base + 2] = _to_pixel_plane(t0, t1, t2, fx, fy, cx, cy)
        row[base + 3] = uv[4 * k + 3] - (t0 * corners[0, 0] + t1 * corners[0, 1] + t2 * corners[0, 2])
    return True


@strict_inline
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


@strict_inline
def _interval(edges, y, width):  # type: ignore[no-untyped-def]
    """The x interval of a quad on the line y; empty when the first is greater."""
    if edges[5, 0] > 0.0:
        for i in range(5):
            if edges[i, 4] * y + edges[i, 5] < 0.0:
                return 1.0, 0.0
    low, high = -1.0, width + 0.0
    for i in range(5):
        low, high = max(low, edges[i, 0] * y + edges[i, 1]), min(high, edges[i, 2] * y + edges[i, 3])
    return low, high


@strict
def _draw_solid(k, edges, row, first, last, inverse_depth, seen):  # type: ignore[no-untyped-def]
    """Draw a quad wherever it is nearest (indices are unsigned, since numba wraps negative ones around)."""
    width = inverse_depth.shape[1]
    slope, down, constant = row[IZ_X], row[IZ_Y], row[IZ_C]
    for y in range(first, last + 1):
        low_0, high_0 = _interval(edges, y + SAMPLE_Y[0], width)
        low_1, high_1 = _interval(edges, y + SAMPLE_Y[1], width)
        low_2, high_2 = _interval(edges, y + SAMPLE_Y[2], width)
        low_3, high_3 = _interval(edges, y + SAMPLE_Y[3], width)
        begin_0, end_0 = math.ceil(low_0 - SAMPLE_X[0]), math.floor(high_0 - SAMPLE_X[0])
        begin_1, end_1 = math.ceil(low_1 - SAMPLE_X[1]), math.floor(high_1 - SAMPLE_X[1])
        begin_2, end_2 = math.ceil(low_2 - SAMPLE_X[2]), math.floor(high_2 - SAMPLE_X[2])
        begin_3, end_3 = math.ceil(low_3 - SAMPLE_X[3]), math.floor(high_3 - SAMPLE_X[3])
        start_0 = down * (y + SAMPLE_Y[0]) + constant + slope * SAMPLE_X[0]
        start_1 = down * (y + SAMPLE_Y[1]) + constant + slope * SAMPLE_X[1]
        start_2 = down * (y + SAMPLE_Y[2]) + constant + slope * SAMPLE_X[2]
        start_3 = down * (y + SAMPLE_Y[3]) + constant + slope * SAMPLE_X[3]
        begin, end = min(min(begin_0, begin_1), min(begin_2, begin_3)), max(max(end_0, end_1), max(end_2, end_3))
        at_y = np.uint64(y)
        for x in range(max(0, begin), min(width - 1, end) + 1):
            step, at = slope * x, np.uint64(x)
            here_0, here_1 = np.float32(start_0 + step), np.float32(start_1 + step)
            here_2, here_3 = np.float32(start_2 + step), np.float32(start_3 + step)
            if here_0 > inverse_depth[at_y, at, 0] and begin_0 <= x <= end_0:
                inverse_depth[at_y, at, 0], seen[at_y, at, 0] = here_0, k
            if here_1 > inverse_depth[at_y, at, 1] and begin_1 <= x <= end_1:
                inverse_depth[at_y, at, 1], seen[at_y, at, 1] = here_1, k
            if here_2 > inverse_depth[at_y, at, 2] and begin_2 <= x <= end_2:
                inverse_depth[at_y, at, 2], seen[at_y, at, 2] = here_2, k
            if here_3 > inverse_depth[at_y, at, 3] and begin_3 <= x <= end_3:
                inverse_depth[at_y, at, 3], seen[at_y, at, 3] = here_3, k


@strict_inline
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
    width = inverse_depth.shape[1]
    texture, repeat_u, repeat_v = int(mask[0]), mask[1], mask[2]
    scale_u, scale_v = repeat_u * (1 << textures[texture, 1]), repeat_v * (1 << textures[texture, 2])
    begin_level, base, stride, w, h = True, 0, 0, 0, 0
    X, Y, C = row[IZ_X], row[IZ_Y], row[IZ_C]
    uX, uY, uC, u0, vX, vY, vC, v0 = row[U_X], row[U_Y], row[U_C], row[U_0], row[V_X], row[V_Y], row[V_C], row[V_0]
    # Depth of sample s is that of the pixel's middle plus a step; if even the nearest is hidden, so are all.
    reach = 0.375 * (abs(X) + abs(Y))
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
            i, j = min(max(level_u, 0), textures[texture, 1]), min(max(level_v, 0), textures[texture, 2])
            base, stride, w, h = version(textures, texture, i, j)
        inner_begin, inner_end = (
            max(max(low[0], low[1]), max(low[2], low[3])),
            min(min(high[0], high[1]), min(high[2], high[3])),
        )
        at_y = np.uint64(y)
        for x in range(begin, end + 1):
            at = np.uint64(x)
            iz = X * x + Y * y + C
            farthest = min(
                min(inverse_depth[at_y, at, 0], inverse_depth[at_y, at, 1]),
                min(inverse_depth[at_y, at, 2], inverse_depth[at_y, at, 3]),
            )
            if np.float32(iz + reach) <= farthest or iz <= FAR_IZ:
                continue
            z = 1.0 / iz
            u = (uX * x + uY * y + uC) * z + u0
            v = (vX * x + vY * y + vC) * z + v0
            cover = bilinear(atlas, base, stride, w, h, u * repeat_u, v * repeat_v)
            count = int(cover * (SAMPLES / 255.0) + 0.5)
            if count == 0:
                continue
            inside = inner_begin <= x <= inner_end
            for step in range(count):
                # The order of samples differs between surfaces, so that what stands behind shows through gaps.
                s = np.uint64((step + k) & 3)
                here = np.float32(iz + X * SAMPLE_X[s] + Y * SAMPLE_Y[s])
                if here > inverse_depth[at_y, at, s] and (inside or low[s] <= x <= high[s]):
                    inverse_depth[at_y, at, s] = here
                    seen[at_y, at, s] = k


@strict
def _survey(inverse_depth, tiles):  # type: ignore[no-untyped-def]
    """Least inverse depth within each tile of TILE_H x TILE_W pixels: nothing behind it can be seen there."""
    height, width, samples = inverse_depth.shape
    for i in range(tiles.shape[0]):
        for j in range(tiles.shape[1]):
            tiles[i, j] = np.float32(1e9)
    for y in range(height):
        for j in range(tiles.shape[1]):
            least = tiles[y // TILE_H, j]
            for x in range(j * TILE_W, min((j + 1) * TILE_W, width)):
                for s in range(samples):
                    least = min(least, inverse_depth[y, x, s])
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
        inverse_depth, seen: outputs (height, width, samples): 1/z (0 for sky) and row of table (-1 for sky).
        table: output (at least n, COLUMNS), the visible quads.
        tiles, corners, edges, low, high: working memory, (height / TILE_H, width / TILE_W) rounded up, (4, 3),
            (6, 6), (samples,), (samples,).

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
