"""Trajectories: files that round-trip to the last digit, chaining, alignment, and files that are wrong."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from convlstm_vo.geometry import files, se3
from convlstm_vo.geometry.trajectory import (
    Trajectory,
    TrajectoryError,
    has_own_times,
    read_kitti,
    read_trajectory,
    read_tum,
)

ROW = "1 0 0 0 0 1 0 0 0 0 1 0"


@st.composite
def trajectories(draw: st.DrawFn, most: int = 8) -> Trajectory:
    n = draw(st.integers(2, most))
    motions = draw(arrays(np.float64, (n - 1, 6), elements=st.floats(-3, 3)))
    steps = draw(arrays(np.float64, n, elements=st.floats(1e-3, 1e3)))
    motions[:, 3:] *= 0.3
    return Trajectory.from_motions(motions, np.cumsum(steps))


@settings(max_examples=30)
@given(trajectories())
def test_kitti_files_round_trip_to_the_last_digit(
    tmp_path_factory: pytest.TempPathFactory, path: Trajectory
) -> None:
    file = tmp_path_factory.mktemp("kitti") / "poses.txt"
    path.write_kitti(file)
    again = read_kitti(file, path.timestamps_s)
    np.testing.assert_array_equal(again.T_world_camera, path.T_world_camera)


@settings(max_examples=30)
@given(trajectories())
def test_tum_files_round_trip(tmp_path_factory: pytest.TempPathFactory, path: Trajectory) -> None:
    file = tmp_path_factory.mktemp("tum") / "poses.txt"
    path.write_tum(file)
    again = read_tum(file)
    np.testing.assert_array_equal(again.timestamps_s, path.timestamps_s)
    np.testing.assert_array_equal(again.positions_xyz, path.positions_xyz)
    # A quaternion and a matrix are two roundings of one rotation: equal to a few units in the last place.
    np.testing.assert_allclose(again.T_world_camera, path.T_world_camera, rtol=0, atol=2e-15)


def test_the_official_files_round_trip_number_by_number(shared: Path, tmp_path: Path) -> None:
    source = shared / "trajectories" / "ground_truth" / "09.txt"
    read_kitti(source).write_kitti(tmp_path / "09.txt")
    np.testing.assert_array_equal(np.loadtxt(tmp_path / "09.txt"), np.loadtxt(source))


@given(trajectories())
def test_motions_chain_back_to_the_trajectory(path: Trajectory) -> None:
    again = Trajectory.from_motions(path.motions, path.timestamps_s)
    np.testing.assert_allclose(again.T_world_camera, path.from_first_pose().T_world_camera, atol=1e-9)


@given(trajectories(), arrays(np.float64, 6, elements=st.floats(-2, 2)))
def test_another_camera_on_the_same_body_moves_as_the_body_does(path: Trajectory, motion: np.ndarray) -> None:
    T_camera_other = se3.matrix_from_motion(motion)
    other = path.with_extrinsics(T_camera_other)
    expected = se3.inverse(T_camera_other) @ se3.matrix_from_motion(path.motions) @ T_camera_other
    np.testing.assert_allclose(se3.matrix_from_motion(other.motions), expected, atol=1e-9)


@settings(max_examples=50)
@given(trajectories(), st.floats(0.1, 10), arrays(np.float64, 6, elements=st.floats(-2, 2)))
def test_sim3_alignment_undoes_a_similarity(path: Trajectory, scale: float, motion: np.ndarray) -> None:
    spread = np.linalg.svd(path.positions_xyz - path.positions_xyz.mean(0), compute_uv=False)
    if len(path) < 4 or spread[-1] < 1e-2:  # points on a plane or a line fix no unique rotation
        return
    poses = path.T_world_camera.copy()
    poses[:, :3, 3] *= scale
    moved = Trajectory(path.timestamps_s, se3.matrix_from_motion(motion) @ poses)
    np.testing.assert_allclose(moved.align(path, "sim3").positions_xyz, path.positions_xyz, atol=1e-6)


def test_standing_still_cannot_be_aligned() -> None:
    still = Trajectory.from_motions(np.zeros((4, 6)))
    with pytest.raises(TrajectoryError, match="stands still"):
        still.align(still, "sim3")
    assert still.align(still, "none") is still


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (f"{ROW}\n{ROW[:-2]}\n", "line 2: 11 values, where a row needs 12 numbers"),
        (f"{ROW}\n{ROW.replace('1 0', 'nan 0', 1)}\n", "line 2: 'nan' is not a finite number"),
        (f"{ROW}\n# a comment\n{ROW.replace('1 0', 'one 0', 1)}\n", "line 3: 'one' is not a finite number"),
        (ROW.replace("1", "2"), "pose 1: its 3x3 part is not a rotation"),
        ("-" + ROW, r"pose 1: its 3x3 part is not a rotation \(it is mirrored\)"),
        (ROW[:-1] + "1e200", r"a position is 1e\+200 m from the origin"),
        (f"0 {ROW}\n1.5 {ROW}\n", "pose 2: 1.5 is no frame number"),
        (f"-1 {ROW}\n1 {ROW}\n", "pose 1: -1 is no frame number"),
        ("", "the file is empty"),
    ],
)
def test_wrong_kitti_files_are_refused_with_their_line(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "poses.txt"
    file.write_text(text)
    with pytest.raises(TrajectoryError, match=message) as caught:
        read_kitti(file)
    assert str(file) in str(caught.value)


def test_a_row_of_no_known_format_is_told_of_both(tmp_path: Path) -> None:
    (tmp_path / "poses.txt").write_text(f"{ROW} 0 0 0 1\n")  # all of the 4x4 matrix
    with pytest.raises(TrajectoryError, match=r"line 1: 16 values, where a row of KITTI has 12 .* TUM 8"):
        read_trajectory(tmp_path / "poses.txt")


def test_parts_of_a_trajectory_fit_each_other() -> None:
    times, poses = np.arange(2.0), np.tile(np.eye(4), (2, 1, 1))
    with pytest.raises(TrajectoryError, match="2 time stamps need 2 frame numbers"):
        Trajectory(times, poses, np.arange(5))
    with pytest.raises(TrajectoryError, match="NaN or infinity"):
        Trajectory(np.array([0.0, np.inf]), poses)


def test_wrong_tum_files_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "poses.txt"
    file.write_text("0 0 0 0 0 0 0 0\n")
    with pytest.raises(TrajectoryError, match="quaternion"):
        read_tum(file)
    file.write_text("1 0 0 0 0 0 0 1\n1 0 0 0 0 0 0 1\n")
    with pytest.raises(TrajectoryError, match="must increase"):
        read_tum(file)
    with pytest.raises(TrajectoryError, match="no such file"):
        read_tum(tmp_path / "missing.txt")


@pytest.mark.parametrize(
    ("name", "frames", "own_times"),
    [("00_orb", 4541, False), ("09_b_indexed", 1589, False), ("10_tartanvo_tum_order", 1201, False)],
)
def test_real_files_of_all_kinds_are_recognised(shared: Path, name: str, frames: int, own_times: bool) -> None:
    file = shared / "trajectories" / "estimates" / f"{name}.txt"
    trajectory = read_trajectory(file)
    assert len(trajectory) == frames
    assert has_own_times(file) == own_times
    if name.endswith("indexed"):
        assert trajectory.frames is not None and trajectory.frames[0] == 2


def test_paths_that_lead_nowhere(tmp_path: Path) -> None:
    path = Trajectory.from_motions(np.ones((3, 6)))
    (tmp_path / "file").touch()
    with pytest.raises(files.WriteError, match="a folder of its path is a file"):
        path.write_kitti(tmp_path / "file" / "poses.txt")
    with pytest.raises(files.WriteError, match="is a folder; name a file"):
        path.write_kitti(tmp_path)


def test_a_full_disk_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "poses.txt"
    path = Trajectory.from_motions(np.ones((3, 6)))
    path.write_kitti(file)
    before = file.read_bytes()

    def full(fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(files.WriteError, match="No space left"):
        Trajectory.from_motions(np.zeros((3, 6))).write_kitti(file)
    assert file.read_bytes() == before
    assert list(tmp_path.iterdir()) == [file]


def test_poses_that_are_not_finite_are_refused() -> None:
    poses = np.tile(np.eye(4), (2, 1, 1))
    poses[1, 0, 3] = np.nan
    with pytest.raises(TrajectoryError, match="NaN"):
        Trajectory(np.arange(2.0), poses)
