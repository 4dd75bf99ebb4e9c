"""The training loop: clips in, weights out. What a run is at any moment: `snapshot.py`."""

from __future__ import annotations

import contextlib
import itertools
import math
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor, nn

from convlstm_vo.models.network import State, detach_state, reset_state
from convlstm_vo.training import sharding
from convlstm_vo.training.cache import DecodedSequence, identity_of
from convlstm_vo.training.clips import Batch, Clip, augment_photometric, collate, photometric_draws
from convlstm_vo.training.config import TrainConfig, TrainError
from convlstm_vo.training.devices import (
    make_accelerator,
    mean_over_processes,
    on_any_process,
    own_lanes,
    resolve_precision,
)
from convlstm_vo.training.ema import WeightAverage
from convlstm_vo.training.interrupts import Interrupts
from convlstm_vo.training.learner import Learner, build_optimizer
from convlstm_vo.training.log import TrainingLog
from convlstm_vo.training.memory import describe_memory, explaining_lack_of_memory
from convlstm_vo.training.schedule import RunPlan, learning_rate
from convlstm_vo.training.snapshot import capture, check_resumable, restore
from convlstm_vo.training.state import Progress, RunCheckpoints, read_training_state
from convlstm_vo.training.stream import EpochStream
from convlstm_vo.training.validation import Validation, validate

__all__ = ["Trainer", "read_training_state", "train"]


def train(
    config: TrainConfig,
    sequences: list[DecodedSequence] | EpochStream,
    validation: list[DecodedSequence],
    log: TrainingLog,
) -> Path:
    """Train a network and return the folder of its best checkpoint (the last one without validation).

    Raises:
        TrainError: an unusable configuration, a loss that is not a number, or too little memory.
        KeyboardInterrupt: after a usable checkpoint `last` has been written.
    """
    if config.patience and not validation:
        raise TrainError(f"--patience {config.patience}: is about the validation loss; add --validate NAME")
    with explaining_lack_of_memory(config):
        trainer = Trainer(config, sequences, validation, log)
        if config.resume:
            trainer.resume()
        log.forget_after(trainer)
        log.describe(lambda: trainer.describe_memory())
        try:
            trainer.run()
        except KeyboardInterrupt:
            log.message(trainer.save_interrupted())
            raise
    return trainer.checkpoints.path("best" if validation else "last")


class Trainer:
    """A run: network, optimiser, position. `train` is the usual way in.

    Args:
        config: what to do.
        sequences: to learn from: the same in all epochs, or a stream of fresh ones.
        validation: to measure on after each epoch; may be empty.
        log: told of every step.

    Raises:
        TrainError: a configuration that this device or these sequences do not allow.
    """

    def __init__(
        self,
        config: TrainConfig,
        sequences: list[DecodedSequence] | EpochStream,
        validation: list[DecodedSequence],
        log: TrainingLog,
    ) -> None:
        self.config, self.validation, self.log = config, validation, log
        self.stream = sequences if isinstance(sequences, EpochStream) else None
        self.sequences = [] if isinstance(sequences, EpochStream) else sequences
        self.accelerator = make_accelerator(config)
        self.lanes = own_lanes(self.accelerator)
        self.run_plan = (
            RunPlan(config, self.stream.lengths, self.stream.identity())
            if self.stream
            else RunPlan(config, tuple(map(len, self.sequences)), identity_of(self.sequences))
        )
        self.total_steps = self.run_plan.steps
        self.checkpoints = RunCheckpoints(config.out)
        self.learner = Learner(config, self.accelerator.process_index)
        self.net, self.loss = self.learner.net, self.learner.loss
        self.sharded = config.sharding == "fsdp"
        self.model, self.optimizer = self._prepare()
        self.ema = WeightAverage(self.net, config.ema) if config.ema else None
        self.progress = Progress()
        self.state: State | None = None
        self.interrupts = Interrupts()
        self._exact = True  # whether a checkpoint written now would be between two steps
        self._agreed = self.accelerator.num_processes == 1  # whether all processes have stopped at the same step

    def _prepare(self) -> tuple[nn.Module, AcceleratedOptimizer]:
        """The learner, wrapped where several processes share gradients or spread it; and its optimiser."""
        if self.sharded:
            sharding.shard(self.learner, self.accelerator, keep=self.loss.parameters())
            return self.learner, self.accelerator.prepare(build_optimizer(self.learner, self.config))
        return self.accelerator.prepare(self.learner, build_optimizer(self.learner, self.config))

    @property
    def epoch_steps(self) -> int:
        """Steps in the current epoch."""
        return self.run_plan.epoch(self.progress.epoch).steps

    @property
    def steps_done(self) -> int:
        """Steps since the start of the run."""
        return self.run_plan.steps_before(self.progress.epoch) + self.progress.step

    def describe_memory(self) -> str:
        """A line about what a step will need."""
        lanes = self.config.batch_size // self.accelerator.num_processes
        return describe_memory(self.config, lanes, self.accelerator.device, resolve_precision(self.config))

    def run(self) -> None:
        """All epochs, from wherever the run stands."""
        with self.log.started(self), self.interrupts.deferred(self.log.message):
            while self.progress.epoch < self.config.epochs and not self._should_stop():
                self.run_epoch()
                self.finish_epoch()
                self._stop_if_asked()

    def _should_stop(self) -> bool:
        stop = bool(self.config.patience) and self.progress.epochs_since_best >= self.config.patience
        if stop:
            self.log.message(f"Stopped early: no better validation loss for {self.config.patience} epochs")
        return stop

    def run_epoch(self) -> None:
        """The remaining steps of the current epoch."""
        self.model.train()
        started = time.perf_counter()
        for batch in prefetch(self.batches(self.progress.epoch, self.progress.step)):
            self._exact = False
            loss = mean_over_processes(self.train_step(batch), self.accelerator)
            self.progress.step += 1
            self._exact = True
            now = time.perf_counter()
            self.log.step(self, loss, batch, now - started)
            started = now
            if self.progress.step % self.config.save_steps == 0:
                self.save("last")
            self._stop_if_asked()

    def _stop_if_asked(self) -> None:
        if on_any_process(self.interrupts.asked, self.accelerator):
            self._agreed = True
            raise KeyboardInterrupt

    def batches(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """This process's part of an epoch's batches from a step on."""
        if self.stream is not None:
            self.sequences = self.stream(epoch, ahead=epoch + 1 < self.config.epochs)
        for clips in itertools.islice(self.run_plan.epoch(epoch)(epoch), start, None):
            yield collate(self.sequences, clips[self.lanes])

    def train_step(self, batch: Batch) -> float:
        """One step on one batch: the state goes on from the step before, its gradient does not."""
        batch = batch.to(self.accelerator.device)
        images = augment_photometric(batch.images, self.config.augment, self._photometric_draws())
        state = None if self.state is None else reset_state(self.state, batch.fresh)
        with self.accelerator.autocast():
            loss, state = self.model(images, batch.intrinsics, state, batch.motions)
        value = self._finite(loss, "loss", batch)
        # Processes average their gradients after each step, not only before an update: a checkpoint between two
        # updates is then the same for all of them.
        self.accelerator.backward(loss / self.config.accumulate)
        if (self.steps_done + 1) % self.config.accumulate == 0:
            self._update(batch)
        self.state = detach_state(state)
        return value

    def _photometric_draws(self) -> Tensor:
        seed = (self.config.seed * 1_000_003 + self.steps_done) * 1009
        return photometric_draws(self.config.batch_size, seed)[:, self.lanes]

    def _finite(self, number: Tensor, what: str, batch: Batch) -> float:
        value = number.item()
        if not math.isfinite(value):
            shown = "; ".join(self._describe(clip) for clip in batch.clips[:4])
            last = next(iter(self.checkpoints.candidates()), "none")
            where = f"epoch {self.progress.epoch + 1}, step {self.progress.step}"
            raise TrainError(
                f"the {what} is {value} in {where} ({shown}, …); "
                f"lower --lr or --clip-gradient; the last good checkpoint is {last}"
            )
        return value

    def _describe(self, clip: Clip) -> str:
        return f"sequence {self.sequences[clip.sequence].name} frames {clip.frames[0]} to {clip.frames[-1]}"

    def _update(self, batch: Batch) -> None:
        norm = self._clip_gradients(self.config.clip_gradient or math.inf)
        if self.accelerator.scaler is None:  # which looks for itself, and skips such updates
            self._finite(norm, "gradient's norm", batch)
        rate = self.next_rate()
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.progress.updates += 1
        if self.ema is not None:
            self.ema.update(self.net)

    def _clip_gradients(self, limit: float) -> Tensor:
        if self.sharded:
            return sharding.clip_gradients(self.learner, limit, self.accelerator)
        return self.accelerator.clip_grad_norm_(self.model.parameters(), limit)

    def next_rate(self) -> float:
        """Learning rate of the next update."""
        return learning_rate(self.progress.updates, self.total_steps // self.config.accumulate, self.config)

    def finish_epoch(self) -> None:
        """Validate, save, and move on to the next epoch."""
        result = self.validate() if self.validation else None
        self._exact = False
        self.progress.epoch, self.progress.step = self.progress.epoch + 1, 0
        self.state = None
        if result is not None and self._judge(result):
            self.save("best")
        self.save("last")
        self._exact = True
        if self.config.keep_epochs and self.progress.epoch % self.config.keep_epochs == 0:
            self.save(f"epoch-{self.progress.epoch:04d}")

    def _judge(self, result: Validation) -> bool:
        """Whether this is the best validation so far."""
        better = result.loss < self.progress.best_loss
        self.progress.epochs_since_best = 0 if better else self.progress.epochs_since_best + 1
        self.progress.best_loss = min(self.progress.best_loss, result.loss)
        self.log.validated(self, result, better)
        return better

    def validate(self) -> Validation:
        """Measure the weights that would be saved."""
        with self._averaged_weights(), sharding.gathered(self.learner):
            return validate(
                self.net,
                self.validation,
                self.config.loss,
                self.accelerator,
                time_steps=max(8, self.config.time_steps),
            )

    def _averaged_weights(self) -> contextlib.AbstractContextManager[None]:
        return self.ema.applied_to(self.net) if self.ema is not None else contextlib.nullcontext()

    def save(self, name: str) -> None:
        """Write a checkpoint: the weights to use, and all that `resume` needs. All processes must call it."""
        state = capture(self)
        if not self.accelerator.is_main_process:
            return
        if self.sharded:
            weights = state["ema"]["average"] if self.ema is not None else state["weights"]
            self.checkpoints.save(name, sharding.whole_network(self.config.model, weights), state)
        else:
            with self._averaged_weights():
                self.checkpoints.save(name, self.net, state)

    def save_interrupted(self) -> str:
        """After a Ctrl-C: save where that is exact; what to tell the user."""
        if self._exact and self._agreed:
            self.save("last")
            return f"Interrupted: saved {self.checkpoints.path('last')}; go on with --resume"
        last = next(iter(self.checkpoints.candidates()), None)
        return f"Interrupted within a step: {f'{last} is' if last else 'nothing is'} saved"

    def resume(self) -> None:
        """Go on where the newest whole checkpoint stands.

        Raises:
            CheckpointError: damaged checkpoints only, or one of another architecture.
            TrainError: a checkpoint of a run with other data or options.
        """
        if self.accelerator.is_main_process:
            self.checkpoints.clean()
        self.accelerator.wait_for_everyone()
        found = self.checkpoints.read_newest(self.log.message)
        if found is None:
            self.log.message(f"Nothing to resume in {self.checkpoints.folder}: starting anew")
            return
        folder, state = found
        check_resumable(self, folder, state)
        restore(self, state)
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            self.checkpoints.set_aside_newer(folder)
        self.log.message(f"Resumed {folder}: epoch {self.progress.epoch}, step {self.progress.step}")


def prefetch(batches: Iterator[Batch]) -> Iterator[Batch]:
    """The same batches, each gathered while the one before is being used."""
    with ThreadPoolExecutor(max_workers=1) as pool:
        upcoming = pool.submit(next, batches, None)
        while (batch := upcoming.result()) is not None:
            upcoming = pool.submit(next, batches, None)
            yield batch
