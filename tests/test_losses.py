"""Losses: right by hand, true to geometry, with gradients everywhere."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import Tensor

from convlstm_vo.geometry import se3
from convlstm_vo.training.losses import LossConfig, LossError, MotionLoss, compose_motions, motion_loss


def random_motions(batch: int, time: int, *, seed: int = 0, angle: float = 0.3) -> Tensor:
    motions = torch.randn(batch, time, 6, generator=torch.Generator().manual_seed(seed))
    motions[..., 3:] *= angle
    return motions


def test_the_loss_weighs_rotation() -> None:
    target = torch.zeros(2, 3, 6)
    predicted = torch.tensor([1.0, 2.0, 2.0, 0.1, 0.0, 0.0]).expand(2, 3, 6)
    assert motion_loss(predicted, target, LossConfig()).item() == pytest.approx(9 + 100 * 0.01)
    assert motion_loss(predicted, target, LossConfig(rotation_weight=1)).item() == pytest.approx(9.01)
    assert motion_loss(predicted, target, LossConfig("norm", 10)).item() == pytest.approx(3 + 10 * 0.1, abs=1e-3)
    at_zero = target.clone().requires_grad_()
    motion_loss(at_zero, target, LossConfig("norm")).backward()
    assert at_zero.grad is not None and at_zero.grad.isfinite().all()
    with pytest.raises(LossError, match="must be positive"):
        LossConfig(rotation_weight=0)


def test_geodesic_errors_are_angles_between_rotations() -> None:
    predicted, target = random_motions(3, 4, seed=1, angle=1.5), random_motions(3, 4, seed=2, angle=1.5)
    only_rotation = torch.cat([target[..., :3], predicted[..., 3:]], -1)
    between = se3.so3_exp(only_rotation[..., 3:]).mT @ se3.so3_exp(target[..., 3:])
    expected = se3.rotation_angle(between).square().mean()
    config = LossConfig(rotation="geodesic", rotation_weight=1)
    torch.testing.assert_close(motion_loss(only_rotation, target, config), expected)
    # The same rotation the other way round: no error, where vectors differ by a full turn.
    near_pi = torch.tensor([0, 0, 0, 0, math.pi - 0.01, 0.0])
    other_way = torch.tensor([0, 0, 0, 0, -math.pi - 0.01, 0.0])
    assert motion_loss(near_pi, other_way, config).item() == pytest.approx(0, abs=1e-6)
    assert motion_loss(near_pi, other_way, LossConfig()).item() > 3000


def test_geodesic_and_vector_errors_agree_for_small_rotations() -> None:
    predicted, target = random_motions(2, 5, seed=1, angle=0.01), random_motions(2, 5, seed=2, angle=0.01)
    vector, geodesic = (
        motion_loss(predicted, target, LossConfig(rotation=kind)) for kind in ("vector", "geodesic")
    )
    torch.testing.assert_close(vector, geodesic, rtol=1e-3, atol=0)


@pytest.mark.parametrize("error", ["squared", "norm"])
@pytest.mark.parametrize("rotation", ["vector", "geodesic"])
def test_gradients_are_finite_everywhere_and_zero_at_the_truth(error: str, rotation: str) -> None:
    loss = MotionLoss(LossConfig(error, rotation=rotation, drift_steps=(2, 4)))  # type: ignore[arg-type]
    target = random_motions(2, 5)
    for offset in (0.0, 1e-4, 1.0):
        predicted = (target + offset).requires_grad_()
        loss(predicted, target).backward()
        assert predicted.grad is not None and predicted.grad.isfinite().all()
        if offset == 0:
            assert predicted.grad.abs().max() < 1e-4


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_composed_motions_lead_where_the_poses_do(steps: int) -> None:
    motions = random_motions(2, 6)
    composed = compose_motions(motions, steps)
    assert composed.shape == (2, 7 - steps, 6)
    matrices = se3.matrix_from_motion(motions)
    expected = se3.compose(*(matrices[:, 1 + k] for k in range(steps)))
    torch.testing.assert_close(se3.matrix_from_motion(composed[:, 1]), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("error", ["squared", "norm"])
def test_drift_counts_bias_more_than_errors_that_cancel(error: str) -> None:
    """Straight ahead, with the same error at each step or with alternating signs."""
    target = torch.zeros(1, 8, 6)
    target[..., 2] = 1
    bias, noise = target.clone(), target.clone()
    bias[..., 2] += 0.1
    noise[..., 2] += 0.1 * torch.tensor([1.0, -1.0]).repeat(4)
    single = LossConfig(error, rotation_weight=1)  # type: ignore[arg-type]
    drift = MotionLoss(dataclasses.replace(single, drift_steps=(2, 4, 8)))
    torch.testing.assert_close(motion_loss(bias, target, single), motion_loss(noise, target, single))
    # A constant bias counts once for single motions and once for the drift, whatever the lengths.
    torch.testing.assert_close(drift(bias, target), 2 * motion_loss(bias, target, single), rtol=2e-3, atol=0)
    torch.testing.assert_close(drift(noise, target), motion_loss(noise, target, single), rtol=3e-2, atol=0)


def test_lengths_beyond_the_clip_are_left_out() -> None:
    """As in the first epochs of a curriculum."""
    predicted, target = random_motions(2, 3, seed=1), random_motions(2, 3, seed=2)
    long, short = (MotionLoss(LossConfig(drift_steps=steps)) for steps in ((2, 8), (2,)))
    torch.testing.assert_close(long(predicted, target), short(predicted, target))
    torch.testing.assert_close(
        MotionLoss(LossConfig())(predicted, target), motion_loss(predicted, target, LossConfig())
    )


def test_learned_weights_find_their_optimum() -> None:
    """At the optimum each weight is one over its error, and both kinds of error count alike."""
    config = LossConfig(learned_weights=True, rotation_weight=50)
    loss = MotionLoss(config)
    assert loss.weights() == pytest.approx({"translation_weight": 1, "rotation_weight": 50})
    target = torch.zeros(4, 3, 6)
    predicted = torch.tensor([0.3, 0.0, 0.4, 0.0, 0.01, 0.0]).expand(4, 3, 6)
    optimizer = torch.optim.Adam(loss.parameters(), lr=0.1)
    for _ in range(400):
        optimizer.zero_grad()
        loss(predicted, target).backward()
        optimizer.step()
    assert loss.weights() == pytest.approx({"translation_weight": 4, "rotation_weight": 1e4}, rel=1e-2)
    assert list(loss.state_dict()) == ["log_variances"] and not MotionLoss(LossConfig()).state_dict()


def test_autocast_does_not_reach_the_loss() -> None:
    loss = MotionLoss(LossConfig(rotation="geodesic", drift_steps=(2, 4)))
    predicted, target = random_motions(2, 5, seed=1), random_motions(2, 5, seed=2)
    with torch.autocast("cpu", torch.bfloat16):
        inside = loss(predicted, target)
    torch.testing.assert_close(inside, loss(predicted, target), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rotation_weight": 0}, "rotation-weight 0 must be positive"),
        ({"rotation_weight": math.nan}, "rotation-weight nan"),
        ({"drift_weight": -1}, "drift-weight -1"),
        ({"drift_steps": (1, 2)}, r"drift-steps \(1, 2\): each must be at least 2"),
    ],
)
def test_impossible_losses(values: dict[str, float], message: str) -> None:
    with pytest.raises(LossError, match=message):
        LossConfig(**values)  # type: ignore[arg-type]
