"""Intrinsics follow the image."""

from __future__ import annotations

import math

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from convlstm_vo.geometry.camera import Camera, CameraError

KITTI = Camera(718.856, 718.856, 607.1928, 185.2157, height=376, width=1241)
POINT = np.array([1.5, -0.7, 9.0])


@given(st.integers(1, 2000), st.integers(1, 2000))
def test_resizing_there_and_back_changes_nothing(height: int, width: int) -> None:
    back = KITTI.resized(height=height, width=width).resized(height=376, width=1241)
    np.testing.assert_allclose(back.intrinsics, KITTI.intrinsics, rtol=1e-9)


@given(st.integers(0, 100), st.integers(0, 300))
def test_a_crop_moves_every_pixel_by_its_corner(top: int, left: int) -> None:
    cropped = KITTI.cropped(top=top, left=left, height=200, width=640)
    np.testing.assert_allclose(cropped.project(POINT), KITTI.project(POINT) - [left, top])


def test_cropping_then_resizing_is_not_resizing_then_cropping_by_the_same_numbers() -> None:
    first = KITTI.cropped(top=10, left=20, height=300, width=1000).resized(height=150, width=500)
    second = KITTI.resized(height=188, width=1241).cropped(top=10, left=20, height=150, width=500)
    assert not np.allclose(first.intrinsics, second.intrinsics)


def test_resized_agrees_with_where_opencv_moves_a_blob() -> None:
    """An oracle that we did not write: the centroid of a blob before and after cv2.resize."""
    rows, columns = np.mgrid[:120, :200]
    blob = np.exp(-((columns - 61.3) ** 2 + (rows - 47.7) ** 2) / 200)
    camera = Camera(100, 100, 61.3, 47.7, height=120, width=200)
    for height, width in ((60, 100), (90, 150), (240, 400), (60, 200)):
        small = cv2.resize(blob, (width, height), interpolation=cv2.INTER_AREA)
        rows_s, columns_s = np.mgrid[:height, :width]
        centroid = [(columns_s * small).sum() / small.sum(), (rows_s * small).sum() / small.sum()]
        resized = camera.resized(height=height, width=width)
        np.testing.assert_allclose(centroid, [resized.cx, resized.cy], atol=0.02)


def test_mirrored_sees_the_mirrored_point() -> None:
    x, y = KITTI.project(POINT)
    mirrored = KITTI.mirrored().project(POINT * [-1, 1, 1])
    np.testing.assert_allclose(mirrored, [KITTI.width - 1 - x, y])
    np.testing.assert_allclose(KITTI.mirrored().mirrored().intrinsics, KITTI.intrinsics)


@given(st.floats(-500, 2000), st.floats(-500, 2000))
def test_rays_invert_projection(x: float, y: float) -> None:
    np.testing.assert_allclose(KITTI.project(KITTI.rays(np.array([x, y]))), [x, y], atol=1e-9)


@given(st.floats(1, 170))
def test_field_of_view_spans_the_image(fov: float) -> None:
    camera = Camera.from_fov(fov, height=480, width=640)
    left, right = camera.rays(np.array([[-0.5, 239.5], [639.5, 239.5]]))[:, 0]
    assert math.degrees(math.atan(right) - math.atan(left)) == pytest.approx(fov)


@pytest.mark.parametrize(
    ("values", "rule"),
    [
        ((0, 700, 600, 180, 376, 1241), "must be positive"),
        ((700, -1, 600, 180, 376, 1241), "must be positive"),
        ((math.nan, 700, 600, 180, 376, 1241), "finite"),
        ((700, 700, 600, 180, 0, 1241), "at least 1 pixel"),
    ],
)
def test_impossible_cameras_are_refused(values: tuple[float, ...], rule: str) -> None:
    fx, fy, cx, cy, height, width = values
    with pytest.raises(CameraError, match=rule):
        Camera(fx, fy, cx, cy, height=int(height), width=int(width))


def test_impossible_crops_and_fields_of_view_are_refused() -> None:
    with pytest.raises(CameraError, match="leaves the image"):
        KITTI.cropped(top=300, left=0, height=100, width=100)
    with pytest.raises(CameraError, match="between 1 and 170"):
        Camera.from_fov(180, height=10, width=10)
