"""How far a predicted motion is from the true one."""

from __future__ import annotations

import dataclasses
from typing import Literal

from torch import Tensor

from convlstm_vo.errors import ConvlstmVoError


class LossError(ConvlstmVoError):
    """A loss that cannot be minimised."""


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """What training minimises."""

    error: Literal["squared", "norm"] = "squared"
    """squared: as the papers; norm: lengths of the errors, which keeps small ones worth learning beside large ones."""
    rotation_weight: float = 100.0
    """Weight of (squared) radians against (squared) metres. DeepVO, arXiv 1709.08429, eq. 8: 100."""

    def __post_init__(self) -> None:
        if not self.rotation_weight > 0:
            raise LossError(f"loss.rotation-weight {self.rotation_weight} must be positive")


def motion_loss(predicted: Tensor, target: Tensor, config: LossConfig) -> Tensor:
    """How wrong motions are, on average: (..., 6) twice to a scalar.

    ``|dt|^2 + rotation_weight * |dw|^2`` (DeepVO, eq. 8), or the same of the lengths ``|dt|`` and ``|dw|``. Labels are
    motions in the previous camera's frame, so rotation vectors are small and never wrap around.
    """
    squared = (predicted.float() - target).square()
    translation, rotation = squared[..., :3].sum(-1), squared[..., 3:].sum(-1)
    if config.error == "norm":
        # The offsets keep the gradient of a length finite at zero; 1 mm and 0.006 degrees are as good as zero.
        translation, rotation = (translation + 1e-6).sqrt(), (rotation + 1e-8).sqrt()
    return (translation + config.rotation_weight * rotation).mean()
