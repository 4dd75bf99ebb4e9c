"""Rendered drives on disk, with everything that the geometric network learns from: frames, depth, movers, poses."""

from __future__ import annotations

import dataclasses
import json
import shutil
import tempfile
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import as_completed
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from convlstm_vo.geometry.camera import Camera
from convlstm_vo.geometry.files import write_atomically
from convlstm_vo.training.config import TrainError
from convlstm_vo.training.interrupts import process_pool
from convlstm_vo.world import Mount, WorldSequence
from convlstm_vo.world.plan import generator

NEAREST_M = 2.0  # inverse depths are kept as 16-bit shares of 1 / NEAREST_M
SHARES = 65535
_RATES = (5.0, 7.0, 10.0, 10.0, 10.0, 10.0, 15.0, 20.0)
_ROADS = ("town", "town", "town", "country", "country", "motorway")
_VERSION = 2


@dataclasses.dataclass(frozen=True)
class RenderedDrive:
    """A drive as it lies on disk (memory-mapped), or in memory.

    Attributes:
        images: uint8 (frames, height, width).
        shares: uint16 (frames, height, width), inverse depth as share of 1 / 2 m; 0 is the sky.
        moving: uint8 (frames, height, width / 8), packed bits, 1 where something moves.
        T_world_camera: (frames, 4, 4). road_plane: (frames, 4), unit normal towards the camera, height in metres.
        intrinsics: fx, fy, cx, cy. folder: where it lies; None if only in memory.
    """

    name: str
    images: NDArray[np.uint8]
    shares: NDArray[np.uint16]
    moving: NDArray[np.uint8]
    T_world_camera: NDArray[np.float64]
    road_plane: NDArray[np.float64]
    intrinsics: NDArray[np.float64]
    height_m: float
    folder: Path | None = None

    def __len__(self) -> int:
        return len(self.images)

    def inverse_depth(self, index: int) -> NDArray[np.float32]:
        """(height, width) 1 / metres."""
        return self.shares[index].astype(np.float32) / np.float32(SHARES * NEAREST_M)


def random_sequence(seed: int, frames: int, *, height: int, width: int, **world: Any) -> WorldSequence:
    """A drive of random road, camera, mounting, look and rate; everything follows from the seed.

    Args:
        world: other options of `WorldSequence`, as traffic, cross_slope, hilly and narrow.
    """
    rng = generator(seed, 77)
    focal = 363.6 * float(rng.uniform(0.93, 1.07))
    camera = Camera(
        focal,
        focal * float(rng.uniform(0.98, 1.02)),
        (width - 1) / 2 + float(rng.uniform(-12, 12)),
        (height - 1) / 2 + float(rng.uniform(-10, 10)),
        height=height,
        width=width,
    )
    mount = Mount.random(rng)
    return WorldSequence(
        seed,
        frames=frames,
        kind=_ROADS[int(rng.integers(len(_ROADS)))],  # type: ignore[arg-type]
        camera=camera,
        fps=_RATES[int(rng.integers(len(_RATES)))],
        mount=mount,
        sensor="random",
        **world,
    )


def in_memory(sequence: WorldSequence, frames: Sequence[int]) -> RenderedDrive:
    """Some frames of a drive, rendered now and kept in memory."""
    height, width = sequence.camera.height, sequence.camera.width
    images = np.empty((len(frames), height, width), np.uint8)
    shares = np.empty((len(frames), height, width), np.uint16)
    moving = np.empty((len(frames), height, width // 8), np.uint8)
    for k, index in enumerate(frames):
        frame, truth = sequence.frame_and_truth(index)
        images[k] = frame.image
        shares[k] = np.clip(SHARES * NEAREST_M / truth.depth + 0.5, 0, SHARES)
        moving[k] = np.packbits(truth.moving, axis=-1)
    return RenderedDrive(
        sequence.name,
        images,
        shares,
        moving,
        sequence.trajectory.T_world_camera[frames],
        sequence.road_plane[frames],
        sequence.camera.intrinsics,
        sequence.mount.height_m,
    )


def render(folder: Path, seed: int, frames: int, height: int, width: int, world: dict[str, Any]) -> Path:
    """Write one drive; one that is there already is left as it is."""
    path = folder / f"{seed:08d}"
    if path.exists():
        return path
    sequence = random_sequence(seed, frames, height=height, width=width, **world)
    drive = in_memory(sequence, range(frames))
    temporary = Path(tempfile.mkdtemp(prefix=".drive-", dir=folder))
    np.save(temporary / "images.npy", drive.images)
    np.save(temporary / "shares.npy", drive.shares)
    np.save(temporary / "moving.npy", drive.moving)
    np.savez(
        temporary / "path.npz",
        T_world_camera=drive.T_world_camera,
        road_plane=drive.road_plane,
        intrinsics=drive.intrinsics,
        height_m=drive.height_m,
    )
    temporary.chmod(0o755)
    temporary.rename(path)
    return path


def render_drives(
    folder: Path,
    seeds: Iterable[int],
    *,
    frames: int,
    height: int,
    width: int,
    workers: int,
    advance: Callable[[int], None] = lambda count: None,
    **world: Any,
) -> list[Path]:
    """Write the drives of some seeds in parallel; those of an earlier, interrupted run are kept.

    Args:
        world: what their streets are like, as in `random_sequence`.

    Raises:
        TrainError: the folder holds drives of another length or size.
    """
    folder.mkdir(parents=True, exist_ok=True)
    marker = folder / "drives.json"
    wanted = {"version": _VERSION, "frames": frames, "size": [height, width], **world}
    if marker.exists() and json.loads(marker.read_text()) != wanted:
        raise TrainError(f"{folder}: holds drives of other settings ({marker}); name another folder or remove it")
    if not marker.exists():
        write_atomically(marker, json.dumps(wanted))
    for left in folder.glob(".drive-*"):
        shutil.rmtree(left)
    with process_pool(workers) as pool:
        jobs = [pool.submit(render, folder, seed, frames, height, width, world) for seed in seeds]
        for job in as_completed(jobs):
            job.result()
            advance(1)
        return sorted(job.result() for job in jobs)


def open_drive(path: Path) -> RenderedDrive:
    """A drive that `render` wrote."""
    with np.load(path / "path.npz") as values:
        path_values = dict(values)
    images, shares, moving = (
        np.load(path / f"{name}.npy", mmap_mode="r") for name in ("images", "shares", "moving")
    )
    return RenderedDrive(
        path.name,
        images,
        shares,
        moving,
        path_values["T_world_camera"],
        path_values["road_plane"],
        path_values["intrinsics"],
        float(path_values["height_m"]),
        path,
    )
