"""Focal lengths from turns; what a vehicle's calibration is otherwise, `test_geometric.py` tests."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import cv2
import numpy as np
import pytest

from convlstm_vo import cli
from convlstm_vo.calibration import CalibrationError, VehicleCalibration, check_track, turn_gain
from convlstm_vo.geometry.camera import Camera
from convlstm_vo.geometry.se3 import so3_exp
from convlstm_vo.geometry.trajectory import Trajectory
from convlstm_vo.sequences.kitti import KittiSequence
from convlstm_vo.world import WorldSequence

KITTI = Path(__file__).parents[2] / "shared" / "kitti"


def turning(rate_rad: float, frames: int = 60) -> Trajectory:
    """A camera that drives around a bend, and leans."""
    step = np.eye(4)
    step[:3, :3], step[2, 3] = so3_exp(np.array([0.0, rate_rad, 0.1 * rate_rad])), 1.0
    poses = [np.eye(4)]
    for _ in range(frames - 1):
        poses.append(poses[-1] @ step)
    return Trajectory(np.arange(frames) / 10, np.stack(poses))


@pytest.mark.parametrize("share", [-0.02, 0.0, 0.013])
def test_turn_gain_is_that_of_the_angles(share):
    assert turn_gain(turning(0.02), turning(0.02 * (1 + share))) == pytest.approx(share, abs=1e-9)


def test_turn_gain_does_not_ask_for_the_cameras_axes():
    true = turning(0.02)
    axes = np.eye(4)
    axes[:3, :3] = np.array([[0, 0, 1], [-1, 0, 0], [0, -1, 0]])  # ahead, left, up, as GPS/IMU units have them
    other = Trajectory(true.timestamps_s, axes @ true.T_world_camera @ np.linalg.inv(axes))
    assert turn_gain(other, turning(0.0198)) == pytest.approx(-0.01, abs=1e-9)


def test_a_straight_drive_says_nothing_about_the_focal_length():
    assert turn_gain(turning(0.0001), turning(0.0001)) is None


def test_a_track_of_other_frames_is_refused():
    track, times = turning(0.02, 30), np.arange(30) / 10
    check_track(track, False, times, "gps.txt")
    check_track(track, True, 1e9 + times[:25], "gps.txt")  # a clock of its own
    with pytest.raises(CalibrationError, match=r"gps\.txt: 30 poses for 29 frames"):
        check_track(track, False, times[1:], "gps.txt")
    with pytest.raises(CalibrationError, match=r"gps\.txt: takes 2\.9 s, but the frames 9\.9 s.*--fps"):
        check_track(track, True, np.arange(100) / 10, "gps.txt")


@pytest.mark.skipif(not KITTI.is_dir(), reason="no ../shared/kitti")
def test_calibrate_finds_a_wrong_focal_length_on_real_frames(tmp_path, capsys):
    sequence = KittiSequence(KITTI, "0005")
    camera = dataclasses.replace(sequence.camera, fx=sequence.camera.fx * 1.04, fy=sequence.camera.fy * 1.04)
    values = [f"{value:.4f}" for value in (camera.fx, camera.fy, camera.cx, camera.cy)]
    track = ["--track", str(KITTI / "poses" / "0005.txt"), "--out", str(tmp_path / "car.json")]
    cli.main(["calibrate", str(KITTI / "sequences" / "0005"), *track, "--intrinsics", *values])
    said = capsys.readouterr().out
    assert float(said.split("turns are ")[1].split(" %")[0]) > 4 and "% smaller than the track's" in said
    better = float(said.split("fx ")[1].split(",")[0])
    assert better == pytest.approx(sequence.camera.fx, rel=0.02)  # itself 1 % too long, by the turns


@pytest.mark.parametrize("hidden, accepted", [(1, True), (6, False)])
def test_calibrate_needs_the_road_in_nearly_all_frames(tmp_path, capsys, hidden, accepted):
    drive = WorldSequence(
        33, frames=60, kind="town", camera=Camera(363.6, 363.6, 309.5, 93.5, height=192, width=624)
    )
    (tmp_path / "drive").mkdir()
    for k, frame in enumerate(drive):
        image = frame.image.copy()
        if 30 <= k < 30 + hidden:
            image[98:] = 0  # a bonnet that opened
        cv2.imwrite(str(tmp_path / "drive" / f"{k:06}.png"), image)
    out = tmp_path / "car.json"
    command = ["calibrate", str(tmp_path / "drive"), "--distance", "25", "--out", str(out)]
    command += ["--intrinsics", "363.6", "363.6", "309.5", "93.5"]
    if accepted:
        with pytest.raises(SystemExit):
            cli.main([*command[:5], str(tmp_path), *command[6:]])
        assert "is a folder; name a file" in capsys.readouterr().err
        with pytest.raises(SystemExit):
            cli.main([*command[:3], "200", *command[4:]])
        assert "--distance: 200.0 m, but with the camera 1.65 m above the road" in capsys.readouterr().err
        cli.main(command)
        assert VehicleCalibration.read(out).camera_height_m > 0
    else:
        with pytest.raises(SystemExit) as stopped:
            cli.main(command)
        assert stopped.value.code == 2
        assert re.search(r"0 frames lost, ([4-9]|1\d) without a road", capsys.readouterr().err)
        assert not out.exists()
