"""The fused loops do what the torch code does."""

from __future__ import annotations

import pytest
import torch

from convlstm_vo.models import kernels
from convlstm_vo.models.correlation import correlate, cosines
from convlstm_vo.models.flow import FlowNet
from convlstm_vo.models.scene import canyon_inverse_depth, cell_rays, flow_of, flow_to_rays, road_inverse_depth
from convlstm_vo.models.solver import Priors, solve


@pytest.fixture
def by_torch(monkeypatch: pytest.MonkeyPatch):
    """Runs something once more without the kernels."""

    def run(call):
        with monkeypatch.context() as patch:
            patch.setattr(kernels, "usable", lambda *tensors: False)
            return call()

    return run


@pytest.mark.parametrize(("channels", "height", "width", "radius"), [(32, 9, 21, 2), (7, 12, 5, 4), (3, 1, 2, 1)])
@torch.no_grad()
def test_matching(by_torch, channels, height, width, radius):
    generator = torch.Generator().manual_seed(channels)
    prev, curr = torch.randn(2, 2, channels, height, width, generator=generator)
    prev = prev.contiguous(memory_format=torch.channels_last)
    found = correlate(prev, curr, radius)
    torch.testing.assert_close(found, by_torch(lambda: correlate(prev, curr, radius)), atol=1e-5, rtol=1e-5)
    assert float(found.abs().max()) > 0.1
    prev[:, :, 0, 0] = 0  # no features, no angle
    found = cosines(prev, curr, radius)
    torch.testing.assert_close(found, by_torch(lambda: cosines(prev, curr, radius)), atol=1e-6, rtol=1e-5)
    assert float(found[:, :, 0, 0].abs().max()) == 0 and 0.1 < float(found.abs().max()) < 1 + 1e-6


@pytest.mark.parametrize(("threads", "batch"), [(1, 2), (2, 1)])
@torch.no_grad()
def test_lucas_kanade(by_torch, threads, batch):
    generator = torch.Generator().manual_seed(3)
    net = FlowNet()
    smooth = torch.nn.functional.avg_pool2d(torch.rand(2 * batch, 4, 70, 102, generator=generator), 7, 1)
    images = 20 * smooth[..., :64, :96].contiguous(memory_format=torch.channels_last)
    predicted = torch.randn(batch, 2, 16, 24, generator=generator) * 6  # some of it leads out of the image
    flow = torch.randn(batch, 2, 16, 24, generator=generator)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        refined, evidence = net._refine(images, predicted, flow)
    finally:
        torch.set_num_threads(before)
    expected, expected_evidence = by_torch(lambda: net._refine(images, predicted, flow))
    assert float((refined - flow).abs().mean()) > 0.1
    torch.testing.assert_close(refined, expected, atol=2e-4, rtol=1e-4)
    torch.testing.assert_close(evidence, expected_evidence, atol=2e-4, rtol=1e-3)


@torch.no_grad()
def test_a_flow_that_is_not_a_number_is_no_address():
    net = FlowNet()
    flow = torch.full((1, 2, 8, 8), float("nan"))
    refined, _ = net._refine(torch.rand(2, 4, 32, 32), flow, torch.full((1, 2, 8, 8), float("inf")))
    assert refined.shape == (1, 2, 8, 8)


@pytest.mark.parametrize("speed", [0.0, -0.5, 0.8])
@torch.no_grad()
def test_gauss_newton(by_torch, speed):
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
    information = torch.eye(3).repeat(2, 1, 1) * 1e4
    information[:, :2, :2] += 1e3 * spread @ spread.mT
    priors = Priors(motion * 0.9, torch.full((2, 6), 50.0), slopes * 0.5, torch.full((2, 1), 0.01), information,
                    torch.full((2,), 0.004))  # fmt: skip
    start = (motion * 0.8, slopes * 0, torch.zeros(2, 1))

    def found():
        return solve(rays.flatten(2), seen.flatten(2), certain, certain * road.flatten(1), priors, start, steps=4)

    (solution, misfits), (expected, expected_misfits) = found(), by_torch(found)
    torch.testing.assert_close(solution.motion, expected.motion, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(solution.slopes, expected.slopes, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(solution.bend, expected.bend, atol=1e-4, rtol=1e-3)
    scale = expected.information.diagonal(dim1=1, dim2=2).rsqrt()
    both = scale[:, :, None] * scale[:, None, :]
    torch.testing.assert_close(solution.information * both, expected.information * both, atol=1e-3, rtol=0)
    torch.testing.assert_close(misfits.across, expected_misfits.across, atol=1e-5, rtol=0)


def test_gradients_are_not_wanted_of_the_kernels():
    wanted = torch.zeros(1, requires_grad=True)
    assert kernels.usable(torch.zeros(1)) and not kernels.usable(torch.zeros(1), wanted)
    with torch.no_grad():
        assert kernels.usable(wanted)
    assert not kernels.usable(torch.zeros(1, dtype=torch.float64))
