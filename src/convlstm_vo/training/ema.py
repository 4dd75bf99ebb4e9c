"""An exponential moving average of weights: smoother than the last ones, and what is validated and saved."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class WeightAverage:
    """The moving average of a network's parameters and buffers.

    Args:
        net: whose weights to follow.
        decay: share of the old average that each update keeps. Early on it is less, ``(1 + n) / (10 + n)`` after n
            updates, or the random initial weights would linger.
    """

    def __init__(self, net: nn.Module, decay: float) -> None:
        self.decay, self.updates = decay, 0
        self.average = {name: value.detach().clone() for name, value in net.state_dict().items()}

    @torch.no_grad()
    def update(self, net: nn.Module) -> None:
        """Take the weights of ``net`` into the average."""
        self.updates += 1
        weight = 1 - min(self.decay, (1 + self.updates) / (10 + self.updates))
        for name, value in net.state_dict().items():
            average = self.average[name]
            if average.device != value.device:
                average = self.average[name] = average.to(value.device)
            if value.is_floating_point():
                average.lerp_(value, weight)
            else:
                average.copy_(value)

    @contextmanager
    def applied_to(self, net: nn.Module) -> Iterator[None]:
        """Within the block ``net`` has the averaged weights; afterwards its own again."""
        own: dict[str, Tensor] = {name: value.detach().clone() for name, value in net.state_dict().items()}
        net.load_state_dict(self.average)
        try:
            yield
        finally:
            net.load_state_dict(own)

    def state_dict(self) -> dict[str, Any]:
        return {"updates": self.updates, "average": self.average}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.updates, self.average = state["updates"], state["average"]
