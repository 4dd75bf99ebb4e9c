"""How far predicted motions are from the true ones."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

import torch
from torch import Tensor, nn

from convlstm_vo.errors import ConvlstmVoError
from convlstm_vo.geometry import se3


class LossError(ConvlstmVoError):
    """A loss that cannot be minimised."""


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """What training minimises."""

    error: Literal["squared", "norm"] = "squared"
    """squared: as the papers; norm: lengths of the errors, so that small ones stay worth learning."""
    rotation_weight: float = 100.0
    """Weight of (squared) radians against (squared) metres. DeepVO, arXiv 1709.08429, eq. 8: 100."""
    rotation: Literal["vector", "geodesic"] = "vector"
    """vector: difference of rotation vectors, right for small turns; geodesic: the angle between the rotations, for
    cameras that turn by tens of degrees a frame (hand-held, drones, frames skipped)."""
    learned_weights: bool = False
    """Learn the weight of rotation against translation (Kendall & Cipolla 2017); use it when you do not know the
    right one, e.g. on a new kind of vehicle. It starts from --loss.rotation-weight, which validation keeps."""
    drift_steps: tuple[int, ...] = ()
    """Also compare motions composed over so many steps (e.g. 2 4 8, at most --time-steps); use it when single
    motions are good but the path drifts: a small bias that repeats counts as much as large errors that cancel."""
    drift_weight: float = 1.0
    """Weight of the composed motions' error (a step, mean over the lengths) against that of single motions."""

    def __post_init__(self) -> None:
        if not 0 < self.rotation_weight < math.inf:
            raise LossError(f"loss.rotation-weight {self.rotation_weight} must be positive")
        if not 0 <= self.drift_weight < math.inf:
            raise LossError(f"loss.drift-weight {self.drift_weight} must not be negative")
        if any(steps < 2 for steps in self.drift_steps):
            raise LossError(f"loss.drift-steps {self.drift_steps}: each must be at least 2; 1 is the motion itself")


class MotionLoss(nn.Module):
    """The loss of a configuration, with the parameters that it may learn.

    With ``learned_weights`` it is ``exp(-s_t) E_t + s_t + exp(-s_r) E_r + s_r`` (Kendall & Cipolla 2017,
    https://arxiv.org/abs/1704.00390), where ``s_t`` and ``s_r`` are the two ``log_variances``. It may be
    negative; its optimum is ``s = log E``.
    """

    def __init__(self, config: LossConfig) -> None:
        super().__init__()
        self.config = config
        self.log_variances: nn.Parameter | None = None
        if config.learned_weights:
            self.log_variances = nn.Parameter(torch.tensor([0.0, -math.log(config.rotation_weight)]))

    def forward(self, predicted: Tensor, target: Tensor) -> Tensor:
        """Motions (batch, time, 6) twice to a scalar."""
        # Products of rotations in bfloat16 would be wrong by a third of a degree.
        with torch.autocast(predicted.device.type, enabled=False):
            translation, rotation = self._errors(predicted, target)
            if self.log_variances is None:
                return translation + self.config.rotation_weight * rotation
            s_t, s_r = self.log_variances.unbind()
            return (-s_t).exp() * translation + s_t + (-s_r).exp() * rotation + s_r

    def weights(self) -> dict[str, float]:
        """The learned weights by name, for logs; empty where none are learned."""
        if self.log_variances is None:
            return {}
        translation, rotation = (-self.log_variances.detach()).exp().tolist()
        return {"translation_weight": translation, "rotation_weight": rotation}

    def _errors(self, predicted: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Mean errors of single motions and, by weight, of composed ones: two scalars."""
        translation, rotation = (part.mean() for part in motion_errors(predicted, target, self.config))
        lengths = [steps for steps in self.config.drift_steps if steps <= target.shape[1]]
        for steps in lengths:
            composed = compose_motions(predicted, steps), compose_motions(target, steps)
            share = self.config.drift_weight / len(lengths) / self._growth(steps)
            drift_t, drift_r = (part.mean() for part in motion_errors(*composed, self.config))
            translation, rotation = translation + share * drift_t, rotation + share * drift_r
        return translation, rotation

    def _growth(self, steps: int) -> int:
        """By how much a constant bias grows over the steps: after division it counts the same for all lengths."""
        return steps if self.config.error == "norm" else steps * steps


def motion_loss(predicted: Tensor, target: Tensor, config: LossConfig) -> Tensor:
    """How wrong single motions are with the configured weight, on average: (..., 6) twice to a scalar.

    ``|dt|^2 + rotation_weight * |dw|^2`` (DeepVO, eq. 8), or the same of the lengths ``|dt|`` and ``|dw|``. This is
    what validation reports: it means the same throughout a run, whatever weights are learned.
    """
    translation, rotation = motion_errors(predicted, target, config)
    return (translation + config.rotation_weight * rotation).mean()


def motion_errors(predicted: Tensor, target: Tensor, config: LossConfig) -> tuple[Tensor, Tensor]:
    """Translation errors (metres, or their squares) and rotation errors (radians, or their squares).

    Args:
        predicted: motions (..., 6).
        target: motions (..., 6).

    Returns:
        Two tensors (...).
    """
    predicted, target = _in_full(predicted), _in_full(target)
    squared = (predicted - target).square()
    translation, rotation = squared[..., :3].sum(-1), squared[..., 3:].sum(-1)
    if config.rotation == "geodesic":
        rotation = _rotation_between(predicted[..., 3:], target[..., 3:]).square().sum(-1)
    if config.error == "norm":
        # The offsets keep the gradient of a length finite at zero; 1 mm and 0.006 degrees are as good as zero.
        translation, rotation = (translation + 1e-6).sqrt(), (rotation + 1e-8).sqrt()
    return translation, rotation


def _in_full(motions: Tensor) -> Tensor:
    """Half precision as float32; float64 stays."""
    return motions.to(torch.promote_types(motions.dtype, torch.float32))


def _rotation_between(first: Tensor, second: Tensor) -> Tensor:
    """Rotation vector (..., 3) of ``R(first)^T R(second)``; its length is the geodesic distance, at most pi."""
    return se3.so3_log(se3.so3_exp(first).transpose(-1, -2) @ se3.so3_exp(second))


def compose_motions(motions: Tensor, steps: int) -> Tensor:
    """Motions over ``steps`` frames, one from each frame that has so many after it.

    Args:
        motions: (batch, time, 6), time at least ``steps``.

    Returns:
        (batch, time - steps + 1, 6).
    """
    single = se3.matrix_from_motion(_in_full(motions))
    chained = single
    for step in range(1, steps):
        chained = chained[:, :-1] @ single[:, step:]
    return se3.motion_from_matrix(chained)
