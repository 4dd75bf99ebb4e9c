"""Two processes (gloo, on the CPU) against one with the same batch: gradients, weights, states, figures, files."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from convlstm_vo.models.checkpoint import load_checkpoint
from convlstm_vo.training import devices
from convlstm_vo.training.clips import NO_AUGMENTATION, AugmentConfig
from convlstm_vo.training.config import TrainConfig, TrainError
from convlstm_vo.training.devices import own_lanes
from convlstm_vo.training.losses import LossConfig
from convlstm_vo.training.schedule import RunPlan
from convlstm_vo.training.state import STATE_FILE, read_training_state
from tests.small_runs import free_port, small_config, start, train_as_one_of, train_small
from tests.trees import write_tree

# A learned part of the loss, updates of two steps, states carried over clips, mirrored and brightened clips.
OPTIONS: dict[str, Any] = {
    "batch_size": 4,
    "accumulate": 2,
    "lr": 1e-3,
    "epochs": 2,
    "loss": LossConfig(learned_weights=True, drift_steps=(2,)),
}


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tree(tmp_path_factory.mktemp("tree"), {"00": 40, "01": 31, "02": 15, "03": 9})


# Two processes add up in another order than one; Adam turns noise of tiny gradients into updates of full size. In
# float64 the noise is small enough to compare weights.
train_with_one = functools.partial(train_small, double=True)


def train_with_two(config: TrainConfig, tree: Path) -> None:
    port = free_port()
    processes = [start(train_as_one_of, rank, 2, port, config, tree) for rank in range(2)]
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0, 0]


@pytest.fixture(scope="module")
def runs(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The same run by one process and by two."""
    one, two = tmp_path_factory.mktemp("one"), tmp_path_factory.mktemp("two")
    train_with_one(small_config(one, **OPTIONS), tree)
    train_with_two(small_config(two, **OPTIONS), tree)
    return one, two


def state_of(run: Path, name: str = "last") -> dict[str, Any]:
    return read_training_state(run / "checkpoints" / name)


def history(run: Path, kind: str) -> list[dict[str, float]]:
    rows = [json.loads(line) for line in (run / "history.jsonl").read_text().splitlines()]
    return [row for row in rows if row["kind"] == kind]


def test_gradients_and_states_are_those_of_one_process(tree: Path, tmp_path: Path) -> None:
    """After one step of a longer accumulation: the gradient is in the checkpoint as it is."""
    options = {**OPTIONS, "accumulate": 1000, "epochs": 1, "save_steps": 1}
    one, two = small_config(tmp_path / "one", **options), small_config(tmp_path / "two", **options)
    train_with_one(one, tree)
    train_with_two(two, tree)
    expected, found = (state_of(config.out) for config in (one, two))
    assert len(expected["gradients"]) > 10
    torch.testing.assert_close(found["gradients"], expected["gradients"], rtol=1e-6, atol=1e-10)
    # The checkpoint within the epoch, with the states of all lanes in their order.
    expected, found = (state_of(config.out, "last.previous") for config in (one, two))
    assert expected["recurrent_state"][0].shape[0] == OPTIONS["batch_size"]
    torch.testing.assert_close(found["recurrent_state"], expected["recurrent_state"], rtol=1e-6, atol=1e-10)


def test_weights_and_figures_are_those_of_one_process(runs: tuple[Path, Path]) -> None:
    one, two = (state_of(run) for run in runs)
    assert one["progress"]["updates"] == two["progress"]["updates"] >= 3
    for part in ("weights", "loss", "ema"):
        torch.testing.assert_close(two[part], one[part], rtol=1e-6, atol=1e-8)
    for first, second in zip(*(history(run, "validation") for run in runs), strict=True):
        for key in ("loss", "translation_percent", "rotation_deg"):
            assert second[key] == pytest.approx(first[key], rel=1e-6)


def test_one_log_and_one_checkpoint(runs: tuple[Path, Path]) -> None:
    one, two = (history(run, "train") for run in runs)
    assert [(row["epoch"], row["step"]) for row in two] == [(row["epoch"], row["step"]) for row in one]
    assert [row["loss"] for row in two] == pytest.approx([row["loss"] for row in one], rel=1e-6)
    assert {path.name for path in (runs[1] / "checkpoints").iterdir()} == {"best", "last", "last.previous"}


@pytest.mark.parametrize("processes", [1, 2])
def test_a_run_goes_on_with_another_number_of_processes(
    tree: Path, tmp_path: Path, runs: tuple[Path, Path], processes: int
) -> None:
    """Cut after an epoch and some steps, with the states of carried clips in the checkpoint."""
    first, second = (train_with_one, train_with_two) if processes == 2 else (train_with_two, train_with_one)
    config = small_config(tmp_path, **OPTIONS, save_steps=1)
    first(dataclasses.replace(config, epochs=1), tree)
    checkpoints = tmp_path / "checkpoints"
    # As if killed before the epoch's end: the checkpoint after its last step but without validation.
    (checkpoints / "last").rename(tmp_path / "end_of_epoch")
    (checkpoints / "last.previous").rename(checkpoints / "last")
    assert state_of(tmp_path)["recurrent_state"] is not None
    second(dataclasses.replace(config, resume=True, other_processes=True), tree)
    expected, found = state_of(runs[0]), state_of(tmp_path)
    torch.testing.assert_close(found["weights"], expected["weights"], rtol=1e-6, atol=1e-8)


def test_another_number_of_processes_is_an_error_unless_asked_for(
    tree: Path, tmp_path: Path, runs: tuple[Path, Path]
) -> None:
    before = (runs[1] / "checkpoints" / "last" / STATE_FILE).read_bytes()
    config = small_config(runs[1], **OPTIONS, resume=True)
    with pytest.raises(TrainError, match=r"last: was saved by 2 processes, this run has 1,.* --other-processes"):
        train_with_one(config, tree)
    assert (runs[1] / "checkpoints" / "last" / STATE_FILE).read_bytes() == before


def test_lanes_are_dealt_out_without_overlap_or_loss() -> None:
    class Process:
        num_processes = 3

        def __init__(self, rank: int) -> None:
            self.process_index = rank

    config = TrainConfig(batch_size=6, time_steps=3, augment=AugmentConfig(reverse=0.5))
    for step in RunPlan(config, (60, 80)).epoch(1)(1):
        dealt = [step[own_lanes(Process(rank))] for rank in range(3)]  # type: ignore[arg-type]
        assert [len(part) for part in dealt] == [2, 2, 2]
        assert {id(clip) for part in dealt for clip in part} == {id(clip) for clip in step}


def test_batches_that_cannot_be_dealt_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Three(devices.Accelerator):
        num_processes = 3

    monkeypatch.setattr(devices, "Accelerator", Three)
    config = small_config(tmp_path, batch_size=4, augment=NO_AUGMENTATION)
    with pytest.raises(TrainError, match="--batch-size 4: must be a multiple of the 3 processes"):
        devices.make_accelerator(config)


def test_a_launcher_that_spreads_networks_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Sharded(devices.Accelerator):
        distributed_type = devices.DistributedType.FSDP

    monkeypatch.setattr(devices, "Accelerator", Sharded)
    with pytest.raises(TrainError, match=r"configured for FSDP.*choose plain data parallelism.*--sharding fsdp"):
        devices.make_accelerator(small_config(tmp_path))


# --- networks spread over processes (FSDP) ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def spread(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run by two processes, each with half of the network, killed after an epoch and resumed."""
    config = small_config(tmp_path_factory.mktemp("spread"), **OPTIONS, sharding="fsdp", save_steps=1)
    train_with_two(dataclasses.replace(config, epochs=1), tree)
    checkpoints = config.out / "checkpoints"
    shutil.rmtree(checkpoints / "last")
    (checkpoints / "last.previous").rename(checkpoints / "last")
    train_with_two(dataclasses.replace(config, resume=True), tree)
    return config.out


def test_a_spread_network_ends_with_the_weights_of_a_whole_one(runs: tuple[Path, Path], spread: Path) -> None:
    """Weights, loss, moving average, moments, validation: all that a checkpoint holds, whole."""
    one, two = state_of(runs[0]), state_of(spread)
    for part in ("weights", "loss", "ema"):
        torch.testing.assert_close(two[part], one[part], rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(two["optimizer"]["state"], one["optimizer"]["state"], rtol=1e-5, atol=1e-10)
    for first, second in zip(*(history(run, "validation") for run in (runs[0], spread)), strict=True):
        assert second["loss"] == pytest.approx(first["loss"], rel=1e-6)
    saved, expected = (load_checkpoint(run / "checkpoints" / "best").state_dict() for run in (spread, runs[0]))
    torch.testing.assert_close(saved, expected, rtol=1e-5, atol=1e-6)


def test_one_process_goes_on_with_what_a_spread_network_has_learnt(
    tree: Path, tmp_path: Path, runs: tuple[Path, Path], spread: Path
) -> None:
    config = small_config(tmp_path / "run", **OPTIONS)
    shutil.copytree(spread, config.out)
    train_with_one(dataclasses.replace(config, epochs=3, resume=True, other_processes=True), tree)
    assert state_of(config.out)["progress"]["epoch"] == 3


def test_what_cannot_be_spread(tmp_path: Path) -> None:
    with pytest.raises(TrainError, match=r"--sharding fsdp: there is one process only.*torchrun"):
        devices.make_accelerator(small_config(tmp_path, sharding="fsdp"))
    with pytest.raises(TrainError, match="--sharding fsdp: not with --precision fp16"):
        small_config(tmp_path, sharding="fsdp", precision="fp16")


def test_accelerate_launch_starts_what_trains_together(tree: Path, tmp_path: Path) -> None:
    """The launcher itself: two processes, whose figures are those of one, and which one does not resume unasked."""
    train = ["train", "--data", str(tree), "--sequences", "00", "01", "--validate", "02", "--preset", "tiny"]
    train += ["--model.image-height", "48", "--model.image-width", "160", "--batch-size", "4", "--time-steps", "3"]
    train += ["--epochs", "2", "--device", "cpu", "--precision", "fp32"]
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    launch += ["--main_process_port", str(free_port()), "-m", "convlstm_vo.cli"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    out = ["--out", str(tmp_path / "two")]
    two = subprocess.run([*launch, *train, *out], env=environment, capture_output=True, text=True, timeout=200)
    assert two.returncode == 0, two.stderr
    alone = [sys.executable, "-m", "convlstm_vo.cli", *train]
    subprocess.run([*alone, "--out", str(tmp_path / "one")], env=environment, check=True, timeout=200)
    for first, second in zip(*(history(tmp_path / run, "validation") for run in ("one", "two")), strict=True):
        assert second["loss"] == pytest.approx(first["loss"], rel=1e-3)
    resumed = subprocess.run([*alone, *out, "--resume"], capture_output=True, text=True)
    assert resumed.returncode != 0
    assert "--other-processes" in resumed.stderr
    assert "Traceback" not in resumed.stderr
