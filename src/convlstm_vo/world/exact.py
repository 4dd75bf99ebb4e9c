"""Numbers that come out the same, bit for bit, on every machine.

Vendors' sine and cosine differ in the last bit, and matrix products in the order of their sums. Layouts and poses
use only +, -, *, / and square roots, which IEEE 754 fixes, one after the other, and uniform numbers from PCG64.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

_SIN = [1.0, -1 / 6, 1 / 120, -1 / 5040, 1 / 362880, -1 / 39916800, 1 / 6227020800, -1 / 1307674368000]
_COS = [1.0, -1 / 2, 1 / 24, -1 / 720, 1 / 40320, -1 / 3628800, 1 / 479001600, -1 / 87178291200, 1 / 20922789888000]


def sincos(angle_rad: float) -> tuple[float, float]:
    """Sine and cosine of an angle of moderate size, to about 1e-16."""
    quarter = math.floor(angle_rad / (math.pi / 2) + 0.5)
    r = angle_rad - quarter * (math.pi / 2)
    square = r * r
    sine, cosine = _SIN[-1], _COS[-1]
    for a in reversed(_SIN[:-1]):
        sine = sine * square + a
    for a in reversed(_COS[:-1]):
        cosine = cosine * square + a
    sine *= r
    return [(sine, cosine), (cosine, -sine), (-sine, -cosine), (-cosine, sine)][int(quarter) % 4]


def bell(rng: np.random.Generator, size: int) -> NDArray[np.float64]:
    """Numbers (size,) of mean 0 and deviation 1, nearly normal (the sum of four uniform ones, cut at 3.5)."""
    u = rng.random((4, size))
    result: NDArray[np.float64] = (u[0] + u[1] + u[2] + u[3] - 2.0) * math.sqrt(3.0)
    return result


def rotation(yaw: float, pitch: float, roll: float) -> NDArray[np.float64]:
    """A rotation (3, 3): right by yaw, then nose up by pitch, then clockwise by roll (radians; x right, y down)."""
    sy, cy = sincos(yaw)
    sp, cp = sincos(pitch)
    sr, cr = sincos(roll)
    # R_y(yaw) R_x(pitch) R_z(roll), written out: a matrix product may sum in another order elsewhere.
    return np.array(
        [
            [cy * cr + sy * sp * sr, sy * sp * cr - cy * sr, sy * cp],
            [cp * sr, cp * cr, -sp],
            [cy * sp * sr - sy * cr, sy * sr + cy * sp * cr, cy * cp],
        ]
    )


def product(A: NDArray[np.float64], B: NDArray[np.float64]) -> NDArray[np.float64]:
    """Matrix product of (..., 3, 3) by (..., 3, k), summed from left to right."""
    result: NDArray[np.float64] = (
        A[..., :, 0, None] * B[..., None, 0, :]
        + A[..., :, 1, None] * B[..., None, 1, :]
        + A[..., :, 2, None] * B[..., None, 2, :]
    )
    return result


def relative_to_first(poses: NDArray[np.float64]) -> NDArray[np.float64]:
    """Poses (n, 4, 4) in the frame of the first one, which becomes the identity exactly."""
    inverse = np.swapaxes(poses[:1, :3, :3], -1, -2)
    out = np.tile(np.eye(4), (len(poses), 1, 1))
    out[:, :3, :3] = product(inverse, poses[:, :3, :3])
    out[:, :3, 3:] = product(inverse, poses[:, :3, 3:] - poses[:1, :3, 3:])
    out[0] = np.eye(4)
    return out
