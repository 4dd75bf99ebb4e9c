"""Training what the default network does with its flow: weights, priors and covariance, from cached flow.

See `cell_drives` for what it learns from.
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from convlstm_vo.environment import bfloat16_pays
from convlstm_vo.models.cells import State
from convlstm_vo.models.geometric import Cells, GeometricNet
from convlstm_vo.models.mounting import Memory
from convlstm_vo.models.network import detach_state
from convlstm_vo.models.solver import residuals
from convlstm_vo.training.cell_drives import MEAN_ROAD, CellDrive, bent, mirrored
from convlstm_vo.training.ema import WeightAverage
from convlstm_vo.training.weigh_state import StateFile, forget_rows_after, trained_part, weights_checksum


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
    cell_loss: float = 0.1
    """Weight of the likelihood of each cell's own misfit with the true motion and road."""
    weigh: bool = True
    """False: geometry alone; only its standard deviations are learned."""
    save_steps: int = 25
    """Updates between writes of the state from which an interrupted run goes on (20 ms each)."""


# --- clips --------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class CellClip:
    """Frames of several drives: cells (lanes, frames, 7, rows, columns) and truth; ``fresh`` where one begins.

    ``bend`` (lanes,) is what they were `bent` by, None: not at all. ``group`` is the number of the lanes that it
    belongs to, of which each group has a state of its own.
    """

    cells: Tensor
    motions: Tensor
    slopes: Tensor
    first: Tensor
    fresh: Tensor
    bend: Tensor | None = None
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
        bend = torch.tensor([lane.source[2] for lane in lanes])
        return CellClip(cells, motions, slopes, torch.from_numpy(first), torch.tensor(fresh), bend, group)

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
    """Packed memory (lanes, 46) of a search's result: a motion to start from, nothing known yet."""
    memory = Memory.unpack(first.new_zeros((len(first), Memory.SIZE)))
    return dataclasses.replace(memory, motion=first).pack()


# --- learning -----------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Outcome:
    """What the network said about a clip: (lanes, frames, ...).

    ``misfit`` is `cell_misfit` of the clip, where gradients are wanted; else 0.
    """

    motions: Tensor
    covariances: Tensor
    slopes: Tensor
    misfit: Tensor


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
    motions, covariances, slopes, memories, trusts = [], [], [], [], []
    for t in range(clip.cells.shape[1]):
        memory = Memory.unpack(packed)
        if config.memory == "none":
            memory = dataclasses.replace(Memory.unpack(torch.zeros_like(packed)), motion=memory.motion)
        if config.memory != "carried":
            hidden = None
        cells = as_cells(clip.cells[:, t])
        estimate, new = net.conclude(cells, memory, hidden)
        memories.append(memory.pack())
        trusts.append(estimate.trust)
        hidden, packed = new[:-1], new[-1]
        motions.append(estimate.solution.motion)
        covariances.append(estimate.covariance)
        slopes.append(estimate.solution.slopes)
    misfit = packed.new_zeros(())
    if torch.is_grad_enabled() and config.cell_loss and config.weigh:
        cells, memory = as_cells(clip.cells.flatten(0, 1)), Memory.unpack(torch.stack(memories, 1).flatten(0, 1))
        weights = net.trusted_weights(cells, memory, torch.stack(trusts, 1).flatten(0, 1))
        bend = None if clip.bend is None else clip.bend.repeat_interleave(len(trusts))
        misfit = cell_misfit(
            cells, weights, clip.motions.flatten(0, 1), clip.slopes.flatten(0, 1), bend, frames=len(trusts)
        )
    outcome = Outcome(torch.stack(motions, 1), torch.stack(covariances, 1), torch.stack(slopes, 1), misfit)
    return outcome, (*(hidden or ()), packed)


def cell_misfit(
    cells: Cells,
    weights: tuple[Tensor, Tensor],
    motions: Tensor,
    slopes: Tensor,
    bend: Tensor | None,
    *,
    frames: int = 1,
) -> Tensor:
    """Negative log likelihood of what cells measured, given true motion and road: what each one is worth.

    That a pavement beside the road is too high is seen from its own misfit in every frame; from the motion that
    comes out alone it would have to be learned drive by drive.

    Args:
        weights: inverse variances across and along, (lanes, cells). motions, slopes: (lanes, 6), (lanes, 2), true.
        bend: (lanes,) of the road's flow (`bent`), for which no cell is to blame.
        frames: so many neighbouring lanes are frames of one; each frame counts the same, whatever it shows.
    """
    across, along = weights
    known = torch.isfinite(slopes).all(1)
    with torch.no_grad():
        r = residuals(cells.rays.flatten(2), cells.seen.flatten(2), motions, slopes.nan_to_num())
        inside = cells.sigma.flatten(1) < 1.0
        road = r.road.clamp_min(0.0)
        misfit = r.along
        if bend is not None:
            misfit = misfit + bend[:, None] * r.parallax * road * (road / MEAN_ROAD - 1).clamp(-1.0, 2.0)
        moving = known & (motions[:, :3].norm(dim=1) > 0.03)
        ahead = inside & (road > 0.06) & (cells.rays[:, 0].flatten(1).abs() < 1.5 * road) & moving[:, None]
    loss = cells.sigma.new_zeros(())
    for weight, off, counts in ((across, r.across, inside), (along, misfit, ahead)):
        own = (
            2.5 * torch.log1p(off.square() * weight / 4) - 0.5 * weight.clamp_min(1e-6).log()
        )  # Student, 4 degrees
        of_frames = [x.unflatten(0, (-1, frames)).sum((0, 2)) for x in (own * counts, counts)]
        loss = loss + (of_frames[0] / of_frames[1].clamp_min(1)).mean()
    return loss


def weigh_loss(outcome: Outcome, clip: CellClip, config: WeighConfig, camera_height: float) -> Tensor:
    """Errors of motions over one, four and eight frames, of the road where it is known, the covariance's
    likelihood, and that of the cells."""
    loss = config.cell_loss * outcome.misfit + motion_error(outcome.motions, clip.motions)
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
        unseen: drives to measure on every 500 updates and after the last; none: nothing is measured.

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
            if (run.step % 500 == 0 or run.step == config.steps) and unseen:
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
        net.mixed = bfloat16_pays()
        net.weigher.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
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
        loss = weigh_loss(outcome, clip, config, self.net.config.camera_height)
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
