"""Where intrinsics come from: a KITTI calib.txt, a ROS camera_info YAML, four numbers, or a field of view."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from convlstm_vo.geometry.camera import Camera
from convlstm_vo.sequences.base import SequenceError
from convlstm_vo.sequences.kitti import camera_from_projection, projection_matrix
from convlstm_vo.sequences.lens import Lens, lens_of


def camera_from(
    *,
    height: int,
    width: int,
    calibration: Path | None = None,
    intrinsics: tuple[float, float, float, float] | None = None,
    fov_deg: float | None = None,
    camera: int = 0,
) -> Camera:
    """The camera of an image of the given size, from exactly one of the three sources.

    Args:
        calibration: a KITTI ``calib.txt`` (its row ``P{camera}``) or a ROS ``camera_info`` YAML file.
        intrinsics: fx, fy, cx, cy in pixels of this image.
        fov_deg: horizontal field of view in degrees.

    Raises:
        SequenceError, CameraError: none or several sources given, or a source that gives no valid camera.
    """
    given = [source is not None for source in (calibration, intrinsics, fov_deg)]
    if sum(given) != 1:
        raise SequenceError(
            f"{'no' if not any(given) else 'more than one'} source of intrinsics: give exactly one of "
            "--calib FILE, --intrinsics FX FY CX CY, or --fov DEGREES (horizontal)"
        )
    if intrinsics is not None:
        return Camera(*intrinsics, height=height, width=width)
    if fov_deg is not None:
        return Camera.from_fov(fov_deg, height=height, width=width)
    assert calibration is not None
    if calibration.suffix.lower() in (".yaml", ".yml"):
        return _camera_from_ros(calibration)
    return camera_from_projection(projection_matrix(calibration, camera), height=height, width=width)


def _camera_from_ros(path: Path) -> Camera:
    camera, coefficients, model = _read_ros(path)
    if lens_of(camera, coefficients, model, str(path)) is not None:
        raise SequenceError(
            f"{path}: a lens that bends ({model}, {list(coefficients)}); undistort the frames first "
            "(`lens_from_ros` and `Undistorted` do, and so does `convlstm-vo run`), or give the rectified camera"
        )
    return camera


def lens_from_ros(path: Path) -> Lens | None:
    """The lens of a ROS ``camera_info`` YAML; None if it bends nothing.

    Raises:
        SequenceError: not such a file, or a distortion model that is not known.
    """
    return lens_of(*_read_ros(path), str(path))


def _read_ros(path: Path) -> tuple[Camera, tuple[float, ...], str]:
    """Camera, distortion and its model of a YAML of http://wiki.ros.org/camera_calibration_parsers."""
    try:
        info: Any = yaml.safe_load(path.read_text(encoding="utf-8"))
        fx, _, cx, _, fy, cy, *_ = (float(value) for value in info["camera_matrix"]["data"])
        coefficients = tuple(float(x) for x in (info.get("distortion_coefficients") or {}).get("data") or [])
        height, width = int(info["image_height"]), int(info["image_width"])
        model = str(info.get("distortion_model") or "")
    except (OSError, yaml.YAMLError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise SequenceError(
            f"{path}: not a camera_info file ({error!r}); it needs image_width, image_height and camera_matrix.data"
        ) from None
    return Camera(fx, fy, cx, cy, height=height, width=width), coefficients, model
