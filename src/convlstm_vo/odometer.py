"""Visual odometry frame by frame: the only owner of a recurrent state."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from convlstm_vo.errors import ConvlstmVoError
from convlstm_vo.geometry import se3
from convlstm_vo.geometry.camera import Camera
from convlstm_vo.geometry.trajectory import Trajectory
from convlstm_vo.models.checkpoint import load_checkpoint
from convlstm_vo.models.network import OdometryNet, State
from convlstm_vo.sequences.base import Frame, Stream, fit_image


class OdometryError(ConvlstmVoError):
    """Frames that cannot be tracked, or a motion that is not a number."""


@dataclasses.dataclass(frozen=True)
class TrackedFrame:
    """What the odometer knows after a frame.

    Attributes:
        index, timestamp_s: of the frame.
        T_prev_curr: (4, 4) motion from the previous frame; the identity for the first.
        T_world_camera: (4, 4) pose; the world is the first frame's camera.
        seconds: time that it took, decoding excluded.
    """

    index: int
    timestamp_s: float
    T_prev_curr: NDArray[np.float64]
    T_world_camera: NDArray[np.float64]
    seconds: float


class VisualOdometry:
    """Turns frames into motions and poses, one at a time.

    Args:
        net: a network in evaluation mode.
        camera: intrinsics of the frames as they come (they are resized to the network's size).

    Its memory does not grow with the number of frames.
    """

    def __init__(self, net: OdometryNet, camera: Camera) -> None:
        self.net = net.eval()
        self.camera = camera
        config = net.config
        self._size = (config.image_height, config.image_width)
        self._device = next(net.parameters()).device
        scaled = camera.resized(height=self._size[0], width=self._size[1])
        self._intrinsics = torch.tensor(scaled.intrinsics[None], dtype=torch.float32, device=self._device)
        self.reset()

    @classmethod
    def from_checkpoint(cls, folder: Path | str, camera: Camera, *, device: str = "cpu") -> VisualOdometry:
        """An odometer with the weights of a checkpoint folder."""
        return cls(load_checkpoint(Path(folder), device=device), camera)

    def reset(self) -> None:
        """Forget everything: the next frame is a first one."""
        self._state: State | None = None
        self._previous: Tensor | None = None
        self._T_world_camera: NDArray[np.float64] = np.eye(4)

    @torch.inference_mode()
    def track(self, frame: Frame) -> TrackedFrame:
        """Take in the next frame.

        Raises:
            OdometryError: an image of another size than the camera's, or a motion that is not finite.
        """
        started = time.perf_counter()
        current = self._prepare(frame)  # (channels, height, width)
        motion = np.zeros(6)
        if self._previous is not None:
            pair = torch.stack([self._previous, current])[None]  # (1, 2, channels, height, width)
            output, self._state = self.net.step(pair, self._intrinsics, self._state)
            motion = output[0].double().cpu().numpy()
        if not np.isfinite(motion).all():
            raise OdometryError(f"{frame.source or f'frame {frame.index}'}: the network gave the motion {motion}")
        T_prev_curr = se3.matrix_from_motion(motion)
        self._T_world_camera = self._T_world_camera @ T_prev_curr
        self._previous = current
        seconds = time.perf_counter() - started
        return TrackedFrame(frame.index, frame.timestamp_s, T_prev_curr, self._T_world_camera, seconds)

    def _prepare(self, frame: Frame) -> Tensor:
        if frame.image.shape[:2] != (self.camera.height, self.camera.width):
            raise OdometryError(
                f"{frame.source or f'frame {frame.index}'}: the image is {frame.image.shape[0]}x"
                f"{frame.image.shape[1]}, but the camera's is {self.camera.height}x{self.camera.width}"
            )
        height, width = self._size
        image = fit_image(frame.image, height=height, width=width, channels=self.net.config.image_channels)
        return torch.from_numpy(image).permute(2, 0, 1).to(self._device)

    def stream(self, frames: Iterable[Frame]) -> Iterator[TrackedFrame]:
        """`track` each frame of a stream as it comes."""
        return (self.track(frame) for frame in frames)


def estimate_trajectory(
    net: OdometryNet, stream: Stream, advance: Callable[[int], None] = lambda count: None
) -> Trajectory:
    """Run a network over a whole sequence from a fresh state; the trajectory's first pose is the identity.

    Args:
        net: a network in evaluation mode.
        stream: frames and their camera.
        advance: called with 1 after each frame, for a progress bar.
    """
    times, poses = [], []
    for tracked in VisualOdometry(net, stream.camera).stream(stream):
        times.append(tracked.timestamp_s)
        poses.append(tracked.T_world_camera)
        advance(1)
    return Trajectory(np.array(times), np.stack(poses))
