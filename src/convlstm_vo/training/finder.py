"""Which learning rate? A range test: the rate grows at each step until the loss explodes.

Smith 2017, "Cyclical learning rates for training neural networks", https://arxiv.org/abs/1506.01186.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections.abc import Iterator
from pathlib import Path

from convlstm_vo.geometry.files import replacing, write_atomically
from convlstm_vo.training.cache import DecodedSequence
from convlstm_vo.training.clips import Batch
from convlstm_vo.training.config import TrainConfig, TrainError
from convlstm_vo.training.devices import mean_over_processes
from convlstm_vo.training.log import TrainingLog
from convlstm_vo.training.loop import Trainer, prefetch
from convlstm_vo.training.memory import explaining_lack_of_memory
from convlstm_vo.training.stream import EpochStream

_SMOOTHING = 0.9
_EXPLODED = 4.0  # times the smallest loss


@dataclasses.dataclass(frozen=True)
class LearningRateCurve:
    """Loss against learning rate.

    Attributes:
        rates: of each step, growing.
        losses: smoothed, of the same steps.
    """

    rates: tuple[float, ...]
    losses: tuple[float, ...]

    @property
    def suggestion(self) -> float:
        """A tenth of the rate of the smallest loss: still steep, and safely away from the explosion."""
        return self.rates[self.losses.index(min(self.losses))] / 10

    def save(self, folder: Path) -> Path:
        """Write ``learning_rates.json`` and ``learning_rates.png``; the path of the picture."""
        figures = {"rates": self.rates, "losses": self.losses, "suggestion": self.suggestion}
        write_atomically(folder / "learning_rates.json", json.dumps(figures, indent=2) + "\n")
        picture = folder / "learning_rates.png"
        with replacing(picture) as temporary:
            self._draw(temporary)
        return picture

    def _draw(self, path: Path) -> None:
        from matplotlib.figure import Figure

        figure = Figure(figsize=(6, 4), layout="constrained")
        axes = figure.subplots()
        axes.plot(self.rates, self.losses)
        axes.axvline(self.suggestion, color="C1", label=f"suggestion: --lr {self.suggestion:.1e}")
        axes.set(xscale="log", yscale="log", xlabel="learning rate", ylabel="loss (smoothed)")
        axes.legend()
        figure.savefig(path)


def find_learning_rate(
    config: TrainConfig,
    sequences: list[DecodedSequence] | EpochStream,
    log: TrainingLog,
    *,
    lowest: float = 1e-7,
    highest: float = 1.0,
    steps: int = 200,
) -> LearningRateCurve:
    """Train a network for some steps with growing rates, and throw it away. Nothing is written.

    Args:
        lowest: the first rate.
        highest: the last rate, if the loss does not explode before.
        steps: how many rates.

    Raises:
        TrainError: a loss that never falls.
    """
    config = dataclasses.replace(config, ema=0.0, accumulate=1, warmup_steps=0, schedule="constant")
    trainer = _Ranger(config, sequences, [], log)
    rates, losses, mean = [], [], 0.0
    trainer.model.train()
    with explaining_lack_of_memory(config):
        for number, batch in zip(range(steps), prefetch(_endless(trainer)), strict=False):
            trainer.rate = lowest * (highest / lowest) ** (number / max(1, steps - 1))
            try:
                loss = mean_over_processes(trainer.train_step(batch), trainer.accelerator)
            except TrainError:  # no longer a number: as exploded as can be
                break
            trainer.progress.step += 1
            mean = _SMOOTHING * mean + (1 - _SMOOTHING) * loss
            rates.append(trainer.rate)
            losses.append(mean / (1 - _SMOOTHING ** (number + 1)))  # unbiased from the first step
            if number > steps // 10 and losses[-1] > _EXPLODED * min(losses):
                break
    if len(losses) < 3 or min(losses) == losses[0]:
        raise TrainError(
            "no learning rate makes the loss fall; look at the labels, or at --init and --loss, before training"
        )
    return LearningRateCurve(tuple(rates), tuple(losses))


class _Ranger(Trainer):
    """A trainer whose rate is set from outside."""

    rate = math.nan

    def next_rate(self) -> float:
        return self.rate


def _endless(trainer: Trainer) -> Iterator[Batch]:
    for epoch in itertools.count():
        yield from trainer.batches(epoch)
