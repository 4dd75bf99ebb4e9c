"""Distortion: OpenCV's own point functions are the oracle; frames are drawn from a smooth picture of the rays."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from convlstm_vo.geometry.camera import Camera
from convlstm_vo.sequences.base import SequenceError
from convlstm_vo.sequences.calibration import camera_from, lens_from_ros
from convlstm_vo.sequences.lens import Lens, Undistorted, bends
from convlstm_vo.sequences.video import ImageFolder

CAMERA = Camera(210.0, 205.0, 158.0, 118.0, height=240, width=320)


def picture(rays_xy: NDArray[np.float64]) -> NDArray[np.uint8]:
    """A smooth pattern over ray coordinates (..., 2): what any camera sees of it follows from its rays."""
    x, y = rays_xy[..., 0], rays_xy[..., 1]
    return np.uint8(np.round(127 + 60 * np.sin(7 * x + 1) + 60 * np.cos(6 * y + x)))


def pixels(camera: Camera) -> NDArray[np.float64]:
    x, y = np.meshgrid(np.arange(camera.width), np.arange(camera.height))
    return np.stack([x, y], -1).astype(np.float64)


def pinhole_rays(camera: Camera) -> NDArray[np.float64]:
    return (pixels(camera) - [camera.cx, camera.cy]) / [camera.fx, camera.fy]


def seen_through(lens: Lens) -> NDArray[np.uint8]:
    """The picture as the distorted camera takes it, by OpenCV's point functions."""
    points = pixels(lens.camera).reshape(-1, 1, 2)
    K, D = lens.camera.matrix(), np.array(lens.coefficients)
    straight = cv2.fisheye.undistortPoints if lens.model == "equidistant" else cv2.undistortPoints
    return picture(straight(points, K, D).reshape(*pixels(lens.camera).shape))


@pytest.mark.parametrize(
    "lens",
    [
        Lens(CAMERA, (-0.28, 0.07, 0.0002, -0.0004)),
        Lens(CAMERA, (-0.2, 0.05, 0.001, 0.0005, -0.01)),
        Lens(CAMERA, (0.3, 0.02, 0.0, 0.0, 0.0, 0.5, 0.05, 0.0)),
        Lens(CAMERA, (-0.02, 0.004, -0.001, 0.0002), "equidistant"),
    ],
    ids=["four", "five", "rational", "fisheye"],
)
def test_frames_are_what_the_pinhole_would_have_taken(lens: Lens) -> None:
    found = lens.undistort(seen_through(lens)).astype(float)
    wanted = picture(pinhole_rays(lens.rectified)).astype(float)
    assert np.abs(found - wanted)[2:-2, 2:-2].max() < 4  # grey levels: interpolation; no border without image
    assert np.abs(seen_through(lens) - wanted).mean() > 5  # and the lens did bend something


@settings(max_examples=30)
@given(st.floats(-0.18, 0.1), st.floats(-0.02, 0.08), st.floats(-0.002, 0.002), st.floats(-0.002, 0.002))
def test_no_pixel_of_the_result_lies_outside_the_image(k1: float, k2: float, p1: float, p2: float) -> None:
    lens = Lens(CAMERA, (k1, k2, p1, p2))
    white = np.full((CAMERA.height, CAMERA.width), 255, np.uint8)
    assert lens.undistort(white)[1:-1, 1:-1].min() > 250


def test_a_lens_that_bends_nothing() -> None:
    assert not bends((0.0, 0.0, 0.0, 0.0, 0.0)) and not bends(()) and bends((0.0, 0.0, 1e-3, 0.0))


def test_a_stream_through_a_lens(tmp_path: Path) -> None:
    lens = Lens(CAMERA, (-0.28, 0.07, 0.0002, -0.0004))
    (tmp_path / "frames").mkdir()
    for number in range(3):
        cv2.imwrite(str(tmp_path / "frames" / f"{number}.png"), np.roll(seen_through(lens), number, 1))
    stream = Undistorted(ImageFolder(tmp_path / "frames", lambda h, w: CAMERA), lens)
    frames = list(stream)
    assert stream.camera == lens.rectified and stream.approximate_length == 3
    assert [frame.index for frame in frames] == [0, 1, 2]
    assert np.abs(frames[0].image - picture(pinhole_rays(lens.rectified)).astype(float))[2:-2, 2:-2].max() < 4
    other = Lens(Camera(100, 100, 50, 50, height=100, width=100), (0.1, 0, 0, 0))
    with pytest.raises(SequenceError, match="its images are 240x320, the lens's 100x100"):
        Undistorted(stream, other)


def test_a_camera_info_file(tmp_path: Path) -> None:
    path = tmp_path / "camera.yaml"

    def write(model: str, coefficients: str) -> None:
        path.write_text(
            "image_width: 320\nimage_height: 240\ncamera_matrix: {data: [210, 0, 158, 0, 205, 118, 0, 0, 1]}\n"
            f"distortion_model: {model}\ndistortion_coefficients: {{data: {coefficients}}}\n"
        )

    write("plumb_bob", "[-0.28, 0.07, 0.0002, -0.0004, 0.0]")
    assert lens_from_ros(path) == Lens(CAMERA, (-0.28, 0.07, 0.0002, -0.0004, 0.0))
    with pytest.raises(SequenceError, match=r"camera.yaml: a lens that bends \(plumb_bob, .*undistort the frames"):
        camera_from(height=240, width=320, calibration=path)
    write("equidistant", "[-0.02, 0.004, -0.001, 0.0002]")
    assert lens_from_ros(path) == Lens(CAMERA, (-0.02, 0.004, -0.001, 0.0002), "equidistant")
    write("plumb_bob", "[0, 0, 0, 0, 0]")
    assert lens_from_ros(path) is None and camera_from(height=240, width=320, calibration=path) == CAMERA
    write("equidistant", "[0, 0, 0, 0]")  # a fisheye all the same
    assert lens_from_ros(path) == Lens(CAMERA, (0.0, 0.0, 0.0, 0.0), "equidistant")
    with pytest.raises(SequenceError, match="a lens that bends"):
        camera_from(height=240, width=320, calibration=path)
    write("equidistant", "")
    assert lens_from_ros(path) is None
    write("moonstone", "[0.1, 0, 0, 0]")
    with pytest.raises(SequenceError, match="distortion_model 'moonstone' is not known; it may be plumb_bob"):
        lens_from_ros(path)


def test_a_file_of_opencv_and_one_written_by_hand(tmp_path: Path) -> None:
    path = tmp_path / "camera.yml"
    path.write_text(
        "%YAML:1.0\n---\nimage_width: 320\nimage_height: 240\n"
        "camera_matrix: !!opencv-matrix\n   rows: 3\n   cols: 3\n   dt: d\n"
        "   data: [ 210., 0., 158., 0., 205., 118., 0., 0., 1. ]\n"
        "distortion_coefficients: !!opencv-matrix\n   rows: 5\n   cols: 1\n   dt: d\n"
        "   data: [ -0.28, 0.07, 0.0002, -0.0004, 0. ]\n"
    )
    expected = Lens(CAMERA, (-0.28, 0.07, 0.0002, -0.0004, 0.0))
    assert lens_from_ros(path) == expected
    fisheye = path.read_text().replace(", 0. ]", " ]") + "fisheye_model: 1\n"
    path.write_text(fisheye)
    assert lens_from_ros(path) == Lens(CAMERA, (-0.28, 0.07, 0.0002, -0.0004), "equidistant")
    path.write_text(
        "image_width: 320\nimage_height: 240\ncamera_matrix: [[210, 0, 158], [0, 205, 118], [0, 0, 1]]\n"
        "distortion_coefficients: [-0.28, 0.07, 0.0002, -0.0004, 0]\n"
    )
    assert lens_from_ros(path) == expected


@pytest.mark.parametrize(
    "change, match",
    [
        (("width: 320", "width: .inf"), "inf is no number of pixels"),
        (("height: 240", "height: 240.5"), "240.5 is no number of pixels"),
        (("[210,", "[-210,"), "fx=-210.0"),
        (("-0.28, 0.07", "-0.28"), "3 coefficients, but plumb_bob has 4"),
        (("-0.28", ".nan"), "must be finite numbers"),
        (("-0.28", "-9"), "folds the image"),
        (("data: [210", "data: [210,, : ["), r"line \d: not YAML"),
    ],
)
def test_faults_of_a_camera_info_file_name_it(tmp_path: Path, change: tuple[str, str], match: str) -> None:
    path = tmp_path / "camera.yaml"
    text = (
        "image_width: 320\nimage_height: 240\ncamera_matrix: {data: [210, 0, 158, 0, 205, 118, 0, 0, 1]}\n"
        "distortion_coefficients: {data: [-0.28, 0.07, 0, 0]}\n"
    )
    path.write_text(text.replace(*change))
    with pytest.raises(SequenceError, match=rf"camera\.yaml.*{match}"):
        lens_from_ros(path)


def test_impossible_lenses_are_refused() -> None:
    with pytest.raises(SequenceError, match="3 coefficients, but plumb_bob has 4 or 5 or 8"):
        Lens(CAMERA, (0.1, 0.2, 0.3))
    with pytest.raises(SequenceError, match="5 coefficients, but equidistant has 4"):
        Lens(CAMERA, (0.1, 0.0, 0.0, 0.0, 0.0), "equidistant")
    with pytest.raises(SequenceError, match="must be finite"):
        Lens(CAMERA, (float("nan"), 0.0, 0.0, 0.0))
    with pytest.raises(SequenceError, match="folds the image of this camera over"):
        _ = Lens(CAMERA, (-2.0, 0.0, 0.0, 0.0)).rectified


def test_a_fisheye_that_looks_back_gives_what_a_pinhole_can_show() -> None:
    wide = Camera(95.0, 95.0, 159.5, 119.5, height=240, width=320)  # 193 degrees from side to side
    lens = Lens(wide, (0.0, 0.0, 0.0, 0.0), "equidistant")
    assert lens.rectified.fx == pytest.approx(319 / 2 / 1.43)
    assert lens.undistort(np.full((240, 320), 255, np.uint8))[1:-1, 1:-1].min() > 250
