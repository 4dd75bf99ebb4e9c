"""The KITTI odometry layout: ``sequences/NAME/{image_0..3, calib.txt, times.txt}`` and ``poses/NAME.txt``."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from convlstm_vo.geometry.camera import Camera
from convlstm_vo.geometry.trajectory import Trajectory, read_kitti, read_times
from convlstm_vo.sequences.base import Frame, SequenceError, read_image

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff")


def read_calibration(path: Path) -> dict[str, NDArray[np.float64]]:
    """Projection matrices of a ``calib.txt`` by name: ``P0`` .. ``P3`` and ``Tr``, each (3, 4).

    Raises:
        SequenceError: no such file, or a row that does not have 12 finite numbers.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise SequenceError(
            f"{path}: cannot be read ({error}); it should be a calibration like KITTI's calib.txt, with lines P0: …"
        ) from None
    matrices = {}
    for number, line in enumerate(lines, start=1):
        key, _, values = line.partition(":")
        if not values.strip():
            continue
        try:
            matrix = np.array([float(value) for value in values.split()])
        except ValueError:
            matrix = np.array([np.nan])
        if matrix.size != 12 or not np.isfinite(matrix).all():
            raise SequenceError(f"{path}, line {number}: {key} needs 12 finite numbers (a 3x4 matrix, row by row)")
        matrices[key.strip()] = matrix.reshape(3, 4)
    return matrices


def projection_matrix(path: Path, camera: int) -> NDArray[np.float64]:
    """The 3x4 matrix of one camera; an error that names the key where the file lacks it."""
    key = f"P{camera}"
    matrices = read_calibration(path)
    if key not in matrices:
        found = ", ".join(matrices) or "nothing"
        raise SequenceError(
            f"{path}: no line '{key}: …' (found {found}); it holds the intrinsics of image_{camera}"
        )
    return matrices[key]


def camera_from_projection(projection: NDArray[np.float64], *, height: int, width: int) -> Camera:
    """The pinhole camera of a 3x4 KITTI projection matrix."""
    fx, fy, cx, cy = (float(projection[i, j]) for i, j in ((0, 0), (1, 1), (0, 2), (1, 2)))
    return Camera(fx, fy, cx, cy, height=height, width=width)


def camera_0_from_camera(projection: NDArray[np.float64]) -> NDArray[np.float64]:
    """``T_camera0_camera`` (4, 4) of a rectified camera: KITTI's cameras differ by a translation only.

    ``P_i = K_i [I | b]`` maps points of camera 0, so a point of camera 0 is ``x_i = x_0 + b`` in camera i.
    """
    transform = np.eye(4)
    transform[:3, 3] = -np.linalg.solve(projection[:, :3], projection[:, 3])
    return transform


class KittiSequence:
    """One sequence of a KITTI odometry tree, with ground truth where ``poses/NAME.txt`` exists.

    Args:
        root: the folder that holds ``sequences`` and ``poses``.
        name: any sequence name, e.g. ``"06"``.
        camera: 0, 1 (gray) or 2, 3 (colour): the ``image_{camera}`` folder.

    Attributes:
        trajectory: poses of *this* camera (ground truth files are those of camera 0 and are converted with the
            baseline from ``calib.txt``), or None.

    Raises:
        SequenceError, TrajectoryError: a missing folder or file, a calibration without the camera, counts of
            images, times and poses that differ, or rows that cannot be read. Images are checked when read.
    """

    def __init__(self, root: Path | str, name: str, *, camera: int = 0) -> None:
        self.root, self.name, self.camera_index = Path(root), name, camera
        folder = self.root / "sequences" / name
        if not folder.is_dir():
            raise SequenceError(f"{folder}: no such folder; {_available(self.root)}")
        self.images = list_images(folder / f"image_{camera}")
        projection = projection_matrix(folder / "calib.txt", camera)
        self._size = read_image(self.images[0]).shape[:2]
        self.camera = camera_from_projection(projection, height=self._size[0], width=self._size[1])
        self.timestamps_s = self._read_times(folder / "times.txt")
        self.trajectory = self._read_poses(camera_0_from_camera(projection))

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Frame:
        path = self.images[index]
        image = read_image(path, size=self._size, rule=f"the first image of sequence {self.name}")
        return Frame(image, float(self.timestamps_s[index]), index, str(path))

    def __iter__(self) -> Iterator[Frame]:
        return (self[index] for index in range(len(self)))

    def _read_times(self, path: Path) -> NDArray[np.float64]:
        times = read_times(path)
        if len(times) != len(self):
            raise SequenceError(
                f"{path}: {len(times)} times for {len(self)} images in {self.images[0].parent}; one row an image"
            )
        return times

    def _read_poses(self, T_camera0_camera: NDArray[np.float64]) -> Trajectory | None:
        path = self.root / "poses" / f"{self.name}.txt"
        if not path.exists():
            return None
        trajectory = read_kitti(path)
        if len(trajectory) != len(self):
            raise SequenceError(
                f"{path}: {len(trajectory)} poses for {len(self)} images in {self.images[0].parent}; "
                "one row an image: was one of the two cut short?"
            )
        timed = Trajectory(self.timestamps_s, trajectory.T_world_camera)
        return timed.with_extrinsics(T_camera0_camera) if self.camera_index else timed


def list_images(folder: Path) -> list[Path]:
    """The image files of a folder in the order of their names (numbers within names count as numbers)."""
    if not folder.is_dir():
        raise SequenceError(f"{folder}: no such folder; it should hold the images")
    images = [
        path
        for path in folder.iterdir()
        if path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".")  # macOS puts ._000000.png beside
    ]
    if not images:
        raise SequenceError(f"{folder}: no images (PNG, JPEG, BMP or TIFF) in this folder")
    return sorted(images, key=_natural_key)


def sequence_names(root: Path | str) -> list[str]:
    """Names of all sequences of a KITTI tree that have images; its calibrations come in folders without any."""
    return sorted({path.parent.name for path in Path(root).glob("sequences/*/image_[0-3]")})


def open_kitti(
    root: Path | str, names: tuple[str, ...] | list[str] = (), *, camera: int = 0
) -> list[KittiSequence]:
    """The named sequences of a tree, or all of them."""
    chosen = list(names) or sequence_names(root)
    if not chosen:
        raise SequenceError(f"{root}: {_available(Path(root))}")
    return [KittiSequence(root, name, camera=camera) for name in chosen]


def _available(root: Path) -> str:
    names = sequence_names(root)
    if names:
        return f"this tree has the sequences {', '.join(names)}"
    return "a KITTI odometry tree holds sequences/NAME/image_0, sequences/NAME/calib.txt and poses/NAME.txt"


def _natural_key(path: Path) -> tuple[list[int | str], str]:
    parts = re.split(r"(\d+)", path.stem)
    # Odd parts are the digits, so numbers are compared with numbers and text with text.
    return [int(part) if i % 2 else part for i, part in enumerate(parts)], path.name
