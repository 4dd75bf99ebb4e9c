"""Rotations and rigid motions against scipy, as algebraic identities, and their gradients."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.linalg import expm
from scipy.spatial.transform import Rotation

from convlstm_vo.geometry import se3

ANGLES = [0.0, 1e-12, 1e-8, 1e-5, 1e-3, 0.00999, 0.01001, 0.5, 2.0, 3.0, np.pi - 1e-4, np.pi - 1e-8]


def vectors(size: int, limit: float) -> st.SearchStrategy[np.ndarray]:
    return arrays(np.float64, size, elements=st.floats(-limit, limit, width=64))


@st.composite
def rotvecs(draw: st.DrawFn) -> np.ndarray:
    """Rotation vectors of length up to just under pi, small and large angles equally likely."""
    axis = draw(vectors(3, 1).filter(lambda v: np.linalg.norm(v) > 1e-3))
    angle = draw(st.one_of(st.floats(0, 3.14159), st.sampled_from(ANGLES)))
    return axis / np.linalg.norm(axis) * angle


@st.composite
def motions(draw: st.DrawFn) -> np.ndarray:
    return np.concatenate([draw(vectors(3, 100)), draw(rotvecs())])


@pytest.mark.parametrize("shape", [(2,), (3, 2), (2, 4, 2)])
def test_yaw_and_pitch_agree_with_scipy(shape: tuple[int, ...]) -> None:
    angles = np.random.default_rng(0).uniform(-3, 3, shape)
    expected = Rotation.from_euler("YX", angles.reshape(-1, 2)).as_matrix().reshape(*shape[:-1], 3, 3)
    np.testing.assert_allclose(se3.so3_from_yaw_pitch(angles), expected, atol=1e-14)
    np.testing.assert_allclose(se3.so3_from_yaw_pitch(torch.from_numpy(angles)).numpy(), expected, atol=1e-14)


@given(rotvecs())
def test_so3_exp_agrees_with_scipy(rotvec: np.ndarray) -> None:
    np.testing.assert_allclose(se3.so3_exp(rotvec), Rotation.from_rotvec(rotvec).as_matrix(), atol=1e-14)


@given(rotvecs())
def test_so3_log_inverts_exp(rotvec: np.ndarray) -> None:
    np.testing.assert_allclose(se3.so3_log(se3.so3_exp(rotvec)), rotvec, atol=1e-13)


@given(motions())
def test_se3_exp_agrees_with_the_matrix_exponential(twist: np.ndarray) -> None:
    generator = np.zeros((4, 4))
    generator[:3, :3], generator[:3, 3] = se3.hat(twist[3:]), twist[:3]
    np.testing.assert_allclose(se3.se3_exp(twist), expm(generator), atol=1e-11)


@given(motions())
def test_se3_log_inverts_exp(twist: np.ndarray) -> None:
    np.testing.assert_allclose(se3.se3_log(se3.se3_exp(twist)), twist, atol=1e-10)


@given(motions())
def test_motion_round_trip(motion: np.ndarray) -> None:
    np.testing.assert_allclose(se3.motion_from_matrix(se3.matrix_from_motion(motion)), motion, atol=1e-12)


@given(motions(), motions())
def test_relative_undoes_compose(a: np.ndarray, b: np.ndarray) -> None:
    T_w_a, T_a_b = se3.matrix_from_motion(a), se3.matrix_from_motion(b)
    np.testing.assert_allclose(se3.relative(T_w_a, se3.compose(T_w_a, T_a_b)), T_a_b, atol=1e-11)


@given(motions())
def test_inverse(motion: np.ndarray) -> None:
    transform = se3.matrix_from_motion(motion)
    np.testing.assert_allclose(se3.inverse(transform), np.linalg.inv(transform), atol=1e-11)


@given(motions(), motions())
def test_mirroring_motions_and_composing_commute(a: np.ndarray, b: np.ndarray) -> None:
    first, second = (se3.matrix_from_motion(m) for m in (a, b))
    mirror = np.diag([-1.0, 1, 1, 1])
    mirrored = [se3.matrix_from_motion(se3.mirror_motion(m)) for m in (a, b)]
    np.testing.assert_allclose(mirrored[0] @ mirrored[1], mirror @ first @ second @ mirror, atol=1e-11)


@given(rotvecs(), rotvecs(), vectors(3, 100))
def test_rotation_vectors_compose_and_rotate(first: np.ndarray, second: np.ndarray, vector: np.ndarray) -> None:
    both = Rotation.from_rotvec(first) * Rotation.from_rotvec(second)
    np.testing.assert_allclose(se3.so3_exp(se3.so3_compose(first, second)), both.as_matrix(), atol=1e-13)
    turned = Rotation.from_rotvec(first).apply(vector)
    np.testing.assert_allclose(se3.rotated(vector, first), turned, atol=1e-11)
    a, b, v = (torch.from_numpy(x)[None] for x in (first, second, vector))
    torch.testing.assert_close(se3.so3_compose(a, b)[0].numpy(), se3.so3_compose(first, second), rtol=0, atol=1e-12)
    np.testing.assert_allclose(se3.rotated(v, a)[0].numpy(), turned, atol=1e-11)


@given(motions())
def test_torch_gives_what_numpy_gives(motion: np.ndarray) -> None:
    tensor = torch.from_numpy(motion)
    np.testing.assert_allclose(se3.se3_exp(tensor).numpy(), se3.se3_exp(motion), atol=1e-12)
    matrix = se3.matrix_from_motion(tensor)
    np.testing.assert_allclose(se3.se3_log(matrix).numpy(), se3.se3_log(matrix.numpy()), atol=1e-12)


@pytest.mark.parametrize("angle", [0.0, 1e-6, 1e-3, 0.0099, 0.0101, 1.0, np.pi - 1e-3])
def test_gradients_are_right_at_zero_and_near_pi(angle: float) -> None:
    axis = torch.tensor([[0.36, -0.48, 0.8], [-0.6, 0.0, -0.8], [0.0, 0.0, 1.0]], dtype=torch.float64)
    twist = torch.cat([axis.flip(0) * 3, axis * angle], -1).requires_grad_()
    assert torch.autograd.gradcheck(se3.se3_exp, twist)
    assert torch.autograd.gradcheck(lambda t: se3.se3_log(se3.se3_exp(t)), twist)
    rotvec = twist[:, 3:].detach().requires_grad_()
    for small in (0.0, 1e-3, 0.1):
        other = (axis.roll(1, 0) * small).requires_grad_()
        if angle < 3:
            assert torch.autograd.gradcheck(se3.so3_compose, (rotvec, other))
    assert torch.autograd.gradcheck(se3.rotated, (axis.roll(1, 0).requires_grad_(), rotvec))
    transform = se3.se3_exp(twist).detach().requires_grad_()
    assert torch.autograd.gradcheck(se3.se3_log, transform)
    assert torch.autograd.gradcheck(se3.rotation_angle if angle > 1e-4 else se3.so3_log, transform[..., :3, :3])


def test_second_derivatives_at_the_identity_are_finite() -> None:
    twist = torch.zeros(2, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda t: se3.se3_log(se3.se3_exp(t)), twist)


def test_half_turn_has_length_pi() -> None:
    for axis in np.eye(3):
        rotation = Rotation.from_rotvec(np.pi * axis).as_matrix()
        np.testing.assert_allclose(np.abs(se3.so3_log(rotation)), np.pi * axis, atol=1e-12)


def test_batches_of_any_shape_and_float32() -> None:
    motion = torch.randn(2, 5, 6)
    transform = se3.matrix_from_motion(motion)
    assert transform.shape == (2, 5, 4, 4) and transform.dtype == torch.float32
    torch.testing.assert_close(se3.compose(se3.inverse(transform), transform), torch.eye(4).expand(2, 5, 4, 4))


def test_a_motion_has_six_numbers() -> None:
    with pytest.raises(ValueError, match="6 numbers"):
        se3.matrix_from_motion(np.zeros(7))
