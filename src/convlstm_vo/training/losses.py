"""How far a predicted motion is from the true one."""

from __future__ import annotations

import dataclasses

from torch import Tensor

from convlstm_vo.errors import ConvlstmVoError


class LossError(ConvlstmVoError):
    """A loss that cannot be minimised."""


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """What training minimises."""

    rotation_weight: float = 100.0
    """Weight of squared radians against squared metres (DeepVO, arXiv 1709.08429, eq. 8: 100)."""

    def __post_init__(self) -> None:
        if not self.rotation_weight > 0:
            raise LossError(f"loss.rotation-weight {self.rotation_weight} must be positive")


def motion_loss(predicted: Tensor, target: Tensor, config: LossConfig) -> Tensor:
    """Mean over all motions of ``|dt|^2 + rotation_weight * |dw|^2`` (DeepVO, eq. 8): (..., 6) twice to a scalar.

    Labels are motions in the previous camera's frame, so rotation vectors are small and never wrap around.
    """
    squared = (predicted.float() - target).square()
    return (squared[..., :3].sum(-1) + config.rotation_weight * squared[..., 3:].sum(-1)).mean()
