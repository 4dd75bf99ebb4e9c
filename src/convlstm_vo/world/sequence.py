"""A drive through a built-in street as a sequence of frames, rendered when asked for; and a stream of them."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Iterator, Sequence
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from convlstm_vo.geometry.camera import Camera
from convlstm_vo.geometry.trajectory import Trajectory
from convlstm_vo.sequences.base import Frame
from convlstm_vo.world.drives import CRUISE_M_S, Drive, Mount, make_drive
from convlstm_vo.world.exact import bell, relative_to_first
from convlstm_vo.world.lens import Distortion, Lens, WorldError
from convlstm_vo.world.meshes import Mesh
from convlstm_vo.world.plan import Plan, StreetKind, generator, make_plan
from convlstm_vo.world.render import Labels, Renderer
from convlstm_vo.world.sensor import Sensor, develop, exposure_for, smeared
from convlstm_vo.world.streets import Street, make_street
from convlstm_vo.world.traffic import Traffic, TrafficKind, heavy_traffic

RoadKind = Literal["town", "country", "motorway", "mixed"]
KITTI_CAMERA = Camera(718.856, 718.856, 607.1928, 185.2157, height=376, width=1241)
_EXPOSURE_EVERY = 20


def _check(kind: str, frames: int, fps: float, mount: Mount) -> None:
    if kind not in get_args(RoadKind):
        raise WorldError(f"road {kind!r}: must be one of {', '.join(get_args(RoadKind))}")
    if frames < 1:
        raise WorldError(f"frames {frames}: a drive has at least one")
    if not 1.0 <= fps <= 120.0:
        raise WorldError(f"fps {fps}: must lie between 1 and 120 images a second")
    if not 0.3 <= mount.height_m <= 5.0:
        raise WorldError(f"camera height {mount.height_m} m: must lie between 0.3 and 5 m above the road")
    if max(abs(mount.yaw), abs(mount.pitch), abs(mount.roll)) > 0.5:
        raise WorldError(
            f"mounting angles {mount.yaw}, {mount.pitch}, {mount.roll} rad: must be under 0.5 (29 degrees)"
        )


def kind_of(seed: int, kind: RoadKind) -> StreetKind:
    """The road that "mixed" stands for with this seed: two thirds of them in town."""
    if kind != "mixed":
        return kind
    number = generator(seed, 3).random()
    return "town" if number < 0.65 else "country" if number < 0.9 else "motorway"


class WorldSequence:
    """Frames of a drive along a street that a seed makes: lazily rendered, always the same.

    Args:
        seed: makes the street, the drive and the weather. frames: how many. kind: the road.
        camera: intrinsics (KITTI's by default). fps: frames a second. mount: the camera's place on the car
            (KITTI's by default), or "random". sensor: its look, or "random".
        distortion: radial, none by default (`camera` then describes the straightened image).
        traffic: other road users: the usual ones, "heavy" (`heavy_traffic`), or your own.
        cross_slope: roads fall to their edges for the rain and lean into bends, as real ones do, and in open
            country grass rises beside some; else all is level across.
        hilly: roads rise and fall as sharply as KITTI's do; else gently.
        narrow: in town and country, lanes lie between kerbs, an island to the left, and ground that rises to the
            right, as close as 1.35 m from the middle of the car.
        name: of the sequence ("world-SEED" by default).

    Attributes:
        trajectory: exact poses, in the frame of the first camera. street, drive: everything behind it.

    Raises:
        WorldError: an impossible camera, road, rate, traffic or number of frames.
    """

    def __init__(self, seed: int = 0, *, frames: int = 100, kind: RoadKind = "mixed", camera: Camera = KITTI_CAMERA,
                 fps: float = 10.0, mount: Mount | Literal["random"] | None = None,
                 sensor: Sensor | Literal["random"] | None = None,
                 distortion: Distortion | None = None, traffic: Traffic | TrafficKind = "usual",
                 cross_slope: bool = False, hilly: bool = False, narrow: bool = False,
                 name: str = "") -> None:  # fmt: skip
        self.mount = Mount.random(generator(seed, 4)) if mount == "random" else mount or Mount()
        _check(kind, frames, fps, self.mount)
        self.seed, self.frames, self.kind, self.fps = seed, frames, kind_of(seed, kind), fps
        self.camera, self.cross_slope, self.hilly, self.narrow = camera, cross_slope, hilly, narrow
        self.sensor = Sensor.random(generator(seed, 5)) if sensor == "random" else sensor or Sensor()
        if isinstance(traffic, str) and traffic not in get_args(TrafficKind):
            raise WorldError(
                f"traffic {traffic!r}: must be one of {', '.join(get_args(TrafficKind))}, or a function"
            )
        self.traffic = heavy_traffic(seed) if traffic == "heavy" else traffic
        self.name = name or f"world-{seed}"
        self._lens = Lens.of(camera, distortion or Distortion())
        self._gains: dict[int, float] = {}

    @functools.cached_property
    def plan(self) -> Plan:
        """Path and roads."""
        length = CRUISE_M_S[self.kind][1] * (self.frames - 1) / self.fps + 40
        return make_plan(
            self.seed, self.kind, length, cross_slope=self.cross_slope, hilly=self.hilly, narrow=self.narrow
        )

    @functools.cached_property
    def drive(self) -> Drive:
        """Exact poses of camera and movers in the street's frame."""
        others = self._others
        if others is None:
            return self._usual_drive
        poses = np.stack([T for _, T in others], 1) if others else self._usual_drive.T_street_mover[:, :0]
        return dataclasses.replace(self._usual_drive, T_street_mover=poses)

    @functools.cached_property
    def _usual_drive(self) -> Drive:
        return make_drive(self.seed, self.plan, frames=self.frames, fps=self.fps, mount=self.mount)

    @functools.cached_property
    def _others(self) -> Sequence[tuple[Mesh, NDArray[np.float64]]] | None:
        """Road users that are not the usual ones: bodies and poses (frames, 4, 4)."""
        return None if isinstance(self.traffic, str) else self.traffic(self.plan, self._usual_drive)

    @functools.cached_property
    def street(self) -> Street:
        """What stands still (built when first needed: half a second or so), and the bodies of what moves."""
        bodies = None if self._others is None else [body for body, _ in self._others]
        return make_street(self.seed, self.plan, driven_m=float(self.drive.road_s[-1]), movers=bodies)

    @functools.cached_property
    def trajectory(self) -> Trajectory:
        """Exact poses; the first one is the identity."""
        return Trajectory(self.drive.timestamps_s, relative_to_first(self.drive.T_street_camera))

    @functools.cached_property
    def _renderer(self) -> Renderer:
        return Renderer(self.street, self.drive, self._lens)

    def __len__(self) -> int:
        return self.frames

    def __iter__(self) -> Iterator[Frame]:
        return (self[i] for i in range(self.frames))

    def __getitem__(self, index: int) -> Frame:
        if not 0 <= index < self.frames:
            raise IndexError(f"{self.name}: frame {index} of {self.frames}")
        return Frame(self._image(index), float(self.drive.timestamps_s[index]), index, f"{self.name}[{index}]")

    def ground_truth(self, index: int) -> Labels:
        """Depth, flow to the next frame and moving pixels of a frame."""
        return self._renderer.labels(index)

    def frame_and_truth(self, index: int) -> tuple[Frame, Labels]:
        """Both, for the price of looking once."""
        return self[index], self._renderer.labels_of_last(index)

    @property
    def road_plane(self) -> NDArray[np.float64]:
        """(frames, 4): the road under the car, normal and height, in each camera's frame; see `Drive`."""
        return self.drive.road_plane

    def _image(self, index: int) -> NDArray[np.uint8]:
        gain, light = self._gain(index), self._renderer.light(index)
        if self.sensor.shutter > 0:
            light = smeared(light, self._renderer.velocity_of_last(index), self.sensor)
        return develop(light, gain, self.sensor, self.seed * 100_003 + index)

    def _gain(self, index: int) -> float:
        """Exposure: measured on small pictures every 20 frames, and glided between."""
        whole, rest = divmod(index, _EXPOSURE_EVERY)
        a, b = self._key_gain(whole), self._key_gain(whole + 1)
        return a + (b - a) * rest / _EXPOSURE_EVERY

    def _key_gain(self, number: int) -> float:
        index = min(number * _EXPOSURE_EVERY, self.frames - 1)
        if index not in self._gains:
            small = self.camera.resized(
                height=max(8, self.camera.height // 8), width=max(16, self.camera.width // 8)
            )
            light = Renderer(self.street, self.drive, Lens.of(small, Distortion())).light(index)
            off = bell(generator(self.seed, 1000 + index), 1)[0] * self.sensor.drift_stops
            self._gains[index] = exposure_for(light, self.sensor) * float(2.0**off)
        return self._gains[index]


def endless(seed: int = 0, **options) -> Iterator[WorldSequence]:  # type: ignore[no-untyped-def]
    """Drives without end, each on a street of its own: seeds seed, seed + 1, ... (options as of WorldSequence)."""
    return (WorldSequence(number, **options) for number in itertools.count(seed))
