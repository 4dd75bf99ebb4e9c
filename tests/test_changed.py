"""Turned frames: what a camera that hangs upside down, or lies on its side, would have seen upright."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest

from convlstm_vo import cli
from convlstm_vo.geometry.camera import Camera
from convlstm_vo.geometry.trajectory import read_kitti
from convlstm_vo.sequences.base import SequenceError
from convlstm_vo.sequences.changed import Turned
from convlstm_vo.sequences.lens import Lens, Undistorted
from convlstm_vo.sequences.video import ImageFolder
from convlstm_vo.world import WorldSequence

CAMERA = Camera(210.0, 200.0, 158.0, 110.0, height=240, width=320)


@pytest.mark.parametrize("degrees", [90, 180, 270])
def test_a_point_is_where_the_turned_image_shows_it(tmp_path: Path, degrees: int) -> None:
    """The camera, its image and its axes turn by the same."""
    point = np.array([0.3, -0.4, 2.0])
    x, y = np.round(CAMERA.project(point)).astype(int)
    image = np.zeros((240, 320), np.uint8)
    image[y, x] = 255
    cv2.imwrite(str(tmp_path / "0.png"), image)
    stream = Turned(ImageFolder(tmp_path, lambda h, w: CAMERA), degrees)
    (frame,) = stream
    assert frame.image.shape == (stream.camera.height, stream.camera.width)
    a = np.radians(degrees)
    seen = stream.camera.project(
        np.array([[np.cos(a), -np.sin(a), 0], [np.sin(a), np.cos(a), 0], [0, 0, 1]]) @ point
    )
    row, column = np.unravel_index(frame.image.argmax(), frame.image.shape)
    np.testing.assert_allclose(seen, [column, row], atol=0.51)
    assert CAMERA.turned(4) == CAMERA == CAMERA.turned(1).turned(3)


def test_the_true_path_turns_along() -> None:
    drive = WorldSequence(3, frames=4, kind="town", camera=CAMERA)
    turned = Turned(drive, 90)
    assert turned.approximate_length == 4 and turned.trajectory is not None
    way, straight = (np.diff(t.T_world_camera[:, :3, 3], axis=0) for t in (turned.trajectory, drive.trajectory))
    np.testing.assert_allclose(way, np.stack([-straight[:, 1], straight[:, 0], straight[:, 2]], 1), atol=1e-12)


def test_a_lens_is_of_the_frames_as_they_come(tmp_path: Path) -> None:
    cv2.imwrite(str(tmp_path / "0.png"), np.zeros((240, 320), np.uint8))
    lens = Lens(CAMERA, (-0.28, 0.07, 0.0002, -0.0004))
    stream = Turned(Undistorted(ImageFolder(tmp_path, lambda h, w: CAMERA), lens), 270)
    assert stream.camera == lens.rectified.turned(3) and next(iter(stream)).image.shape == (320, 240)


def test_other_angles_are_refused() -> None:
    drive = WorldSequence(3, frames=2, kind="town", camera=CAMERA)
    with pytest.raises(SequenceError, match="by 90, 180 or 270 degrees, not by 45"):
        Turned(drive, 45)


def test_a_camera_that_hangs_upside_down_drives_the_same_way(tmp_path: Path) -> None:
    """`run --rotate 180`, with intrinsics, mask and frames as the camera gives them."""
    camera = Camera(200.0, 200.0, 158.0, 52.0, height=112, width=352)
    drive = WorldSequence(31, frames=6, kind="town", camera=camera)
    mask = np.full((112, 352), 255, np.uint8)
    mask[100:, 60:200] = 0
    paths = []
    for name, degrees in (("upright", 0), ("hanging", 180)):
        folder, seen = tmp_path / name, camera.turned(degrees // 90)
        folder.mkdir()
        for i in range(6):
            image = drive[i].image
            cv2.imwrite(str(folder / f"{i}.png"), image if degrees == 0 else cv2.rotate(image, cv2.ROTATE_180))
        painted = tmp_path / f"{name}.png"
        cv2.imwrite(str(painted), mask if degrees == 0 else cv2.rotate(mask, cv2.ROTATE_180))
        intrinsics = [str(value) for value in seen.intrinsics]
        command = [
            "run",
            str(folder),
            "--intrinsics",
            *intrinsics,
            "--mask",
            str(painted),
            "--rotate",
            str(degrees),
        ]
        cli.main([*command, "--out", str(tmp_path / "out" / name)])
        paths.append(read_kitti(tmp_path / "out" / name / "trajectory.txt").T_world_camera)
    np.testing.assert_allclose(paths[1], paths[0], atol=1e-6)
    assert np.linalg.norm(paths[0][-1][:3, 3]) > 1
