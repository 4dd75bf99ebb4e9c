"""Heads: the cell's output to the six numbers of a motion.

A new head is a class with `from_config` and `forward`, and a line in `HEADS`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convlstm_vo.models.config import ModelConfig, ModelError

MOTION_SIZE = 6
_ATTENTION_GROUPS = 8
_LEAK = 0.1


class LinearHead(nn.Module):
    """Everything flattened, then one linear layer: bound to the image size where the input is a feature map.

    Args:
        in_shape: of the input, without the batch.
        dropout: before the linear layer, in training.

    Raises:
        ModelError: an input of another size.
    """

    def __init__(self, in_shape: tuple[int, ...], *, dropout: float = 0.0) -> None:
        super().__init__()
        self.in_shape, self.dropout = tuple(in_shape), dropout
        self.linear = nn.Linear(torch.Size(in_shape).numel(), MOTION_SIZE)

    @classmethod
    def from_config(cls, config: ModelConfig, in_shape: tuple[int, ...]) -> LinearHead:
        """The head of a network, for cell outputs of the given shape."""
        return cls(in_shape, dropout=config.head_dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Six numbers (batch, 6) from cell outputs (batch, *in_shape)."""
        if tuple(x.shape[1:]) != self.in_shape:
            raise ModelError(
                f"features of shape {tuple(x.shape[1:])}, but the linear head was built for {self.in_shape}: "
                "resize frames to the network's image size, or build it with head=attention"
            )
        return self.linear(F.dropout(x.flatten(1), self.dropout, self.training))


class AttentionHead(nn.Module):
    """Learned weighted means over the map, then two linear layers: works at any image size.

    Eight groups of channels are averaged, each with its own softmax weights, so that a group can look at the road
    and another one at the far field (cf. attentive pooling, dos Santos et al. 2016, https://arxiv.org/abs/1602.03609).

    Args:
        in_channels: channels of the input.
        hidden: channels that are averaged, a multiple of 8, and hidden size of the linear layers.
        dropout: before the linear layers, in training.

    Raises:
        ModelError: an input that is not a feature map, or ``hidden`` not a multiple of 8.
    """

    def __init__(self, in_channels: int, hidden: int, *, dropout: float = 0.0) -> None:
        super().__init__()
        if hidden % _ATTENTION_GROUPS:
            raise ModelError(f"head_channels is {hidden}, but must be a multiple of {_ATTENTION_GROUPS}")
        self.dropout = dropout
        self.values = nn.Conv2d(in_channels, hidden, 1)
        self.weights = nn.Conv2d(in_channels, _ATTENTION_GROUPS, 1)
        self.hidden = nn.Linear(hidden, hidden)
        self.linear = nn.Linear(hidden, MOTION_SIZE)
        for layer in (self.values, self.hidden):
            nn.init.kaiming_normal_(layer.weight, a=_LEAK)
            nn.init.zeros_(layer.bias)  # type: ignore[arg-type]

    @classmethod
    def from_config(cls, config: ModelConfig, in_shape: tuple[int, ...]) -> AttentionHead:
        """The head of a network, for cell outputs (channels, height, width)."""
        if len(in_shape) != 3:
            raise ModelError(
                f"head=attention needs a feature map, but cell={config.cell} gives a vector: head=linear"
            )
        return cls(in_shape[0], config.head_channels, dropout=config.head_dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Six numbers (batch, 6) from cell outputs (batch, channels, height, width)."""
        weights = torch.softmax(self.weights(x).flatten(2), 2)  # (batch, groups, cells)
        values = F.leaky_relu(self.values(x), _LEAK).flatten(2)  # (batch, hidden, cells)
        values = values.unflatten(1, (_ATTENTION_GROUPS, -1))  # (batch, groups, hidden / groups, cells)
        pooled = (values * weights[:, :, None]).sum(3).flatten(1)  # (batch, hidden)
        pooled = F.dropout(pooled, self.dropout, self.training)
        return self.linear(F.leaky_relu(self.hidden(pooled), _LEAK))


HEADS: dict[str, type[nn.Module]] = {"linear": LinearHead, "attention": AttentionHead}
