"""Training: it learns, resumes exactly, survives interruptions, and stops with a reason."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from convlstm_vo.models.checkpoint import CheckpointError, load_checkpoint
from convlstm_vo.models.config import preset
from convlstm_vo.models.network import OdometryNet
from convlstm_vo.sequences.kitti import open_kitti
from convlstm_vo.training import devices
from convlstm_vo.training.cache import DecodedSequence, decode_sequence
from convlstm_vo.training.clips import AugmentConfig
from convlstm_vo.training.config import TrainConfig, TrainError
from convlstm_vo.training.ema import WeightAverage
from convlstm_vo.training.learner import Learner
from convlstm_vo.training.log import TrainingLog
from convlstm_vo.training.loop import Trainer, train
from convlstm_vo.training.losses import LossConfig
from tests.small_runs import SMALL, small_config
from tests.trees import write_tree


@pytest.fixture(scope="module")
def sequences(tmp_path_factory: pytest.TempPathFactory) -> list[DecodedSequence]:
    tree = write_tree(tmp_path_factory.mktemp("tree"), {"00": 16, "01": 13})
    return [decode_sequence(sequence, height=48, width=160, channels=1) for sequence in open_kitti(tree)]


def run(options: TrainConfig, sequences: list[DecodedSequence], validate: bool = True) -> Path:
    return train(options, sequences[:1], sequences[1:] if validate else [], TrainingLog(options.out, quiet=True))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_checkpoint(folder).state_dict()


def history(folder: Path, kind: str) -> list[dict[str, float]]:
    rows = [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]
    return [row for row in rows if row["kind"] == kind]


def test_the_loss_falls(tmp_path: Path, sequences: list[DecodedSequence]) -> None:
    best = run(small_config(tmp_path, epochs=12, augment=AugmentConfig(mirror=0, reverse=0)), sequences)
    losses = [row["loss"] for row in history(tmp_path, "train")]
    assert np.mean(losses[-4:]) < 0.1 * np.mean(losses[:4])
    assert best.name == "best" and isinstance(load_checkpoint(best), OdometryNet)
    assert min(row["loss"] for row in history(tmp_path, "validation")) < 0.2


def test_an_interrupted_run_resumes_to_the_same_weights(
    tmp_path: Path, sequences: list[DecodedSequence], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted in the middle of an epoch, between two carried clips; equal bit for bit."""
    options = small_config(tmp_path / "whole")
    run(options, sequences)
    original = TrainingLog.step

    def interrupt(self: TrainingLog, trainer: Trainer, *args: Any) -> None:
        original(self, trainer, *args)
        if (trainer.progress.epoch, trainer.progress.step) == (1, 1):
            raise KeyboardInterrupt

    cut = dataclasses.replace(options, out=tmp_path / "cut")
    monkeypatch.setattr(TrainingLog, "step", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run(cut, sequences)
    load_checkpoint(cut.out / "checkpoints" / "last")  # usable as it is
    monkeypatch.setattr(TrainingLog, "step", original)
    run(dataclasses.replace(cut, resume=True), sequences)
    for name in ("last", "best"):
        expected = weights(options.out / "checkpoints" / name)
        for key, value in weights(cut.out / "checkpoints" / name).items():
            torch.testing.assert_close(value, expected[key], rtol=0, atol=0, msg=f"{name}: {key}")


def test_resuming_something_else_is_refused(tmp_path: Path, sequences: list[DecodedSequence]) -> None:
    options = small_config(tmp_path, epochs=1)
    run(options, sequences)
    with pytest.raises(TrainError, match="other sequences or options: batch_size was 2, now 1"):
        run(dataclasses.replace(options, resume=True, batch_size=1), sequences)
    with pytest.raises(TrainError, match="seed was 0, now 3"):
        run(dataclasses.replace(options, resume=True, seed=3), sequences)
    with pytest.raises(TrainError, match=r"lengths was \[16\], now \[16, 13\]"):
        train(dataclasses.replace(options, resume=True), sequences, [], TrainingLog(tmp_path, quiet=True))
    moved = dataclasses.replace(sequences[0], T_world_camera=sequences[0].T_world_camera[::-1].copy())
    renamed = dataclasses.replace(sequences[0], name="77")
    for other_one, what in ((renamed, "sequences was"), (moved, "of poses was")):
        with pytest.raises(TrainError, match=what):
            train(dataclasses.replace(options, resume=True), [other_one], [], TrainingLog(tmp_path, quiet=True))
    with pytest.raises(TrainError, match="augment was"):
        mirrored = dataclasses.replace(options.augment, mirror=0.25)
        run(dataclasses.replace(options, resume=True, augment=mirrored), sequences)
    other = dataclasses.replace(SMALL, hidden_channels=12)
    with pytest.raises(CheckpointError, match="hidden_channels"):
        run(dataclasses.replace(options, resume=True, model=other), sequences)
    with pytest.raises(TrainError, match=r"trained without --loss\.learned-weights"):
        run(dataclasses.replace(options, resume=True, loss=LossConfig(learned_weights=True)), sequences)


def test_weights_of_another_run_are_the_start(tmp_path: Path, sequences: list[DecodedSequence]) -> None:
    first = run(small_config(tmp_path / "a", epochs=8), sequences)
    run(small_config(tmp_path / "b", epochs=1, lr=1e-9, init=first), sequences)
    expected = weights(first)
    for key, value in weights(tmp_path / "b" / "checkpoints" / "last").items():
        torch.testing.assert_close(value, expected[key], rtol=1e-4, atol=1e-6)


def test_a_loss_that_is_not_a_number_names_the_frames(tmp_path: Path, sequences: list[DecodedSequence]) -> None:
    poses = sequences[0].T_world_camera.copy()
    poses[:, 0, 3] = np.nan
    bad = dataclasses.replace(sequences[0], T_world_camera=poses)
    with pytest.raises(TrainError, match=r"loss is nan in epoch 1, step 0 \(sequence 00 frames"):
        run(small_config(tmp_path), [bad], validate=False)


def test_a_gradient_that_is_not_a_number_spoils_no_weights(
    tmp_path: Path, sequences: list[DecodedSequence], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loss is finite, its gradient is not; the last good checkpoint is named and stays as it was."""
    run(small_config(tmp_path, epochs=1), sequences)
    before = weights(tmp_path / "checkpoints" / "last")
    forward = Learner.forward

    def spoiled(self: Learner, *args: Any) -> tuple[torch.Tensor, Any]:
        loss, state = forward(self, *args)
        return loss + 0 * (next(self.parameters()).sum() * 0).sqrt(), state

    monkeypatch.setattr(Learner, "forward", spoiled)
    with pytest.raises(TrainError, match=r"gradient's norm is nan .*the last good checkpoint is .*last"):
        run(small_config(tmp_path, epochs=3, resume=True), sequences)
    torch.testing.assert_close(weights(tmp_path / "checkpoints" / "last"), before, rtol=0, atol=0)


def test_patience_needs_validation(tmp_path: Path, sequences: list[DecodedSequence]) -> None:
    with pytest.raises(TrainError, match="--patience 2: is about the validation loss; add --validate"):
        run(small_config(tmp_path, patience=2), sequences, validate=False)


def test_early_stop(tmp_path: Path, sequences: list[DecodedSequence]) -> None:
    run(small_config(tmp_path, epochs=30, patience=2, lr=1e-20), sequences)
    losses = [row["loss"] for row in history(tmp_path, "validation")]
    assert len(losses) < 30 and min(losses[-2:]) >= min(losses[:-2])


def test_accumulated_steps_make_one_update(tmp_path: Path, sequences: list[DecodedSequence]) -> None:
    run(small_config(tmp_path, epochs=2, accumulate=2), sequences)
    rows = history(tmp_path, "train")
    assert rows[-1]["update"] == pytest.approx(len(rows) / 2, abs=1)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_trains_too(tmp_path: Path, sequences: list[DecodedSequence], precision: str) -> None:
    run(small_config(tmp_path, epochs=8, precision=precision), sequences)
    losses = [row["loss"] for row in history(tmp_path, "train")]
    assert np.mean(losses[-3:]) < 0.6 * losses[0]


def test_a_device_without_the_precision_says_what_to_use(
    tmp_path: Path, sequences: list[DecodedSequence], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(**options: Any) -> None:
        raise ValueError("fp16 mixed precision requires a GPU")

    monkeypatch.setattr(devices, "Accelerator", refuse)
    with pytest.raises(TrainError, match="requires a GPU\\); use bf16 or fp32"):
        run(small_config(tmp_path, precision="fp16"), sequences)


def test_kept_checkpoints(tmp_path: Path, sequences: list[DecodedSequence]) -> None:
    run(small_config(tmp_path, epochs=4, keep_epochs=2), sequences, validate=False)
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {
        "last",
        "last.previous",
        "epoch-0002",
        "epoch-0004",
    }


def test_averages_follow_the_weights() -> None:
    net = torch.nn.Linear(1, 1, bias=False)
    average = WeightAverage(net, 0.5)
    with torch.no_grad():
        net.weight.fill_(4.0)
    before = average.average["weight"].item()
    average.update(net)
    assert average.average["weight"].item() == pytest.approx(4 + (before - 4) * 2 / 11)  # the warm-up's decay
    for _ in range(60):
        average.update(net)
    with average.applied_to(net):
        assert net.weight.item() == pytest.approx(4.0, abs=1e-3)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"batch_size": 0}, "--batch-size 0: must be at least 1"),
        ({"lr": -1.0}, "--lr -1.0: must be positive"),
        ({"lr": math.nan}, "--lr nan: must be positive"),
        ({"ema": 1.0}, "--ema 1.0"),
        ({"patience": -1}, "--patience -1"),
        ({"keep_epochs": -1}, "--keep-epochs -1"),
        ({"curriculum_epochs": -2}, "--curriculum-epochs -2"),
        ({"weights": (1.0,)}, "--weights: 1 numbers for 0 --sequences"),
        ({"weights": (1.0, 0.0), "sequences": ("00", "01")}, "--weights 1.0 0.0: each must be positive"),
        (
            {"loss": LossConfig(drift_steps=(2, 8))},
            "--loss.drift-steps 8: longer than a clip; raise --time-steps 5",
        ),
        ({"model": preset("deepvo"), "checkpoint_activations": True}, "--model.batch-norm averages over the batch"),
        ({"sequences": ("00",), "validate": ("00",)}, "--validate 00: also in --sequences"),
    ],
)
def test_options_out_of_range(values: dict[str, Any], message: str) -> None:
    with pytest.raises(TrainError, match=message):
        TrainConfig(**values)
