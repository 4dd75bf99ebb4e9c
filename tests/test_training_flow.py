"""Training the flow: killed and started again, and what must not be continued."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from convlstm_vo.models.flow import FlowNet
from convlstm_vo.training.cell_drives import cache_cells, cells_of
from convlstm_vo.training.config import TrainError
from convlstm_vo.training.flow import FlowConfig, FlowRun, flow_loss, train_flow
from convlstm_vo.training.rendered import RenderedDrive, in_memory, random_sequence
from tests.small_runs import killed_at

SHORT = FlowConfig(steps=3, batch_size=2, crop_width=64, save_steps=2)


@pytest.fixture(scope="module")
def drives() -> list[RenderedDrive]:
    return [in_memory(random_sequence(seed, 40, height=64, width=128), range(20, 24)) for seed in (31, 32)]


def test_cached_cells_are_those_of_the_flow(drives, tmp_path):
    """A flow that is trained anew in the same folder is not given another's cells."""
    net = FlowNet().eval()
    drives = [dataclasses.replace(drive, name=f"{number:08d}") for number, drive in enumerate(drives)]
    first = cache_cells(net, drives, tmp_path, 0)
    (tmp_path / f"{drives[0].name}.npz").touch()  # as a version before named them
    again = cache_cells(net, drives, tmp_path, 0)
    with torch.no_grad():
        net.judge[-1].bias += 0.3
    other = cache_cells(net, drives, tmp_path, 0)
    for one, same, new in zip(first, again, other, strict=True):
        np.testing.assert_array_equal(one.cells, same.cells)
        assert (one.cells != new.cells).any()
    assert len(list(tmp_path.iterdir())) == len(drives)


def test_cells_over_a_bonnet_have_the_same_truth(drives, tmp_path):
    net = FlowNet().eval()
    drive = dataclasses.replace(drives[0], name="00000031")
    plain = cells_of(net, drive, 0, plain=True)
    over = cells_of(net, drive, 0, plain=True, bonnet=True)
    np.testing.assert_array_equal(plain.motions, over.motions)
    np.testing.assert_array_equal(plain.slopes, over.slopes)
    changed = plain.cells[:, 6] != over.cells[:, 6]  # texture
    assert changed[:, -1].mean() > 0.3
    assert not changed[:, :5].any()
    (kept,) = cache_cells(net, [drive], tmp_path, 0, plain=True, bonnet=True)
    np.testing.assert_array_equal(kept.cells, over.cells)


@pytest.fixture(scope="module")
def whole(drives, tmp_path_factory) -> tuple[Path, FlowNet]:
    """A run that nobody kills."""
    out = tmp_path_factory.mktemp("whole")
    return out, train_flow(SHORT, drives, drives, out)


def test_all_weights_learn(drives, tmp_path):
    """Those that Muon has as matrices too; the last layers begin at zero, so what is before them learns later."""
    run = FlowRun(dataclasses.replace(SHORT, steps=100), drives, tmp_path)
    batch = run.data.random_batch(8, 64, (7, 7))
    before = {name: value.detach().clone() for name, value in run.net.named_parameters()}
    with torch.no_grad():
        first = flow_loss(run.net, batch)
    for _ in range(60):
        run.update()
    assert not [name for name, value in run.net.named_parameters() if torch.equal(value, before[name])]
    with torch.no_grad():
        assert flow_loss(run.net, batch) < 0.8 * first


@pytest.mark.parametrize("step", [1, 2])
def test_a_killed_run_ends_with_the_same_weights(drives, whole, tmp_path, step):
    with killed_at(FlowRun, step):
        train_flow(SHORT, drives, drives, tmp_path)
    assert (tmp_path / "flow-last.pt").exists() == (step >= SHORT.save_steps)
    net = train_flow(SHORT, drives, drives, tmp_path)
    torch.testing.assert_close(net.state_dict(), whole[1].state_dict(), rtol=0, atol=0)
    states = [torch.load(folder / "flow-last.pt", weights_only=True) for folder in (tmp_path, whole[0])]
    assert states[0].pop("settings") == states[1].pop("settings")
    torch.testing.assert_close(states[0], states[1], rtol=0, atol=0)


def test_what_is_not_the_same_run_is_not_continued(drives, whole, tmp_path):
    out, net = whole
    again = train_flow(SHORT, drives, drives, out)  # finished: nothing to do
    torch.testing.assert_close(again.state_dict(), net.state_dict(), rtol=0, atol=0)
    with pytest.raises(TrainError, match="a run with seed 0, but now it is 1; go on with the same settings"):
        train_flow(dataclasses.replace(SHORT, seed=1), drives, drives, out)
    with pytest.raises(TrainError, match="a run with other drives"):
        train_flow(SHORT, drives[:1], drives, out)
    path = tmp_path / "flow-last.pt"
    path.write_bytes((out / "flow-last.pt").read_bytes()[:5000])
    with pytest.raises(TrainError, match=r"flow-last.pt: is damaged .*; remove flow-last.pt to train this stage"):
        train_flow(SHORT, drives, drives, tmp_path)
    torch.save({"net": net.state_dict(), "step": 3}, path)  # as versions before 29 November 2026 wrote it
    with pytest.raises(TrainError, match=r"was written by another version of .*; remove flow-last\.pt"):
        train_flow(SHORT, drives, drives, tmp_path)
