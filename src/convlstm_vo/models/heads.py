"""Heads: the cell's output to the six numbers of a motion.

A new head is a class with `from_config` and `forward`, and a line in `HEADS`.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convlstm_vo.geometry.se3 import so3_log
from convlstm_vo.models.config import ModelConfig, ModelError

MOTION_SIZE = 6
_ATTENTION_GROUPS = 8
_LEAK = 0.1


class MatrixMotion(nn.Module):
    """Twelve numbers to six: a translation, and a 3x3 matrix that is made a rotation and then its vector.

    The matrix is the identity plus the numbers, each scaled as the angle that it stands for in a small rotation, so
    that zeros mean no rotation. The nearest rotation has no jumps or preferred axes for a network to learn around
    (Levinson et al. 2020, https://arxiv.org/abs/2006.14616).

    Args:
        scale: of the three angles, radians; the vector comes out in units of it, which `OdometryNet` multiplies.
    """

    in_size = 3 + 9

    def __init__(self, scale: tuple[float, float, float]) -> None:
        super().__init__()
        x, y, z = scale
        size = (abs(x) + abs(y) + abs(z)) / 3
        spread = torch.tensor([[size, z, y], [z, size, x], [y, x, size]])
        self.register_buffer("spread", spread, persistent=False)
        self.register_buffer("scale", torch.tensor(scale), persistent=False)

    def forward(self, numbers: Tensor) -> Tensor:
        """(batch, 12) to (batch, 6)."""
        offsets = numbers[:, 3:].unflatten(1, (3, 3)).float()  # no SVD in bfloat16
        matrix = torch.eye(3, device=numbers.device) + offsets * self.get_buffer("spread").float()
        rotvec = so3_log(nearest_rotation(matrix)) / self.get_buffer("scale").float()
        return torch.cat([numbers[:, :3], rotvec.to(numbers.dtype)], 1)


class _NearestRotation(torch.autograd.Function):
    """SVD orthogonalisation with its own gradient: that of a general SVD divides by zero at the identity.

    For ``M = R P`` with P symmetric, ``R^T dR`` solves ``W P + P W = R^T dM - dM^T R``: in the eigenbasis of P, a
    division by sums of its eigenvalues.
    """

    @staticmethod
    def forward(ctx: Any, matrix: Tensor) -> Tensor:
        u, values, vt = torch.linalg.svd(matrix)
        sign = torch.ones_like(values)
        sign[..., 2] = torch.det(u @ vt).sign()  # a rotation, not a reflection
        rotation = (u * sign[..., None, :]) @ vt
        ctx.save_for_backward(rotation, values * sign, vt)
        return rotation

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        rotation, eigenvalues, vt = ctx.saved_tensors
        inner = rotation.transpose(-1, -2) @ gradients[0]
        skew = vt @ (inner - inner.transpose(-1, -2)) @ vt.transpose(-1, -2)
        sums = eigenvalues[..., :, None] + eigenvalues[..., None, :]
        # Sums near zero belong to matrices far from any rotation, where the nearest one is not unique.
        skew = skew / torch.where(sums.abs() < 1e-6, torch.full_like(sums, math.inf), sums)
        return rotation @ vt.transpose(-1, -2) @ skew @ vt


def nearest_rotation(matrix: Tensor) -> Tensor:
    """The rotation nearest to each matrix in the sum of squares: (..., 3, 3) to (..., 3, 3), differentiable."""
    return _NearestRotation.apply(matrix)


def motion_from_config(config: ModelConfig) -> MatrixMotion | None:
    """What follows a head's last layer; None where its six numbers are a motion."""
    x, y, z = config.motion_scale[3:]
    return MatrixMotion((x, y, z)) if config.rotation == "matrix" else None


class LinearHead(nn.Module):
    """Everything flattened, then one linear layer: bound to the image size where the input is a feature map.

    Args:
        in_shape: of the input, without the batch.
        dropout: before the linear layer, in training.
        motion: from the layer's numbers to a motion; by default they are one.

    Raises:
        ModelError: an input of another size.
    """

    def __init__(
        self, in_shape: tuple[int, ...], *, dropout: float = 0.0, motion: MatrixMotion | None = None
    ) -> None:
        super().__init__()
        self.in_shape, self.dropout = tuple(in_shape), dropout
        self.linear = nn.Linear(torch.Size(in_shape).numel(), MOTION_SIZE if motion is None else motion.in_size)
        self.motion = motion or nn.Identity()

    @classmethod
    def from_config(cls, config: ModelConfig, in_shape: tuple[int, ...]) -> LinearHead:
        """The head of a network, for cell outputs of the given shape."""
        return cls(in_shape, dropout=config.head_dropout, motion=motion_from_config(config))

    def forward(self, x: Tensor) -> Tensor:
        """Six numbers (batch, 6) from cell outputs (batch, *in_shape)."""
        if tuple(x.shape[1:]) != self.in_shape:
            raise ModelError(
                f"features of shape {tuple(x.shape[1:])}, but the linear head was built for {self.in_shape}: "
                "resize frames to the network's image size, or build it with head=attention"
            )
        return self.motion(self.linear(F.dropout(x.flatten(1), self.dropout, self.training)))


class AttentionHead(nn.Module):
    """Learned weighted means over the map, then two linear layers: works at any image size.

    Eight groups of channels are averaged, each with its own softmax weights, so that a group can look at the road
    and another one at the far field (cf. attentive pooling, dos Santos et al. 2016, https://arxiv.org/abs/1602.03609).

    Args:
        in_channels: channels of the input.
        hidden: channels that are averaged, a multiple of 8, and hidden size of the linear layers.
        dropout: before the linear layers, in training.
        motion: from the last layer's numbers to a motion; by default they are one.

    Raises:
        ModelError: an input that is not a feature map, or ``hidden`` not a multiple of 8.
    """

    def __init__(
        self, in_channels: int, hidden: int, *, dropout: float = 0.0, motion: MatrixMotion | None = None
    ) -> None:
        super().__init__()
        if hidden % _ATTENTION_GROUPS:
            raise ModelError(f"head_channels is {hidden}, but must be a multiple of {_ATTENTION_GROUPS}")
        self.dropout = dropout
        self.values = nn.Conv2d(in_channels, hidden, 1)
        self.weights = nn.Conv2d(in_channels, _ATTENTION_GROUPS, 1)
        self.hidden = nn.Linear(hidden, hidden)
        self.linear = nn.Linear(hidden, MOTION_SIZE if motion is None else motion.in_size)
        self.motion = motion or nn.Identity()
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
        motion = motion_from_config(config)
        return cls(in_shape[0], config.head_channels, dropout=config.head_dropout, motion=motion)

    def forward(self, x: Tensor) -> Tensor:
        """Six numbers (batch, 6) from cell outputs (batch, channels, height, width)."""
        weights = torch.softmax(self.weights(x).flatten(2), 2)  # (batch, groups, cells)
        values = F.leaky_relu(self.values(x), _LEAK).flatten(2)  # (batch, hidden, cells)
        values = values.unflatten(1, (_ATTENTION_GROUPS, -1))  # (batch, groups, hidden / groups, cells)
        pooled = (values * weights[:, :, None]).sum(3).flatten(1)  # (batch, hidden)
        pooled = F.dropout(pooled, self.dropout, self.training)
        return self.motion(self.linear(F.leaky_relu(self.hidden(pooled), _LEAK)))


HEADS: dict[str, type[nn.Module]] = {"linear": LinearHead, "attention": AttentionHead}
