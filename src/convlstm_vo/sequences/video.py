"""Frames without ground truth: a folder of images, a video file, or a live camera."""

from __future__ import annotations

import itertools
import math
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from convlstm_vo.geometry.camera import Camera
from convlstm_vo.geometry.trajectory import FRAME_PERIOD_S, Trajectory, read_times
from convlstm_vo.sequences.base import Frame, SequenceError, read_image
from convlstm_vo.sequences.kitti import IMAGE_SUFFIXES, list_images

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
        fps: frames per second, where the folder has no ``times.txt`` (in it or beside it); by default 10, as KITTI.

    Raises:
        SequenceError: no images, times that do not fit them, or both times and a rate.
    """

    trajectory: Trajectory | None = None

    def __init__(self, folder: Path | str, camera_for: CameraFor, *, fps: float | None = None) -> None:
        folder = Path(folder)
        self.name = folder.resolve().name
        self.images = list_images(folder)
        self._size: tuple[int, int] = read_image(self.images[0]).shape[:2]
        self.camera = check_size(camera_for(*self._size), *self._size, str(folder))
        times = next((path for path in (folder / "times.txt", folder.parent / "times.txt") if path.exists()), None)
        if fps is not None and not 0 < fps < math.inf:
            raise SequenceError(f"--fps {fps:g}: must be positive frames a second")
        if fps is not None and times is not None:
            raise SequenceError(f"--fps {fps:g}: {folder} has times of its own ({times}); leave one of them out")
        period_s = FRAME_PERIOD_S if fps is None else 1 / fps
        self.timestamps_s = np.arange(len(self.images)) * period_s if times is None else read_times(times)
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


class LiveFrames:
    """A live source, read as its frames come: of those that nobody has asked for in time, the newest alone is kept.

    Who is slower than the camera would else see what is long past, at times that are wrong.

    Args:
        capture: OpenCV's, of which ``first`` has been read.

    Attributes:
        dropped: frames that came and were not asked for, once one had been.
    """

    def __init__(self, capture: Any, first: Any) -> None:
        self._capture = capture
        self._changed = threading.Condition()
        # Image (BGR), seconds of the clock, number.
        self._newest: tuple[Any, float, int] | None = (first, time.monotonic(), 0)
        self._over = self._unwanted = False
        self.dropped = 0
        threading.Thread(target=self._read, name="convlstm-vo-camera", daemon=True).start()

    def _read(self) -> None:
        try:
            for number in itertools.count(1):
                ok, image = self._capture.read()
                if not ok or self._unwanted:
                    return
                with self._changed:
                    self._newest = image, time.monotonic(), number
                    self._changed.notify()
        finally:  # whatever happened, nobody is to wait for ever
            with self._changed:
                self._over = True
                self._changed.notify()
            self._capture.release()

    def __iter__(self) -> Iterator[tuple[Any, float, int]]:
        """Images, seconds since the first that was asked for, and numbers, which leave out what was dropped."""
        begin: tuple[float, int] | None = None
        try:
            for given in itertools.count():
                with self._changed:
                    self._changed.wait_for(lambda: self._newest is not None or self._over)
                    newest, self._newest = self._newest, None
                if newest is None:
                    return
                image, now, number = newest
                start_s, offset = begin = begin or (now, number)
                self.dropped = number - offset - given
                yield image, now - start_s, number - offset
        finally:
            self._unwanted = True


class VideoStream:
    """A video file, a stream URL or a live camera (its number), read once from start to end by OpenCV.

    Times are those of the file, whose frames need not be equally far apart, or those at which a live source gave
    its frames. A camera and a URL without a length are live: see `LiveFrames`.

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
        if not isinstance(source, int):
            _check_is_no_other_file(Path(source))
        self.name = f"camera{source}" if isinstance(source, int) else Path(source).stem
        self._capture = cv2.VideoCapture(source if isinstance(source, int) else str(source))
        ok, first = self._capture.read() if self._capture.isOpened() else (False, None)
        if not ok or first is None:
            what = "camera number " * isinstance(source, int) + self.source
            raise SequenceError(f"{what}: cannot be opened as a video (OpenCV found no frame in it)")
        self._first: Any = first
        height, width = first.shape[:2]
        self.camera = check_size(camera_for(height, width), height, width, self.source)
        self._fps = self._capture.get(cv2.CAP_PROP_FPS) or 1 / FRAME_PERIOD_S
        count = int(self._capture.get(cv2.CAP_PROP_FRAME_COUNT))
        self.approximate_length = count if count > 0 else None
        live = isinstance(source, int) or (count <= 0 and "://" in self.source)
        self._live = LiveFrames(self._capture, first) if live else None

    @property
    def live(self) -> bool:
        """Whether frames come once and for all."""
        return self._live is not None

    @property
    def dropped(self) -> int:
        """Frames of a live source that came while others were looked at."""
        return 0 if self._live is None else self._live.dropped

    def __iter__(self) -> Iterator[Frame]:
        if self._first is None:
            raise SequenceError(f"{self.source}: a video can be read only once; open it again")
        for image, time_s, index in self._recorded() if self._live is None else self._live:
            self._first = None
            rgb = cv2.cvtColor(image, cv2.COLOR_BGR2RGB)
            yield Frame(rgb, time_s, index, f"{self.source}, frame {index}")

    def _recorded(self) -> Iterator[tuple[Any, float, int]]:
        """Images, seconds and numbers of a file."""
        image, index, time_s = self._first, 0, 0.0
        start = self._told_s()
        while image is not None:
            yield image, time_s, index
            ok, image = self._capture.read()
            image, index, told = (image if ok else None), index + 1, self._told_s() - start
            time_s = told if told > time_s else time_s + 1 / self._fps  # not every format tells
        self._capture.release()

    def _told_s(self) -> float:
        return float(self._capture.get(cv2.CAP_PROP_POS_MSEC)) / 1000


_PLAYLISTS = (".m3u8", ".m3u", ".sdp", ".mpd", ".ffconcat")  # texts that name videos
_TEXT = {*b"\t\n\r", *range(32, 127), *range(128, 256)}  # bytes; a video has zeros


def _check_is_no_other_file(path: Path) -> None:
    """ffmpeg plays texts and single images as videos; nobody means that."""
    if not path.is_file():
        return
    if path.suffix.lower() in IMAGE_SUFFIXES:
        raise SequenceError(f"{path}: is one image; name the folder of them")
    if path.suffix.lower() in _PLAYLISTS:
        return
    try:
        with path.open("rb") as stream:
            start = stream.read(512)
    except OSError as error:
        raise SequenceError(f"{path}: cannot be read ({error.strerror})") from None
    if start and not set(start) - _TEXT:
        raise SequenceError(f"{path}: is a text, not a video (to compare trajectories: `convlstm-vo score`)")
