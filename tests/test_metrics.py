"""Scores against oracles that are not ours: the figures of KITTI's C++ devkit, and evo."""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from convlstm_vo.errors import ConvlstmVoError
from convlstm_vo.evaluation.baselines import BASELINES, constant_motion, straight_ahead, zero_motion
from convlstm_vo.evaluation.matching import match
from convlstm_vo.evaluation.metrics import Score, score, score_files
from convlstm_vo.evaluation.segments import (
    KITTI,
    SHORT,
    TINY,
    MetricError,
    SegmentProtocol,
    choose_protocol,
    frame_period_s,
    segment_errors,
)
from convlstm_vo.geometry import se3
from convlstm_vo.geometry.trajectory import ALIGNMENTS, Alignment, Trajectory, read_trajectory

# Printed by the devkit's evaluate_odometry (see facts.md): segments, t_rel %, r_rel degrees per 100 m.
DEVKIT = {"00_orb": (3283, 0.699733, 0.253352), "09_a": (958, 2.606843, 0.287709)}
DEVKIT_BY_LENGTH = {
    ("00_orb", 100): (445, 1.009080, 0.614279),
    ("00_orb", 800): (375, 0.415861, 0.100014),
    ("09_a", 100): (147, 3.325737, None),
    ("09_a", 800): (86, 2.110271, None),
}
# Measured by others on the real clips (facts.md): t_rel %, r_rel degrees per 100 m of "straight ahead".
STRAIGHT_AHEAD = {"06": (2.19, 3.16), "01": (54.8, 208), "0005": (42.5, 146), "0013": (6.70, 6.59)}
ESTIMATES = ("00_orb", "00_sptam", "09_a", "10_a", "10_tartanvo_tum_order")


def ground_truth_of(shared: Path, estimate: str) -> Path:
    return shared / "trajectories" / "ground_truth" / f"{estimate[:2]}.txt"


def files(shared: Path, estimate: str) -> tuple[Path, Path]:
    return ground_truth_of(shared, estimate), shared / "trajectories" / "estimates" / f"{estimate}.txt"


scored = functools.cache(score_files)


def random_path(seed: int = 0, frames: int = 60, speed_m: float = 1.0) -> Trajectory:
    """A winding path of about ``speed_m`` metres a frame."""
    rng = np.random.default_rng(seed)
    motions = rng.normal(0, 0.03, (frames - 1, 6)) + np.array([0, 0, speed_m, 0, 0.02, 0])
    return Trajectory.from_motions(motions)


def straight_path(frames: int = 101, speed_m: float = 1.0) -> Trajectory:
    return Trajectory.from_motions(np.tile([0, 0, speed_m, 0, 0, 0], (frames - 1, 1)))


class TestDevkit:
    @pytest.mark.parametrize("estimate", DEVKIT)
    def test_all_lengths(self, shared: Path, estimate: str) -> None:
        found = scored(*files(shared, estimate))
        segments, t_rel, r_rel = DEVKIT[estimate]
        assert found.overall.segments == segments
        assert found.t_rel_percent == pytest.approx(t_rel, abs=2e-6)
        assert found.r_rel_deg_per_100m == pytest.approx(r_rel, abs=2e-6)
        assert (found.protocol, found.alignment, found.matched_by) == (KITTI, "none", "row")

    @pytest.mark.parametrize(("estimate", "length"), DEVKIT_BY_LENGTH)
    def test_one_length(self, shared: Path, estimate: str, length: int) -> None:
        found = scored(*files(shared, estimate)).by_length[length]
        segments, t_rel, r_rel = DEVKIT_BY_LENGTH[estimate, length]
        assert found.segments == segments
        assert found.t_rel_percent == pytest.approx(t_rel, abs=2e-6)
        assert r_rel is None or found.r_rel_deg_per_100m == pytest.approx(r_rel, abs=2e-6)

    @pytest.mark.parametrize("estimate", ["00_orb", "09_a"])
    def test_segments_as_in_a_literal_transcription_of_the_devkit(self, shared: Path, estimate: str) -> None:
        true, estimated = (read_trajectory(path) for path in files(shared, estimate))
        errors = segment_errors(true, estimated, KITTI)
        expected = _devkit_segments(true, estimated)
        np.testing.assert_array_equal(errors.first_frame, expected[:, 0])
        np.testing.assert_array_equal(errors.length_m, expected[:, 1])
        np.testing.assert_allclose(errors.speed_m_per_s, expected[:, 2], rtol=1e-6)
        by_speed = errors.by_speed()
        for speed in range(2, 25, 2):
            near = np.abs(expected[:, 2] - speed) < 2
            assert by_speed[speed].segments == near.sum() if near.any() else speed not in by_speed

    @pytest.mark.parametrize("name", STRAIGHT_AHEAD)
    def test_straight_ahead_on_short_clips(self, shared: Path, name: str) -> None:
        true = read_trajectory(shared / "kitti" / "poses" / f"{name}.txt")
        found = score(true, straight_ahead(true))
        assert found.protocol == (KITTI if name == "0013" else SHORT)
        t_rel, r_rel = STRAIGHT_AHEAD[name]
        assert found.t_rel_percent == pytest.approx(t_rel, rel=3e-3)
        assert found.r_rel_deg_per_100m == pytest.approx(r_rel, rel=3e-3)


def _devkit_segments(true: Trajectory, estimated: Trajectory) -> np.ndarray:
    """First frame, length and speed of every segment, by the devkit's own loops."""
    distances = [np.float32(0)]
    for a, b in zip(true.positions_xyz[:-1], true.positions_xyz[1:], strict=True):
        x, y, z = (b - a).astype(np.float32)
        distances.append(np.float32(distances[-1] + np.sqrt(x * x + y * y + z * z)))
    rows = []
    for first in range(0, len(distances), 10):
        for length in range(100, 801, 100):
            beyond = (
                i for i in range(first, len(distances)) if distances[i] > distances[first] + np.float32(length)
            )
            last = next(beyond, None)
            if last is not None:
                rows.append((first, length, length / (0.1 * (last - first + 1))))
    return np.array(rows)


class TestEvo:
    """evo is GPL and only asked here; the package never imports it."""

    @pytest.mark.parametrize("alignment", ALIGNMENTS)
    @pytest.mark.parametrize("estimate", ESTIMATES)
    def test_ate_and_rpe(self, shared: Path, estimate: str, alignment: Alignment) -> None:
        found = scored(*files(shared, estimate))
        ate, translation, rotation = _evo(*(read_trajectory(path) for path in files(shared, estimate)), alignment)
        ours = found.ate[alignment]
        for name, value in {"rmse_m": ate["rmse"], "mean_m": ate["mean"], "median_m": ate["median"]}.items():
            assert getattr(ours, name) == pytest.approx(value, rel=1e-9), name
        assert ours.max_m == pytest.approx(ate["max"], rel=1e-9)
        assert found.rpe[alignment].translation_rmse_m == pytest.approx(translation["rmse"], rel=1e-6)
        assert found.rpe[alignment].rotation_rmse_deg == pytest.approx(rotation["rmse"], abs=1e-6)

    @pytest.mark.parametrize("alignment", ALIGNMENTS)
    def test_an_estimate_of_some_frames(self, shared: Path, alignment: Alignment) -> None:
        true, estimated = (read_trajectory(path) for path in files(shared, "09_b_indexed"))
        found = score(true, estimated)
        assert (found.frames, found.matched_by) == (1589, "frame")
        ate, _, _ = _evo(true[estimated.frames], estimated, alignment)
        assert found.ate[alignment].rmse_m == pytest.approx(ate["rmse"], rel=1e-9)


def _evo(true: Trajectory, estimated: Trajectory, alignment: Alignment) -> list[dict[str, float]]:
    """evo's statistics of ATE, and of RPE in translation (m) and rotation (degrees)."""
    metrics = pytest.importorskip("evo.core.metrics")
    from evo.core.trajectory import PosePath3D

    reference, estimate = (PosePath3D(poses_se3=list(t.T_world_camera)) for t in (true, estimated))
    if alignment != "none":
        estimate.align(reference, correct_scale=alignment == "sim3", correct_only_scale=alignment == "scale")
    relations = metrics.PoseRelation
    measures = [
        metrics.APE(relations.translation_part),
        metrics.RPE(relations.translation_part, delta=1, delta_unit=metrics.Unit.frames),
        metrics.RPE(relations.rotation_angle_deg, delta=1, delta_unit=metrics.Unit.frames),
    ]
    for measure in measures:
        measure.process_data((reference, estimate))
    return [measure.get_all_statistics() for measure in measures]


class TestIdentities:
    @pytest.mark.parametrize("frames", [61, 301])
    def test_a_path_has_no_error_against_itself(self, frames: int) -> None:
        true = random_path(frames=frames)
        found = score(true, true)
        assert found.t_rel_percent == pytest.approx(0, abs=1e-9)
        assert found.r_rel_deg_per_100m == pytest.approx(0, abs=1e-9)
        assert found.end_drift_m == 0
        for alignment in ALIGNMENTS:
            assert found.ate[alignment].rmse_m == pytest.approx(0, abs=1e-9)
            assert found.rpe[alignment].rotation_rmse_deg == pytest.approx(0, abs=1e-6)

    @given(st.lists(st.floats(-3, 3), min_size=6, max_size=6))
    @settings(max_examples=15)
    def test_the_world_frame_of_the_estimate_does_not_matter(self, motion: list[float]) -> None:
        true, estimate = random_path(1), random_path(2)
        world = se3.matrix_from_motion(np.array(motion))
        moved = dataclasses.replace(estimate, T_world_camera=world @ estimate.T_world_camera)
        one, other = score(true, estimate), score(true, moved)
        assert other.t_rel_percent == pytest.approx(one.t_rel_percent, rel=1e-5)
        assert other.r_rel_deg_per_100m == pytest.approx(one.r_rel_deg_per_100m, rel=1e-5)
        assert other.end_drift_m == pytest.approx(one.end_drift_m, rel=1e-6)
        assert other.ate["se3"].rmse_m == pytest.approx(one.ate["se3"].rmse_m, rel=1e-6)
        started_together = score(true, moved, same_start=True)
        assert started_together.ate["none"].rmse_m == pytest.approx(one.ate["none"].rmse_m, rel=1e-6)

    @pytest.mark.parametrize("scale", [0.5, 1.0, 1.03])
    def test_a_wrong_scale_on_a_straight_line(self, scale: float) -> None:
        true = straight_path(speed_m=1.25)  # 1.25 m sums up exactly, so the last frame lies one step beyond
        found = score(true, straight_path(speed_m=1.25 * scale), lengths_m=[20], step_frames=1)
        assert found.t_rel_percent == pytest.approx(100 * abs(scale - 1) * 21.25 / 20, abs=1e-4)
        assert found.end_drift_percent == pytest.approx(100 * abs(scale - 1), abs=1e-9)
        assert found.by_length[20].segments == found.overall.segments == 101 - 17
        aligned = score(true, straight_path(speed_m=1.25 * scale), lengths_m=[20], alignment="scale")
        assert (aligned.alignment, aligned.t_rel_percent) == ("scale", pytest.approx(0, abs=1e-4))

    def test_a_constant_yaw_error(self) -> None:
        true = straight_path()
        estimate = Trajectory.from_motions(np.tile([0, 0, 1.0, 0, np.radians(0.1), 0], (100, 1)))
        found = score(true, estimate, lengths_m=[40])
        assert found.r_rel_deg_per_100m == pytest.approx(100 * 0.1 * 41 / 40, rel=1e-5)
        assert found.rpe["none"].rotation_rmse_deg == pytest.approx(0.1)

    def test_speed_counts_frames_as_the_devkit_does(self) -> None:
        found = score(straight_path(), straight_path(), lengths_m=[20], step_frames=1)
        assert list(found.by_speed) == [8, 10]  # 20 m in 22 frames of 0.1 s
        assert frame_period_s(straight_path()) == 0.1


class TestProtocol:
    @pytest.mark.parametrize(
        ("length", "protocol"), [(3000, KITTI), (100.1, KITTI), (100, SHORT), (20.1, SHORT), (20, TINY), (1, TINY)]
    )
    def test_the_longest_that_fits(self, length: float, protocol: SegmentProtocol) -> None:
        assert choose_protocol(length) == protocol

    def test_own_lengths_are_named(self) -> None:
        assert choose_protocol(3000, [40, 20]) == SHORT
        assert choose_protocol(60, range(100, 801, 100)) == KITTI
        assert choose_protocol(60, [10]) == SegmentProtocol("custom", (10.0,), 1)
        assert choose_protocol(3000, step_frames=1) == SegmentProtocol("custom", KITTI.lengths_m, 1)
        assert str(choose_protocol(60)) == "short: segments of 20, 40 m, starting every frame"

    @pytest.mark.parametrize(("lengths", "step"), [([], 1), ([0], 1), ([float("nan")], 1), ([5, 5], 1), ([5], 0)])
    def test_bad_options(self, lengths: list[float], step: int) -> None:
        with pytest.raises(MetricError, match=r"segment"):
            score(random_path(), random_path(), lengths_m=lengths, step_frames=step)

    def test_bad_alignment(self) -> None:
        with pytest.raises(MetricError, match="'se2' is not one of none, scale, se3, sim3"):
            score(random_path(), random_path(), alignment="se2")  # type: ignore[arg-type]


class TestMatching:
    def test_by_frame_number(self) -> None:
        true = random_path()
        rows = np.array([3, 4, 7, 20, 59])
        part = dataclasses.replace(true[rows], frames=rows)
        matched = match(true, part)
        assert (matched.by, matched.frames, matched.estimate_frames, matched.ground_truth_frames) == (
            "frame",
            5,
            5,
            60,
        )
        np.testing.assert_array_equal(matched.ground_truth.T_world_camera, part.T_world_camera)

    def test_a_ground_truth_of_some_frames(self) -> None:
        full = random_path()
        rows = np.arange(10, 40)
        part = dataclasses.replace(full[rows], frames=rows)
        assert match(part, full).frames == 30
        assert match(part, full[rows]).by == "row"  # as many poses as the ground truth, none of them numbered

    def test_by_nearest_time(self) -> None:
        true = random_path()
        rows = np.array([3, 4, 7, 20, 59])
        late = dataclasses.replace(true[rows], timestamps_s=true.timestamps_s[rows] + 0.04)
        matched = match(true, late, both_timed=True)
        assert (matched.by, matched.frames) == ("time", 5)
        np.testing.assert_array_equal(matched.ground_truth.T_world_camera, late.T_world_camera)

    def test_a_denser_ground_truth_matches_only_where_it_is_near(self) -> None:
        dense = dataclasses.replace(random_path(), timestamps_s=np.arange(60) * 0.005 + 100)
        sparse = dataclasses.replace(random_path(frames=20), timestamps_s=np.arange(20) * 0.05 + 99.9)
        matched = match(dense, sparse, both_timed=True)
        np.testing.assert_allclose(matched.estimate.timestamps_s, matched.ground_truth.timestamps_s)
        assert matched.frames == 6

    def test_different_counts(self, tmp_path: Path) -> None:
        paths = [tmp_path / "true.txt", tmp_path / "estimate.txt"]
        random_path(frames=51).write_kitti(paths[0])
        random_path(frames=50).write_kitti(paths[1])
        with pytest.raises(MetricError, match=r"true.txt has 51 poses, but .*estimate.txt has 50.*13 columns"):
            score_files(*paths)

    def test_nothing_in_common(self) -> None:
        true = random_path()
        later = dataclasses.replace(true, timestamps_s=true.timestamps_s + 1000)
        with pytest.raises(MetricError, match="0 poses of the same time in common"):
            match(true, later, both_timed=True)

    def test_a_single_pose(self) -> None:
        with pytest.raises(MetricError, match="at least 2"):
            score(random_path(frames=1), random_path(frames=1))


class TestFiles:
    def test_tum_files_are_matched_by_their_times(self, tmp_path: Path) -> None:
        true = random_path()
        true.write_tum(tmp_path / "true.txt")
        true[np.arange(5, 50)].write_tum(tmp_path / "part.txt")
        found = score_files(tmp_path / "true.txt", tmp_path / "part.txt")
        assert (found.matched_by, found.frames) == ("time", 45)
        assert found.ate["none"].rmse_m == pytest.approx(0, abs=1e-9)

    def test_nan_and_missing_files(self, tmp_path: Path) -> None:
        random_path().write_kitti(tmp_path / "true.txt")
        (tmp_path / "bad.txt").write_text("1 0 0 0 0 1 0 0 0 0 1 0\n1 0 0 nan 0 1 0 0 0 0 1 0\n")
        with pytest.raises(ConvlstmVoError, match=r"bad.txt, line 2: 'nan'"):
            score_files(tmp_path / "true.txt", tmp_path / "bad.txt")
        with pytest.raises(ConvlstmVoError, match=r"none.txt: no such file"):
            score_files(tmp_path / "none.txt", tmp_path / "true.txt")


class TestScore:
    def test_json_names_everything(self) -> None:
        found = score(random_path(), random_path(1), alignment="sim3").as_dict()
        again = json.loads(json.dumps(found, allow_nan=False))
        assert again == found
        assert again["alignment"] == "sim3"
        assert (again["protocol"], again["lengths_m"], again["step_frames"]) == ("short", [20, 40], 1)
        assert set(again["by_length"]) == {"20", "40"}
        assert set(again["by_length"]["20"]) == {"segments", "t_rel_percent", "r_rel_deg_per_100m"}
        assert set(again["ate"]) == set(again["rpe"]) == set(ALIGNMENTS)
        keys = {"segments", "t_rel_percent", "r_rel_deg_per_100m", "by_speed", "frames", "path_length_m", "notes"}
        assert keys | {"end_drift_m", "end_drift_percent", "matched_by"} <= set(again)

    def test_no_segment_is_null_with_a_reason(self) -> None:
        found = score(random_path(frames=10, speed_m=0.1), random_path(1, frames=10))
        assert (found.overall.segments, found.t_rel_percent, found.r_rel_deg_per_100m) == (0, None, None)
        assert "holds no segment of 2 m" in found.notes[0]
        json.dumps(found.as_dict(), allow_nan=False)

    def test_a_camera_that_stands_still(self) -> None:
        still = zero_motion(random_path())
        found = score(still, random_path())
        assert found.end_drift_percent is None
        json.dumps(found.as_dict(), allow_nan=False)


class TestBaselines:
    @pytest.mark.parametrize("name", BASELINES)
    def test_same_times_and_first_pose(self, name: str) -> None:
        true = random_path()[np.arange(7, 60)]
        path = BASELINES[name](true)
        np.testing.assert_array_equal(path.timestamps_s, true.timestamps_s)
        np.testing.assert_allclose(path.T_world_camera[0], true.T_world_camera[0])

    def test_zero_motion_is_100_percent_and_cannot_be_aligned(self) -> None:
        true = straight_path()[np.arange(7, 101)]
        found = score(true, zero_motion(true))
        assert found.end_drift_percent == pytest.approx(100)
        assert found.ate["sim3"] is None and found.rpe["scale"] is None and found.ate["none"] is not None
        assert "stands still" in found.notes[0]
        with pytest.raises(MetricError, match="sim3 is not defined for an estimate that stands still"):
            score(true, zero_motion(true), alignment="sim3")

    def test_constant_motion_is_right_on_a_circle(self) -> None:
        circle = Trajectory.from_motions(np.tile([0, 0, 1.0, 0, 0.02, 0], (60, 1)))
        assert _largest_error(score(circle, constant_motion(circle))) < 1e-9

    def test_straight_ahead_keeps_the_length_of_the_path(self) -> None:
        true = random_path()
        assert straight_ahead(true).distances_m[-1] == pytest.approx(true.distances_m[-1])
        assert np.abs(straight_ahead(true).motions[:, 3:]).max() == 0


def _largest_error(found: Score) -> float:
    return max(found.ate["none"].max_m, found.rpe["none"].rotation_rmse_deg, found.end_drift_m)
