"""What changes in the course of a run: the learning rate, and the length of clips."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable
from functools import cached_property
from typing import Any

from convlstm_vo.config import to_dict
from convlstm_vo.training.clips import EpochPlan
from convlstm_vo.training.config import TrainConfig

_FIRST_CLIP = 2  # motions: the shortest clip in which memory has something to carry


def learning_rate(update: int, total: int, config: TrainConfig) -> float:
    """The rate of one update: a linear rise, then constant or along a cosine to zero."""
    warm = min(1.0, (update + 1) / config.warmup_steps) if config.warmup_steps else 1.0
    if config.schedule == "constant":
        return config.lr * warm
    done = max(0, update - config.warmup_steps) / max(1, total - config.warmup_steps)
    return config.lr * warm * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def clip_length(epoch: int, config: TrainConfig) -> int:
    """Motions in the clips of an epoch: `curriculum_epochs` long they grow evenly, then they are `time_steps`.

    Easy examples first: curriculum learning (Bengio et al. 2009).
    """
    if epoch >= config.curriculum_epochs:
        return config.time_steps
    first = min(_FIRST_CLIP, config.time_steps)
    return first + (config.time_steps - first) * epoch // config.curriculum_epochs


@dataclasses.dataclass(frozen=True)
class RunPlan:
    """The plans of all epochs of a run; a function of its fields alone.

    Attributes:
        config: of the run.
        lengths: frames of each training sequence; where every epoch has its own sequences, a function that tells
            them by the epoch's number.
        data: what the sequences are, as plain values; by default their lengths.
    """

    config: TrainConfig
    lengths: tuple[int, ...] | Callable[[int], tuple[int, ...]]
    data: dict[str, Any] = dataclasses.field(default_factory=dict)

    def epoch(self, number: int) -> EpochPlan:
        """Which clips are shown in one epoch."""
        config = self.config
        return EpochPlan(
            self.lengths(number) if callable(self.lengths) else self.lengths,
            clip_length(number, config),
            config.batch_size,
            config.carry_clips,
            config.augment,
            config.seed,
            config.weights,
        )

    def steps_before(self, epoch: int) -> int:
        """Steps in all epochs before this one."""
        if callable(self.lengths):
            return self._starts[epoch]
        growing = min(epoch, self.config.curriculum_epochs)
        steps = sum(self.epoch(number).steps for number in range(growing))
        return steps + (epoch - growing) * self.epoch(self.config.curriculum_epochs).steps

    @cached_property
    def _starts(self) -> list[int]:
        """Steps before each epoch, and after the last one."""
        steps = (self.epoch(number).steps for number in range(self.config.epochs))
        return list(itertools.accumulate(steps, initial=0))

    @property
    def steps(self) -> int:
        """Steps in the whole run."""
        return self.steps_before(self.config.epochs)

    def identity(self) -> dict[str, Any]:
        """What must stay the same for a run to be resumed."""
        names = ("batch_size", "time_steps", "carry_clips", "curriculum_epochs", "accumulate", "seed", "ema")
        lengths = {} if callable(self.lengths) else {"lengths": list(self.lengths)}
        return {
            **lengths,
            **self.data,
            "weights": list(self.config.weights),
            "world": to_dict(self.config.world),
            "augment": to_dict(self.config.augment),
            **{name: getattr(self.config, name) for name in names},
        }
