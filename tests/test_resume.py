"""Exact resume: killed at any moment, a run ends with the weights of one that never was."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from convlstm_vo.models.checkpoint import CheckpointError, load_checkpoint
from convlstm_vo.training import interrupts as interrupts_module
from convlstm_vo.training.config import TrainConfig
from convlstm_vo.training.interrupts import Interrupts
from convlstm_vo.training.log import TrainingLog
from convlstm_vo.training.loop import Trainer
from convlstm_vo.training.losses import LossConfig
from convlstm_vo.training.state import RunCheckpoints, read_training_state
from tests.small_runs import decoded, small_config, start, train_small
from tests.trees import write_tree

# Everything that has a state of its own: dropout, averages of the weights and of gradients, learned weights of the
# loss, growing clips, carried states, early stopping.
EVERYTHING: dict[str, Any] = {
    "epochs": 6,
    "save_steps": 3,
    "accumulate": 2,
    "curriculum_epochs": 3,
    "patience": 50,
    "loss": LossConfig(learned_weights=True, drift_steps=(2,), rotation="geodesic"),
}


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tree(tmp_path_factory.mktemp("tree"), {"00": 26, "01": 19, "02": 9, "03": 9})


def everything(out: Path) -> TrainConfig:
    config = small_config(out, **EVERYTHING)
    return dataclasses.replace(config, model=dataclasses.replace(config.model, head_dropout=0.2))


def final_state(config: TrainConfig) -> dict[str, Any]:
    return read_training_state(config.out / "checkpoints" / "last")


def assert_equal_runs(config: TrainConfig, expected: TrainConfig) -> None:
    """Bit for bit: weights, averages, moments, everything in the state; the best checkpoint; the history."""
    state, other = final_state(config), final_state(expected)
    assert state.pop("run") == other.pop("run")
    torch.testing.assert_close(state, other, rtol=0, atol=0)
    best, good = (load_checkpoint(run.out / "checkpoints" / "best").state_dict() for run in (config, expected))
    torch.testing.assert_close(best, good, rtol=0, atol=0)
    assert history(config) == history(expected)


def history(config: TrainConfig) -> list[dict[str, float]]:
    rows = [json.loads(line) for line in (config.out / "history.jsonl").read_text().splitlines()]
    timing = ("seconds_per_step", "pairs_per_second")
    return [{key: value for key, value in row.items() if key not in timing} for row in rows]


@pytest.fixture(scope="module")
def whole(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    """A run that nobody kills."""
    config = everything(tmp_path_factory.mktemp("whole"))
    process = start(train_small, config, tree)
    process.join(120)
    assert process.exitcode == 0
    return config


def history_rows(config: TrainConfig) -> int:
    """Rows that a run has logged so far; one a step or validation."""
    path = config.out / "history.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def kill_often(config: TrainConfig, tree: Path, rows: int, kills: int, seed: int) -> int:
    """Start the run, kill it at a random moment of its training, resume it, and so on; then let it end.

    Args:
        rows: that the whole run logs; moments are chosen by them, since seconds differ from machine to machine.

    Returns:
        How often it was killed while it trained.
    """
    rng = random.Random(seed)
    resumed, killed = dataclasses.replace(config, resume=True), 0
    for _ in range(kills):
        begun = history_rows(config)
        target = rng.randint(min(begun + 1, rows - 2), rows - 2)
        process = start(train_small, resumed, tree)
        while process.is_alive() and history_rows(config) < target:
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.02))  # in the middle of a step, or of a checkpoint
        process.kill()
        process.join()
        assert process.exitcode in (-signal.SIGKILL, 0)
        killed += process.exitcode == -signal.SIGKILL and target > begun
    process = start(train_small, resumed, tree)
    process.join(120)
    assert process.exitcode == 0
    return killed


def test_killed_runs_end_with_the_same_weights(tree: Path, tmp_path: Path, whole: TrainConfig) -> None:
    config = everything(tmp_path)
    assert kill_often(config, tree, history_rows(whole), kills=3, seed=0) >= 1
    assert_equal_runs(config, whole)
    assert not list((tmp_path / "checkpoints").glob(".*"))


@pytest.mark.slow
def test_twenty_killed_runs_end_with_the_same_weights(tree: Path, tmp_path: Path, whole: TrainConfig) -> None:
    killed, number = 0, 0
    while killed < 20:
        config, number = everything(tmp_path / str(number)), number + 1
        killed += kill_often(config, tree, history_rows(whole), kills=4, seed=number)
        assert_equal_runs(config, whole)


@pytest.fixture(scope="module")
def finished(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two epochs."""
    out = tmp_path_factory.mktemp("finished")
    train_small(small_config(out, epochs=2), tree)
    return out


@pytest.mark.parametrize("file", ["training_state.pt", "model.safetensors"])
@pytest.mark.parametrize("damage", ["cut", "bit", "gone"])
def test_a_damaged_checkpoint_gives_way_to_the_one_before(
    tree: Path, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], file: str, damage: str
) -> None:
    config = small_config(tmp_path, epochs=2)
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "checkpoints" / "last" / file
    content = path.read_bytes()
    middle = len(content) // 2
    if damage == "gone":
        path.unlink()
    else:
        flipped = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
        path.write_bytes(content[:middle] if damage == "cut" else flipped)
    trainer = Trainer(dataclasses.replace(config, resume=True), *_data(tree), TrainingLog(tmp_path))
    trainer.resume()
    told = capsys.readouterr().out
    assert "Warning" in told and file in told and "last.previous" in told
    assert trainer.progress.epoch == 1
    trainer.run()
    assert final_state(config)["progress"]["epoch"] == 2
    assert (tmp_path / "checkpoints" / "last.damaged").is_dir()


def _data(tree: Path) -> tuple[list, list]:
    *training, one, other = decoded(tree)
    return training, [one, other]


def test_only_damaged_checkpoints_are_an_error(tree: Path, finished: Path, tmp_path: Path) -> None:
    config = small_config(tmp_path, epochs=2)
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    for name in ("last", "last.previous"):
        (tmp_path / "checkpoints" / name / "training_state.pt").write_bytes(b"damaged")
    with pytest.raises(CheckpointError, match=r"last/training_state\.pt: is damaged.*previous/training_state\.pt"):
        train_small(dataclasses.replace(config, resume=True), tree)
    (tmp_path / "checkpoints" / "last.previous" / "training_state.pt").unlink()
    with pytest.raises(
        CheckpointError, match=r"has no training_state\.pt, so it cannot be resumed; use it with --init"
    ):
        train_small(dataclasses.replace(config, resume=True), tree)


def test_a_kill_between_two_renames_loses_nothing(tmp_path: Path) -> None:
    checkpoints = RunCheckpoints(tmp_path)
    for name in ("last.new", "last.previous", ".best.previous", ".last.new.a1b2c3"):
        (checkpoints.folder / name).mkdir(parents=True)
    checkpoints.clean()
    assert {path.name for path in checkpoints.folder.iterdir()} == {"last.new", "last.previous", "best"}
    assert [path.name for path in checkpoints.candidates()] == ["last.new", "last.previous"]


def test_the_first_ctrl_c_waits_and_the_second_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    interrupts, before = Interrupts(), signal.getsignal(signal.SIGINT)
    with interrupts.deferred(told.append):
        os.kill(os.getpid(), signal.SIGINT)
        assert interrupts.asked and told == ["Stopping after this step (again to stop at once)"]
        os.kill(os.getpid(), signal.SIGINT)  # the same one, from a launcher
        monkeypatch.setattr(interrupts_module, "_SAME_SECONDS", 0.0)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_an_interrupt_within_a_step_saves_nothing_inexact(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(self: Trainer, *args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Trainer, "_update", interrupt)
    with pytest.raises(KeyboardInterrupt):
        train_small(small_config(tmp_path), tree)
    assert not RunCheckpoints(tmp_path).candidates()


def test_a_checkpoint_of_another_version_says_so(finished: Path, tmp_path: Path) -> None:
    folder = tmp_path / "last"
    shutil.copytree(finished / "checkpoints" / "last", folder)
    state = read_training_state(folder)
    torch.save({**state, "format": 1}, folder / "training_state.pt")
    (folder / "checksums.json").write_text("{}")
    with pytest.raises(CheckpointError, match="of another version of convlstm-vo"):
        read_training_state(folder)
