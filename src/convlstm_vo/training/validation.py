"""Measuring a network on whole sequences, as it will be used: frame after frame, the state carried."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence

import torch
from accelerate import Accelerator
from torch import Tensor

from convlstm_vo.models.network import OdometryNet, State
from convlstm_vo.training.cache import DecodedSequence
from convlstm_vo.training.clips import collate, sequential_clips
from convlstm_vo.training.losses import LossConfig, motion_loss


@dataclasses.dataclass(frozen=True)
class Validation:
    """Errors of single motions on the validation sequences, with the state carried from their first frame."""

    loss: float
    translation_percent: float
    """Summed length of the translation errors, in percent of the path."""
    rotation_deg: float
    """Root mean square of the rotation errors, degrees a frame."""


@torch.no_grad()
def validate(
    net: OdometryNet,
    sequences: Sequence[DecodedSequence],
    loss: LossConfig,
    accelerator: Accelerator,
    *,
    time_steps: int,
) -> Validation:
    """Stream through the sequences; with several processes each takes its share, and all get the same figures.

    Args:
        time_steps: motions that are computed at once; does not change the figures.
    """
    net.eval()
    sums = [0.0] * 5
    for sequence in sequences[accelerator.process_index :: accelerator.num_processes]:
        for predicted, target in _stream(net, sequence, accelerator, time_steps):
            sums = [a + b for a, b in zip(sums, _sums(predicted, target, loss), strict=True)]
    loss_sum, t_error, t_length, r_squared, count = _over_all_processes(sums, accelerator)
    rotation_deg = math.degrees(math.sqrt(r_squared / count))
    return Validation(loss_sum / count, 100 * t_error / max(t_length, 1e-12), rotation_deg)


def _stream(
    net: OdometryNet, sequence: DecodedSequence, accelerator: Accelerator, time_steps: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Predicted and true motions, (time, 6) each, clip by clip."""
    state: State | None = None
    for clip in sequential_clips(len(sequence), time_steps):
        batch = collate([sequence], (clip,)).to(accelerator.device)
        with accelerator.autocast():
            motions, state = net(batch.images, batch.intrinsics, state)
        yield motions[0].float(), batch.motions[0]


def _sums(predicted: Tensor, target: Tensor, loss: LossConfig) -> list[float]:
    """Of the loss, the translation errors (m), the path (m), the squared rotation errors (rad^2), the motions."""
    error = (predicted - target).cpu().double()
    return [
        motion_loss(predicted, target, loss).item() * len(target),
        error[:, :3].norm(dim=-1).sum().item(),
        target[:, :3].norm(dim=-1).sum().item(),
        error[:, 3:].square().sum().item(),
        len(target),
    ]


def _over_all_processes(sums: list[float], accelerator: Accelerator) -> list[float]:
    """Added in the order of the processes, so that all of them get the same bits and decide alike."""
    if accelerator.num_processes == 1:
        return sums
    from accelerate.utils import gather_object

    return [math.fsum(column) for column in zip(*gather_object([sums]), strict=True)]
