"""Compiled kernel 1: which surface each sample of the image sees.

Surfaces are flat quads (a triangle repeats its last corner). A sample's ray r = ((x - cx)/fx, (y - cy)/fy, 1)
passes through a quad where all its edge planes, which contain the camera centre, have r on the inner side; its
inverse depth there is (N . r) / (N . corner), N the normal. Both are linear in x and y, so a row of the image is an
interval, found without clipping, subdivision or any snapping of coordinates: geometry is exact to rounding.
"""

from __future__ import annotations

import math

import numpy as np
from numba import njit

from convlstm_vo.world.texels import sample_fast

# Four samples a pixel, each with its own x and y: an edge of any slope has four steps of coverage.
SAMPLE_X = np.array([-0.125, 0.375, -0.375, 0.125])
SAMPLE_Y = np.array([-0.375, -0.125, 0.125, 0.375])
SAMPLES = 4
# Columns of a table of surfaces as one camera sees them. Inverse depth, and texture coordinates divided by depth,
# are linear in the pixel: value = X * x + Y * y + C.
IZ_X, IZ_Y, IZ_C, U_X, U_Y, U_C, U_0, V_X, V_Y, V_C, V_0, TONE, MATERIAL, FRAME, COLUMNS = range(15)
NEAR_M = 0.05
FAR_IZ = 1e-4  # 10 km


@njit(cache=True, nogil=True, error_model="numpy", inline="always")
def _to_pixel_plane(n0, n1, n2, fx, fy, cx, cy):  # type: ignore[no-untyped-def]
    """n . ray as a function of the pixel: (X, Y, C)."""
    x, y = n0 / fx, n1 / fy
    return x, y, n2 - x * cx - y * cy


@njit(cache=True, nogil=True, error_model="numpy")
def _prepare(quad, uv, M, camera, corners, edges, row):  # type: ignore[no-untyped-def]
    """Fill ``edges`` (4, 3) and the geometry of a ``row``; False when the quad cannot be seen at all."""
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
        edges[i, 0], edges[i, 1], edges[i, 2] = _to_pixel_plane(e0 * side, e1 * side, e2 * side, fx, fy, cx, cy)
    for k in range(2):
        g0, g1, g2 = uv[4 * k], uv[4 * k + 1], uv[4 * k + 2]
        t0 = M[0, 0] * g0 + M[0, 1] * g1 + M[0, 2] * g2
        t1 = M[1, 0] * g0 + M[1, 1] * g1 + M[1, 2] * g2
        t2 = M[2, 0] * g0 + M[2, 1] * g1 + M[2, 2] * g2
        base = U_X + 4 * k
        row[base], row[base + 1], row[base + 2] = _to_pixel_plane(t0, t1, t2, fx, fy, cx, cy)
        row[base + 3] = uv[4 * k + 3] - (t0 * corners[0, 0] + t1 * corners[0, 1] + t2 * corners[0, 2])
    return True


@njit(cache=True, nogil=True, error_model="numpy", inline="always")
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


@njit(cache=True, nogil=True, error_model="numpy", inline="always")
def _interval(edges, row, y, width):  # type: ignore[no-untyped-def]
    """The x interval of a quad on the line y; empty when the first is greater."""
    low, high = -1.0, width + 0.0
    for i in range(4):
        a, rest = edges[i, 0], edges[i, 1] * y + edges[i, 2]
        if a > 1e-14:
            low = max(low, -rest / a)
        elif a < -1e-14:
            high = min(high, -rest / a)
        elif rest < 0.0:
            return 1.0, 0.0
    a, rest = row[IZ_X], row[IZ_Y] * y + row[IZ_C] - FAR_IZ
    if a > 1e-14:
        low = max(low, -rest / a)
    elif a < -1e-14:
        high = min(high, -rest / a)
    elif rest < 0.0:
        return 1.0, 0.0
    return low, high


@njit(cache=True, nogil=True, error_model="numpy")
def _draw_solid(k, edges, row, first, last, inverse_depth, seen):  # type: ignore[no-untyped-def]
    width = inverse_depth.shape[2]
    slope = row[IZ_X]
    for y in range(first, last + 1):
        for s in range(SAMPLES):
            low, high = _interval(edges, row, y + SAMPLE_Y[s], width)
            begin, end = max(0, math.ceil(low - SAMPLE_X[s])), min(width - 1, math.floor(high - SAMPLE_X[s]))
            start = row[IZ_Y] * (y + SAMPLE_Y[s]) + row[IZ_C] + slope * SAMPLE_X[s]
            depth_line, seen_line = inverse_depth[s, y], seen[s, y]
            for x in range(begin, end + 1):
                iz = np.float32(start + slope * x)
                if iz > depth_line[x]:
                    depth_line[x] = iz
                    seen_line[x] = k


@njit(cache=True, nogil=True, error_model="numpy")
def _draw_mask(k, edges, row, first, last, inverse_depth, seen, mask, atlas, textures):  # type: ignore[no-untyped-def]
    """As `_draw_solid`, where a texture says how many of a pixel's samples the surface covers."""
    width = inverse_depth.shape[2]
    texture, repeat_u, repeat_v = int(mask[0]), mask[1], mask[2]
    scale_u, scale_v = repeat_u * (1 << textures[texture, 1]), repeat_v * (1 << textures[texture, 2])
    low, high = np.empty(SAMPLES), np.empty(SAMPLES)
    for y in range(first, last + 1):
        begin, end = width, -1
        for s in range(SAMPLES):
            low[s], high[s] = _interval(edges, row, y + SAMPLE_Y[s], width)
            low[s], high[s] = low[s] - SAMPLE_X[s], high[s] - SAMPLE_X[s]
            if low[s] <= high[s]:
                begin, end = min(begin, math.ceil(low[s])), max(end, math.floor(high[s]))
        begin, end = max(0, begin), min(width - 1, end)
        if begin > end:
            continue
        middle = 0.5 * (begin + end)
        iz = row[IZ_X] * middle + row[IZ_Y] * y + row[IZ_C]
        z = 1.0 / max(iz, FAR_IZ)
        u = (row[U_X] * middle + row[U_Y] * y + row[U_C]) * z
        v = (row[V_X] * middle + row[V_Y] * y + row[V_C]) * z
        size_u = (abs(row[U_X] - u * row[IZ_X]) + abs(row[U_Y] - u * row[IZ_Y])) * z * scale_u
        size_v = (abs(row[V_X] - v * row[IZ_X]) + abs(row[V_Y] - v * row[IZ_Y])) * z * scale_v
        level_u = int(math.log2(max(size_u, 1.0)) + 0.3)
        level_v = int(math.log2(max(size_v, 1.0)) + 0.3)
        for x in range(begin, end + 1):
            iz = row[IZ_X] * x + row[IZ_Y] * y + row[IZ_C]
            iz32 = np.float32(iz)
            hidden = True
            for s in range(SAMPLES):
                hidden = hidden and iz32 <= inverse_depth[s, y, x]
            if hidden or iz <= FAR_IZ:
                continue
            z = 1.0 / iz
            u = (row[U_X] * x + row[U_Y] * y + row[U_C]) * z + row[U_0]
            v = (row[V_X] * x + row[V_Y] * y + row[V_C]) * z + row[V_0]
            cover = sample_fast(atlas, textures, texture, u * repeat_u, v * repeat_v, level_u, level_v)
            for s in range(SAMPLES):
                # The order of samples differs between surfaces, so that what stands behind shows through gaps.
                if cover > 255.0 * (((s + k) & 3) + 0.5) / SAMPLES and low[s] <= x <= high[s]:
                    here = np.float32(iz + row[IZ_X] * SAMPLE_X[s] + row[IZ_Y] * SAMPLE_Y[s])
                    if here > inverse_depth[s, y, x]:
                        inverse_depth[s, y, x] = here
                        seen[s, y, x] = k


@njit(cache=True, nogil=True, error_model="numpy")
def rasterise(  # type: ignore[no-untyped-def]
    order,
    start,
    end,
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
):
    """Find the nearest surface of every sample.

    Args:
        order: objects to draw, nearest first; start, end: their ranges of quads; frame: their row of transforms.
        quads: (n, 4, 3) corners in metres; uvs: (n, 8) gradients and values of texture coordinates.
        transforms: (m, 3, 4) from an object's frame to the camera's. masks: (materials, 3) texture or -1, repeats.
        camera: fx, fy, cx, cy, height, width.
        inverse_depth, seen: outputs (samples, height, width): 1/z (0 for sky) and row of table (-1 for sky).
        table: output (at least n, COLUMNS), the visible quads.

    Returns:
        The number of rows of table in use.
    """
    corners, edges = np.empty((4, 3)), np.empty((4, 3))
    inverse_depth[:] = 0.0
    seen[:] = -1
    k = 0
    for index in range(len(order)):
        thing = order[index]
        for q in range(start[thing], end[thing]):
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
                _draw_mask(k, edges, row, first, last, inverse_depth, seen, mask, atlas, textures)
            k += 1
            if k == len(table):
                return k
    return k
