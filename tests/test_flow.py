"""The learned flow: warping, contrast, and what the shipped weights reach on images that moved by known amounts."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
import torch

from convlstm_vo.models.checkpoint import load_checkpoint
from convlstm_vo.models.flow import FlowNet, normalise_contrast, upsample, warp, window
from convlstm_vo.models.geometric import GeometricNet


def texture(height: int = 96, width: int = 192, seed: int = 0) -> torch.Tensor:
    noise = np.random.default_rng(seed).normal(size=(height, width)).astype(np.float32)
    image = cv2.GaussianBlur(noise, (0, 0), 1.5)
    return torch.from_numpy(100 + 60 * image / image.std())[None, None].clamp(0, 255)


def test_warp_reads_where_the_flow_points():
    image = texture()
    flow = torch.zeros(1, 2, 96, 192)
    flow[:, 0] = 3.0
    torch.testing.assert_close(warp(image, flow)[..., :-4], image[..., 3:-1], atol=1e-2, rtol=0)


def test_exposure_drops_out():
    image = texture()
    torch.testing.assert_close(
        normalise_contrast(image * 1.2 + 10), normalise_contrast(image), atol=0.05, rtol=0.05
    )


def test_window_is_the_mean_of_eight_by_eight():
    x = torch.arange(32.0).expand(1, 1, 32, 32).contiguous()
    torch.testing.assert_close(
        window(x)[0, 0, 4, 1:-1], upsample(window(x), (32, 32))[0, 0, 16, 5:-5:4], atol=2, rtol=0
    )
    assert float(window(x)[0, 0, 3, 3]) == pytest.approx(13.5)


@pytest.mark.parametrize("shift", [(0.0, 0.0), (0.4, -0.3), (2.6, 1.2), (-7.5, 3.0)])
def test_shipped_flow_measures_a_shift(shift):
    net = load_checkpoint()
    assert isinstance(net, GeometricNet)
    image = texture()[0, 0].numpy()
    matrix = np.array([[1, 0, shift[0]], [0, 1, shift[1]]], np.float32)
    moved = cv2.warpAffine(image, matrix, (192, 96), flags=cv2.INTER_CUBIC, borderMode=cv2.BORDER_REFLECT)
    pair = [torch.from_numpy(np.array(x))[None, None] for x in (image, moved)]
    with torch.inference_mode():
        field = net.flow(*pair, torch.zeros(1, 2, 24, 48))
    error = (field.flow - torch.tensor(shift)[:, None, None])[0, :, 4:-4, 4:-4].norm(dim=0)
    assert float(error.median()) < 0.15
    assert float(field.log_scale.exp().median()) < 0.3


def test_even_images_are_not_trusted():
    net = load_checkpoint()
    assert isinstance(net, GeometricNet)
    even = torch.full((1, 1, 64, 128), 80.0)
    with torch.inference_mode():
        field = net.flow(even, even, torch.zeros(1, 2, 16, 32))
    assert float(field.log_scale.exp().median()) > 1.0


def test_gradients_reach_all_weights():
    torch.manual_seed(0)
    net = FlowNet()
    field = net(texture(seed=1), texture(seed=2), torch.zeros(1, 2, 24, 48))
    (field.flow.square().mean() + field.log_scale.mean() + sum(s.square().mean() for s in field.stages)).backward()
    missing = [name for name, p in net.named_parameters() if p.grad is None or not torch.isfinite(p.grad).all()]
    assert not missing
