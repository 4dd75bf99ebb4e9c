"""Training what the default network does with its flow: weights, priors and covariance, from cached flow.

The flow of every pair is measured once, predicted as the odometer would predict it: from the motion before. What is
learned afterwards sees 1920 cells a frame and no image, which makes hundreds of frames a second on a CPU.
"""

from __future__ import annotations

import dataclasses
import json
import math
import multiprocessing
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from convlstm_vo.geometry import se3
from convlstm_vo.geometry.files import replacing
from convlstm_vo.models.cells import State
from convlstm_vo.models.flow import FlowNet
from convlstm_vo.models.geometric import Cells, GeometricNet, Memory, choose_cells
from convlstm_vo.models.network import detach_state
from convlstm_vo.models.scene import canyon_inverse_depth, cell_rays, flow_of, road_inverse_depth, road_slopes
from convlstm_vo.training.ema import WeightAverage
from convlstm_vo.training.flow import change_light
from convlstm_vo.training.rendered import RenderedDrive, open_drive
from convlstm_vo.training.weigh_state import StateFile, forget_rows_after, trained_part, weights_checksum

_MEAN_ROAD = 0.19  # inverse depth of the road on average, as the solver weighs it


@dataclasses.dataclass(frozen=True)
class WeighConfig:
    """How the weights are trained."""

    steps: int = 2500
    """Updates."""
    lanes: int = 8
    """Drives side by side in a batch."""
    frames: int = 8
    """Frames through which gradients reach back; the state is carried on to the end of a drive."""
    lr: float = 2e-3
    """Peak learning rate of AdamW; it falls to zero along a cosine."""
    warmup: int = 100
    """Updates over which the learning rate rises from zero."""
    seed: int = 0
    memory: str = "carried"
    """carried; hidden-reset: the ConvLSTM forgets at each frame; none: the priors forget too."""
    bend: float = 0.03
    """Standard deviation of the systematic error of the road's flow (`bent`) that drives are given."""
    weigh: bool = True
    """False: geometry alone; only its standard deviations are learned."""
    save_steps: int = 25
    """Updates between writes of the state from which an interrupted run goes on (20 ms each)."""


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


# --- cached flow --------------------------------------------------------------------------------------------------


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
def cells_of(net: FlowNet, drive: RenderedDrive, seed: int, *, plain: bool = False) -> CellDrive:
    """Measure the flow of a drive; as it is, or with dropped, spoilt and dimmed frames."""
    rng = np.random.Generator(np.random.PCG64([seed, int(drive.name)]))
    frames = list(range(len(drive))) if plain else pick_frames(len(drive), rng)
    images = [drive.images[i] for i in frames]
    if not plain:
        images = [spoil(image, rng) if rng.random() < 0.04 else image for image in images]
    intrinsics = torch.tensor(drive.intrinsics[None], dtype=torch.float32)
    rays = cell_rays(intrinsics, images[0].shape[0] // 4, images[0].shape[1] // 4)
    motions, slopes, rows = [], [], []
    first: NDArray[np.float32] | None = None
    for k in range(len(frames) - 1):
        T = se3.relative(drive.T_world_camera[frames[k]], drive.T_world_camera[frames[k + 1]])
        T[:3, 3] /= drive.height_m
        motions.append(se3.motion_from_matrix(T).astype(np.float32))
        slopes.append(
            road_slopes(torch.tensor(drive.road_plane[frames[k], None, :3])).numpy()[0].astype(np.float32)
        )
        guess = predicted_motion(motions, rng)
        first = guess if first is None else first
        noise = 0.015 if k == 0 or rng.random() < 0.1 else 0.003
        tilted = torch.from_numpy(slopes[-1] + rng.normal(0, noise, 2).astype(np.float32))[None]
        motion = torch.from_numpy(guess)[None]
        predicted = flow_of(rays, canyon_inverse_depth(rays, tilted), motion, intrinsics).clamp(-1000, 1000)
        pair = (images[k], images[k + 1]) if plain else change_light(images[k], images[k + 1], rng)
        prev, curr = (torch.from_numpy(np.array(image, np.float32))[None, None] for image in pair)
        with torch.autocast("cpu", torch.bfloat16):
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
    workers: int = 1,
    advance: Callable[[int], None] = lambda count: None,
) -> list[CellDrive]:
    """`cells_of` all drives, in parallel, from files where an earlier run has left them."""
    jobs = [(net, drive.folder or drive, folder, seed, plain) for drive in drives]
    if workers > 1:
        with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
            for done in as_completed([pool.submit(_cache_one, *job) for job in jobs]):
                done.result()
                advance(1)
    out = []
    for job in jobs:
        out.append(_cache_one(*job))  # what other processes have made is read
        advance(int(workers == 1))
    return out


def _cache_one(net: FlowNet, drive: Path | RenderedDrive, folder: Path, seed: int, plain: bool) -> CellDrive:
    """The cells of one drive (another process is only told where it lies), measured on one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return cached(
            folder / f"{drive.name}.npz",
            lambda: cells_of(net, open_drive(drive) if isinstance(drive, Path) else drive, seed, plain=plain),
        )
    finally:
        torch.set_num_threads(before)


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
    length = (near - far).norm(dim=1)
    on_road = (road > 0.02) & ((seen - near).norm(dim=1) < 0.15 * length + 0.001)
    share = bend * (road / _MEAN_ROAD - 1).clamp(-1.0, 2.0)
    moved = torch.where(on_road[:, None], share[:, None] * (near - far), 0.0)
    cells = drive.cells.copy()
    cells[:, 3:5] += moved.numpy()
    return dataclasses.replace(drive, cells=cells)


# --- clips --------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class CellClip:
    """Frames of several drives: cells (lanes, frames, 7, rows, columns) and truth; ``fresh`` where one begins.

    ``group`` is the number of the lanes that it belongs to, of which each group has a state of its own.
    """

    cells: Tensor
    motions: Tensor
    slopes: Tensor
    first: Tensor
    fresh: Tensor
    group: int = 0


@dataclasses.dataclass
class Lane:
    """A walk through a drive: as it is shown, the next frame, and what made it (number, mirrored, bend)."""

    drive: CellDrive
    at: int
    source: tuple[int, bool, float]


class Clips:
    """Endless clips; each lane walks through a drive from a random start, then through another one.

    Lanes of a batch have one size of grid. Drives of other sizes are groups with lanes of their own; each clip
    belongs to one group, to larger ones more often.

    Args:
        drives: of at least ``config.frames`` frames each.
    """

    def __init__(self, drives: Sequence[CellDrive], config: WeighConfig) -> None:
        self._drives, self._config = drives, config
        self._rng = np.random.Generator(np.random.PCG64([config.seed, 5]))
        sizes = [drive.cells.shape[2:] for drive in drives]
        self.groups = [[i for i, own in enumerate(sizes) if own == size] for size in dict.fromkeys(sizes)]
        self._lanes: list[list[Lane]] = [[] for _ in self.groups]

    def __iter__(self) -> Iterator[CellClip]:
        return self

    def __next__(self) -> CellClip:
        frames, group = self._config.frames, self._pick_group()
        lanes, fresh = self._lanes[group], []
        for number in range(self._config.lanes):
            new = len(lanes) <= number or lanes[number].at + frames > len(lanes[number].drive)
            if new:
                lanes[number : number + 1] = [self._begin(self.groups[group])]
            fresh.append(new)
        first = np.stack([lane.drive.motions[lane.at - 1] if lane.at else lane.drive.first for lane in lanes])
        cells, motions, slopes = (
            torch.from_numpy(np.stack([getattr(lane.drive, name)[lane.at : lane.at + frames] for lane in lanes]))
            for name in ("cells", "motions", "slopes")
        )
        for lane in lanes:
            lane.at += frames
        return CellClip(cells, motions, slopes, torch.from_numpy(first), torch.tensor(fresh), group)

    def state_dict(self) -> dict[str, Any]:
        """Where it stands, in plain values."""
        lanes = [[(*lane.source, lane.at) for lane in lanes] for lanes in self._lanes]
        return {"rng": self._rng.bit_generator.state, "lanes": lanes}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where another one stood, over the same drives."""
        self._rng.bit_generator.state = state["rng"]
        self._lanes = [
            [Lane(self._shown(*source), at, source) for *source, at in lanes] for lanes in state["lanes"]
        ]

    def _pick_group(self) -> int:
        if len(self.groups) == 1:
            return 0
        frames = np.array([sum(len(self._drives[i]) for i in group) for group in self.groups], float)
        return int(self._rng.choice(len(self.groups), p=frames / frames.sum()))

    def _begin(self, group: list[int]) -> Lane:
        number = group[int(self._rng.integers(len(group)))]
        start = int(self._rng.integers(0, max(1, len(self._drives[number]) - 3 * self._config.frames)))
        mirror = bool(self._rng.random() < 0.5)
        bend = float(self._rng.normal(0, self._config.bend)) if self._rng.random() < 0.7 else 0.0
        return Lane(self._shown(number, mirror, bend), start, (number, mirror, bend))

    def _shown(self, number: int, mirror: bool, bend: float) -> CellDrive:
        drive = mirrored(self._drives[number]) if mirror else self._drives[number]
        return bent(drive, bend) if bend else drive


def as_cells(values: Tensor) -> Cells:
    """Cells of one frame of each lane, from (lanes, 7, rows, columns)."""
    return Cells(values[:, :3], values[:, 3:5], values[:, 5], values[:, 6])


def first_memory(first: Tensor) -> Tensor:
    """Packed memory (lanes, 24) of a search's result: a motion to start from, nothing known yet."""
    memory = Memory.unpack(first.new_zeros((len(first), Memory.SIZE)))
    return dataclasses.replace(memory, motion=first).pack()


# --- learning -----------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Outcome:
    """What the network said about a clip: (lanes, frames, ...)."""

    motions: Tensor
    covariances: Tensor
    slopes: Tensor


def follow(
    net: GeometricNet, clip: CellClip, state: State | None, config: WeighConfig
) -> tuple[Outcome, State | None]:
    """Through a clip, in camera heights, the state carried as configured."""
    packed = first_memory(clip.first)
    hidden: State | None = None
    if state is not None:
        keep = ~clip.fresh
        packed = torch.where(keep[:, None], state[-1], packed)
        hidden = tuple(part * keep.reshape(-1, *[1] * (part.dim() - 1)) for part in state[:-1])
    motions, covariances, slopes = [], [], []
    for t in range(clip.cells.shape[1]):
        memory = Memory.unpack(packed)
        if config.memory == "none":
            memory = dataclasses.replace(Memory.unpack(torch.zeros_like(packed)), motion=memory.motion)
        if config.memory != "carried":
            hidden = None
        estimate, new = net.conclude(as_cells(clip.cells[:, t]), memory, hidden)
        hidden, packed = new[:-1], new[-1]
        motions.append(estimate.solution.motion)
        covariances.append(estimate.covariance)
        slopes.append(estimate.solution.slopes)
    outcome = Outcome(torch.stack(motions, 1), torch.stack(covariances, 1), torch.stack(slopes, 1))
    return outcome, (*(hidden or ()), packed)


def weigh_loss(outcome: Outcome, clip: CellClip, camera_height: float) -> Tensor:
    """Errors of motions over one, four and eight frames, of the road where it is known, and the covariance's
    likelihood."""
    loss = motion_error(outcome.motions, clip.motions)
    for steps in (4, 8):
        if steps <= clip.motions.shape[1]:
            loss = loss + motion_error(
                _composed(outcome.motions, steps), _composed(clip.motions, steps)
            ) / math.sqrt(steps)
    known = torch.isfinite(clip.slopes).all(-1)
    if bool(known.any()):
        slopes = ((outcome.slopes[known] - clip.slopes[known]) / 0.003).square().sum(-1)
        loss = loss + 0.2 * torch.log1p(slopes).sum() / known.numel()
    error = (outcome.motions - clip.motions).detach()
    error = torch.cat([error[..., :3] * camera_height, error[..., 3:]], -1)
    return loss + 0.1 * likelihood(error, outcome.covariances)


def motion_error(found: Tensor, true: Tensor) -> Tensor:
    """In units of what is good: half a percent of the way, 0.02 degrees; logarithmic far above."""
    shift = (found[..., :3] - true[..., :3]).square().sum(-1) / (
        0.005 * (0.3 + true[..., :3].norm(dim=-1))
    ).square()
    turn = (found[..., 3:] - true[..., 3:]).square().sum(-1) / 0.00035**2
    return (torch.log1p(shift / 4) + torch.log1p(turn / 4)).mean()


def likelihood(error: Tensor, covariance: Tensor) -> Tensor:
    """Negative logarithm of Student's t likelihood (5 degrees of freedom) of errors (..., 6), up to a constant."""
    factor = torch.linalg.cholesky_ex(covariance + 1e-12 * torch.eye(6))[0]
    scaled = torch.linalg.solve_triangular(factor, error[..., None], upper=False)[..., 0]
    log_det = factor.diagonal(dim1=-2, dim2=-1).clamp_min(1e-12).log().sum(-1)
    return (5.5 * torch.log1p(scaled.square().sum(-1) / 5) + log_det).mean()


def _composed(motions: Tensor, steps: int) -> Tensor:
    from convlstm_vo.training.losses import compose_motions

    return compose_motions(motions, steps)


def train_weights(net: GeometricNet, drives: Sequence[CellDrive], unseen: Sequence[CellDrive], config: WeighConfig,
                  out: Path) -> None:  # fmt: skip
    """Train everything but the flow, in place; an interrupted run in ``out`` is continued, to the same weights.

    Args:
        unseen: drives to measure on every 500 updates; none: nothing is measured.

    Raises:
        TrainError: ``out`` holds a run of other settings, weights or drives, or a damaged state.
    """
    run = WeighRun(net, drives, config, out)
    began, start = time.perf_counter(), run.step
    while run.step < config.steps:
        run.update()
        if run.step % 50 == 0:
            seconds = time.perf_counter() - began
            frames = (run.step - start) * config.lanes * config.frames
            row = {"step": run.step, "loss": sum(run.losses) / len(run.losses), "seconds": seconds,
                   "frames_per_s": frames / seconds}  # fmt: skip
            run.losses.clear()
            if run.step % 500 == 0 and unseen:
                with run.average.applied_to(net):
                    row |= {k: v for k, v in measure(net, unseen, config).items() if math.isfinite(v)}
            with (out / "weights.jsonl").open("a") as log:
                log.write(json.dumps(row) + "\n")
            print(row, flush=True)
        if run.step % config.save_steps == 0 or run.step == config.steps:
            run.save()
    net.load_state_dict(run.average.average)


def run_settings(net: GeometricNet, drives: Sequence[CellDrive], config: WeighConfig) -> dict[str, Any]:
    """All that a run's weights follow from: options, the network and its first weights, the truth to learn."""
    truth = 0
    for drive in drives:
        truth = zlib.crc32(f"{drive.cells.shape}".encode() + drive.motions.tobytes(), truth)
    options = dataclasses.asdict(config) | net.config.to_dict()
    del options["save_steps"]
    return options | {"first weights": weights_checksum(net.state_dict()), "drives": truth}


class WeighRun:
    """A run of `train_weights`: all that changes from one update to the next, and its file ``out/weights-last.pt``.

    Raises:
        TrainError: see `train_weights`.
    """

    def __init__(self, net: GeometricNet, drives: Sequence[CellDrive], config: WeighConfig, out: Path) -> None:
        self.net, self.config = net, config
        self._file = StateFile(out / "weights-last.pt", run_settings(net, drives, config))
        torch.manual_seed(config.seed)
        net.train()
        net.mixed = True
        self._parameters = [p for name, p in net.named_parameters() if name.startswith("log_") or
                            (config.weigh and name.startswith("weigher."))]  # fmt: skip
        self.optimizer = torch.optim.AdamW(self._parameters, config.lr, weight_decay=1e-4)
        self.average, self.clips = WeightAverage(net, 0.995), Clips(drives, config)
        self.carried: list[State | None] = [None] * len(self.clips.groups)  # of each group's lanes
        self.step, self.losses = 0, list[float]()
        self._load()
        forget_rows_after(out / "weights.jsonl", self.step)

    def update(self) -> None:
        """One step down the gradient."""
        config, clip = self.config, next(self.clips)
        warm = min(1.0, (self.step + 1) / max(1, config.warmup))
        fall = 0.5 * (1 + math.cos(math.pi * self.step / config.steps))
        for group in self.optimizer.param_groups:
            group["lr"] = config.lr * warm * fall
        outcome, state = follow(self.net, clip, self.carried[clip.group], config)
        loss = weigh_loss(outcome, clip, self.net.config.camera_height)
        self.optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self._parameters, 1.0)
        if torch.isfinite(norm):
            self.optimizer.step()
        whole = state is not None and bool(torch.isfinite(loss))
        self.carried[clip.group] = detach_state(state) if state is not None and whole else None
        self.average.update(self.net)
        self.losses.append(loss.item())
        self.step += 1

    def save(self) -> None:
        """Write all of it aside, and rename."""
        average = self.average.state_dict()
        self._file.write({
            "step": self.step,
            "losses": self.losses,
            "net": trained_part(self.net.state_dict()),
            "average": average | {"average": trained_part(average["average"])},
            "optimizer": self.optimizer.state_dict(),
            "clips": self.clips.state_dict(),
            "carried": self.carried,
            "rng": torch.get_rng_state(),  # of cells that drop out
        })  # fmt: skip

    def _load(self) -> None:
        saved = self._file.read()
        if saved is None:
            return
        self.step, self.losses, self.carried = saved["step"], saved["losses"], saved["carried"]
        whole = self.net.state_dict()
        self.net.load_state_dict(whole | saved["net"])
        saved["average"]["average"] = self.average.average | saved["average"]["average"]
        self.average.load_state_dict(saved["average"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.clips.load_state_dict(saved["clips"])
        torch.set_rng_state(saved["rng"])


@torch.no_grad()
def measure(net: GeometricNet, drives: Sequence[CellDrive], config: WeighConfig) -> dict[str, float]:
    """Median errors on whole drives: of the motion, the scale, the tilt; calibration of the covariance.

    What cannot be measured is not a number: the tilt on unknown roads, shift and scale where nothing moves.
    """
    net.eval()
    shifts, turns, tilts, scales, scaled, weighs = [], [], [], [], [], []
    for drive in drives:
        values = [torch.from_numpy(v)[None] for v in (drive.cells, drive.motions, drive.slopes, drive.first)]
        clip = CellClip(values[0], values[1], values[2], values[3], torch.tensor([True]))
        outcome, _ = follow(net, clip, None, config)
        found, true = outcome.motions[0], clip.motions[0]
        moving = true[:, :3].norm(dim=1) > 0.1
        shifts.append(((found - true)[:, :3].norm(dim=1) / true[:, :3].norm(dim=1))[moving])
        scales.append(
            (found[moving, :3].norm(dim=1).sum() / true[moving, :3].norm(dim=1).sum().clamp_min(1e-6))[None]
        )
        turns.append((found - true)[:, 3:].norm(dim=1).rad2deg())
        tilt = (outcome.slopes[0] - clip.slopes[0])[:, 1].rad2deg()
        tilts.append(tilt[torch.isfinite(clip.slopes[0, :, 1])])
        error = torch.cat([(found - true)[:, :3] * net.config.camera_height, (found - true)[:, 3:]], 1)
        factor = torch.linalg.cholesky_ex(outcome.covariances[0] + 1e-12 * torch.eye(6))[0]
        scaled.append(torch.linalg.solve_triangular(factor, error[..., None], upper=False).square().mean((1, 2)))
        weighs.append(moving.any()[None])
    net.train()
    bias = torch.cat(scales)[torch.cat(weighs)] - 1
    return {
        "shift_percent": 100 * torch.cat(shifts).median().item(),
        "shift_mean_percent": 100 * torch.cat(shifts).mean().item(),
        "turn_deg": torch.cat(turns).median().item(),
        "turn_mean_deg": torch.cat(turns).mean().item(),
        "tilt_bias_deg": torch.cat(tilts).mean().item(),
        "tilt_deg": torch.cat(tilts).abs().median().item(),
        "scale_bias_percent": 100 * bias.mean().item(),
        "scale_spread_percent": 100 * bias.std().item() if len(bias) > 1 else math.nan,
        "chi": torch.cat(scaled).median().item(),
    }
