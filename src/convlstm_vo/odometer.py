"""Visual odometry frame by frame: the only owner of a recurrent state."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Literal

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from convlstm_vo.calibration import VehicleCalibration
from convlstm_vo.environment import bfloat16_pays
from convlstm_vo.errors import ConvlstmVoError
from convlstm_vo.geometry import se3
from convlstm_vo.geometry.camera import Camera
from convlstm_vo.geometry.trajectory import Trajectory
from convlstm_vo.models import fixed, kernels
from convlstm_vo.models.cells import State
from convlstm_vo.models.checkpoint import DEFAULT_CHECKPOINT, Network, load_checkpoint
from convlstm_vo.models.geometric import LEAST_CONTRAST, LEAST_EVIDENCE, Estimate, GeometricNet
from convlstm_vo.models.mounting import Memory
from convlstm_vo.sequences.base import Frame, Image, Stream, fit_image, read_image

_FOCAL_PX = 363.6  # at which the default network sees: half of KITTI's size
_KEY_S = 0.11  # seconds between two frames that are compared, at most where there are more of them
_MOST_AHEAD = 4.5  # times as long as before a car may go on as it did
_MOST_COLUMNS, _MOST_ROWS = 1024, 448
COMPILING = "The first run on a machine compiles the network's inner loops, which takes up to a minute."
Status = Literal["ok", "lost", "frozen"]


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
        covariance: (6, 6) of the motion (metres, radians); None for the first frame, for one that is frozen or
            whose motion was no number, and of networks that do not know it. Above
            15 frames a second it is that of two motions from one key frame, whose errors are partly the same: added
            up over a way it is an upper bound.
        status: "lost": the image does not tell (covered, dark, a jump), the motion is a guess; "frozen": the same
            image again. After few lost frames the first that shows something is measured from the last that did, so
            that its pose is right again; it is still "lost", for its motion makes good what was guessed.
        metric: False where no road is seen, or one that shows next to nothing: rotation and direction hold, the
            length of the motion is a guess.
    """

    index: int
    timestamp_s: float
    T_prev_curr: NDArray[np.float64]
    T_world_camera: NDArray[np.float64]
    seconds: float
    covariance: NDArray[np.float64] | None = None
    status: Status = "ok"
    metric: bool = True


@dataclasses.dataclass(frozen=True)
class Key:
    """The frame from which motion is measured, and what was measured since.

    Attributes:
        image: (channels, height, width). time_s: seconds. interval_s: from the key frame before, 0 for the first.
        prev_s: time of the last frame, if that is another one; T_key_prev: its pose; covariance: of that.
    """

    image: Tensor
    time_s: float
    interval_s: float = 0.0
    prev_s: float | None = None
    T_key_prev: NDArray[np.float64] = dataclasses.field(default_factory=lambda: np.eye(4))
    covariance: NDArray[np.float64] | None = None

    def due(self, now: float) -> bool:
        """Whether the frame of this time is the next key frame: one more would be too far off."""
        last = self.time_s if self.prev_s is None else self.prev_s
        return not (now > last and 2 * now - last - self.time_s <= _KEY_S)

    def followed_by(self, now: float, T_key_curr: NDArray[np.float64], covariance: NDArray[np.float64]) -> Key:
        """The same key frame, after another frame that is none."""
        return dataclasses.replace(self, prev_s=now, T_key_prev=T_key_curr, covariance=covariance)

    def reaches(self, now: float) -> bool:
        """Whether the car may still be taken to go on as it did before this key frame."""
        return now - self.time_s <= _MOST_AHEAD * self.interval_s

    def expected(self, before: Tensor, now: float) -> Tensor:
        """The motion (1, 6) from the key frame to one of this time, at the speed before the key frame.

        What was measured since is not asked: the solver would take its own errors for what is known of the speed.

        Args:
            before: the motion to the key frame.
        """
        took = self.interval_s
        share = (now - self.time_s) / took if took > 0 and now > self.time_s else 1.0
        # A clock that jitters is no reason to expect another motion; after a longer gap the car may do anything.
        return before if 2 / 3 < share < 3 / 2 or share > _MOST_AHEAD else before * share


class VisualOdometry:
    """Turns frames into motions and poses, one at a time.

    Args:
        net: a network in evaluation mode.
        camera: intrinsics of the frames as they come (they are resized to the network's size).
        calibration: of the vehicle, for the default network; it starts from it and learns the mounting further.
        mask: uint8 (height, width), 0 where a frame shows the car or what else is fixed to the camera, for the
            default network, which finds most of that out by itself.

    Its memory does not grow with the number of frames.
    """

    def __init__(
        self,
        net: Network,
        camera: Camera,
        calibration: VehicleCalibration | None = None,
        mask: Image | None = None,
    ) -> None:
        if calibration is not None and not isinstance(net, GeometricNet):
            raise OdometryError(
                f"preset {net.config.preset} learned its scale in training and knows no camera height: leave out "
                "--camera-height and --calibration, or use the default network"
            )
        self.net = net.eval()
        self.camera = camera
        self.started_from = calibration
        self._size = working_size(camera) if isinstance(net, GeometricNet) else _configured_size(net)
        self._device = next(net.parameters()).device
        self._hidden: Tensor | None = None
        scaled = camera.resized(height=self._size[0], width=self._size[1])
        self._intrinsics = torch.tensor(scaled.intrinsics[None], dtype=torch.float32, device=self._device)
        if isinstance(net, GeometricNet):
            net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            net.mixed = bfloat16_pays(self._device.type)
        self.reset()
        if mask is not None:
            self.hide(mask)

    @classmethod
    def from_checkpoint(
        cls,
        folder: Path | str = DEFAULT_CHECKPOINT,
        camera: Camera | None = None,
        *,
        device: str = "cpu",
        calibration: VehicleCalibration | None = None,
        mask: Image | None = None,
    ) -> VisualOdometry:
        """An odometer with the weights of a checkpoint folder; by default those of the package."""
        if camera is None:
            raise OdometryError("an odometer needs a camera: give its intrinsics, e.g. Camera.from_fov(80, ...)")
        return cls(load_checkpoint(Path(folder), device=device), camera, calibration, mask)

    def reset(self) -> None:
        """Forget everything but calibration and mask: the next frame is a first one."""
        self._state: State | None = None  # at the key frame
        self._previous: Tensor | None = None
        self._key: Key | None = None
        self._good: tuple[Key, State] | None = None  # before the odometer was lost, and the state there
        self._T_world_camera: NDArray[np.float64] = np.eye(4)

    def hide(self, mask: Image) -> None:
        """From the next frame on leave out what a mask covers, beside what another one does.

        Args:
            mask: uint8 (height, width), 0 where frames show what is fixed to the camera.

        Raises:
            OdometryError: a mask of another size than the camera's, or a network that takes none.
        """
        if not isinstance(self.net, GeometricNet):
            raise OdometryError(
                f"preset {self.net.config.preset} sees an image as a whole and takes no mask: leave out --mask, or "
                "use the default network"
            )
        hidden = _hidden(mask, self.camera, self._size).to(self._device)
        self._hidden = hidden if self._hidden is None else torch.maximum(self._hidden, hidden)
        if self._state is not None:
            *before, share, packed = self._state
            self._state = (*before, torch.maximum(share, self._hidden[None]), packed)

    def warm_up(self) -> None:
        """Track three frames of noise and `reset`: all is then compiled and loaded before a real one comes."""
        rng = np.random.default_rng(0)
        size = self.camera.height, self.camera.width
        for index in range(3):
            self.track(Frame(rng.integers(0, 256, size, dtype=np.uint8), index / 10, index))
        self.reset()

    @property
    def calibration(self) -> VehicleCalibration | None:
        """Camera height and mounting as they are known by now; None for networks that do not know them."""
        if not isinstance(self.net, GeometricNet):
            return None
        start = self.started_from or VehicleCalibration(self.net.config.camera_height)
        if self._state is None:
            return start
        memory = Memory.unpack(self._state[-1])
        (left, tilt), (yaw, up) = memory.mounting[0].tolist(), memory.aside[0].tolist()
        pitch, roll, yaw = np.clip([up + tilt, -left, yaw], -0.3, 0.3).tolist()  # what a calibration allows
        of_roll, of_tilt = memory.mounting_precision[0].tolist()
        of_yaw, of_up = memory.aside_precision[0].tolist()
        of_pitch = of_tilt * of_up / max(of_tilt + of_up, 1e-9)
        return VehicleCalibration(start.camera_height_m, pitch, roll, yaw, of_pitch, of_roll, of_yaw)

    @torch.inference_mode()
    def track(self, frame: Frame) -> TrackedFrame:
        """Take in the next frame.

        Raises:
            OdometryError: an image of another size than the camera's, or a motion that is not finite.
        """
        started = time.perf_counter()
        current = self._prepare(frame)  # (channels, height, width)
        T_prev_curr: NDArray[np.float64] = np.eye(4)
        covariance: NDArray[np.float64] | None = None
        status: Status = "ok"
        metric = True
        if isinstance(self.net, GeometricNet):
            T_prev_curr, covariance, status, metric = self._track_geometric(self.net, current, frame.timestamp_s)
        elif self._previous is not None:
            pair = torch.stack([self._previous, current])[None]  # (1, 2, channels, height, width)
            output, state = self.net.step(pair, self._intrinsics, self._state)
            motion = output[0].cpu().double().numpy()
            if not np.isfinite(motion).all():
                name = frame.source or f"frame {frame.index}"
                raise OdometryError(
                    f"{name}: the network gave the motion {motion}; its weights have run away in training (a "
                    "smaller --lr?), take an earlier checkpoint"
                )
            self._state = state
            T_prev_curr = se3.matrix_from_motion(motion)
        self._T_world_camera = self._T_world_camera @ T_prev_curr
        self._previous = current
        seconds = time.perf_counter() - started
        pose = self._T_world_camera.copy()  # the caller's to change, and so is the covariance
        return TrackedFrame(frame.index, frame.timestamp_s, T_prev_curr, pose, seconds, covariance, status, metric)

    def _track_geometric(
        self, net: GeometricNet, current: Tensor, now: float
    ) -> tuple[NDArray[np.float64], NDArray[np.float64] | None, Status, bool]:
        """The motion since the last frame, its covariance, status, and whether the road gave the scale.

        It is measured from a key frame, a tenth of a second ago at high rates: small errors of rotation, which do
        not depend on the time between two frames, would else add up three times as often at 30 frames a second.
        After a few frames that tell nothing it is measured across them, from the last key frame that did.
        """
        key = self._key
        if key is None or self._previous is None:
            self._key = Key(current, now)
            return np.eye(4), None, "ok", True
        if torch.equal(self._previous, current) and float(current.float().std()) > LEAST_CONTRAST:
            return np.eye(4), None, "frozen", True
        state = self._state if self._state is not None else self._calibrated_state(net)
        estimate, new, lost = self._measure(net, key, state, current, now)
        told = not lost
        if lost and self._good is not None and self._good[0].reaches(now):
            bridge, after, no_bridge = self._measure(net, *self._good, current, now)
            if not no_bridge:
                (key, state), estimate, new, lost = self._good, bridge, after, False
        known = all(bool(torch.isfinite(part).all()) for part in (*new, estimate.motion, estimate.covariance))
        if not known:
            self._state = self._calibrated_state(net)  # numbers beyond float32: nothing of them is kept
            self._key, self._good = Key(current, now), None
            return np.eye(4), None, "lost", False
        metric = told and bool(estimate.metric)
        covariance = estimate.covariance[0].cpu().double().numpy()
        T_key_curr = se3.matrix_from_motion(estimate.motion[0].cpu().double().numpy())
        T_prev_curr = se3.inverse(key.T_key_prev) @ T_key_curr
        both = covariance if key.covariance is None else covariance + key.covariance
        memory = Memory.unpack(state[-1])
        if not lost:
            self._good = None
        elif self._good is not None:
            good, its_state = self._good
            total = both if good.covariance is None else good.covariance + both
            self._good = good.followed_by(now, good.T_key_prev @ T_prev_curr, total), its_state
        elif bool(memory.known > 0):
            self._good = key.followed_by(now, T_key_curr, covariance), state
        if key.due(now) or lost:
            self._state = new
            self._key = Key(current, now, now - key.time_s)
        else:
            # A search that found little rests for some frames; the first one is repeated until it may look further.
            rests = torch.where(memory.known > 0, Memory.unpack(new[-1]).known, memory.known)
            self._state = (*state[:-1], dataclasses.replace(memory, known=rests).pack())
            self._key = key.followed_by(now, T_key_curr, covariance)
        return T_prev_curr, both.copy(), "ok" if told else "lost", metric

    def _measure(
        self, net: GeometricNet, key: Key, state: State, current: Tensor, now: float
    ) -> tuple[Estimate, State, bool]:
        """The motion from a key frame, the state after it, and whether it is lost."""
        memory = Memory.unpack(state[-1])
        packed = dataclasses.replace(memory, motion=key.expected(memory.motion, now)).pack()
        pair = torch.stack([key.image, current])[None]  # (1, 2, channels, height, width)
        estimate, new = net.track(pair, self._intrinsics, (*state[:-1], packed))
        return estimate, new, not float(estimate.evidence) >= LEAST_EVIDENCE

    def _calibrated_state(self, net: GeometricNet) -> State:
        """The state before the first frame: nothing but the calibration and the mask."""
        start = self.started_from or VehicleCalibration(net.config.camera_height)
        state = net.initial_state(1, self._size)
        memory = Memory.unpack(state[-1])
        memory.height[:] = start.camera_height_m
        memory.mounting[:] = torch.tensor([-start.roll_rad, 0.0])  # the road's slope
        memory.mounting_precision[:] = torch.tensor([start.roll_precision, start.pitch_precision])
        memory.aside[:] = torch.tensor([start.yaw_rad, start.pitch_rad])
        memory.aside_precision[:] = torch.tensor([start.yaw_precision, start.pitch_precision])
        share = state[-2] if self._hidden is None else self._hidden[None]
        return (*state[:-2], share, memory.pack())

    def _prepare(self, frame: Frame) -> Tensor:
        if frame.image.shape[:2] != (self.camera.height, self.camera.width):
            raise OdometryError(
                f"{frame.source or f'frame {frame.index}'}: the image is {frame.image.shape[0]}x"
                f"{frame.image.shape[1]}, but the camera's is {self.camera.height}x{self.camera.width}"
            )
        if frame.image.dtype != np.uint8:
            raise OdometryError(
                f"{frame.source or f'frame {frame.index}'}: the image is {frame.image.dtype}, but frames are "
                "uint8, 0 to 255"
            )
        height, width = self._size
        image = fit_image(frame.image, height=height, width=width, channels=self.net.config.image_channels)
        image = np.array(image)  # a copy: a camera may use its buffer again
        return torch.from_numpy(image).permute(2, 0, 1).to(self._device)

    def stream(self, frames: Iterable[Frame]) -> Iterator[TrackedFrame]:
        """`track` each frame of a stream as it comes."""
        return (self.track(frame) for frame in frames)


def read_mask(path: Path, camera: Camera) -> Image:
    """A mask of a camera's images from a picture that is dark, or transparent, where they show the car.

    Returns:
        uint8 (height, width), 0 there and 255 elsewhere.

    Raises:
        SequenceError: a damaged image. OdometryError: no file, another size, or nothing left in view.
    """
    if not path.is_file():
        raise OdometryError(
            f"{path}: no such mask; draw one on a frame of the camera, black where it shows the car"
        )
    mask = _painted(path)
    if mask.shape[:2] != (camera.height, camera.width):
        raise OdometryError(
            f"{path}: the mask is {mask.shape[0]}x{mask.shape[1]}, but the camera's images are {camera.height}x"
            f"{camera.width} (height x width); draw it on one of them"
        )
    mask = mask.reshape(camera.height, camera.width, -1).max(2)
    seen = 2 * mask.astype(int) > mask.max()  # JPEG's black is not quite 0, and white may be 1
    if not seen.any():
        raise OdometryError(f"{path}: the mask is black all over; black is what to leave out, white the world")
    return np.where(seen, np.uint8(255), np.uint8(0))


def _painted(path: Path) -> Image:
    """An image, black where it is transparent."""
    mask = read_image(path)
    whole = cv2.imdecode(np.fromfile(path, np.uint8), cv2.IMREAD_UNCHANGED)
    if whole is not None and whole.ndim == 3 and whole.shape[2] == 4 and whole.shape[:2] == mask.shape[:2]:
        mask[whole[..., 3] == 0] = 0
    return mask


def _hidden(mask: Image, camera: Camera, size: tuple[int, int]) -> Tensor:
    """What share of the default network's blocks it hides, `fixed.told`."""
    if mask.shape != (camera.height, camera.width):
        raise OdometryError(
            f"the mask is {mask.shape}, but the camera's images are {camera.height}x{camera.width}; draw it on one "
            "of them (`read_mask` reads it)"
        )
    seen = fit_image((255 * (mask > 0)).astype(np.uint8), height=size[0], width=size[1], channels=1)
    return fixed.told(torch.from_numpy(seen[..., 0] < 128))


def compiles_first(net: Network) -> bool:
    """Whether the first frame of this network takes up to a minute, in which its loops are compiled for ever."""
    return isinstance(net, GeometricNet) and next(net.parameters()).device.type == "cpu" and not kernels.compiled()


def working_size(camera: Camera) -> tuple[int, int]:
    """(height, width) at which the default network sees a camera: one focal length for all, whole cells."""
    scale = min(
        1.0,
        _MOST_COLUMNS * camera.fx / (camera.width * _FOCAL_PX),
        _MOST_ROWS * camera.fy / (camera.height * _FOCAL_PX),
    )
    height = round(camera.height * scale * _FOCAL_PX / camera.fy / 8) * 8
    width = round(camera.width * scale * _FOCAL_PX / camera.fx / 8) * 8
    return max(height, 64), max(width, 64)


def _configured_size(net: Network) -> tuple[int, int]:
    return net.config.image_height, net.config.image_width


def estimate_trajectory(
    net: Network,
    stream: Stream,
    advance: Callable[[int], None] = lambda count: None,
    calibration: VehicleCalibration | None = None,
) -> Trajectory:
    """Run a network over a whole sequence from a fresh state; the trajectory's first pose is the identity.

    Args:
        net: a network in evaluation mode.
        stream: frames and their camera.
        advance: called with 1 after each frame, for a progress bar.
        calibration: of the vehicle, for the default network.
    """
    times, poses = [], []
    for tracked in VisualOdometry(net, stream.camera, calibration).stream(stream):
        times.append(tracked.timestamp_s)
        poses.append(tracked.T_world_camera)
        advance(1)
    if not poses:
        raise OdometryError(f"{stream.name}: holds no frame")
    return Trajectory(np.array(times), np.stack(poses))
