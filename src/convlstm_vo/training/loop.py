"""The training loop: clips in, weights out; the state of a run is in `TrainingState` and nowhere else."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor

from convlstm_vo.models.checkpoint import CheckpointError, load_weights, save_checkpoint
from convlstm_vo.models.encoders import load_flownet_weights
from convlstm_vo.models.network import OdometryNet, State, detach_state, reset_state
from convlstm_vo.training.cache import DecodedSequence
from convlstm_vo.training.clips import Batch, Clip, EpochPlan, augment_photometric, collate, sequential_clips
from convlstm_vo.training.config import TrainConfig, TrainError
from convlstm_vo.training.ema import WeightAverage
from convlstm_vo.training.log import TrainingLog
from convlstm_vo.training.losses import motion_loss

STATE_FILE = "training_state.pt"


@dataclasses.dataclass
class Progress:
    """Where a run stands."""

    epoch: int = 0
    step: int = 0  # within the epoch
    updates: int = 0
    best_loss: float = math.inf
    epochs_since_best: int = 0


@dataclasses.dataclass(frozen=True)
class Validation:
    """Errors of single motions on the validation sequences, with the state carried from their first frame."""

    loss: float
    translation_percent: float
    """Summed length of the translation errors, in percent of the path."""
    rotation_deg: float
    """Root mean square of the rotation errors, degrees a frame."""


def train(
    config: TrainConfig, sequences: list[DecodedSequence], validation: list[DecodedSequence], log: TrainingLog
) -> Path:
    """Train a network and return the folder of its best checkpoint (the last one without validation).

    Raises:
        TrainError: an unusable configuration, or a loss that is not a number.
        KeyboardInterrupt: after a usable checkpoint `last` has been written.
    """
    trainer = Trainer(config, sequences, validation, log)
    if config.resume:
        trainer.resume()
    try:
        trainer.run()
    except KeyboardInterrupt:
        trainer.save("last")
        log.message(f"Interrupted: saved {trainer.checkpoint('last')}; go on with --resume")
        raise
    return trainer.checkpoint("best" if validation else "last")


def make_accelerator(config: TrainConfig) -> Accelerator:
    """The device, precision and processes of a run (accelerate), or a clear error where the device lacks fp16."""
    precision = resolve_precision(config)
    AcceleratorState._reset_state()  # it is a singleton, and would refuse a second run with another precision
    try:
        return Accelerator(
            cpu=config.device == "cpu",
            mixed_precision="no" if precision == "fp32" else precision,
            gradient_accumulation_steps=config.accumulate,
        )
    except ValueError as error:
        raise TrainError(
            f"--precision {config.precision} cannot run on this device ({error}); use bf16 or fp32"
        ) from None


def resolve_precision(config: TrainConfig) -> str:
    """fp32, bf16 or fp16; `auto` asks the device."""
    if config.precision != "auto":
        return config.precision
    if config.device == "auto" and torch.cuda.is_available():
        return "bf16" if torch.cuda.is_bf16_supported() else "fp16"
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return "bf16" if capabilities.get("amx_bf16") or capabilities.get("avx512_bf16") else "fp32"


def learning_rate(update: int, total: int, config: TrainConfig) -> float:
    """The rate of one update: a linear rise, then constant or along a cosine to zero."""
    warm = min(1.0, (update + 1) / config.warmup_steps) if config.warmup_steps else 1.0
    if config.schedule == "constant":
        return config.lr * warm
    done = max(0, update - config.warmup_steps) / max(1, total - config.warmup_steps)
    return config.lr * warm * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


class Trainer:
    """One training run. Methods stand in the order in which they are first called."""

    def __init__(
        self,
        config: TrainConfig,
        sequences: list[DecodedSequence],
        validation: list[DecodedSequence],
        log: TrainingLog,
    ) -> None:
        self.config, self.sequences, self.validation, self.log = config, sequences, validation, log
        self.accelerator = make_accelerator(config)
        self.plan = EpochPlan(
            tuple(len(sequence) for sequence in sequences),
            config.time_steps,
            config.batch_size,
            config.carry_clips,
            config.augment,
            config.seed,
        )
        self.lanes = self._own_lanes()
        self.net = self._build_network()
        self.ema = WeightAverage(self.net, config.ema) if config.ema else None
        optimizer = torch.optim.AdamW(self.net.parameters(), config.lr, weight_decay=config.weight_decay)
        self.model, self.optimizer = self.accelerator.prepare(self.net, optimizer)
        self.progress = Progress()
        self.state: State | None = None

    def _own_lanes(self) -> slice:
        """The lanes of this process: its clips follow each other, so its recurrent states stay right."""
        processes, rank = self.accelerator.num_processes, self.accelerator.process_index
        if self.config.batch_size % processes:
            raise TrainError(
                f"--batch-size {self.config.batch_size}: must be a multiple of the {processes} processes"
            )
        return slice(rank, None, processes)

    def _build_network(self) -> OdometryNet:
        torch.manual_seed(self.config.seed)  # initial weights and dropout
        net = OdometryNet(self.config.model)
        # The layout that bf16 convolutions on CPUs and GPUs want; torch's own signature of `to` lacks it.
        net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        if self.config.flownet is not None:
            load_flownet_weights(net.encoder, self.config.flownet)
        if self.config.init is not None:
            load_weights(net, self.config.init)
        return net

    @property
    def total_updates(self) -> int:
        return self.config.epochs * self.plan.steps // self.config.accumulate

    def checkpoint(self, name: str) -> Path:
        return self.config.out / "checkpoints" / name

    def run(self) -> None:
        """All epochs, from wherever the run stands."""
        with self.log.started(self):
            while self.progress.epoch < self.config.epochs and not self._should_stop():
                self.run_epoch()
                self.finish_epoch()

    def _should_stop(self) -> bool:
        stop = bool(self.config.patience) and self.progress.epochs_since_best >= self.config.patience
        if stop:
            self.log.message(f"Stopped early: no better validation loss for {self.config.patience} epochs")
        return stop

    def run_epoch(self) -> None:
        """The remaining steps of the current epoch."""
        self.model.train()
        for batch in prefetch(self._batches()):
            started = time.perf_counter()
            loss = self.train_step(batch)
            self.progress.step += 1
            self.log.step(self, loss, batch, time.perf_counter() - started)
            if self.progress.step % self.config.save_steps == 0:
                self.save("last")

    def _batches(self) -> Iterator[Batch]:
        for step, clips in enumerate(self.plan(self.progress.epoch)):
            if step >= self.progress.step:
                yield collate(self.sequences, clips[self.lanes])

    def train_step(self, batch: Batch) -> float:
        """One step on one batch: the state goes on from the step before, its gradient does not."""
        batch = batch.to(self.accelerator.device)
        generator = torch.Generator().manual_seed(self._step_seed())
        images = augment_photometric(batch.images, self.config.augment, generator)
        state = None if self.state is None else reset_state(self.state, batch.fresh)
        with self.accelerator.accumulate(self.model):
            with self.accelerator.autocast():
                motions, state = self.model(images, batch.intrinsics, state)
            loss = motion_loss(motions, batch.motions, self.config.loss)
            value = self._finite(loss, batch)
            self.accelerator.backward(loss)
            if self.accelerator.sync_gradients:
                self._update()
            self.optimizer.step()
            self.optimizer.zero_grad()
        self.state = detach_state(state)
        if self.accelerator.sync_gradients and self.ema is not None:
            self.ema.update(self.net)
        return value

    def _step_seed(self) -> int:
        position = self.progress.epoch * self.plan.steps + self.progress.step
        return (self.config.seed * 1_000_003 + position) * 1009 + self.accelerator.process_index

    def _finite(self, loss: Tensor, batch: Batch) -> float:
        value = loss.item()
        if not math.isfinite(value):
            shown = "; ".join(self._describe(clip) for clip in batch.clips[:4])
            last = self.checkpoint("last")
            raise TrainError(
                f"the loss is {value} in epoch {self.progress.epoch}, step {self.progress.step} ({shown}, …); "
                f"lower --lr or --clip-gradient; the last good checkpoint is {last if last.exists() else 'none'}"
            )
        return value

    def _describe(self, clip: Clip) -> str:
        return f"sequence {self.sequences[clip.sequence].name} frames {clip.frames[0]} to {clip.frames[-1]}"

    def _update(self) -> None:
        if self.config.clip_gradient:
            self.accelerator.clip_grad_norm_(self.model.parameters(), self.config.clip_gradient)
        rate = learning_rate(self.progress.updates, self.total_updates, self.config)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.progress.updates += 1

    def finish_epoch(self) -> None:
        """Validate, save, and move on to the next epoch."""
        self.progress.epoch, self.progress.step = self.progress.epoch + 1, 0
        self.state = None
        if self.validation:
            result = self.validate()
            better = result.loss < self.progress.best_loss
            self.progress.epochs_since_best = 0 if better else self.progress.epochs_since_best + 1
            self.progress.best_loss = min(self.progress.best_loss, result.loss)
            self.log.validated(self, result, better)
            if better:
                self.save("best")
        self.save("last")
        if self.config.keep_epochs and self.progress.epoch % self.config.keep_epochs == 0:
            self.save(f"epoch-{self.progress.epoch:04d}")

    @torch.no_grad()
    def validate(self) -> Validation:
        """Stream through the validation sequences with the weights that would be saved."""
        self.net.eval()
        losses, t_error, t_length, r_error, count = 0.0, 0.0, 0.0, 0.0, 0
        with self._averaged_weights():
            for predicted, target in self._stream_validation():
                losses += motion_loss(predicted, target, self.config.loss).item() * len(target)
                error = (predicted - target).double()
                t_error += error[:, :3].norm(dim=-1).sum().item()
                t_length += target[:, :3].norm(dim=-1).sum().item()
                r_error += error[:, 3:].square().sum().item()
                count += len(target)
        return Validation(losses / count, 100 * t_error / t_length, math.degrees(math.sqrt(r_error / count)))

    def _stream_validation(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Predicted and true motions, (time, 6) each, clip by clip."""
        for sequence in self.validation:
            state: State | None = None
            for clip in sequential_clips(len(sequence), max(8, self.config.time_steps)):
                batch = collate([sequence], (clip,)).to(self.accelerator.device)
                with self.accelerator.autocast():
                    motions, state = self.net(batch.images, batch.intrinsics, state)
                yield motions[0].float(), batch.motions[0]

    def _averaged_weights(self) -> contextlib.AbstractContextManager[None]:
        return self.ema.applied_to(self.net) if self.ema is not None else contextlib.nullcontext()

    def save(self, name: str) -> None:
        """Write a checkpoint: the weights to use, and all that `resume` needs."""
        if not self.accelerator.is_main_process:
            return
        state = self.training_state()
        with self._averaged_weights():
            save_checkpoint(
                self.checkpoint(name), self.net, extra_files={STATE_FILE: lambda path: torch.save(state, path)}
            )

    def training_state(self) -> dict[str, Any]:
        """All that a resumed run needs, as tensors and plain values."""
        return {
            "weights": {key: value.clone() for key, value in self.net.state_dict().items()},
            "ema": self.ema.state_dict() if self.ema is not None else None,
            "optimizer": self.optimizer.state_dict(),
            "progress": dataclasses.asdict(self.progress),
            "recurrent_state": self.state,
            "random_state": torch.get_rng_state(),
            "plan": [list(self.plan.lengths), self.plan.time_steps, self.plan.batch_size, self.plan.carry_clips],
        }

    def resume(self) -> None:
        """Go on where the checkpoint `last` stands."""
        folder = self.checkpoint("last")
        if not folder.exists():
            self.log.message(f"Nothing to resume in {folder}: starting anew")
            return
        state = read_training_state(folder)
        if state["plan"] != self.training_state()["plan"]:
            raise TrainError(
                f"{folder}: was trained on other sequences, clips or batch size ({state['plan']}); "
                "resume with the same options, or start from its weights with --init"
            )
        load_weights(self.net, folder)  # names the first difference of another architecture
        self.net.load_state_dict(state["weights"])
        if self.ema is not None and state["ema"] is not None:
            self.ema.load_state_dict(state["ema"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.progress = Progress(**state["progress"])
        self.state = state["recurrent_state"]
        torch.set_rng_state(state["random_state"])
        self.log.message(f"Resumed {folder}: epoch {self.progress.epoch}, step {self.progress.step}")


def read_training_state(folder: Path) -> dict[str, Any]:
    """The training state of a checkpoint; tensors and plain values only, never code."""
    try:
        return torch.load(folder / STATE_FILE, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise CheckpointError(
            f"{folder}: has no {STATE_FILE}, so it cannot be resumed; use it with --init"
        ) from None
    except Exception as error:  # torch.load raises many kinds for a damaged file
        raise CheckpointError(f"{folder / STATE_FILE}: is damaged ({error}); use another checkpoint") from None


def prefetch(batches: Iterator[Batch]) -> Iterator[Batch]:
    """The same batches, each gathered while the one before is being used."""
    with ThreadPoolExecutor(max_workers=1) as pool:
        upcoming = pool.submit(next, batches, None)
        while (batch := upcoming.result()) is not None:
            upcoming = pool.submit(next, batches, None)
            yield batch
