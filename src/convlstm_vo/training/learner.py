"""What is optimised: a network and its loss as one module, and the optimiser over both."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from convlstm_vo.models.checkpoint import load_weights
from convlstm_vo.models.encoders import load_flownet_weights
from convlstm_vo.models.network import OdometryNet, State
from convlstm_vo.training.config import TrainConfig
from convlstm_vo.training.losses import MotionLoss
from convlstm_vo.training.memory import checkpoint_encoder


class Learner(nn.Module):
    """A network and its loss as one module, so that processes share the gradients of both.

    Args:
        config: of the run.
        process: number of this process; all start from the same weights, each draws its own dropout.
    """

    def __init__(self, config: TrainConfig, process: int = 0) -> None:
        super().__init__()
        torch.manual_seed(config.seed)  # initial weights
        self.net, self.loss = build_network(config), MotionLoss(config.loss)
        if process:
            torch.manual_seed(config.seed + 7919 * process)

    def forward(
        self, images: Tensor, intrinsics: Tensor, state: State | None, motions: Tensor
    ) -> tuple[Tensor, State]:
        """The loss of a batch and the state after it; arguments as those of `Batch`."""
        predicted, state = self.net(images, intrinsics, state)
        return self.loss(predicted, motions), state


def build_network(config: TrainConfig) -> OdometryNet:
    """The network of a run, with the weights that it starts from."""
    net = OdometryNet(config.model)
    # The layout that bf16 convolutions on CPUs and GPUs want; torch's own signature of `to` lacks it.
    net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if config.flownet is not None:
        load_flownet_weights(net.encoder, config.flownet)
    if config.init is not None:
        load_weights(net, config.init)
    if config.checkpoint_activations:
        checkpoint_encoder(net)
    return net


def build_optimizer(learner: Learner, config: TrainConfig) -> torch.optim.Optimizer:
    """Adam with decoupled weight decay (AdamW)."""
    groups: list[dict[str, Any]] = [{"params": list(learner.net.parameters())}]
    if own := list(learner.loss.parameters()):
        groups.append({"params": own, "weight_decay": 0.0})  # decay would pull log-variances to zero
    # Operations on many tensors at once take no mixture of spread and other ones.
    foreach = False if config.sharding == "fsdp" else None
    return torch.optim.AdamW(groups, config.lr, weight_decay=config.weight_decay, foreach=foreach)
