"""Drives as cells: the flow of every pair measured once, as the odometer would measure it, and kept in files.

What is learned from them sees 1920 cells a frame and no image, which makes hundreds of frames a second on a CPU.
"""

from __future__ import annotations

import dataclasses
import math
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import as_completed
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from convlstm_vo.environment import bfloat16_pays
from convlstm_vo.geometry import se3
from convlstm_vo.geometry.files import replacing
from convlstm_vo.models.flow import FlowNet
from convlstm_vo.models.geometric import Cells, choose_cells
from convlstm_vo.models.scene import canyon_inverse_depth, cell_rays, flow_of, road_inverse_depth, road_slopes
from convlstm_vo.training.flow_data import change_lights
from convlstm_vo.training.interrupts import process_pool
from convlstm_vo.training.rendered import RenderedDrive, open_drive
from convlstm_vo.training.stage_state import weights_checksum
from convlstm_vo.world.bonnet import Bonnet

MEAN_ROAD = 0.19  # inverse depth of the road on average, as the solver weighs it


@dataclasses.dataclass(frozen=True)
class CellDrive:
    """A drive as its cells: float32 (frames, 7, rows, columns) (rays, seen, sigma, texture), and the truth.

    Attributes:
        motions: (frames, 6) true motions in camera heights.
        slopes: (frames, 2) of the road in the previous frame; not a number where nobody knows them (real frames).
        first: (6,) the motion that a search at the first frame finds.
    """

    cells: NDArray[np.float32]
    motions: NDArray[np.float32]
    slopes: NDArray[np.float32]
    first: NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.cells)


def pick_frames(length: int, rng: np.random.Generator) -> list[int]:
    """Frames of a drive as a video may show them: half of the drives as they are, others with frames dropped."""
    if rng.random() < 0.5:
        return list(range(length))
    frames, at = [], 0
    while at < length:
        frames.append(at)
        at += 1 if rng.random() < 0.9 else 2
    return frames


def spoil(image: NDArray[np.uint8], rng: np.random.Generator) -> NDArray[np.uint8]:
    """A frame as one in twenty is: covered, dazzled, blurred."""
    import cv2

    kind = rng.integers(4)
    if kind == 0:
        return np.full_like(image, int(rng.integers(0, 256)))
    if kind == 1:
        return np.clip(image.astype(np.float32) * 0.15 + rng.normal(0, 3, image.shape), 0, 255).astype(np.uint8)
    if kind == 2:
        return np.asarray(cv2.blur(image, (int(rng.integers(5, 25)), int(rng.integers(1, 7)))), np.uint8)
    covered = image.copy()
    left, top = int(rng.integers(0, image.shape[1] // 2)), int(rng.integers(0, image.shape[0] // 2))
    covered[top : top + image.shape[0] // 2, left : left + image.shape[1] // 2] = int(rng.integers(0, 100))
    return covered


@torch.inference_mode()
def cells_of(
    net: FlowNet, drive: RenderedDrive, seed: int, *, plain: bool = False, bonnet: bool = False
) -> CellDrive:
    """Measure the flow of a drive; as it is, or with dropped, spoilt and dimmed frames.

    Args:
        bonnet: over the car's own, of a random shape.
    """
    rng = np.random.Generator(np.random.PCG64([seed, int(drive.name)]))
    frames = list(range(len(drive))) if plain else pick_frames(len(drive), rng)
    images = [drive.images[i] for i in frames]
    if bonnet:
        height, width = images[0].shape
        own = Bonnet(height, width, np.random.Generator(np.random.PCG64([seed, int(drive.name), 1])))
        images = [own.over(image) for image in images]
    if not plain:
        images = [spoil(image, rng) if rng.random() < 0.04 else image for image in images]
    intrinsics = torch.tensor(drive.intrinsics[None], dtype=torch.float32)
    rays = cell_rays(intrinsics, images[0].shape[0] // 4, images[0].shape[1] // 4)
    motions, slopes, rows = [], [], []
    first: NDArray[np.float32] | None = None
    wrong, light = mistaken(len(frames), rng), torch.Generator().manual_seed(int(rng.integers(2**62)))
    for k in range(len(frames) - 1):
        T = se3.relative(drive.T_world_camera[frames[k]], drive.T_world_camera[frames[k + 1]])
        T[:3, 3] /= drive.height_m
        motions.append(se3.motion_from_matrix(T).astype(np.float32))
        slopes.append(
            road_slopes(torch.tensor(drive.road_plane[frames[k], None, :3])).numpy()[0].astype(np.float32)
        )
        guess = predicted_motion(motions, rng)
        first = guess if first is None else first
        guess[:3] *= math.exp(wrong[k, 0])
        noise = 0.015 if k == 0 or rng.random() < 0.1 else 0.003
        tilted = torch.from_numpy((slopes[-1] + wrong[k, 1:] + rng.normal(0, noise, 2)).astype(np.float32))[None]
        motion = torch.from_numpy(guess)[None]
        predicted = flow_of(rays, canyon_inverse_depth(rays, tilted), motion, intrinsics).clamp(-1000, 1000)
        prev, curr = (torch.from_numpy(np.array(image, np.float32))[None, None] for image in images[k : k + 2])
        if not plain:
            prev, curr = change_lights(prev, curr, light)
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16_pays()):
            field = net(prev, curr, predicted)
        rows.append(packed_cells(choose_cells(rays, field, intrinsics, prev)))
    assert first is not None
    return CellDrive(np.stack(rows), np.stack(motions), np.stack(slopes), first)


def predicted_motion(motions: Sequence[NDArray[np.float32]], rng: np.random.Generator) -> NDArray[np.float32]:
    """What is taken for the last of some true motions before it is measured: the one before it, or, of a first
    one, what a search finds."""
    found = 0.0 if len(motions) > 1 else rng.normal(0, 1, 6) * [0.02, 0.01, 0.1, 0.005, 0.01, 0.005]
    guess = motions[max(len(motions) - 2, 0)] + found
    return (guess + rng.normal(0, 1, 6) * [0.003, 0.003, 0.01, 0.0005, 0.0005, 0.0005]).astype(np.float32)


def mistaken(frames: int, rng: np.random.Generator) -> NDArray[np.float64]:
    """(frames, 3): what the odometer is wrong about for a second or two: logarithm of the way's length, slopes.

    A flow that sees little keeps to what was predicted, and says so of each cell; that all of them are then wrong
    alike can only be learned where the prediction is wrong.
    """
    keep, sd = math.exp(-1 / 15), np.array([0.03, 0.004, 0.004])
    out = rng.normal(0, 1, (frames, 3)) * sd
    for k in range(1, frames):
        out[k] = keep * out[k - 1] + math.sqrt(1 - keep**2) * out[k]
    return out


def packed_cells(cells: Cells) -> NDArray[np.float32]:
    """Cells of one frame as a drive keeps them: (7, rows, columns)."""
    packed = torch.cat([cells.rays, cells.seen, cells.sigma[:, None], cells.texture[:, None]], 1)
    return packed[0].numpy()


def cached(path: Path, make: Callable[[], CellDrive]) -> CellDrive:
    """A drive from the file where an earlier run has left it; made and left there where none has."""
    if not path.exists():
        done = make()
        with replacing(path) as temporary:
            np.savez(temporary, **{f.name: getattr(done, f.name) for f in dataclasses.fields(CellDrive)})
    with np.load(path) as values:
        return CellDrive(**dict(values))


def cache_cells(
    net: FlowNet,
    drives: Sequence[RenderedDrive],
    folder: Path,
    seed: int,
    *,
    plain: bool = False,
    bonnet: bool = False,
    workers: int = 1,
    advance: Callable[[int], None] = lambda count: None,
) -> list[CellDrive]:
    """`cells_of` all drives, in parallel, from files where an earlier run has left them.

    Their names tell by a checksum what they were made with; those of another flow or seed are replaced.
    """
    made_with = zlib.crc32(f"{seed} {plain}{' bonnet' * bonnet}".encode(), weights_checksum(net.state_dict()))
    jobs = [(net, drive.folder or drive, folder, made_with, seed, plain, bonnet) for drive in drives]
    if workers > 1:
        with process_pool(workers) as pool:
            for done in as_completed([pool.submit(_cache_one, *job) for job in jobs]):
                done.result()
                advance(1)
    out = []
    for job in jobs:
        out.append(_cache_one(*job))  # what other processes have made is read
        advance(int(workers == 1))
    return out


def _cache_one(
    net: FlowNet,
    drive: Path | RenderedDrive,
    folder: Path,
    made_with: int,
    seed: int,
    plain: bool,
    bonnet: bool,
) -> CellDrive:
    """The cells of one drive (another process is only told where it lies), measured on one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    path = folder / f"{drive.name}-{made_with:08x}.npz"
    try:
        found = cached(
            path,
            lambda: cells_of(
                net,
                open_drive(drive) if isinstance(drive, Path) else drive,
                seed,
                plain=plain,
                bonnet=bonnet,
            ),
        )
    finally:
        torch.set_num_threads(before)
    for other in folder.glob(f"{drive.name}[-.]*"):
        if other != path:
            other.unlink(missing_ok=True)
    return found


def mirrored(drive: CellDrive) -> CellDrive:
    """The same drive seen in a mirror."""
    cells = drive.cells[..., ::-1].copy()
    cells[:, 0] *= -1
    cells[:, 3] *= -1
    flip = np.array([-1, 1, 1, 1, -1, -1], np.float32)
    return CellDrive(cells, drive.motions * flip, drive.slopes * np.array([-1, 1], np.float32), drive.first * flip)


def bent(drive: CellDrive, bend: float) -> CellDrive:
    """The drive with the road's flow too large by a share of it where it is near, too small where it is far.

    Real roads and cameras do this to an otherwise exact flow: pavements are crowned, lenses not as calibrated.
    A network that has never seen it trusts the far road with its life. Frames whose road is unknown stay as they
    are: real ones, which have such errors of their own.

    Args:
        bend: relative error of the flow at half the mean distance (`solver.bend_derivative`).
    """
    rays = torch.from_numpy(drive.cells[:, :3])
    seen = torch.from_numpy(drive.cells[:, 3:5])
    R_t = se3.so3_exp(torch.from_numpy(drive.motions[:, 3:])).transpose(1, 2)
    t = torch.from_numpy(drive.motions[:, :3])
    road = road_inverse_depth(rays, torch.from_numpy(drive.slopes))
    turned = (R_t @ rays.flatten(2)).unflatten(2, rays.shape[2:])
    moved = turned - road.clamp_min(0.0)[:, None] * (R_t @ t[..., None])[..., None]
    far, near = (p[:, :2] / p[:, 2:].clamp_min(0.05) for p in (turned, moved))
    length, off = (torch.hypot(*x.unbind(1)) for x in (near - far, seen - near))  # `norm` takes ten times as long
    on_road = (road > 0.02) & (off < 0.15 * length + 0.001)
    share = bend * (road / MEAN_ROAD - 1).clamp(-1.0, 2.0)
    moved = torch.where(on_road[:, None], share[:, None] * (near - far), 0.0)
    cells = drive.cells.copy()
    cells[:, 3:5] += moved.numpy()
    return dataclasses.replace(drive, cells=cells)
