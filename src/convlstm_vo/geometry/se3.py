"""Rotations and rigid motions: the one place for conversions between their representations.

Every function takes numpy arrays or torch tensors with any leading batch shape ``...`` and returns the same
kind; with torch they are differentiable everywhere, including the identity and rotations close to pi (but for
`rotation_angle`, whose gradient at the identity does not exist).

Two different 6-vectors occur in the field, and both live here:

- a *motion* is ``(translation xyz in metres, rotation vector xyz in radians)`` of ``T_prev_curr``. Networks
  regress it, files and covariances use it;
- a *twist* is the argument of the exponential map of SE(3), ``(rho, rotation vector)``, where the translation
  is ``V(rotvec) @ rho`` (Barfoot, State Estimation for Robotics, 2017, eq. 7.85).
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any, TypeVar

import numpy as np

# numpy.ndarray or torch.Tensor; torch is never imported from here, so that reading a trajectory stays quick.
Array = TypeVar("Array", bound=Any)

_SMALL_ANGLE_SQUARED = 1e-4  # below it, the series used here are exact to the last bit of a float64
_MOTION_SIZE = 6


def _namespace(array: Any) -> ModuleType:
    """The module (numpy or torch) whose functions work on ``array``."""
    torch = sys.modules.get("torch")
    return torch if torch is not None and isinstance(array, torch.Tensor) else np


def _eye_like(matrix: Array, size: int) -> Array:
    """The identity of the given size, broadcast to the batch shape, kind, dtype and device of ``matrix``."""
    xp = _namespace(matrix)
    zero = matrix[..., :1, :1] * 0
    on_device = {} if xp is np else {"device": matrix.device}
    return zero + xp.eye(size, dtype=matrix.dtype, **on_device)


def hat(vector: Array) -> Array:
    """The skew matrix of a 3-vector, so that ``hat(a) @ b == cross(a, b)``: (..., 3) to (..., 3, 3)."""
    xp = _namespace(vector)
    x, y, z = vector[..., 0], vector[..., 1], vector[..., 2]
    zero = x * 0
    rows = [[zero, -z, y], [z, zero, -x], [-y, x, zero]]
    return xp.stack([xp.stack(row, -1) for row in rows], -2)


def _angle(angle_squared: Array) -> tuple[Array, Array, Array]:
    """Where a^2 is small, and a and a^2 themselves, but 1 there.

    The unused branch of a `where` must stay finite too, or its gradient poisons the used one.
    """
    xp = _namespace(angle_squared)
    small = angle_squared < _SMALL_ANGLE_SQUARED
    safe = xp.where(small, angle_squared * 0 + 1.0, angle_squared)
    return small, xp.sqrt(safe), safe


def _sine_coefficients(angle_squared: Array) -> tuple[Array, Array]:
    """sin(a)/a and (1 - cos a)/a^2 as smooth functions of a^2, by series near zero."""
    xp = _namespace(angle_squared)
    s = angle_squared
    small, a, s_safe = _angle(s)
    half_sin = xp.sin(a / 2)
    sinc = xp.where(small, 1 - s / 6 * (1 - s / 20 * (1 - s / 42)), xp.sin(a) / a)
    versine = xp.where(small, 0.5 - s / 24 * (1 - s / 30 * (1 - s / 56)), 2 * half_sin * half_sin / s_safe)
    return sinc, versine


def _cubic_coefficient(angle_squared: Array) -> Array:
    """(a - sin a)/a^3 in the same way."""
    xp = _namespace(angle_squared)
    s = angle_squared
    small, a, s_safe = _angle(s)
    return xp.where(small, (1 - s / 20 * (1 - s / 42 * (1 - s / 72))) / 6, (a - xp.sin(a)) / (s_safe * a))


def so3_exp(rotvec: Array) -> Array:
    """Rotation matrix of a rotation vector in radians (Rodrigues): (..., 3) to (..., 3, 3)."""
    sinc, versine = _sine_coefficients((rotvec * rotvec).sum(-1))
    skew = hat(rotvec)
    return _eye_like(skew, 3) + sinc[..., None, None] * skew + versine[..., None, None] * (skew @ skew)


def _quaternion(rotvec: Array) -> tuple[Array, Array]:
    """Real part (..., 1) and vector (..., 3) of a rotation vector's unit quaternion."""
    xp = _namespace(rotvec)
    s = (rotvec * rotvec).sum(-1)[..., None]
    small, a, _ = _angle(s)
    real = xp.where(small, 1 - s / 8 * (1 - s / 48), xp.cos(a / 2))
    return real, xp.where(small, 0.5 - s / 48 * (1 - s / 80), xp.sin(a / 2) / a) * rotvec


def so3_compose(first: Array, second: Array) -> Array:
    """Rotation vector of ``so3_exp(first) @ so3_exp(second)``, each (..., 3), in a sixth of the steps."""
    xp = _namespace(first)
    (w1, v1), (w2, v2) = _quaternion(first), _quaternion(second)
    real = w1 * w2 - (v1 * v2).sum(-1)[..., None]
    vector = w1 * v2 + w2 * v1 + xp.linalg.cross(v1, v2)
    return _rotvec_from_quaternion(xp.abs(real), xp.where(real < 0, -vector, vector))


def rotated(vector: Array, rotvec: Array) -> Array:
    """``so3_exp(rotvec) @ vector``, each (..., 3), in a fourth of the steps."""
    cross = _namespace(vector).linalg.cross
    real, axis = _quaternion(rotvec)
    across = cross(axis, vector)
    return vector + 2 * (real * across + cross(axis, across))


def so3_from_yaw_pitch(yaw_pitch: Array) -> Array:
    """Rotation about y (to the right) after one about x (up), radians: (..., 2) to (..., 3, 3).

    The product of two `so3_exp` in fewer steps: for single frames of the default network those took a twentieth.
    """
    xp = _namespace(yaw_pitch)
    sin, cos = xp.sin(yaw_pitch), xp.cos(yaw_pitch)
    sy, sp, cy, cp = sin[..., 0], sin[..., 1], cos[..., 0], cos[..., 1]
    rows = [[cy, sy * sp, sy * cp], [sy * 0, cp, -sp], [-sy, cy * sp, cy * cp]]
    return xp.stack([xp.stack(row, -1) for row in rows], -2)


def quat_wxyz_from_so3(rotation: Array) -> Array:
    """Unit quaternion (w, x, y, z) with w >= 0 of a rotation matrix: (..., 3, 3) to (..., 4).

    The four rows of the symmetric matrix ``4 q q^T`` are all multiples of q; the one with the largest diagonal
    is well conditioned for every rotation (Shepperd 1978).
    """
    xp = _namespace(rotation)
    r = [[rotation[..., i, j] for j in range(3)] for i in range(3)]
    one = r[0][0] * 0 + 1
    rows = [
        [one + r[0][0] + r[1][1] + r[2][2], r[2][1] - r[1][2], r[0][2] - r[2][0], r[1][0] - r[0][1]],
        [r[2][1] - r[1][2], one + r[0][0] - r[1][1] - r[2][2], r[1][0] + r[0][1], r[0][2] + r[2][0]],
        [r[0][2] - r[2][0], r[1][0] + r[0][1], one - r[0][0] + r[1][1] - r[2][2], r[2][1] + r[1][2]],
        [r[1][0] - r[0][1], r[0][2] + r[2][0], r[2][1] + r[1][2], one - r[0][0] - r[1][1] + r[2][2]],
    ]
    outer = xp.stack([xp.stack(row, -1) for row in rows], -2)
    diagonal = xp.stack([rows[i][i] for i in range(4)], -1)
    best = diagonal.argmax(-1)
    chosen = xp.stack([xp.where(best == i, one, one * 0) for i in range(4)], -1)
    row = (outer * chosen[..., None]).sum(-2)
    quat = row / (2 * xp.sqrt((diagonal * chosen).sum(-1)))[..., None]
    return xp.where(quat[..., :1] < 0, -quat, quat)


def so3_log(rotation: Array) -> Array:
    """Rotation vector in radians, of length at most pi, of a rotation matrix: (..., 3, 3) to (..., 3)."""
    quat = quat_wxyz_from_so3(rotation)
    return _rotvec_from_quaternion(quat[..., :1], quat[..., 1:])


def _rotvec_from_quaternion(real: Array, vector: Array) -> Array:
    """Of real part (..., 1), not negative, and vector (..., 3) of a unit quaternion: (..., 3)."""
    xp = _namespace(real)
    sin_squared = (vector * vector).sum(-1)[..., None]
    small, sin_half, _ = _angle(sin_squared)
    w_safe = xp.where(small, real, real * 0 + 1.0)
    ratio = sin_squared / (w_safe * w_safe)  # tan^2 of the half angle
    series = 2 / w_safe * (1 - ratio / 3 * (1 - ratio * 3 / 5 * (1 - ratio * 5 / 7)))
    return xp.where(small, series, 2 * xp.arctan2(sin_half, real) / sin_half) * vector


def _stack_transform(rotation: Array, translation: Array) -> Array:
    """Homogeneous matrix of a rotation (..., 3, 3) and a translation (..., 3): (..., 4, 4)."""
    xp = _namespace(rotation)
    top = xp.concatenate([rotation, translation[..., None]], -1)
    bottom = top[..., :1, :] * 0
    one = bottom[..., 3:] + 1
    return xp.concatenate([top, xp.concatenate([bottom[..., :3], one], -1)], -2)


def se3_exp(twist: Array) -> Array:
    """Rigid motion of a twist: (..., 6) to (..., 4, 4)."""
    rho, rotvec = twist[..., :3], twist[..., 3:]
    s = (rotvec * rotvec).sum(-1)
    (_, versine), cubic = _sine_coefficients(s), _cubic_coefficient(s)
    skew = hat(rotvec)
    left = _eye_like(skew, 3) + versine[..., None, None] * skew + cubic[..., None, None] * (skew @ skew)
    return _stack_transform(so3_exp(rotvec), (left @ rho[..., None])[..., 0])


def se3_log(transform: Array) -> Array:
    """Twist of a rigid motion, the inverse of `se3_exp`: (..., 4, 4) to (..., 6)."""
    xp = _namespace(transform)
    rotvec = so3_log(transform[..., :3, :3])
    s = (rotvec * rotvec).sum(-1)
    sinc, versine = _sine_coefficients(s)
    small = s < _SMALL_ANGLE_SQUARED
    series = (1 + s / 60 * (1 + s / 42)) / 12
    closed = (1 - sinc / (2 * versine)) / xp.where(small, s * 0 + 1.0, s)
    skew = hat(rotvec)
    quadratic = xp.where(small, series, closed)[..., None, None] * (skew @ skew)
    left_inverse = _eye_like(skew, 3) - skew / 2 + quadratic
    rho = (left_inverse @ transform[..., :3, 3:])[..., 0]
    return xp.concatenate([rho, rotvec], -1)


def matrix_from_motion(motion: Array) -> Array:
    """``T_prev_curr`` of a motion (translation in metres, rotation vector in radians): (..., 6) to (..., 4, 4)."""
    if motion.shape[-1] != _MOTION_SIZE:
        raise ValueError(f"a motion has 6 numbers (xyz, rotation vector), not {motion.shape[-1]}")
    return _stack_transform(so3_exp(motion[..., 3:]), motion[..., :3])


def motion_from_matrix(transform: Array) -> Array:
    """The motion 6-vector of ``T_prev_curr``, the inverse of `matrix_from_motion`: (..., 4, 4) to (..., 6)."""
    return _namespace(transform).concatenate([transform[..., :3, 3], so3_log(transform[..., :3, :3])], -1)


def inverse(transform: Array) -> Array:
    """Inverse of a rigid motion: ``T_a_b`` (..., 4, 4) to ``T_b_a``."""
    rotation_t = transform[..., :3, :3].swapaxes(-1, -2)
    return _stack_transform(rotation_t, -(rotation_t @ transform[..., :3, 3:])[..., 0])


def compose(*transforms: Array) -> Array:
    """Product of rigid motions from left to right: ``compose(T_a_b, T_b_c) == T_a_c``, each (..., 4, 4)."""
    result = transforms[0]
    for transform in transforms[1:]:
        result = result @ transform
    return result


def relative(T_world_a: Array, T_world_b: Array) -> Array:
    """``T_a_b = inv(T_world_a) @ T_world_b``: the motion from frame a to frame b, each (..., 4, 4)."""
    return inverse(T_world_a) @ T_world_b


def mirror_motion(motion: Array) -> Array:
    """The motion seen in a horizontally mirrored video: x of the translation, y and z of the rotation flip.

    With ``M = diag(-1, 1, 1)`` the mirrored motion is ``(M t, M R M)``; a rotation vector is an axial vector,
    so it becomes ``det(M) M w``. (..., 6) to (..., 6).
    """
    xp = _namespace(motion)
    return xp.stack([-motion[..., 0], *(motion[..., i] for i in (1, 2, 3)), -motion[..., 4], -motion[..., 5]], -1)


def rotation_angle(rotation: Array) -> Array:
    """Angle in radians, 0 to pi, of a rotation matrix: (..., 3, 3) to (...)."""
    xp = _namespace(rotation)
    quat = quat_wxyz_from_so3(rotation)
    return 2 * xp.arctan2(xp.sqrt((quat[..., 1:] ** 2).sum(-1)), quat[..., 0])
