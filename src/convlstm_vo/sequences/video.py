"""Frames without ground truth: a folder of images, a video file, or a live camera."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from convlstm_vo.geometry.camera import Camera
from convlstm_vo.geometry.trajectory import FRAME_PERIOD_S, Trajectory, read_times
from convlstm_vo.sequences.base import Frame, SequenceError, read_image
from convlstm_vo.sequences.kitti import list_images

# Intrinsics that need to know the image's (height, width) first, e.g. those of a field of view.
CameraFor = Callable[[int, int], Camera]


def check_size(camera: Camera, height: int, width: int, source: str) -> Camera:
    """The camera, if its intrinsics belong to an image of this size."""
    if (camera.height, camera.width) != (height, width):
        raise SequenceError(
            f"{source}: its images are {height}x{width}, but the intrinsics belong to "
            f"{camera.height}x{camera.width} (height x width); give those of this image size"
        )
    return camera


class ImageFolder:
    """A folder of images in the order of their names.

    Args:
        folder: the images.
        camera_for: gives the camera for an image of (height, width).
        fps: frames per second, where the folder has no ``times.txt`` (in it or beside it).

    Raises:
        SequenceError: no images, or times that do not fit them.
    """

    trajectory: Trajectory | None = None

    def __init__(self, folder: Path | str, camera_for: CameraFor, *, fps: float = 1 / FRAME_PERIOD_S) -> None:
        folder = Path(folder)
        self.name = folder.resolve().name
        self.images = list_images(folder)
        self._size: tuple[int, int] = read_image(self.images[0]).shape[:2]
        self.camera = check_size(camera_for(*self._size), *self._size, str(folder))
        times = next((path for path in (folder / "times.txt", folder.parent / "times.txt") if path.exists()), None)
        self.timestamps_s = np.arange(len(self.images)) / fps if times is None else read_times(times)
        if len(self.timestamps_s) != len(self.images):
            raise SequenceError(
                f"{times}: {len(self.timestamps_s)} times for {len(self.images)} images in {folder}"
            )

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Frame:
        path = self.images[index]
        image = read_image(path, size=self._size, rule="the first image of the folder")
        return Frame(image, float(self.timestamps_s[index]), index, str(path))

    def __iter__(self) -> Iterator[Frame]:
        return (self[index] for index in range(len(self)))


class VideoStream:
    """A video file, a stream URL or a live camera (its number), read once from start to end by OpenCV.

    Args:
        source: path, URL or camera number.
        camera_for: gives the camera for an image of (height, width).

    Attributes:
        approximate_length: the number of frames that a file claims to have, or None.

    Raises:
        SequenceError: OpenCV cannot open it, or it ends before its first frame.
    """

    def __init__(self, source: Path | str | int, camera_for: CameraFor) -> None:
        self.source = str(source)
        self.name = f"camera{source}" if isinstance(source, int) else Path(source).stem
        self._live = isinstance(source, int)
        self._capture = cv2.VideoCapture(source if isinstance(source, int) else str(source))
        ok, first = self._capture.read() if self._capture.isOpened() else (False, None)
        if not ok or first is None:
            raise SequenceError(f"{self.source}: cannot be opened as a video (OpenCV found no frame in it)")
        self._first: Any = first
        height, width = first.shape[:2]
        self.camera = check_size(camera_for(height, width), height, width, self.source)
        self._fps = self._capture.get(cv2.CAP_PROP_FPS) or 1 / FRAME_PERIOD_S
        count = int(self._capture.get(cv2.CAP_PROP_FRAME_COUNT))
        self.approximate_length = count if count > 0 else None

    def __iter__(self) -> Iterator[Frame]:
        image, index = self._first, 0
        if image is None:
            raise SequenceError(f"{self.source}: a video can be read only once; open it again")
        self._first = None
        while image is not None:
            rgb = cv2.cvtColor(image, cv2.COLOR_BGR2RGB)
            yield Frame(rgb, index / self._fps, index, f"{self.source}, frame {index}")
            ok, image = self._capture.read()
            image, index = (image if ok else None), index + 1
        self._capture.release()
