"""What a training run tells: a progress bar, TensorBoard scalars, and one JSON line a report in history.jsonl."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from convlstm_vo.training.stage_state import forget_rows_after

if TYPE_CHECKING:
    from convlstm_vo.training.clips import Batch
    from convlstm_vo.training.loop import Trainer
    from convlstm_vo.training.validation import Validation

_SMOOTHING = 0.95  # of the printed loss and rates; history.jsonl has them as they are
_SECONDS_BETWEEN_LINES = 30.0  # where output goes to a file instead of a terminal


class TrainingLog:
    """Tells of a run on the terminal, in ``folder/history.jsonl`` and to TensorBoard.

    Args:
        folder: of the run.
        quiet: say nothing on the terminal (processes other than the first, tests).
    """

    def __init__(self, folder: Path, *, quiet: bool = False) -> None:
        self.folder, self.quiet = folder, quiet
        self.console = Console(quiet=quiet)
        self._writer: Any = None
        self._progress: Progress | None = None
        self._smooth: dict[str, float] = {}
        self._last_line = 0.0
        self._losses: list[float] = []  # of this epoch's steps

    def message(self, text: str) -> None:
        """One line on the terminal."""
        self.console.print(text, highlight=False, soft_wrap=True)

    def describe(self, line: Callable[[], str]) -> None:
        """One line that takes a while to find out: not when nobody reads it."""
        if not self.quiet:
            self.message(line())

    def forget_after(self, trainer: Trainer) -> None:
        """Drop rows of history.jsonl later than where a run stands: a killed run will report them again."""
        if trainer.accelerator.is_main_process:
            position = {"epoch": trainer.progress.epoch, "step": trainer.progress.step}
            forget_rows_after(self.folder / "history.jsonl", **position)

    @contextmanager
    def started(self, trainer: Trainer) -> Iterator[None]:
        """Within the block a progress bar stands on the terminal and files are open."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._losses = self._told(trainer.progress.epoch) if trainer.accelerator.is_main_process else []
        if not self.quiet:
            self._writer = _tensorboard(self.folder, self, trainer.progress.updates)
        columns = [
            TextColumn("epoch {task.fields[epoch]}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        ]
        self._progress = Progress(
            *columns, console=self.console, disable=self.quiet or not self.console.is_terminal
        )
        self._task = self._progress.add_task(
            "train",
            total=trainer.total_steps,
            completed=trainer.steps_done,
            epoch=trainer.progress.epoch,
            figures="",
        )
        try:
            with self._progress:
                yield
        finally:
            if self._writer is not None:
                self._writer.close()

    def step(self, trainer: Trainer, loss: float, batch: Batch, seconds: float) -> None:
        """After each step: its loss and speed."""
        pairs = batch.motions.shape[0] * batch.motions.shape[1] * trainer.accelerator.num_processes
        figures = {"loss": loss, "seconds_per_step": seconds, "pairs_per_second": pairs / seconds}
        if trainer.progress.step == 1:
            self._losses.clear()
        self._losses.append(loss)
        for name, value in figures.items():
            self._smooth[name] = _SMOOTHING * self._smooth.get(name, value) + (1 - _SMOOTHING) * value
        self._show(trainer)
        rate = trainer.optimizer.param_groups[0]["lr"]
        self._record(trainer, "train", {**figures, "learning_rate": rate, **trainer.loss.weights()})

    def validated(self, trainer: Trainer, result: Validation, better: bool) -> None:
        """After each validation."""
        figures = {
            "loss": result.loss,
            "translation_percent": result.translation_percent,
            "rotation_deg": result.rotation_deg,
        }
        self._record(trainer, "validation", figures)
        self.message(
            f"epoch {trainer.progress.epoch:4d}  train loss {np.mean(self._losses or np.nan):.4g}  "
            f"validation loss {result.loss:.4g}, translation error {result.translation_percent:.2f} % of the path, "
            f"rotation error {result.rotation_deg:.3f} deg a frame{'  (best)' if better else ''}"
        )

    def _told(self, epoch: int) -> list[float]:
        """Losses of the steps of an epoch that history.jsonl has: those before a run was interrupted."""
        path = self.folder / "history.jsonl"
        rows = map(json.loads, path.read_text(encoding="utf-8").splitlines()) if path.exists() else ()
        return [row["loss"] for row in rows if row["kind"] == "train" and row["epoch"] == epoch]

    def _show(self, trainer: Trainer) -> None:
        s = self._smooth
        figures = f"loss {s['loss']:.4g}  {s['seconds_per_step']:.3g} s/step  {s['pairs_per_second']:.1f} images/s"
        progress = trainer.progress
        if self._progress is not None:
            self._progress.update(self._task, advance=1, epoch=progress.epoch + 1, figures=figures)
        now = time.monotonic()
        if not self.console.is_terminal and now - self._last_line > _SECONDS_BETWEEN_LINES:
            self._last_line = now
            minutes = (trainer.total_steps - trainer.steps_done) * s["seconds_per_step"] / 60
            self.message(
                f"epoch {progress.epoch + 1}/{trainer.config.epochs} step {progress.step}/{trainer.epoch_steps}  "
                f"{figures}  {minutes:.0f} min left"
            )
            sys.stdout.flush()

    def _record(self, trainer: Trainer, kind: str, figures: dict[str, float]) -> None:
        if self.quiet and not self.folder.exists():
            return
        progress = trainer.progress
        row = {"kind": kind, "epoch": progress.epoch, "step": progress.step, "update": progress.updates, **figures}
        if trainer.accelerator.is_main_process:
            with (self.folder / "history.jsonl").open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(row) + "\n")
        if self._writer is not None:
            for name, value in figures.items():
                self._writer.add_scalar(f"{kind}/{name}", value, progress.updates)


def _tensorboard(folder: Path, log: TrainingLog, updates: int) -> Any:
    """A writer that hides what a killed run reported after the checkpoint that this one goes on from."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        log.message(
            "No TensorBoard log: pip install 'convlstm-vo[tensorboard]' (history.jsonl has the same figures)"
        )
        return None
    return SummaryWriter(str(folder / "tensorboard"), purge_step=updates + 1 if updates else None)
