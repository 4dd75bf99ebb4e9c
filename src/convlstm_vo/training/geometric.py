"""Training what the default network does with its flow: weights, priors and covariance, from cached flow.

See `cell_drives` for what it learns from.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import time
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from convlstm_vo.environment import bfloat16_pays
from convlstm_vo.models.cells import State
from convlstm_vo.models.config import ModelConfig
from convlstm_vo.models.geometric import Cells, GeometricNet
from convlstm_vo.models.mounting import Memory
from convlstm_vo.models.network import detach_state
from convlstm_vo.models.solver import residuals
from convlstm_vo.training.cell_clips import CellClip, Clips, as_cells, whole_drives
from convlstm_vo.training.cell_drives import MEAN_ROAD, CellDrive
from convlstm_vo.training.ema import WeightAverage
from convlstm_vo.training.helpers import Helper, Message, Task
from convlstm_vo.training.stage_state import StateFile, forget_rows_after, trained_part, weights_checksum


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


def first_memory(first: Tensor) -> Tensor:
    """Packed memory (lanes, 47) of a search's result: a motion to start from, nothing known yet."""
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


def descend(
    net: GeometricNet, clip: CellClip, state: State | None, config: WeighConfig, share: float
) -> tuple[float, State | None]:
    """Add the gradient of a clip's loss, times ``share``, to that of the parameters; the loss and the new state."""
    outcome, after = follow(net, clip, state, config)
    loss = share * weigh_loss(outcome, clip, config, net.config.camera_height)
    loss.backward()
    return loss.item(), None if after is None else detach_state(after)


def lane_helper(message: Message) -> Task:
    """For a `Helper`: `descend` on lanes that are sent to it, with a network of the same weights."""
    config = WeighConfig(**message["config"])
    net = GeometricNet(ModelConfig.from_dict(message["network"]))
    net.load_state_dict(message["weights"], strict=False)  # of the flow nothing is needed
    net.flow.requires_grad_(False)
    prepare(net, message["mixed"])
    parameters = trained_parameters(net, config)

    def task(message: Message) -> Message:
        with torch.no_grad():
            for parameter, value in zip(parameters, _like(parameters, message["values"]), strict=True):
                parameter.copy_(value)
                parameter.grad = None
        loss, state = descend(net, CellClip(**message["clip"]), message["state"], config, message["share"])
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        told = [p.grad is not None for p in parameters]
        return {"loss": loss, "state": state, "gradients": _flat(gradients), "told": told}

    return task


def prepare(net: GeometricNet, mixed: bool) -> None:
    """For training, in the layout that convolutions like best."""
    net.train()
    net.mixed = mixed
    net.weigher.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def trained_parameters(net: GeometricNet, config: WeighConfig) -> list[torch.nn.Parameter]:
    """What a run changes."""
    return [p for name, p in net.named_parameters() if name.startswith("log_") or
            (config.weigh and name.startswith("weigher."))]  # fmt: skip


def _flat(values: Sequence[Tensor]) -> Tensor:
    return torch.cat([value.detach().reshape(-1) for value in values])


def _like(parameters: Sequence[Tensor], flat: Tensor) -> list[Tensor]:
    parts = flat.split([parameter.numel() for parameter in parameters])
    return [part.view(parameter.shape) for part, parameter in zip(parts, parameters, strict=True)]


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def train_weights(net: GeometricNet, drives: Sequence[CellDrive], unseen: Sequence[CellDrive], config: WeighConfig,
                  out: Path, *, processes: int = 1) -> None:  # fmt: skip
    """Train everything but the flow, in place; an interrupted run in ``out`` is continued, to the same weights.

    Args:
        unseen: drives to measure on every 500 updates and after the last; none: nothing is measured.
        processes: that share the lanes of a batch, each on one thread; with 1 all of torch's threads work in this
            one. A frame is hundreds of small steps: threads gain little there, processes nearly all. The weights
            depend on it as they do on a seed.

    Raises:
        TrainError: ``out`` holds a run of other settings, weights or drives, or a damaged state; a process that
            helped has ended.
    """
    run = WeighRun(net, drives, config, out)
    processes = min(processes, config.lanes)
    with contextlib.ExitStack() as block:
        if processes > 1 and run.step < config.steps:
            block.enter_context(_one_thread())
            run.helpers = [block.enter_context(run.helper()) for _ in range(processes - 1)]
        _train(run, unseen, out)
    net.load_state_dict(run.average.average)


def _train(run: WeighRun, unseen: Sequence[CellDrive], out: Path) -> None:
    net, config = run.net, run.config
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
        prepare(net, bfloat16_pays())
        self._parameters = trained_parameters(net, config)
        self.helpers: list[Helper] = []
        self.optimizer = torch.optim.AdamW(self._parameters, config.lr, weight_decay=1e-4)
        self.average = WeightAverage(net, 0.995)
        self.clips = Clips(drives, lanes=config.lanes, frames=config.frames, bend=config.bend, seed=config.seed)
        self.carried: list[State | None] = [None] * len(self.clips.groups)  # of each group's lanes
        self.step, self.losses = 0, list[float]()
        self._load()
        forget_rows_after(out / "weights.jsonl", step=self.step)

    def update(self) -> None:
        """One step down the gradient."""
        config, clip = self.config, next(self.clips)
        warm = min(1.0, (self.step + 1) / max(1, config.warmup))
        fall = 0.5 * (1 + math.cos(math.pi * self.step / config.steps))
        for group in self.optimizer.param_groups:
            group["lr"] = config.lr * warm * fall
        self.optimizer.zero_grad()
        loss, state = self._descend(clip)
        norm = torch.nn.utils.clip_grad_norm_(self._parameters, 1.0)
        if torch.isfinite(norm):
            self.optimizer.step()
        self.carried[clip.group] = state if math.isfinite(loss) else None
        self.average.update(self.net)
        self.losses.append(loss)
        self.step += 1

    def helper(self) -> Helper:
        """A process for `helpers`, which then get a share of the lanes each."""
        message = {
            "config": dataclasses.asdict(self.config),
            "network": self.net.config.to_dict(),
            "weights": trained_part(self.net.state_dict()),
            "mixed": self.net.mixed,
        }
        return Helper(lane_helper, message)

    def _descend(self, clip: CellClip) -> tuple[float, State | None]:
        """`descend` on all lanes, those of helpers over there."""
        count = 1 + len(self.helpers)
        clips, states = clip.split(count), _split(self.carried[clip.group], count)
        shares = [len(part.cells) / len(clip.cells) for part in clips]
        values = _flat(self._parameters) if self.helpers else None
        for helper, part, state, share in zip(self.helpers, clips[1:], states[1:], shares[1:], strict=True):
            helper.ask({"values": values, "clip": dict(vars(part)), "state": state, "share": share})
        loss, own = descend(self.net, clips[0], states[0], self.config, shares[0])
        after = [own]
        for helper in self.helpers:
            answer = helper.answer()
            loss += answer["loss"]
            after.append(answer["state"])
            gradients = _like(self._parameters, answer["gradients"])
            for parameter, gradient, told in zip(self._parameters, gradients, answer["told"], strict=True):
                if told:
                    parameter.grad = gradient.clone() if parameter.grad is None else parameter.grad.add_(gradient)
        return loss, _joined(after)

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


def _split(state: State | None, count: int) -> list[State | None]:
    if state is None:
        return [None] * count
    return list(zip(*(part.tensor_split(count) for part in state), strict=True))


def _joined(states: Sequence[State | None]) -> State | None:
    whole = [state for state in states if state is not None]
    if len(whole) < len(states):
        return None
    return whole[0] if len(whole) == 1 else tuple(torch.cat(parts) for parts in zip(*whole, strict=True))


@torch.no_grad()
def measure(net: GeometricNet, drives: Sequence[CellDrive], config: WeighConfig) -> dict[str, float]:
    """Median errors on whole drives: of the motion, the scale, the tilt; calibration of the covariance.

    What cannot be measured is not a number: the tilt on unknown roads, shift and scale where nothing moves.
    """
    net.eval()
    shifts, turns, tilts, scales, scaled, weighs = [], [], [], [], [], []
    for clip in whole_drives(drives, config.lanes):
        outcome, _ = follow(net, clip, None, config)
        error = outcome.motions - clip.motions
        turns.append(error[..., 3:].norm(dim=2).rad2deg().flatten())
        tilt = (outcome.slopes - clip.slopes)[..., 1].rad2deg()
        tilts.append(tilt[torch.isfinite(tilt)])
        error_m = torch.cat([error[..., :3] * net.config.camera_height, error[..., 3:]], 2)
        factor = torch.linalg.cholesky_ex(outcome.covariances + 1e-12 * torch.eye(6))[0]
        scaled.append(
            torch.linalg.solve_triangular(factor, error_m[..., None], upper=False).square().mean((2, 3)).flatten()
        )
        way, found = clip.motions[..., :3].norm(dim=2), outcome.motions[..., :3].norm(dim=2)
        moving = way > 0.1
        shifts.append((error[..., :3].norm(dim=2) / way)[moving])
        scales.append((found * moving).sum(1) / (way * moving).sum(1).clamp_min(1e-6))
        weighs.append(moving.any(1))
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
