"""Compiled kernel 2: the light that each pixel gathers, and depth, flow and movers from the same surfaces."""

from __future__ import annotations

import math

import numpy as np
from numba import njit

from convlstm_vo.world.raster import (
    FAR_IZ, FRAME, IZ_C, IZ_X, IZ_Y, MATERIAL, SAMPLE_X, SAMPLE_Y, SAMPLES, TONE,
    U_0, U_C, U_X, U_Y, V_0, V_C, V_X, V_Y,
)  # fmt: skip
from convlstm_vo.world.texels import sample

# Columns of the table of materials: two textures (index or -1, repeats per metre, strength), a light map, marks.
TEX_A, REP_UA, REP_VA, AMP_A, TEX_B, REP_UB, REP_VB, AMP_B = range(8)
LIGHT, LIGHT_U, LIGHT_V, LIGHT_V0, MARK_START, MARK_END, MATERIAL_COLUMNS = range(8, 15)
# Columns of the table of road marks: lateral middle and half width, repeat period and painted length along the road,
# where the first one begins, range along the road, tone.
MARK_D, MARK_HALF, MARK_PERIOD, MARK_LENGTH, MARK_PHASE, MARK_S0, MARK_S1, MARK_TONE, MARK_COLUMNS = range(9)


@njit(cache=True, nogil=True, error_model="numpy", inline="always")
def _painted(s, size, period, length, phase):  # type: ignore[no-untyped-def]
    """Share of [s - size/2, s + size/2] that lies on dashes."""
    a, b = (s - 0.5 * size - phase) / period, (s + 0.5 * size - phase) / period
    duty = length / period
    fa, fb = math.floor(a), math.floor(b)
    return (fb * duty + min(b - fb, duty) - fa * duty - min(a - fa, duty)) * period / size


@njit(cache=True, nogil=True, error_model="numpy")
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


@njit(cache=True, nogil=True, error_model="numpy")
def _surface_light(row, x, y, materials, marks, atlas, textures, haze, bias):  # type: ignore[no-untyped-def]
    """Light from one surface through image point (x, y)."""
    iz = max(row[IZ_X] * x + row[IZ_Y] * y + row[IZ_C], FAR_IZ)
    z = 1.0 / iz
    u = (row[U_X] * x + row[U_Y] * y + row[U_C]) * z
    v = (row[V_X] * x + row[V_Y] * y + row[V_C]) * z
    size_u = (abs(row[U_X] - u * row[IZ_X]) + abs(row[U_Y] - u * row[IZ_Y])) * z + 1e-9
    size_v = (abs(row[V_X] - v * row[IZ_X]) + abs(row[V_Y] - v * row[IZ_Y])) * z + 1e-9
    u, v = u + row[U_0], v + row[V_0]
    material = materials[int(row[MATERIAL])]
    level_u, level_v = math.log2(size_u) + bias, math.log2(size_v) + bias
    light = row[TONE]
    a, b = int(material[TEX_A]), int(material[TEX_B])
    if a >= 0:
        du, dv = material[REP_UA], material[REP_VA]
        top_u, top_v = math.log2(du) + textures[a, 1], math.log2(dv) + textures[a, 2]
        value = sample(atlas, textures, a, u * du, v * dv, level_u + top_u, level_v + top_v)
        light *= 1.0 + material[AMP_A] * (value - 128.0) * (1.0 / 128.0)
    if b >= 0:
        du, dv = material[REP_UB], material[REP_VB]
        top_u, top_v = math.log2(du) + textures[b, 1], math.log2(dv) + textures[b, 2]
        value = sample(atlas, textures, b, u * du, v * dv, level_u + top_u, level_v + top_v)
        light *= 1.0 + material[AMP_B] * (value - 128.0) * (1.0 / 128.0)
    if material[MARK_END] > material[MARK_START]:
        share, tone = _marks(marks, int(material[MARK_START]), int(material[MARK_END]), u, v, size_u, size_v)
        light += share * (tone * row[TONE] - light)
    shadow = int(material[LIGHT])
    if shadow >= 0:
        du, dv = material[LIGHT_U], material[LIGHT_V]
        top_u, top_v = math.log2(du) + textures[shadow, 1], math.log2(dv) + textures[shadow, 2]
        v_map = min(max((v - material[LIGHT_V0]) * dv, 0.002), 0.998)
        light *= sample(atlas, textures, shadow, u * du, v_map, level_u + top_u, level_v + top_v) * (1.0 / 255.0)
    veil = z * haze[0]
    veil = veil / (1.0 + veil)
    return light + veil * (haze[1] - light)


@njit(cache=True, nogil=True, error_model="numpy")
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
        level = math.log2(max(scale / up * 512.0 / camera[0], 1.0))
        cloud = sample(atlas, textures, int(sky[3]), dx * scale, dz * scale, level, level)
        light += sky[2] * max(0.0, cloud - 110.0) * (1.0 / 145.0) * min(1.0, up * 8.0)
    return light


@njit(cache=True, nogil=True, error_model="numpy")
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
            total, done = 0.0, 0
            for s in range(SAMPLES):
                if done >> s & 1:
                    continue
                k, count = seen[s, y, x], 0
                px, py = 0.0, 0.0
                for other in range(s, SAMPLES):
                    if seen[other, y, x] == k:
                        count += 1
                        done |= 1 << other
                        px += SAMPLE_X[other]
                        py += SAMPLE_Y[other]
                px, py = x + px / count, y + py / count
                if k < 0:
                    value = _sky_light(px, py, camera, R_world_camera, sky, atlas, textures)
                else:
                    value = _surface_light(table[k], px, py, materials, marks, atlas, textures, haze, bias)
                total += count * value
            light[y, x] = total / SAMPLES


@njit(cache=True, nogil=True, error_model="numpy")
def _front(seen, y, x):  # type: ignore[no-untyped-def]
    """The surface that covers most of a pixel's samples."""
    best, most = seen[0, y, x], 0
    for s in range(SAMPLES):
        count = 0
        for other in range(SAMPLES):
            count += seen[other, y, x] == seen[s, y, x]
        if count > most:
            best, most = seen[s, y, x], count
    return best


@njit(cache=True, nogil=True, error_model="numpy")
def label(seen, table, camera, motions, depth, flow, moving):  # type: ignore[no-untyped-def]
    """Depth (m, inf for sky), flow to the next frame (px) and movers, at pixel centres.

    Args:
        motions: (m, 3, 4) that map a point of the camera frame now, fixed to frame m, into the next camera frame;
            the last row is for points at infinity (its translation is not used).
        flow: (height, width, 2) x and y; NaN where the point passes behind the next camera.
    """
    fx, fy, cx, cy = camera[0], camera[1], camera[2], camera[3]
    height, width = depth.shape
    for y in range(height):
        for x in range(width):
            k = _front(seen, y, x)
            frame = len(motions) - 1
            iz = 0.0
            if k >= 0:
                row = table[k]
                frame = int(row[FRAME])
                iz = max(row[IZ_X] * x + row[IZ_Y] * y + row[IZ_C], FAR_IZ)
            depth[y, x] = 1.0 / iz if iz > 0.0 else np.inf
            moving[y, x] = 0 < frame < len(motions) - 1
            M = motions[frame]
            rx, ry = (x - cx) / fx, (y - cy) / fy
            px = M[0, 0] * rx + M[0, 1] * ry + M[0, 2] + M[0, 3] * iz
            py = M[1, 0] * rx + M[1, 1] * ry + M[1, 2] + M[1, 3] * iz
            pz = M[2, 0] * rx + M[2, 1] * ry + M[2, 2] + M[2, 3] * iz
            if pz > 1e-6:
                flow[y, x, 0], flow[y, x, 1] = fx * px / pz + cx - x, fy * py / pz + cy - y
            else:
                flow[y, x, 0], flow[y, x, 1] = np.nan, np.nan
