"""Where intrinsics come from: a KITTI calib.txt, a ROS camera_info YAML, four numbers, or a field of view."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import yaml

from convlstm_vo.geometry.camera import Camera, CameraError
from convlstm_vo.geometry.files import write_atomically
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
    if lens_from_ros(path) is not None:
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


def write_ros(path: Path, lens: Lens) -> None:
    """A lens as a ROS ``camera_info`` YAML, which `lens_from_ros` reads, and ROS does."""
    K, P = lens.camera.matrix(), lens.rectified.matrix()
    model = "rational_polynomial" if lens.model == "plumb_bob" and len(lens.coefficients) >= 8 else lens.model
    info = {
        "image_width": lens.camera.width,
        "image_height": lens.camera.height,
        "camera_name": "camera",
        "camera_matrix": {"rows": 3, "cols": 3, "data": K.flatten().tolist()},
        "distortion_model": model,
        "distortion_coefficients": {"rows": 1, "cols": len(lens.coefficients), "data": list(lens.coefficients)},
        "rectification_matrix": {"rows": 3, "cols": 3, "data": np.eye(3).flatten().tolist()},
        "projection_matrix": {"rows": 3, "cols": 4, "data": np.pad(P, ((0, 0), (0, 1))).flatten().tolist()},
    }
    write_atomically(path, yaml.safe_dump(info, sort_keys=False, default_flow_style=None))


def _read_ros(path: Path) -> tuple[Camera, tuple[float, ...], str]:
    """Camera, distortion and its model of a YAML of http://wiki.ros.org/camera_calibration_parsers, or of one that
    OpenCV's calibration program wrote, which has the same keys."""
    needs = "it needs image_width, image_height and camera_matrix"
    try:
        text = path.read_text(encoding="utf-8-sig")
        if text.startswith("%YAML:"):  # OpenCV's first line is no YAML
            text = text.partition("\n")[2]
        info: Any = yaml.load(text, _Loader)
        if not isinstance(info, dict):
            raise SequenceError(f"{path}: not a camera_info file; {needs}")
        fx, _, cx, _, fy, cy, *_ = _numbers(info["camera_matrix"])
        coefficients = tuple(_numbers(info.get("distortion_coefficients") or []))
        height, width = _whole(info["image_height"]), _whole(info["image_width"])
        # OpenCV's program says so of a fisheye, and nothing of the others.
        model = str(info.get("distortion_model") or ("equidistant" if info.get("fisheye_model") else ""))
        return Camera(fx, fy, cx, cy, height=height, width=width), coefficients, model
    except CameraError as error:
        raise SequenceError(f"{path}: {error}") from None
    except KeyError as error:
        raise SequenceError(f"{path}: has no {error.args[0]}; {needs}") from None
    except yaml.MarkedYAMLError as error:
        line = "" if error.problem_mark is None else f", line {error.problem_mark.line + 1}"
        raise SequenceError(f"{path}{line}: not YAML ({error.problem})") from None
    except (OSError, yaml.YAMLError, TypeError, ValueError) as error:
        raise SequenceError(f"{path}: not a camera_info file ({error}); {needs}") from None


class _Loader(yaml.SafeLoader):
    """Knows OpenCV's matrices as what they are, mappings."""


def _matrix(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    return loader.construct_mapping(node, deep=True)


_Loader.add_constructor("tag:yaml.org,2002:opencv-matrix", _matrix)


def _numbers(value: Any) -> list[float]:
    """The numbers of a matrix, which is a mapping with ``data``, a list, or a list of rows."""
    data = value["data"] if isinstance(value, dict) else value
    return [number for row in data or [] for number in (_numbers(row) if isinstance(row, list) else [float(row)])]


def _whole(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{value!r} is no number of pixels")
    return value
