"""Compiled kernel 2: the light that each pixel gathers, and depth, flow and movers from the same surfaces."""

from __future__ import annotations

import math

import numpy as np

from convlstm_vo.world.compiling import quick, quick_inline
from convlstm_vo.world.raster import (
    FAR_IZ,
    FRAME,
    IZ_C,
    IZ_X,
    IZ_Y,
    MATERIAL,
    SAMPLE_X,
    SAMPLE_Y,
    SAMPLES,
    TONE,
    U_0,
    U_C,
    U_X,
    U_Y,
    V_0,
    V_C,
    V_X,
    V_Y,
)  # fmt: skip
from convlstm_vo.world.texels import log2, sample

# Columns of the table of materials: two layers of texture, a map of shadows, road marks. Those of a layer: picture
# or -1, repeats per metre along u and v, strength, log2 of its texels per metre along u and v, the level (u + v) at
# which averaging has left nothing of it, and its mean.
TEXTURE, REPEAT_U, REPEAT_V, STRENGTH, TEXELS_U, TEXELS_V, LAST_LEVEL, MEAN, LAYER_COLUMNS = range(9)
LAYER_A, LAYER_B, SHADOW = 0, LAYER_COLUMNS, 2 * LAYER_COLUMNS
SHADOW_V0, MARK_START, MARK_END, MATERIAL_COLUMNS = range(3 * LAYER_COLUMNS, 3 * LAYER_COLUMNS + 4)
# Columns of the table of road marks: lateral middle and half width, repeat period and painted length along the
# road, where the first one begins, range along the road, tone.
MARK_D, MARK_HALF, MARK_PERIOD, MARK_LENGTH, MARK_PHASE, MARK_S0, MARK_S1, MARK_TONE, MARK_COLUMNS = range(9)


@quick_inline
def _painted(s, size, period, length, phase):  # type: ignore[no-untyped-def]
    """Share of [s - size/2, s + size/2] that lies on dashes."""
    a, b = (s - 0.5 * size - phase) / period, (s + 0.5 * size - phase) / period
    duty = length / period
    fa, fb = math.floor(a), math.floor(b)
    return (fb * duty + min(b - fb, duty) - fa * duty - min(a - fa, duty)) * period / size


@quick_inline
def _marks(marks, first, last, u, v, size_u, size_v):  # type: ignore[no-untyped-def]
    """Paint on the road at u along, v across: (share of the pixel that is painted, its tone)."""
    for m in range(first, last):
        half = marks[m, MARK_HALF]
        inside = half + 0.5 * size_v - abs(v - marks[m, MARK_D])
        if inside <= 0.0 or u < marks[m, MARK_S0] or u > marks[m, MARK_S1]:
            continue
        across = min(inside, size_v, 2.0 * half) / size_v
        along = _painted(u, size_u, marks[m, MARK_PERIOD], marks[m, MARK_LENGTH], marks[m, MARK_PHASE])
        return across * along, marks[m, MARK_TONE]
    return 0.0, 0.0


@quick_inline
def _layer(materials, m, base, u, v, level_u, level_v, atlas, textures):  # type: ignore[no-untyped-def]
    """Factor by which a layer of texture changes a tone."""
    texture = int(materials[m, base + TEXTURE])
    if texture < 0:
        return 1.0
    level_u += materials[m, base + TEXELS_U]
    level_v += materials[m, base + TEXELS_V]
    value = materials[m, base + MEAN]
    # Faded out over the last level: fetching what averages to its mean would be wasted.
    left = materials[m, base + LAST_LEVEL] - max(level_u, 0.0) - max(level_v, 0.0)
    if left > 0.0:
        here = sample(
            atlas,
            textures,
            texture,
            u * materials[m, base + REPEAT_U],
            v * materials[m, base + REPEAT_V],
            level_u,
            level_v,
        )
        value += min(left, 1.0) * (here - value)
    return max(1.0 + materials[m, base + STRENGTH] * (value - 128.0) * (1.0 / 128.0), 0.02)


@quick_inline
def _surface_light(table, k, x, y, materials, marks, atlas, textures, haze, bias):  # type: ignore[no-untyped-def]
    """Light from one surface through image point (x, y)."""
    iz = max(table[k, IZ_X] * x + table[k, IZ_Y] * y + table[k, IZ_C], FAR_IZ)
    z = 1.0 / iz
    u = (table[k, U_X] * x + table[k, U_Y] * y + table[k, U_C]) * z
    v = (table[k, V_X] * x + table[k, V_Y] * y + table[k, V_C]) * z
    size_u = (abs(table[k, U_X] - u * table[k, IZ_X]) + abs(table[k, U_Y] - u * table[k, IZ_Y])) * z + 1e-9
    size_v = (abs(table[k, V_X] - v * table[k, IZ_X]) + abs(table[k, V_Y] - v * table[k, IZ_Y])) * z + 1e-9
    u, v = u + table[k, U_0], v + table[k, V_0]
    m = int(table[k, MATERIAL])
    level_u, level_v = log2(size_u) + bias, log2(size_v) + bias
    light = table[k, TONE]
    light *= _layer(materials, m, LAYER_A, u, v, level_u, level_v, atlas, textures)
    light *= _layer(materials, m, LAYER_B, u, v, level_u, level_v, atlas, textures)
    if materials[m, MARK_END] > materials[m, MARK_START]:
        share, tone = _marks(
            marks, int(materials[m, MARK_START]), int(materials[m, MARK_END]), u, v, size_u, size_v
        )
        light += share * (tone * table[k, TONE] - light)
    shadow = int(materials[m, SHADOW])
    if shadow >= 0:
        v_map = min(max((v - materials[m, SHADOW_V0]) * materials[m, SHADOW + REPEAT_V], 0.002), 0.998)
        level_u += materials[m, SHADOW + TEXELS_U]
        level_v += materials[m, SHADOW + TEXELS_V]
        lit = sample(atlas, textures, shadow, u * materials[m, SHADOW + REPEAT_U], v_map, level_u, level_v)
        light *= lit * (1.0 / 255.0)
    veil = z * haze[0]
    veil = veil / (1.0 + veil)
    return light + veil * (haze[1] - light)


@quick_inline
def _sky_light(x, y, camera, R, sky, atlas, textures):  # type: ignore[no-untyped-def]
    """Light from the sky: brightest at the horizon, darker above, with clouds drawn on a high plane."""
    rx, ry = (x - camera[2]) / camera[0], (y - camera[3]) / camera[1]
    dx = R[0, 0] * rx + R[0, 1] * ry + R[0, 2]
    dy = R[1, 0] * rx + R[1, 1] * ry + R[1, 2]
    dz = R[2, 0] * rx + R[2, 1] * ry + R[2, 2]
    up = max(-dy / math.sqrt(dx * dx + dy * dy + dz * dz), 0.02)
    light = sky[0] + (sky[1] - sky[0]) * min(1.0, up * 2.2)
    if sky[2] > 0.0:
        scale = 0.12 / up
        level = log2(max(scale / up * 512.0 / camera[0], 1.0))
        cloud = sample(atlas, textures, int(sky[3]), dx * scale, dz * scale, level, level)
        light += sky[2] * max(0.0, cloud - 110.0) * (1.0 / 145.0) * min(1.0, up * 8.0)
    return light


@quick_inline
def _share(seen, s, y, x, k):  # type: ignore[no-untyped-def]
    """How many of a pixel's samples see surface k, and their middle; none when an earlier sample than s does."""
    first, second, third = seen[y, x, 0] == k, seen[y, x, 1] == k, seen[y, x, 2] == k
    fourth = seen[y, x, 3] == k
    if first and second and third and fourth:
        return 4, x + 0.0, y + 0.0
    if (s > 0 and first) or (s > 1 and second) or (s > 2 and third):
        return 0, 0.0, 0.0
    count = first + second + third + fourth
    px = first * SAMPLE_X[0] + second * SAMPLE_X[1] + third * SAMPLE_X[2] + fourth * SAMPLE_X[3]
    py = first * SAMPLE_Y[0] + second * SAMPLE_Y[1] + third * SAMPLE_Y[2] + fourth * SAMPLE_Y[3]
    return count, x + px / count, y + py / count


@quick
def shade(  # type: ignore[no-untyped-def]
    seen,
    table,
    materials,
    marks,
    atlas,
    textures,
    haze,
    bias,
    camera,
    R_world_camera,
    sky,
    light,
):
    """Fill ``light`` (height, width): each pixel's surfaces, weighted by the samples that they cover."""
    height, width = light.shape
    for y in range(height):
        for x in range(width):
            total, done, s = 0.0, 0, 0
            while done < SAMPLES:
                k = seen[y, x, s]
                count, px, py = _share(seen, s, y, x, k)
                if count > 0:
                    if k < 0:
                        value = _sky_light(px, py, camera, R_world_camera, sky, atlas, textures)
                    else:
                        value = _surface_light(table, k, px, py, materials, marks, atlas, textures, haze, bias)
                    total += count * value
                done += count
                s += 1
            light[y, x] = total / SAMPLES


@quick
def _front(seen, y, x):  # type: ignore[no-untyped-def]
    """The surface that covers most of a pixel's samples."""
    best, most = seen[y, x, 0], 0
    for s in range(SAMPLES):
        count = 0
        for other in range(SAMPLES):
            count += seen[y, x, other] == seen[y, x, s]
        if count > most:
            best, most = seen[y, x, s], count
    return best


@quick
def label(seen, table, camera, motions, places, depth, flow, moving):  # type: ignore[no-untyped-def]
    """Depth (m, inf for sky), flow to the next frame (px) and movers, at given places of the image.

    Args:
        motions: (m, 3, 4) that map a point of the camera frame now, fixed to frame m, into the next camera frame;
            the last row is for points at infinity (its translation is not used).
        places: (height, width, 2) x and y in the image that was drawn.
        flow: (height, width, 2) x and y; NaN where the point passes behind the next camera.
    """
    fx, fy, cx, cy = camera[0], camera[1], camera[2], camera[3]
    height, width = depth.shape
    for y in range(height):
        for x in range(width):
            px, py = places[y, x, 0], places[y, x, 1]
            k = _front(seen, int(py + 0.5), int(px + 0.5))
            frame = len(motions) - 1
            iz = 0.0
            if k >= 0:
                frame = int(table[k, FRAME])
                iz = max(table[k, IZ_X] * px + table[k, IZ_Y] * py + table[k, IZ_C], FAR_IZ)
            depth[y, x] = 1.0 / iz if iz > 0.0 else np.inf
            moving[y, x] = 0 < frame < len(motions) - 1
            rx, ry = (px - cx) / fx, (py - cy) / fy
            qx = (
                motions[frame, 0, 0] * rx
                + motions[frame, 0, 1] * ry
                + motions[frame, 0, 2]
                + motions[frame, 0, 3] * iz
            )
            qy = (
                motions[frame, 1, 0] * rx
                + motions[frame, 1, 1] * ry
                + motions[frame, 1, 2]
                + motions[frame, 1, 3] * iz
            )
            qz = (
                motions[frame, 2, 0] * rx
                + motions[frame, 2, 1] * ry
                + motions[frame, 2, 2]
                + motions[frame, 2, 3] * iz
            )
            if qz > 1e-6:
                flow[y, x, 0], flow[y, x, 1] = fx * qx / qz + cx - px, fy * qy / qz + cy - py
            else:
                flow[y, x, 0], flow[y, x, 1] = np.nan, np.nan
