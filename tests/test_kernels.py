"""The fused loops do what the torch code does."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from convlstm_vo.models import kernels
from convlstm_vo.models.correlation import correlate, matched, together
from convlstm_vo.models.fixed import slopes_and_change
from convlstm_vo.models.flow import (
    FlowField,
    FlowNet,
    blend,
    gradient_products,
    misfits,
    normalise_contrast,
    warp,
    warp_by_cells,
)
from convlstm_vo.models.geometric import choose_cells, expected_flow
from convlstm_vo.models.mounting import Memory
from convlstm_vo.models.scene import cell_rays


@pytest.mark.parametrize(("batch", "height", "width"), [(2, 64, 96), (1, 8, 8), (1, 24, 200)])
@torch.no_grad()
def test_images(by_torch, batch, height, width):
    generator = torch.Generator().manual_seed(width)
    images = 255 * torch.rand(batch, 1, height, width, generator=generator)
    images[..., : width // 2] = 100.0  # nothing to see, where a variance may come out below zero
    predicted = 9 * torch.randn(
        batch, 2, height // 4, width // 4, generator=generator
    )  # some leads out of the image
    net = FlowNet()
    for layer in (net.images.weight, net.images.bias):
        layer.copy_(torch.randn(layer.shape, generator=generator))
    for call in (
        lambda: normalise_contrast(images),
        lambda: warp_by_cells(images, predicted),
        lambda: net._channels(images / 255),
        lambda: slopes_and_change(images, images.flip(3)),
    ):
        found, expected = call(), by_torch(call)
        assert found.shape == expected.shape and float(found.std()) > 0.1
        torch.testing.assert_close(found, expected, atol=2e-3 if found.max() > 50 else 2e-4, rtol=1e-4)


@pytest.mark.parametrize(("batch", "rows", "columns"), [(2, 9, 13), (1, 1, 2)])
@torch.no_grad()
def test_mean_of_the_cells_around(by_torch, batch, rows, columns):
    generator = torch.Generator().manual_seed(rows)
    flow, logits = (torch.randn(batch, channels, rows, columns, generator=generator) for channels in (2, 25))
    found = blend(flow, 3 * logits)
    torch.testing.assert_close(found, by_torch(lambda: blend(flow, 3 * logits)), atol=1e-5, rtol=1e-5)


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
    more = (torch.randn(2, 3, height, width), torch.randn(2, height, width, 4).permute(0, 3, 1, 2))
    for sharpness in (torch.tensor(0.3), torch.tensor(12.0), torch.tensor(60.0)):
        both, guess = matched(prev, curr, radius, sharpness, more)
        expected, expected_guess = by_torch(lambda by=sharpness: matched(prev, curr, radius, by, more))
        assert both.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(both, expected, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(guess, expected_guess, atol=3e-5 * radius, rtol=1e-4)
    found = both[:, : (2 * radius + 1) ** 2]
    assert float(found[:, :, 0, 0].abs().max()) == 0 and 0.1 < float(found.abs().max()) < 1 + 1e-6


@pytest.mark.parametrize(("channels", "height", "width"), [(32, 9, 21), (1, 2, 2), (3, 1, 5)])
@torch.no_grad()
def test_warped_features(by_torch, channels, height, width):
    generator = torch.Generator().manual_seed(channels)
    features = torch.randn(2, channels, height, width, generator=generator)
    flow = 3 * torch.randn(2, 2, height, width, generator=generator)  # some leads out
    flow[0, :, 0, 0] = torch.tensor([1e9, float("-inf")])
    for given in (features, features.contiguous(memory_format=torch.channels_last)):
        torch.testing.assert_close(warp(given, flow), by_torch(lambda: warp(features, flow)), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_channels_side_by_side(by_torch):
    parts = [torch.randn(2, 5, 17, 3), torch.randn(2, 17, 3, 4).permute(0, 3, 1, 2), torch.randn(2, 1, 17, 3)]
    found = together(torch.float32, *parts)
    assert torch.equal(found, by_torch(lambda: together(torch.float32, *parts)))
    assert found.is_contiguous(memory_format=torch.channels_last)
    half = together(torch.bfloat16, *(part.bfloat16() for part in parts))
    assert torch.equal(half, found.bfloat16())


@torch.no_grad()
def test_a_match_that_stands_out_by_far():
    matches = torch.full((1, 25, 1, 40), -1.0)
    matches[:, 7] = 1.0
    x, y = 7 % 5 - 2, 7 // 5 - 2
    for sharpness in (50.0, 1e4):
        expected = np.empty((3, 1, 40), np.float32)
        kernels._expect(0, 1, matches[0].numpy(), np.float32(sharpness), expected)
        assert np.allclose(expected[:, 0], np.array([x, y, 1.0])[:, None], atol=1e-6)


@torch.no_grad()
def test_exponential():
    values = np.linspace(-80, 0, 4001, dtype=np.float32)
    found = values.copy()
    kernels._exponential(found, np.empty(len(values), np.int32))
    exact = np.exp(values.astype(np.float64))
    assert np.abs(found / exact - 1).max() < 1e-5  # of -80 a float's last digit is 4e-6
    assert np.abs(found / exact - 1)[values > -1].max() < 3e-7
    beyond = np.full(16, -np.inf, np.float32)
    kernels._exponential(beyond, np.empty(16, np.int32))
    assert (beyond < 1e-37).all()


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


@pytest.mark.parametrize(("channels", "height", "width"), [(4, 48, 64), (4, 8, 8), (4, 8, 40), (2, 8, 40)])
def test_gradients_of_lucas_kanade(by_torch, channels, height, width):
    generator = torch.Generator().manual_seed(width)
    smooth = torch.nn.functional.avg_pool2d(
        torch.randn(4, channels, height + 2, width + 2, generator=generator), 3, 1
    )
    here, there = smooth.chunk(2)
    there = there.contiguous(memory_format=torch.channels_last)
    flow = 6 * torch.randn(2, 2, height // 4, width // 4, generator=generator)  # some leads out of the image
    wanted = torch.randn(2, 7, height // 4, width // 4, generator=generator)

    def values_and_gradients():
        leaves = [x.clone().requires_grad_() for x in (here, there, flow, torch.tensor(0.3))]
        out = torch.cat([gradient_products(leaves[0]), misfits(*leaves)], 1)
        return [out.detach(), *torch.autograd.grad(out, leaves, wanted)]

    for found, expected in zip(values_and_gradients(), by_torch(values_and_gradients), strict=True):
        assert float(found.abs().max()) > 0.01
        torch.testing.assert_close(found, expected, atol=2e-6, rtol=1e-4)


@torch.no_grad()
def test_a_flow_that_is_not_a_number_is_no_address():
    net = FlowNet()
    flow = torch.full((1, 2, 8, 8), float("nan"))
    refined, _ = net._refine(torch.rand(2, 4, 32, 32), flow, torch.full((1, 2, 8, 8), float("inf")))
    assert refined.shape == (1, 2, 8, 8)
    warped = warp_by_cells(torch.rand(1, 1, 32, 32), flow)
    assert warped.shape == (1, 1, 32, 32) and bool(torch.isfinite(warped).all())


def test_gradients_are_not_wanted_of_the_kernels():
    wanted = torch.zeros(1, requires_grad=True)
    assert kernels.usable(torch.zeros(1)) and not kernels.usable(torch.zeros(1), wanted)
    with torch.no_grad():
        assert kernels.usable(wanted)
    assert kernels.usable(wanted, differentiable=True)
    assert not kernels.usable(torch.zeros(1, dtype=torch.float64))
    half = torch.zeros(1, dtype=torch.bfloat16)
    assert kernels.usable(half, half=True) and not kernels.usable(half)


@pytest.mark.parametrize("seed", range(3))
@torch.no_grad()
def test_cells(by_torch, seed):
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    K = torch.tensor([[80.0, 90.0, 47.0, 30.0], [120.0, 110.0, 40.0, 33.0]])
    rays = cell_rays(K, 16, 24)
    memory = dataclasses.replace(
        Memory.unpack(torch.zeros(2, Memory.SIZE)),
        motion=0.3 * random(2, 6),
        mounting=0.05 * random(2, 2),
        aside=0.2 * random(2, 2),
    )
    flow = expected_flow(rays, K, memory)
    torch.testing.assert_close(flow, by_torch(lambda: expected_flow(rays, K, memory)), atol=1e-3, rtol=1e-4)
    field = FlowField(flow + random(2, 2, 16, 24), random(2, 1, 16, 24), ())
    image = 255 * torch.rand(2, 1, 64, 96, generator=generator)
    found, expected = (f(lambda: choose_cells(rays, field, K, image)) for f in (lambda call: call(), by_torch))
    for name in ("rays", "seen", "sigma", "texture"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), atol=1e-3, rtol=1e-4)
    assert 0.1 < float((found.sigma == 10).float().mean()) < 0.9
