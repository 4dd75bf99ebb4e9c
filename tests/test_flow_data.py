"""What the flow learns from: rendered pairs, their exact flow, windows and light."""

from __future__ import annotations

import dataclasses

import cv2
import numpy as np
import pytest
import torch

from convlstm_vo.geometry import se3
from convlstm_vo.training.flow_data import (
    FlowBatch,
    FlowData,
    change_lights,
    cropped,
    good_pair,
    mispredicted,
    of_cells,
)
from convlstm_vo.training.rendered import RenderedDrive, in_memory, random_sequence

FRAMES = 4


@pytest.fixture(scope="module")
def drives() -> list[RenderedDrive]:
    return [in_memory(random_sequence(seed, 40, height=96, width=192), range(20, 20 + FRAMES)) for seed in (31, 32)]


def test_target_is_where_the_image_went(drives: list[RenderedDrive]):
    """The other frame, read where the flow points, is like this one; read elsewhere, it is less so."""
    for drive in drives:
        batch = good_pair(drive, 3, 0, seed=0)
        flow = cv2.resize(batch.target[0].permute(1, 2, 0).numpy(), (192, 96), interpolation=cv2.INTER_LINEAR)
        y, x = np.mgrid[:96, :192].astype(np.float32)
        off = {}
        for length in (0.0, 0.8, 1.0, 1.2):
            found = cv2.remap(
                drive.images[0], x + length * flow[..., 0], y + length * flow[..., 1], cv2.INTER_LINEAR
            )
            difference = of_cells(np.abs(found.astype(np.float32) - drive.images[3]))
            off[length] = float(difference[batch.valid[0].numpy()].mean())
        assert off[1.0] < 0.8 * off[0.0]
        assert off[1.0] < min(off[0.8], off[1.2])


def test_a_batch_follows_from_its_numbers(drives: list[RenderedDrive]):
    first, again, other = (FlowData(drives).random_batch(6, 96, (3, step)) for step in (5, 5, 6))
    for field in dataclasses.fields(FlowBatch):
        assert torch.equal(getattr(first, field.name), getattr(again, field.name))
    assert not torch.equal(first.prev, other.prev)
    assert first.prev.shape == (6, 1, 96, 96)
    assert first.target.shape == (6, 2, 24, 24)
    assert bool(torch.isfinite(first.predicted).all())
    assert 0.5 < float(first.valid.float().mean()) <= 1.0
    assert bool((first.predicted - first.target).abs().max() > 0)


def test_windows_are_cut_and_mirrored_alike(drives: list[RenderedDrive]):
    """Where a window is mirrored, x of the flow turns around; the road stays where it is seen."""
    data, ones = FlowData(drives), torch.ones(64, dtype=torch.long)
    batch = data.pairs(0 * ones, ones, 2 * ones, torch.Generator().manual_seed(0))
    windows = cropped(batch, 96, np.random.default_rng(0))
    mirrored = 0
    for k in range(64):
        for left in range(0, 25, 2):
            straight = batch.prev[k, 0, :, 4 * left : 4 * left + 96]
            flow = batch.target[k, :, :, left : left + 24]
            road = batch.road[k, :, left : left + 24]
            if torch.equal(windows.prev[k, 0], straight):
                assert torch.equal(windows.target[k], flow)
                assert torch.equal(windows.road[k], road)
                break
            if torch.equal(windows.prev[k, 0], straight.flip(-1)):
                assert torch.equal(windows.target[k], flow.flip(-1) * torch.tensor([-1.0, 1.0])[:, None, None])
                assert torch.equal(windows.road[k], road.flip(-1))
                mirrored += 1
                break
        else:
            raise AssertionError("the window is nowhere in the frame")
    assert 16 < mirrored < 48


def test_good_predictions_are_better():
    torch.manual_seed(0)
    T = torch.eye(4, dtype=torch.float64).repeat(2000, 1, 1)
    T[:, 2, 3] = 0.6
    turns, shifts = [], []
    for good in (True, False):
        guess = mispredicted(T, torch.Generator().manual_seed(1), good=good)
        difference = se3.motion_from_matrix(se3.inverse(T) @ guess)
        turns.append(difference[:, 3:].std().item())
        shifts.append(difference[:, 2].std().item())
    assert turns[0] == pytest.approx(0.002 * 0.89, rel=0.1)  # radians: mean over the axes
    assert shifts[0] == pytest.approx(np.hypot(0.6 * 0.04, 0.01), rel=0.1)
    assert turns[1] > 1.5 * turns[0]
    assert shifts[1] > 1.5 * shifts[0]


def test_light_differs_between_pairs_and_a_little_between_frames():
    flat = torch.full((200, 1, 8, 8), 150.0)
    prev, curr = change_lights(flat, flat, torch.Generator().manual_seed(0))
    level = torch.stack([prev.mean((1, 2, 3)), curr.mean((1, 2, 3))])
    assert float(level.std(1).min()) > 8  # grey levels
    assert 2 < float((level[0] - level[1]).std()) < 10
    assert float(prev.min()) >= 0
    assert float(prev.max()) <= 255
    assert torch.equal(prev, prev.round())
