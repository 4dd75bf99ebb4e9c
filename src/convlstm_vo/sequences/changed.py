"""Streams whose frames come changed: turned, or by a lens (`lens.Undistorted`)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

import cv2
import numpy as np

from convlstm_vo.geometry.camera import Camera
from convlstm_vo.geometry.trajectory import Trajectory
from convlstm_vo.sequences.base import Frame, Image, SequenceError, Stream

_TURNS = {90: cv2.ROTATE_90_CLOCKWISE, 180: cv2.ROTATE_180, 270: cv2.ROTATE_90_COUNTERCLOCKWISE}


class Changed:
    """A stream of which every image goes through a function.

    Args:
        stream: the frames as they come.
        camera: that would have taken the changed ones.
        change: image to image.
    """

    def __init__(self, stream: Stream, camera: Camera, change: Callable[[Image], Image]) -> None:
        self.stream, self.camera, self.change = stream, camera, change
        self.name = stream.name
        self.trajectory: Trajectory | None = getattr(stream, "trajectory", None)
        length = getattr(stream, "__len__", None)
        self.approximate_length = getattr(stream, "approximate_length", None) if length is None else length()

    @property
    def dropped(self) -> int:
        """Frames of a live source that came while others were looked at."""
        return int(getattr(self.stream, "dropped", 0))

    @property
    def restamped(self) -> int:
        """Of a bag; see `BagStream`."""
        return int(getattr(self.stream, "restamped", 0))

    def __iter__(self) -> Iterator[Frame]:
        return (dataclasses.replace(frame, image=self.change(frame.image)) for frame in self.stream)


class Turned(Changed):
    """A stream whose images are turned clockwise: of a camera that hangs upside down, or lies on its side.

    Args:
        stream: the frames as they come. degrees: 90, 180 or 270.

    Raises:
        SequenceError: other degrees.
    """

    def __init__(self, stream: Stream, degrees: int) -> None:
        if degrees not in _TURNS:
            raise SequenceError(f"{stream.name}: frames can be turned by 90, 180 or 270 degrees, not by {degrees}")
        super().__init__(stream, stream.camera.turned(degrees // 90), self.turn)
        self._code = _TURNS[degrees]
        if self.trajectory is not None:
            T = np.eye(4)  # from the camera's axes to those of the turned one
            T[:2, :2] = np.linalg.matrix_power(np.array([[0.0, -1.0], [1.0, 0.0]]), degrees // 90)
            poses = T @ self.trajectory.T_world_camera @ T.T
            self.trajectory = Trajectory(self.trajectory.timestamps_s, poses)

    def turn(self, image: Image) -> Image:
        """An image as it comes, to one as this stream has them."""
        return cv2.rotate(image, self._code)  # type: ignore[return-value]
