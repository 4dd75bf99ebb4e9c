"""Weights, gradients and moments spread over processes (FSDP2): each keeps a part, and the whole for a step only.

Zhao et al. 2023, https://arxiv.org/abs/2304.11277. The learner is one unit: a recurrent cell is used at every time
step, so parts of their own would be gathered again and again. Checkpoints hold whole tensors and load anywhere.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils import _pytree as pytree

from convlstm_vo.models.config import ModelConfig
from convlstm_vo.models.network import OdometryNet


def shard(learner: nn.Module, accelerator: Accelerator, *, keep: Iterable[nn.Parameter] = ()) -> None:
    """Put a module on its device and leave each process an equal part of its parameters, but all of ``keep``."""
    device, processes = accelerator.device, accelerator.num_processes
    # FSDP takes tensors in rows only; channels-last weights are made in each step then.
    learner.to(device, memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    # It takes no single numbers either: each process keeps those, and their gradients are averaged here.
    kept = {*keep, *(weight for weight in learner.parameters() if weight.dim() == 0)}
    for weight in (weight for weight in learner.parameters() if weight in kept):  # everywhere in one order
        weight.register_hook(lambda gradient: accelerator.reduce(gradient.clone(), "mean"))
    fully_shard(learner, mesh=init_device_mesh(device.type, (processes,)), ignored_params=kept)


def clip_gradients(learner: nn.Module, limit: float, accelerator: Accelerator) -> Tensor:
    """As torch's `clip_grad_norm_`, which takes no mixture of spread and other gradients; their norm before."""
    gradients = [weight.grad for weight in learner.parameters() if weight.grad is not None]
    spread = [gradient.to_local() for gradient in gradients if isinstance(gradient, DTensor)]
    squares = accelerator.reduce(torch.stack([part.square().sum() for part in spread]).sum(), "sum")
    for gradient in gradients:
        squares = squares + (0 if isinstance(gradient, DTensor) else gradient.square().sum())
    norm = squares.sqrt()
    coefficient = min(1.0, limit / (norm.item() + 1e-6))
    for gradient in gradients:
        gradient.mul_(coefficient)
    return norm


@contextlib.contextmanager
def gathered(learner: nn.Module) -> Iterator[None]:
    """Within the block each process has the whole weights, so that they can differ in what they compute."""
    if not isinstance(learner, FSDPModule):
        yield
        return
    learner.unshard()
    try:
        yield
    finally:
        learner.reshard()


def whole(values: Any) -> Any:
    """Nested values with every spread tensor gathered. All processes must call it, with the same ones."""
    return pytree.tree_map_only(DTensor, lambda tensor: tensor.detach().full_tensor(), values)


def spread_as(value: Tensor, model: Tensor) -> Tensor:
    """A whole tensor as ``model`` is: this process's part of it where that is spread, otherwise itself."""
    if not isinstance(model, DTensor):
        return value.to(model.device)
    # Every process has read the same file: nothing to send.
    return distribute_tensor(value.to(model.device), model.device_mesh, model.placements, src_data_rank=None)


def spread_all_as(values: dict[str, Tensor], models: dict[str, Tensor]) -> dict[str, Tensor]:
    """`spread_as` by name."""
    return {name: spread_as(value, models[name]) for name, value in values.items()}


def spread_optimizer_state(state: dict[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The state of an optimiser of whole weights for one whose weights may be spread."""
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    moments = {
        number: {
            key: spread_as(value, weights[number]) if value.shape == weights[number].shape else value
            for key, value in own.items()
        }
        for number, own in state["state"].items()
    }
    groups = [
        {**saved, "foreach": own["foreach"]}
        for saved, own in zip(state["param_groups"], optimizer.param_groups, strict=True)
    ]
    return {**state, "state": moments, "param_groups": groups}


def whole_network(config: ModelConfig, weights: dict[str, Tensor]) -> OdometryNet:
    """A network of gathered weights, which it shares."""
    with torch.device("meta"):
        net = OdometryNet(config)
    net.load_state_dict(weights, assign=True)
    return net
