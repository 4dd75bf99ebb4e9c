"""A camera that does not look where the car drives: found out, and as good as one that does."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from convlstm_vo.calibration import CalibrationError, VehicleCalibration
from convlstm_vo.evaluation.metrics import score
from convlstm_vo.geometry import se3
from convlstm_vo.geometry.camera import Camera
from convlstm_vo.geometry.trajectory import Trajectory
from convlstm_vo.models.checkpoint import load_checkpoint
from convlstm_vo.models.geometric import Cells, expected_flow
from convlstm_vo.models.mounting import Memory, direction, facing_ahead, looking_ahead, turned_aside
from convlstm_vo.models.scene import cell_rays, flow_of, road_normal
from convlstm_vo.odometer import VisualOdometry
from convlstm_vo.sequences.base import Frame
from convlstm_vo.sequences.kitti import KittiSequence
from convlstm_vo.world import Mount, WorldSequence

KITTI = Path(__file__).parents[2] / "shared" / "kitti"
NET = load_checkpoint()
CAMERA = Camera(363.6, 363.6, 309.5, 93.5, height=192, width=624)
K = torch.tensor(CAMERA.intrinsics[None], dtype=torch.float32)
angle = st.floats(-0.3, 0.3)


def memory(**values: torch.Tensor) -> Memory:
    blank = Memory.unpack(torch.zeros(1, Memory.SIZE))
    return dataclasses.replace(blank, known=torch.ones(1), **values)


def aside(yaw: float, pitch: float) -> torch.Tensor:
    return torch.tensor([[yaw, pitch]])


@given(angle, angle)
def test_looking_ahead_is_the_cameras_orientation_on_the_car(yaw, pitch):
    """Right is positive yaw, up is positive pitch; y points down."""
    axis = looking_ahead(memory(aside=aside(yaw, pitch)))[0] @ torch.tensor([0.0, 0.0, 1.0])
    assert torch.atan2(axis[0], axis[2]).item() == pytest.approx(yaw, abs=1e-5)
    assert -torch.asin(axis[1]).item() == pytest.approx(pitch, abs=1e-5)


@given(angle, angle, angle, angle)
def test_what_is_remembered_is_the_same_whatever_the_axes(yaw, pitch, to_yaw, to_pitch):
    before = memory(
        aside=aside(yaw, pitch),
        motion=torch.tensor([[0.1, 0.05, 1.0, 0.01, 0.03, -0.02]]),
        slopes=torch.tensor([[0.02, -0.05]]),
        mounting=torch.tensor([[-0.01, 0.03]]),
    )
    after = turned_aside(before, aside(to_yaw, to_pitch))
    back, forth = (looking_ahead(m)[0].T for m in (before, after))
    for part in (slice(0, 3), slice(3, 6)):
        torch.testing.assert_close(back @ before.motion[0, part], forth @ after.motion[0, part], atol=1e-5, rtol=0)
    for name in ("slopes", "mounting"):
        normals = [R @ road_normal(getattr(m, name))[0] for R, m in ((back, before), (forth, after))]
        torch.testing.assert_close(*normals, atol=1e-5, rtol=0)


def test_expected_flow_is_that_of_the_scene_in_the_cameras_own_axes():
    """A canyon along the road and a car that drives along it, seen by a camera that looks aside."""
    rays = cell_rays(K, 48, 156)
    ahead = memory(motion=torch.tensor([[0.0, 0.0, 0.7, 0.0, 0.0, 0.0]]))
    straight = expected_flow(rays, K, ahead)
    flow = flow_of(rays, rays[:, 1].clamp_min(1 / 60).maximum(rays[:, 0].abs() / 7.3), ahead.motion, K)
    torch.testing.assert_close(straight, flow, atol=1e-3, rtol=0)
    turned = dataclasses.replace(ahead, aside=aside(0.1, -0.08))
    R = looking_ahead(turned)
    cells = Cells(
        rays, (straight / K[:, :2, None, None]) + rays[:, :2], torch.ones(1, 48, 156), torch.ones(1, 48, 156)
    )
    # The same points, as the turned camera sees them, in pixels of its own; then predicted there.
    there = cells.turned(R.transpose(1, 2))
    predicted = expected_flow(there.rays, K, turned)
    inside = (there.rays[0, 0].abs() < 0.9) & (there.rays[0, 1].abs() < 0.4)
    error = (predicted - (there.seen - there.rays[:, :2]) * K[:, :2, None, None])[0][:, inside]
    assert error.abs().max() < 0.01


def test_cells_come_back_from_other_axes():
    rays = cell_rays(K, 48, 156)
    cells = Cells(rays, rays[:, :2] * 1.02, torch.ones(1, 48, 156), torch.ones(1, 48, 156))
    R = looking_ahead(memory(aside=aside(0.2, 0.1)))
    again = cells.turned(R).turned(R.transpose(1, 2))
    torch.testing.assert_close(again.rays, cells.rays, atol=1e-5, rtol=0)
    torch.testing.assert_close(again.seen, cells.seen, atol=1e-5, rtol=0)


def driven(motion: list[float], frames: int) -> Memory:
    """What is known after so many frames of one motion, in the camera's axes."""
    own, known = torch.tensor([motion]), memory()
    lost = torch.zeros(1, dtype=torch.bool)
    for _ in range(frames):
        R = looking_ahead(known)
        seen = torch.cat([(R @ part[..., None])[..., 0] for part in own.split(3, 1)], 1)
        known = facing_ahead(dataclasses.replace(known, motion=seen), lost)
    return known


@settings(max_examples=25)
@given(angle, angle)
def test_driving_straight_tells_where_the_camera_looks(yaw, pitch):
    R = looking_ahead(memory(aside=aside(yaw, pitch)))[0]
    known = driven([*(R.T @ torch.tensor([0.0, 0.0, 1.0])).tolist(), 0.0, 0.0, 0.0], 40)
    torch.testing.assert_close(known.aside, aside(yaw, pitch), atol=0.012, rtol=0)
    assert known.motion[0, 2] == pytest.approx(1.0, abs=1e-3)


@pytest.mark.parametrize("motion", [[0.0, 0.0, 0.0, 0.0, 0.0, 0.0], [0.09, 0.0, 0.3, 0.0, 0.05, 0.0]])
def test_neither_standing_nor_turning_tells(motion):
    known = driven(motion, 40)
    assert known.aside.abs().max() < 0.01


def test_a_bend_tells_of_the_pitch():
    known = driven([0.09, 0.05, 0.3, 0.0, 0.05, 0.0], 40)
    assert known.aside[0].tolist() == pytest.approx([0.0, np.arctan(0.05 / 0.3)], abs=0.02)


def test_backwards_tells_the_same():
    ahead, back = (direction(torch.tensor([[s * 0.1, s * -0.05, s * 1.0, 0.0, 0.0, 0.0]])) for s in (1, -1))
    torch.testing.assert_close(ahead, back)
    assert ahead.tolist() == [[pytest.approx(-0.0997, abs=1e-3), pytest.approx(-0.05, abs=1e-3)]]


def test_a_lost_frame_tells_nothing():
    known = memory(motion=torch.tensor([[0.5, 0.0, 1.0, 0.0, 0.0, 0.0]]))
    after = facing_ahead(known, torch.ones(1, dtype=torch.bool))
    assert after.aside.abs().max() == 0 and after.aside_precision.max() == 0


@pytest.mark.parametrize(
    "seed, kind, yaw, pitch, within",
    [
        (5_100_001, "country", 0.0, 8.0, 0.15),
        (5_100_001, "country", -10.0, 0.0, 0.05),
        (5_100_001, "country", 12.0, -5.0, 0.05),
        (5_100_002, "motorway", 0.0, -8.0, 0.05),
    ],
)
def test_a_camera_that_looks_aside_on_a_street(seed, kind, yaw, pitch, within):
    """Looking up by 8 degrees it sees little road. Before all this, two of eight such drives were lost."""
    mount = Mount(yaw=np.radians(yaw), pitch=np.radians(pitch))
    sequence = WorldSequence(seed, frames=16, kind=kind, camera=CAMERA, mount=mount)
    odometer = VisualOdometry(NET, CAMERA)
    found = np.array([np.linalg.norm(odometer.track(frame).T_prev_curr[:3, 3]) for frame in sequence])[1:]
    true = np.linalg.norm(sequence.trajectory.motions[:, :3], axis=1)
    assert true.min() > 0.5
    np.testing.assert_allclose(found, true, rtol=within)
    known = odometer.calibration
    assert known is not None
    assert np.degrees([known.yaw_rad, known.pitch_rad]) == pytest.approx([yaw, pitch], abs=1.0)


@pytest.mark.skipif(not KITTI.exists(), reason="../shared/kitti is missing")
def test_real_frames_of_a_camera_that_looks_aside():
    """KITTI's, turned 6 degrees to the left about the lens, and cut to what both see."""
    sequence = KittiSequence(KITTI, "06")
    R = se3.so3_exp(np.array([0.0, np.radians(-6.0), 0.0]))
    whole = sequence.camera
    H = whole.matrix() @ R.T @ np.linalg.inv(whole.matrix())
    camera = whole.cropped(top=12, left=80, height=whole.height - 24, width=whole.width - 160)
    odometer, poses = VisualOdometry(NET, camera), []
    for frame in sequence:
        image = cv2.warpPerspective(frame.image, H, (whole.width, whole.height), flags=cv2.INTER_CUBIC)
        image = np.ascontiguousarray(image[12:-12, 80:-80])
        poses.append(odometer.track(Frame(image, frame.timestamp_s, frame.index)).T_world_camera)
    turned = np.eye(4)
    turned[:3, :3] = R.T
    times = sequence.trajectory.timestamps_s
    truth = Trajectory(times, turned @ sequence.trajectory.T_world_camera @ np.linalg.inv(turned))
    result = score(truth, Trajectory(times, np.stack(poses)), lengths_m=(20.0, 40.0))
    assert result.t_rel_percent < 1.2  # 1.6 where the camera was taken to look ahead
    assert result.r_rel_deg_per_100m < 1.2
    assert np.degrees(odometer.calibration.yaw_rad) == pytest.approx(-6.0, abs=0.7)


def test_a_calibrated_camera_starts_with_what_is_known(monkeypatch):
    mount = Mount(yaw=0.15, pitch=-0.1)
    sequence = WorldSequence(5_100_001, frames=3, kind="country", camera=CAMERA, mount=mount)
    start = VehicleCalibration(1.65, -0.1, 0.0, 0.15, 1e5, 1e5, 1e5)
    odometer = VisualOdometry(NET, CAMERA, start)
    searches, search = [], NET.search
    monkeypatch.setattr(NET, "search", lambda view, memory: searches.append(1) or search(view, memory))
    for frame in sequence:
        odometer.track(frame)
    assert len(searches) == 1  # for the motion alone
    known = odometer.calibration
    assert [known.yaw_rad, known.pitch_rad] == pytest.approx([0.15, -0.1], abs=0.01)


def test_a_yaw_that_no_calibration_has_is_refused():
    with pytest.raises(CalibrationError, match=r"yaw 0.4 rad: must be under 0.3"):
        VehicleCalibration(1.65, yaw_rad=0.4)
    with pytest.raises(CalibrationError, match="yaw_precision -1"):
        VehicleCalibration(1.65, yaw_precision=-1.0)
