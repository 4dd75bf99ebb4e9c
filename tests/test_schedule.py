"""Growing clips, learning rates, and the search for one."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from convlstm_vo.sequences.kitti import open_kitti
from convlstm_vo.training.cache import DecodedSequence, decode_sequence
from convlstm_vo.training.config import TrainConfig, TrainError
from convlstm_vo.training.finder import LearningRateCurve, find_learning_rate
from convlstm_vo.training.log import TrainingLog
from convlstm_vo.training.losses import LossConfig
from convlstm_vo.training.run import run_training
from convlstm_vo.training.schedule import RunPlan, clip_length, learning_rate
from tests.small_runs import small_config, train_small
from tests.trees import write_tree


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tree(tmp_path_factory.mktemp("tree"), {"00": 40, "01": 16, "02": 13})


@pytest.fixture(scope="module")
def sequences(tree: Path) -> list[DecodedSequence]:
    return [decode_sequence(sequence, height=48, width=160, channels=1) for sequence in open_kitti(tree)]


def test_learning_rates() -> None:
    options = TrainConfig(lr=1.0, warmup_steps=10, schedule="cosine")
    rates = [learning_rate(update, 110, options) for update in range(111)]
    assert rates[0] == pytest.approx(0.1) and max(rates) == pytest.approx(1) and rates[110] == pytest.approx(0)
    assert rates[60] == pytest.approx(0.5)
    constant = dataclasses.replace(options, schedule="constant", warmup_steps=0)
    assert {learning_rate(update, 110, constant) for update in range(110)} == {1.0}


def test_clips_grow_to_their_full_length() -> None:
    config = TrainConfig(time_steps=10, curriculum_epochs=8)
    lengths = [clip_length(epoch, config) for epoch in range(12)]
    assert lengths == sorted(lengths) and lengths[0] == 2 and lengths[8:] == [10] * 4 and len(set(lengths)) > 5
    assert {clip_length(epoch, TrainConfig(time_steps=5)) for epoch in range(3)} == {5}
    assert clip_length(0, TrainConfig(time_steps=1, curriculum_epochs=4)) == 1


def test_steps_add_up_over_epochs_of_different_length() -> None:
    plan = RunPlan(TrainConfig(time_steps=6, curriculum_epochs=4, epochs=7, batch_size=2), (50, 70))
    steps = [len(list(plan.epoch(number)(number))) for number in range(7)]
    assert steps[0] > steps[6]
    assert [plan.steps_before(number) for number in range(8)] == [sum(steps[:number]) for number in range(8)]
    assert plan.steps == sum(steps)


def test_a_curriculum_trains(tree: Path, tmp_path: Path) -> None:
    config = small_config(
        tmp_path, curriculum_epochs=2, epochs=3, time_steps=6, loss=LossConfig(drift_steps=(2, 4))
    )
    train_small(config, tree)
    rows = [json.loads(line) for line in (tmp_path / "history.jsonl").read_text().splitlines()]
    steps = [sum(row["kind"] == "train" and row["epoch"] == epoch for row in rows) for epoch in range(3)]
    assert steps[0] > steps[1] > steps[2] > 0


def test_a_learning_rate_is_found(sequences: list[DecodedSequence], tmp_path: Path) -> None:
    config = small_config(tmp_path)
    curve = find_learning_rate(config, sequences[:1], TrainingLog(tmp_path, quiet=True), steps=60)
    assert 1e-5 < curve.suggestion < 1e-1
    assert list(curve.rates) == sorted(curve.rates) and curve.rates[0] == pytest.approx(1e-7)
    assert min(curve.losses) < 0.8 * curve.losses[0]
    again = find_learning_rate(config, sequences[:1], TrainingLog(tmp_path, quiet=True), steps=60)
    assert again == curve and not list(tmp_path.iterdir())


def test_the_suggestion_is_a_tenth_of_the_best_rate() -> None:
    assert LearningRateCurve((1e-4, 1e-3, 1e-2, 1e-1), (3.0, 2.0, 1.0, 9.0)).suggestion == pytest.approx(1e-3)


def test_a_loss_that_never_falls_gives_no_rate(
    sequences: list[DecodedSequence], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = iter(range(1, 1000))
    monkeypatch.setattr("convlstm_vo.training.loop.Trainer.train_step", lambda self, batch: float(next(losses)))
    with pytest.raises(TrainError, match="no learning rate makes the loss fall"):
        find_learning_rate(small_config(tmp_path), sequences[:1], TrainingLog(tmp_path, quiet=True), steps=20)


def test_the_flag_draws_the_curve(tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = small_config(tmp_path / "run", data=tree, sequences=("00",), find_lr=True, cache=tmp_path / "cache")
    picture = run_training(config)
    assert picture.name == "learning_rates.png" and picture.stat().st_size > 1000
    suggestion = json.loads(picture.with_suffix(".json").read_text())["suggestion"]
    assert f"Suggestion: --lr {suggestion:.1e}" in capsys.readouterr().out
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_weights_reach_the_plan(tree: Path, tmp_path: Path) -> None:
    options = {"data": tree, "cache": tmp_path / "cache", "sequences": ("00", "01"), "weights": (0.5, 4.0)}
    config = small_config(tmp_path / "run", validate=("02",), epochs=1, **options)
    run_training(config)
    saved = json.loads((tmp_path / "run" / "train.json").read_text())
    assert saved["weights"] == [0.5, 4.0]
    assert RunPlan(config, (40, 16)).epoch(0).weights == (0.5, 4.0)
