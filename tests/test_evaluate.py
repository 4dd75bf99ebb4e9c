"""Whole sequences beside the baselines, and their JSON."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from convlstm_vo.errors import ConvlstmVoError
from convlstm_vo.evaluation.baselines import BASELINES
from convlstm_vo.evaluation.evaluate import (
    Evaluation,
    evaluate_sequence,
    evaluate_sequences,
    sample_frames,
    save_json,
    save_results,
)
from convlstm_vo.evaluation.metrics import score
from convlstm_vo.evaluation.segments import MetricError
from convlstm_vo.geometry import se3
from convlstm_vo.geometry.camera import Camera
from convlstm_vo.geometry.trajectory import Trajectory
from convlstm_vo.sequences.base import Frame, Sequence


@dataclasses.dataclass
class Drive:
    """A sequence in memory: gray noise, and a path with or without poses."""

    name: str
    trajectory: Trajectory | None
    frames: int = 61
    camera: Camera = dataclasses.field(default_factory=lambda: Camera.from_fov(80, height=24, width=80))

    def __len__(self) -> int:
        return self.frames

    def __getitem__(self, index: int) -> Frame:
        image = np.random.default_rng(index).integers(0, 255, (24, 80), dtype=np.uint8)
        return Frame(image, index * 0.1, index, f"{self.name}/{index}")

    def __iter__(self) -> Iterator[Frame]:
        return (self[index] for index in range(len(self)))


def path(seed: int = 0, frames: int = 61) -> Trajectory:
    rng = np.random.default_rng(seed)
    return Trajectory.from_motions(rng.normal(0, 0.02, (frames - 1, 6)) + np.array([0, 0, 1.0, 0, 0.02, 0]))


def slightly_wrong(sequence: Sequence) -> Trajectory:
    """An estimate 2 % too long."""
    assert sequence.trajectory is not None
    return Trajectory.from_motions(sequence.trajectory.motions * [1.02, 1.02, 1.02, 1, 1, 1])


def drives() -> list[Drive]:
    return [Drive("a", path(0)), Drive("b", path(1)), Drive("test-only", None)]


def test_a_drive_is_a_sequence() -> None:
    assert isinstance(Drive("a", path()), Sequence)


def test_network_beside_baselines() -> None:
    result = evaluate_sequence(Drive("a", path()), slightly_wrong)
    assert list(result.scores) == ["network", *BASELINES]
    assert result.score is not None and result.score.end_drift_percent == pytest.approx(
        100 * 0.02 * np.linalg.norm(path().positions_xyz[-1]) / path().distances_m[-1], rel=1e-5
    )
    assert result.scores["zero_motion"].t_rel_percent > 50
    assert result.ms_per_frame is not None and result.ms_per_frame > 0
    errors = result.errors_over_time("network")
    assert errors.time_s.shape == errors.translation_m.shape == errors.rotation_deg.shape == (60,)
    assert errors.translation_m.mean() == pytest.approx(0.02, rel=0.05)


def test_a_finished_trajectory_and_a_given_time() -> None:
    sequence = Drive("a", path())
    result = evaluate_sequence(sequence, slightly_wrong(sequence), ms_per_frame=12.5, lengths_m=[10], step_frames=2)
    assert result.ms_per_frame == 12.5
    assert result.any_score.protocol.lengths_m == result.scores["zero_motion"].protocol.lengths_m == (10,)


def test_where_the_world_begins_does_not_matter() -> None:
    sequence = Drive("a", path())
    elsewhere = se3.matrix_from_motion(np.array([5, -3, 8, 0.3, 2, 0.1])) @ sequence.trajectory.T_world_camera
    moved = Drive("a", dataclasses.replace(sequence.trajectory, T_world_camera=elsewhere))
    one, other = (evaluate_sequence(drive, slightly_wrong).score for drive in (sequence, moved))
    assert other.ate["none"].rmse_m == pytest.approx(one.ate["none"].rmse_m)


def test_some_frames_only() -> None:
    rows = np.arange(5, 50)
    sequence = Drive("a", path())
    part = dataclasses.replace(slightly_wrong(sequence)[rows], frames=rows)
    numbered = evaluate_sequence(sequence, part)
    timed = evaluate_sequence(sequence, lambda _: dataclasses.replace(part, frames=None))
    assert (numbered.score.frames, numbered.score.matched_by) == (45, "frame")
    assert (timed.score.frames, timed.score.matched_by) == (45, "time")
    assert timed.score.t_rel_percent == numbered.score.t_rel_percent
    assert len(timed.errors_over_time("network").time_s) == 44
    with pytest.raises(MetricError, match=r"the ground truth of a has 61 poses, but the estimate of a has 45"):
        evaluate_sequence(sequence, dataclasses.replace(part, frames=None))


def test_without_ground_truth() -> None:
    with pytest.raises(MetricError, match=r"test-only has no ground truth .*poses/test-only.txt.*convlstm-vo run"):
        evaluate_sequence(Drive("test-only", None), slightly_wrong)
    assert evaluate_sequences(drives(), slightly_wrong).skipped == {"test-only": "no ground truth"}
    with pytest.raises(MetricError, match=r"nothing to measure: no ground truth .poses/NAME.txt. for test-only"):
        evaluate_sequences(drives()[2:], slightly_wrong)


def test_json_has_the_keys_of_score_and_no_nan(tmp_path: Path) -> None:
    evaluation = evaluate_sequences(drives(), slightly_wrong, alignment="sim3")
    save_results(tmp_path / "out.json", evaluation, "convlstm-vo evaluate --data x")
    text = (tmp_path / "out.json").read_text()
    assert "NaN" not in text and "Infinity" not in text
    found = json.loads(text)
    keys = set(score(path(), path(1)).as_dict())
    assert keys | {"ms_per_frame", "baselines"} == set(found["sequences"]["a"])
    assert found["sequences"]["a"]["alignment"] == "sim3"
    assert found["sequences"]["a"]["baselines"]["straight_ahead"]["alignment"] == "none"
    assert keys == set(found["sequences"]["b"]["baselines"]["zero_motion"])
    mean = np.mean([found["sequences"][name]["t_rel_percent"] for name in "ab"])
    assert found["mean"]["network"]["t_rel_percent"] == pytest.approx(mean)
    assert found["mean"]["over_sequences"] == 2 and found["skipped"] == {"test-only": "no ground truth"}
    assert found["command"] == "convlstm-vo evaluate --data x"


def test_baselines_alone() -> None:
    evaluation = evaluate_sequences(drives(), None)
    found = evaluation.as_dict()["sequences"]["a"]
    assert found["t_rel_percent"] is None and found["notes"] == ["no network: baselines only"]
    assert set(found) == set(evaluate_sequences(drives(), slightly_wrong).as_dict()["sequences"]["a"])
    assert found["lengths_m"] == [20, 40] and found["baselines"]["zero_motion"]["t_rel_percent"] > 50


def test_a_mean_needs_every_sequence() -> None:
    tiny = Trajectory.from_motions(path(frames=10).motions * 0.01)
    evaluation = evaluate_sequences([Drive("a", path()), Drive("tiny", tiny, frames=10)], slightly_wrong)
    assert evaluation.mean()["network"]["t_rel_percent"] is None
    assert len(evaluation.protocols()) == 2


def test_json_refuses_nan_and_leaves_the_old_file(tmp_path: Path) -> None:
    (tmp_path / "out.json").write_text("old")
    with pytest.raises(ValueError):
        save_json(tmp_path / "out.json", {"x": float("nan")})
    (tmp_path / "file").touch()
    with pytest.raises(ConvlstmVoError, match=r"out.json: cannot be written"):
        save_json(tmp_path / "file" / "out.json", {})
    assert (tmp_path / "out.json").read_text() == "old"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "out.json"]


def test_samples_are_spread_from_first_to_last() -> None:
    assert [frame.index for frame in sample_frames(Drive("a", path()), 4)] == [0, 20, 40, 60]
    assert [frame.index for frame in sample_frames(Drive("a", None, frames=2), 4)] == [0, 1]
    assert sample_frames(Drive("a", None, frames=0), 4) == ()


def test_an_evaluation_of_nothing_has_no_mean() -> None:
    assert Evaluation(()).mean() == {}
