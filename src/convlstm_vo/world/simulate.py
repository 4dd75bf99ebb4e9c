"""Writing drives as KITTI odometry folders: in parallel, resumable, and never a mixture of two datasets."""

from __future__ import annotations

import dataclasses
import errno
import functools
import json
import math
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor, wait
from pathlib import Path
from typing import Any, Literal

import cv2
import numpy as np
from numpy.typing import NDArray

from convlstm_vo.geometry.camera import Camera
from convlstm_vo.geometry.files import WriteError, write_atomically
from convlstm_vo.world.drives import Mount
from convlstm_vo.world.lens import Distortion, WorldError
from convlstm_vo.world.render import Labels
from convlstm_vo.world.sequence import KITTI_CAMERA, RoadKind, WorldSequence, kind_of
from convlstm_vo.world.traffic import TrafficKind

MARKER = "simulation.json"


@dataclasses.dataclass(frozen=True)
class SimulateConfig:
    """Drives through built-in streets, written as a KITTI odometry folder."""

    out: Path
    """Folder to write; new, empty, or left by an interrupted run with the same options."""
    frames: int = 200
    """Frames of each sequence."""
    sequences: int = 1
    """How many sequences; each has a street of its own."""
    first_name: int = 0
    """Number of the first sequence: 0 gives 00, 01, ..."""
    seed: int = 0
    """Seed of the first sequence's street; the next ones count up."""
    road: RoadKind = "mixed"
    """Kind of road."""
    height: int = KITTI_CAMERA.height
    """Image height, pixels; KITTI's camera is resized to it."""
    width: int = KITTI_CAMERA.width
    """Image width, pixels."""
    fov: float | None = None
    """Horizontal field of view in degrees, instead of KITTI's camera (about 82)."""
    camera_height: float = 1.65
    """Height of the camera above the road, metres."""
    camera_yaw: float = 0.0
    """Mounting yaw, degrees, to the right."""
    camera_pitch: float = 0.0
    """Mounting pitch, degrees, nose up."""
    camera_roll: float = 0.0
    """Mounting roll, degrees, clockwise."""
    distortion: tuple[float, float] = (0.0, 0.0)
    """Radial distortion k1, k2 as in OpenCV; calib.txt then describes the straightened image."""
    mounting: Literal["fixed", "random"] = "fixed"
    """"random" draws height (1 to 3 m) and angles for each sequence; they are in its world.json."""
    look: Literal["clean", "random"] = "clean"
    """"random" draws exposure, blur, noise, vignetting and JPEG for each sequence; labels stay exact."""
    traffic: TrafficKind = "usual"
    """"heavy": a lorry or a car close ahead, and a full lane beside."""
    cross_slope: bool = False
    """Roads fall to their edges for the rain and lean into bends, as real ones do; banks and kerbs beside them."""
    hilly: bool = False
    """Roads rise and fall as sharply as KITTI's do, in crests, dips and ramps of 15 to 120 m."""
    narrow: bool = False
    """In town and country, lanes lie between kerbs: an island close to the left, ground that rises to the right."""
    fps: float = 10.0
    """Frames a second."""
    depth: bool = False
    """Also write depth_0/: 16-bit PNG, metres * 256, 0 for sky (KITTI's depth format)."""
    flow: bool = False
    """Also write flow_0/ (16-bit PNG in KITTI's flow format) and moving_0/ (255 where something moves)."""
    workers: int = 0
    """Processes; 0 takes all cores."""

    def __post_init__(self) -> None:
        for key in ("frames", "sequences", "height", "width"):
            if getattr(self, key) < 1:
                raise WorldError(f"{key} is {getattr(self, key)}: must be at least 1")
        if self.seed < 0 or self.first_name < 0 or self.workers < 0:
            raise WorldError("seed, first_name and workers must not be negative")
        if self.mounting == "random":
            for key in ("camera_height", "camera_yaw", "camera_pitch", "camera_roll"):
                if getattr(self, key) != SimulateConfig.__dataclass_fields__[key].default:
                    raise WorldError(f"{key} is {getattr(self, key)}: --mounting random draws it; leave one out")
        self.sequence(0)  # says what is wrong with camera, road or rate

    @property
    def camera(self) -> Camera:
        """The camera of all sequences."""
        if self.fov is not None:
            return Camera.from_fov(self.fov, height=self.height, width=self.width)
        return KITTI_CAMERA.resized(height=self.height, width=self.width)

    def name(self, number: int) -> str:
        """Folder name of a sequence."""
        return f"{self.first_name + number:02d}"

    def sequence(self, number: int) -> WorldSequence:
        """The sequence of that number, unrendered."""
        angles = (math.radians(angle) for angle in (self.camera_yaw, self.camera_pitch, self.camera_roll))
        fixed = Mount(self.camera_height, *angles)
        return WorldSequence(
            self.seed + number,
            frames=self.frames,
            kind=self.road,
            camera=self.camera,
            fps=self.fps,
            mount="random" if self.mounting == "random" else fixed,
            sensor="random" if self.look == "random" else None,
            distortion=Distortion(*self.distortion),
            traffic=self.traffic,
            cross_slope=self.cross_slope,
            hilly=self.hilly,
            narrow=self.narrow,
            name=self.name(number),
        )


def simulate(config: SimulateConfig, *, progress: bool = True) -> Path:
    """Write the drives; what an interrupted run left is continued.

    Returns:
        The folder, in KITTI odometry layout: sequences/NAME/image_0, calib.txt, times.txt, and poses/NAME.txt.

    Raises:
        WorldError: the folder holds something else. WriteError: it cannot be written, or the disk is full.
    """
    _claim(config)
    jobs = list(_jobs(config))
    workers = min(config.workers or os.cpu_count() or 1, len(jobs))
    context = multiprocessing.get_context("spawn")
    done, stop = context.Value("q", 0), context.Event()
    if workers == 1:
        _start_worker(done, stop, signal.getsignal(signal.SIGINT))
        short = [functools.partial(_write_part, config, *job) for job in _jobs(config, most=10)]
        for job in _watched(short, config, done, progress):
            job()
        return config.out
    with ProcessPoolExecutor(workers, context, _start_worker, (done, stop, signal.SIG_IGN)) as pool:
        futures = [pool.submit(_write_part, config, *job) for job in jobs]
        try:
            _watch(futures, config, done, progress)
        except BaseException:
            stop.set()  # workers finish the frame that they are at; the rest is left for the next run
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return config.out


def _jobs(config: SimulateConfig, most: int = 1 << 30) -> Iterator[tuple[int, int, int]]:
    """(sequence, first frame, end): whole sequences, or parts of them when there are fewer than workers."""
    workers = config.workers or os.cpu_count() or 1
    parts = max(1, min(math.ceil(workers / config.sequences), config.frames // 20))
    size = min(math.ceil(config.frames / parts), most)
    for number in range(config.sequences):
        for begin in range(0, config.frames, size):
            yield number, begin, min(begin + size, config.frames)


def _claim(config: SimulateConfig) -> None:
    """Take the folder, or explain why not."""
    marker, wanted = config.out / MARKER, _identity(config)
    if config.out.exists() and not config.out.is_dir():
        raise WorldError(f"{config.out}: is a file; name a folder to write")
    if marker.exists():
        if json.loads(marker.read_text()) != json.loads(json.dumps(wanted)):
            raise WorldError(f"{config.out}: holds a simulation with other options (see {MARKER} there); "
                             "repeat those to continue it, or name another folder")  # fmt: skip
        _sweep(config.out)
        return
    if config.out.is_dir() and any(config.out.iterdir()):
        raise WorldError(f"{config.out}: holds other files; name a new or empty folder")
    write_atomically(marker, json.dumps(wanted, indent=2) + "\n")


def _sweep(folder: Path) -> None:
    """Remove halves of files that a killed run left."""
    for path in folder.glob("sequences/*/*/.*.png.*"):
        path.unlink(missing_ok=True)


def _identity(config: SimulateConfig) -> dict[str, Any]:
    """Everything that the content depends on."""
    values = dataclasses.asdict(config)
    del values["out"], values["workers"]
    for name in ("traffic", "cross_slope", "hilly", "narrow"):
        if values[name] == SimulateConfig.__dataclass_fields__[name].default:
            del values[name]  # folders of before the option have no such key
    return {"made_by": "convlstm-vo simulate", **values}


_done: Any = None
_stop: Any = None


def _start_worker(done: Any, stop: Any, on_interrupt: Any) -> None:
    """Set a process up: the count of frames, the sign to stop, and who hears Ctrl-C (only the one that watches)."""
    global _done, _stop
    _done, _stop = done, stop
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, on_interrupt)
    cv2.setNumThreads(1)


@functools.lru_cache(maxsize=1)
def _sequence(config: SimulateConfig, number: int) -> WorldSequence:
    return config.sequence(number)


def _write_part(config: SimulateConfig, number: int, begin: int, end: int) -> None:
    """Write frames begin to end of a sequence that are not there yet, and its tables with the last one."""
    folder = config.out / "sequences" / config.name(number)
    for index in range(begin, end):
        if _stop.is_set():
            return
        if not _frame_files(config, folder, index)[-1].exists():
            _write_frame(config, number, folder, index)
        with _done.get_lock():
            _done.value += 1
    if begin == 0:
        _write_tables(config, number, folder)


def _frame_files(config: SimulateConfig, folder: Path, index: int) -> list[Path]:
    """Files of a frame in the order of writing: the last one tells that all are there."""
    kinds = ["depth_0"] * config.depth + ["flow_0", "moving_0"] * config.flow + ["image_0"]
    return [folder / kind / f"{index:06d}.png" for kind in kinds]


def _write_frame(config: SimulateConfig, number: int, folder: Path, index: int) -> None:
    frame, labels = _sequence(config, number).frame_and_truth(index)
    content = {"image_0": frame.image, **(encode_labels(labels) if config.depth or config.flow else {})}
    for path in _frame_files(config, folder, index):
        _write_png(path, content[path.parent.name])


def encode_labels(labels: Labels) -> dict[str, NDArray]:
    """Labels as 16-bit and 8-bit pictures in KITTI's formats (BGR order, as OpenCV writes)."""
    depth = np.where(np.isfinite(labels.depth), np.clip(labels.depth * 256, 1, 65535), 0).astype(np.uint16)
    largest: NDArray[np.float32] = np.abs(labels.flow).max(axis=-1)
    valid = np.isfinite(largest) & (largest < 511)
    vectors = np.where(valid[..., None], labels.flow * 64 + 32768.5, 0).astype(np.uint16)
    flow = np.dstack([valid.astype(np.uint16), vectors[..., 1], vectors[..., 0]])
    return {"depth_0": depth, "flow_0": flow, "moving_0": labels.moving.astype(np.uint8) * 255}


def _write_png(path: Path, image: NDArray) -> None:
    ok, data = cv2.imencode(".png", image, [cv2.IMWRITE_PNG_COMPRESSION, 1])
    assert ok
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_bytes(data.tobytes())
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        raise WriteError(
            f"{path}: cannot be written ({error.strerror}); "
            + ("free some space" if full else "check the folder")
            + " and repeat the command: it continues where it stopped"
        ) from None


def _write_tables(config: SimulateConfig, number: int, folder: Path) -> None:
    sequence = _sequence(config, number)
    camera, mount = sequence.camera, sequence.mount
    row = [camera.fx, 0, camera.cx, 0, 0, camera.fy, camera.cy, 0, 0, 0, 1, 0]
    calib = "".join(f"P{k}: " + " ".join(f"{value:.12e}" for value in row) + "\n" for k in range(4))
    write_atomically(folder / "calib.txt", calib)
    write_atomically(folder / "times.txt", "".join(f"{t:.9e}\n" for t in sequence.drive.timestamps_s))
    planes = "".join(" ".join(f"{value:.9e}" for value in plane) + "\n" for plane in sequence.road_plane)
    write_atomically(folder / "road_plane.txt", planes)
    about = {
        "seed": sequence.seed,
        "road": kind_of(sequence.seed, config.road),
        "fps": config.fps,
        "camera_height_m": mount.height_m,
        "mount_yaw_pitch_roll_rad": [mount.yaw, mount.pitch, mount.roll],
        "distortion_k1_k2": list(config.distortion),
        "sensor": dataclasses.asdict(sequence.sensor),
    }
    write_atomically(folder / "world.json", json.dumps(about, indent=2) + "\n")
    poses = config.out / "poses" / f"{config.name(number)}.txt"
    poses.parent.mkdir(parents=True, exist_ok=True)
    sequence.trajectory.write_kitti(poses)


def _bar(progress: bool):  # type: ignore[no-untyped-def]
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
    )
    return Progress(*columns, TimeRemainingColumn(), disable=not progress)


def _watch(futures: list[Future[None]], config: SimulateConfig, done: Any, progress: bool) -> None:
    """Show progress until all parts are written; the first error ends it."""
    total, start = config.frames * config.sequences, time.monotonic()
    with _bar(progress) as bar:
        task = bar.add_task("rendering streets", total=total, rate="")
        pending = set(futures)
        while pending:
            finished, pending = wait(pending, timeout=0.25)
            for future in finished:
                future.result()
            rate = done.value / max(time.monotonic() - start, 1e-3)
            bar.update(task, completed=done.value, rate=f"{rate:.0f} frames/s")


def _watched(jobs: list[Any], config: SimulateConfig, done: Any, progress: bool) -> Iterator[Any]:
    """The same for jobs that run in this process."""
    with _bar(progress) as bar:
        task = bar.add_task("rendering streets", total=config.frames * config.sequences, rate="")
        for job in jobs:
            yield job
            bar.update(task, completed=done.value)
