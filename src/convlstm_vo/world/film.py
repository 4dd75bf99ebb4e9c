"""Compiled kernel 3: from light to grey levels."""

from __future__ import annotations

import math

import numpy as np

from convlstm_vo.world.compiling import quick


@quick
def expose(light, gain, curve, corner, centre_x, centre_y, noise, y0, x0, base, slope, out):  # type: ignore[no-untyped-def]
    """Fill ``out`` (height, width) uint8.

    Args:
        light: (height, width). gain: exposure. curve: grey level by light in 4095ths of the brightest.
        corner: share of light lost per squared distance from the centre, in half widths.
        noise: tile of deviation 1, read from (y0, x0) on; its strength is base + slope * grey level.
    """
    height, width = light.shape
    scale = 4095.0 * gain
    for y in range(height):
        dy = (y - centre_y) * 2.0 / width
        for x in range(width):
            dx = (x - centre_x) * 2.0 / width
            value = light[y, x] * scale * (1.0 - corner * (dx * dx + dy * dy))
            grey = curve[min(max(int(value), 0), 4095)]
            grey += noise[(y0 + y) & 1023, (x0 + x) & 2047] * (base + slope * grey)
            out[y, x] = np.uint8(min(max(grey + 0.5, 0.0), 255.0))


@quick
def smear(light, flow, share, out):  # type: ignore[no-untyped-def]
    """Average light (height, width) along flow * [-share/2, share/2], one reading a pixel of length and a half."""
    height, width = light.shape
    for y in range(height):
        for x in range(width):
            dx, dy = flow[y, x, 0] * share, flow[y, x, 1] * share
            length = math.sqrt(dx * dx + dy * dy)
            if not length < 200.0:
                dx, dy, length = 0.0, 0.0, 0.0
            steps = 1 + 2 * int(length / 3.0 + 0.5)
            total = 0.0
            for i in range(steps):
                t = (i + 0.5) / steps - 0.5
                px = min(max(x + dx * t, 0.0), width - 1.001)
                py = min(max(y + dy * t, 0.0), height - 1.001)
                x0, y0 = int(px), int(py)
                fx, fy = px - x0, py - y0
                top = light[y0, x0] * (1 - fx) + light[y0, x0 + 1] * fx
                total += top * (1 - fy) + (light[y0 + 1, x0] * (1 - fx) + light[y0 + 1, x0 + 1] * fx) * fy
            out[y, x] = total / steps
