"""Rotations as orthogonalised matrices: nearest, differentiable at the identity too, and none at zero."""

from __future__ import annotations

import pytest
import torch

from convlstm_vo.geometry import se3
from convlstm_vo.models.config import ModelError, preset
from convlstm_vo.models.heads import MatrixMotion, nearest_rotation
from convlstm_vo.models.network import OdometryNet

SIZE = {"image_height": 48, "image_width": 96}


def random_rotations(count: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return se3.so3_exp(torch.randn(count, 3, generator=generator, dtype=torch.float64))


def test_rotations_stay_and_scaled_ones_come_back() -> None:
    rotation = random_rotations(20)
    torch.testing.assert_close(nearest_rotation(rotation), rotation)
    stretch = torch.diag(torch.tensor([0.5, 2.0, 3.0], dtype=torch.float64))
    torch.testing.assert_close(nearest_rotation(rotation @ stretch), rotation)  # the polar factor


def test_reflections_become_rotations() -> None:
    mirrored = random_rotations(20) @ torch.diag(torch.tensor([1.0, 0.9, -0.2], dtype=torch.float64))
    rotation = nearest_rotation(mirrored)
    torch.testing.assert_close(torch.linalg.det(rotation), torch.ones(20, dtype=torch.float64))
    torch.testing.assert_close(rotation @ rotation.mT, torch.eye(3, dtype=torch.float64).expand(20, 3, 3))


@pytest.mark.parametrize("noise", [0.0, 0.3])
def test_gradients_are_those_of_finite_differences(noise: float) -> None:
    """Exactly at rotations too, where torch's own SVD has none."""
    generator = torch.Generator().manual_seed(2)
    matrix = random_rotations(4) + noise * torch.randn(4, 3, 3, generator=generator, dtype=torch.float64)
    matrix[0] = torch.eye(3)
    assert torch.autograd.gradcheck(nearest_rotation, matrix.requires_grad_())


def test_zeros_are_no_motion_and_small_numbers_small_angles() -> None:
    motion = MatrixMotion((0.01, 0.03, 0.01))
    numbers = torch.zeros(1, 12, requires_grad=True)
    torch.testing.assert_close(motion(numbers), torch.zeros(1, 6))
    motion(numbers).sum().backward()
    assert numbers.grad is not None and numbers.grad.isfinite().all()
    matrix = torch.zeros(1, 3, 3)
    matrix[0, 0, 2], matrix[0, 2, 0] = 0.5, -0.5  # a yaw of half the scale
    found = motion(torch.cat([torch.tensor([[1.0, 2.0, 3.0]]), matrix.flatten(1)], 1))
    torch.testing.assert_close(found, torch.tensor([[1.0, 2.0, 3.0, 0.0, 0.5, 0.0]]), atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["tiny", "ascend"])
def test_networks_with_matrices_start_small_and_learn(name: str) -> None:
    channels = {"encoder_channels": [4, 4, 6, 6, 8, 8]} if name == "ascend" else {}
    net = OdometryNet(preset(name, rotation="matrix", **SIZE, **channels), seed=0)
    clip = torch.randint(0, 256, (2, 3, net.config.image_channels, 48, 96), dtype=torch.uint8)
    motions, _ = net(clip, torch.ones(2, 4))
    assert motions.shape == (2, 2, 6) and motions[..., 3:].norm(dim=-1).max() < 3.15
    motions.square().sum().backward()
    gradients = [parameter.grad for parameter in net.head.parameters()]
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients)
    torch.nn.init.zeros_(net.head.linear.weight)
    torch.nn.init.zeros_(net.head.linear.bias)
    torch.testing.assert_close(net(clip, torch.ones(2, 4))[0], torch.zeros(2, 2, 6))


def test_matrices_work_with_bfloat16_weights() -> None:
    net = OdometryNet(preset("tiny", rotation="matrix", **SIZE), seed=0).to(torch.bfloat16).eval()
    motions, _ = net(torch.randint(0, 256, (1, 2, 1, 48, 96), dtype=torch.uint8), torch.ones(1, 4))
    assert motions.isfinite().all()


def test_angles_of_scale_zero_are_refused() -> None:
    with pytest.raises(ModelError, match="rotation=matrix needs angles other than 0"):
        preset("tiny", rotation="matrix", motion_scale=(1, 1, 1, 1, 0, 1))
