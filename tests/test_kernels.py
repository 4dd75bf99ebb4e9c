"""The fused loops do what the torch code does."""

from __future__ import annotations

import pytest
import torch

from convlstm_vo.models import kernels
from convlstm_vo.models.correlation import correlate, cosines
from convlstm_vo.models.flow import FlowNet


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


def test_gradients_are_not_wanted_of_the_kernels():
    wanted = torch.zeros(1, requires_grad=True)
    assert kernels.usable(torch.zeros(1)) and not kernels.usable(torch.zeros(1), wanted)
    with torch.no_grad():
        assert kernels.usable(wanted)
    assert not kernels.usable(torch.zeros(1, dtype=torch.float64))
