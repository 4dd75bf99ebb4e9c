"""The solver's fused loops do what its torch code does."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from convlstm_vo.models.scene import canyon_inverse_depth, cell_rays, flow_of, flow_to_rays, road_inverse_depth
from convlstm_vo.models.solver import Carried, Priors, Residuals, residuals, solve


def road_and_houses(speed):
    """What `solve` takes, of two drives: rays, where they are seen, weights across and along, priors, start."""
    K = torch.tensor([[363.6, 360.0, 319.5, 95.5]] * 2)
    rays = cell_rays(K, 48, 160)[:, :, ::2, ::2]
    motion = torch.tensor([[0.02, -0.01, speed, 0.002, 0.03, -0.004], [0.0, 0.01, speed * 2, 0.0, -0.02, 0.001]])
    slopes = torch.tensor([[0.01, -0.02], [-0.02, 0.015]])
    rho = canyon_inverse_depth(rays, slopes)
    generator = torch.Generator().manual_seed(1)
    seen = flow_to_rays(flow_of(rays, rho, motion, K), rays, K)
    seen = seen + 5e-4 * torch.randn(seen.shape, generator=generator)
    road = (rho - road_inverse_depth(rays, slopes)).abs() < 1e-6
    certain = ((seen[:, 0].abs() < 0.9) & (seen[:, 1].abs() < 0.27)).float().flatten(1) * 1e6
    spread = torch.rand(2, 2, 2, generator=generator)
    information = torch.eye(5).repeat(2, 1, 1) * 1e4
    information[:, :2, :2] += 1e3 * spread @ spread.mT
    priors = Priors(motion * 0.9, torch.full((2, 6), 50.0), slopes * 0.5, torch.full((2, 3), 0.01), information,
                    torch.full((2,), 0.004), torch.tensor([0.002, 0.01]))  # fmt: skip
    start = (motion * 0.8, slopes * 0, torch.zeros(2, 3))
    return rays.flatten(2), seen.flatten(2), certain, certain * road.flatten(1), priors, start


def from_before(scene) -> Carried:
    """Depths that are a tenth off, of a motion of which little is known, and of half of the cells."""
    rays, seen, across, _, _, (start, slopes, _) = scene
    generator = torch.Generator().manual_seed(3)
    true = residuals(rays, seen, start / 0.8, slopes).inverse_depth
    wrong = true * (1 + 0.1 * torch.randn(true.shape, generator=generator))
    known = 1e4 * (torch.rand(true.shape, generator=generator) < 0.5)
    spread = torch.rand(2, 6, 6, generator=generator)
    of_motion = 1e4 * spread @ spread.mT + 1e2 * torch.eye(6)
    return Carried(wrong, known, across, start / 0.9, of_motion)


@pytest.mark.parametrize("depths", [False, True])
@pytest.mark.parametrize("speed", [0.0, -0.5, 0.8])
@pytest.mark.parametrize("threads", [1, 2])
@torch.no_grad()
def test_gauss_newton(by_torch, monkeypatch, speed, threads, depths):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    scene = road_and_houses(speed)
    carried = from_before(scene) if depths else None

    def found():
        return solve(*scene, steps=4, carried=carried)

    (solution, misfits), (expected, expected_misfits) = found(), by_torch(found)
    torch.testing.assert_close(solution.motion, expected.motion, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(solution.slopes, expected.slopes, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(solution.shape, expected.shape, atol=1e-4, rtol=1e-3)
    scale = expected.information.diagonal(dim1=1, dim2=2).rsqrt()
    both = scale[:, :, None] * scale[:, None, :]
    torch.testing.assert_close(solution.information * both, expected.information * both, atol=1e-3, rtol=0)
    torch.testing.assert_close(misfits.across, expected_misfits.across, atol=1e-5, rtol=0)


@pytest.mark.parametrize("speed", [0.01, 0.5])
def test_residuals(by_torch, speed):
    rays, seen, _, _, _, (motion, slopes, _) = road_and_houses(speed)
    found, expected = residuals(rays, seen, motion, slopes), by_torch(lambda: residuals(rays, seen, motion, slopes))
    for field in dataclasses.fields(Residuals):
        values = getattr(expected, field.name)
        torch.testing.assert_close(
            getattr(found, field.name), values, atol=2e-5 * float(values.abs().max()), rtol=1e-3, msg=field.name
        )


@pytest.mark.parametrize("speed", [0.01, 0.5])
def test_gradients_of_weights(by_torch, speed):
    rays, seen, across, along, priors, start = road_and_houses(speed)
    generator = torch.Generator().manual_seed(2)
    wanted = [torch.randn(2, n, generator=generator) for n in (6, 2, 3)]
    of_information = torch.randn(2, 11, 11, generator=generator)

    def gradients():
        weights = across.clone().requires_grad_(), along.clone().requires_grad_()
        solution, misfits = solve(rays, seen, *weights, priors, start, steps=3)
        assert not misfits.across.requires_grad
        parts = zip(wanted, (solution.motion, solution.slopes, solution.shape), strict=True)
        loss = sum((a * b).sum() for a, b in parts)
        loss = loss + 1e-7 * (of_information * solution.information).sum()
        return torch.autograd.grad(loss, weights)

    for found, expected in zip(gradients(), by_torch(gradients), strict=True):
        torch.testing.assert_close(found, expected, atol=2e-3 * float(expected.abs().max()), rtol=2e-3)
