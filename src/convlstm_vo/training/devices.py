"""Where a run computes: device, precision, processes."""

from __future__ import annotations

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType

from convlstm_vo.environment import bfloat16_pays
from convlstm_vo.training.config import TrainConfig, TrainError

_DATA_PARALLEL = {
    DistributedType.NO,
    DistributedType.MULTI_CPU,
    DistributedType.MULTI_GPU,
    DistributedType.MULTI_NPU,
}


def make_accelerator(config: TrainConfig) -> Accelerator:
    """The device, precision and processes of a run (accelerate).

    Raises:
        TrainError: a precision that the device lacks, a way of spreading a network that is not supported, or a
            batch that cannot be dealt out evenly.
    """
    precision = resolve_precision(config)
    AcceleratorState._reset_state()  # it is a singleton, and would refuse a second run with another precision
    try:
        accelerator = Accelerator(
            cpu=config.device == "cpu", mixed_precision="no" if precision == "fp32" else precision
        )
    except ValueError as error:
        raise TrainError(
            f"--precision {config.precision} cannot run on this device ({error}); use bf16 or fp32"
        ) from None
    _check_processes(accelerator, config)
    return accelerator


def _check_processes(accelerator: Accelerator, config: TrainConfig) -> None:
    if accelerator.distributed_type not in _DATA_PARALLEL:
        raise TrainError(
            f"accelerate is configured for {accelerator.distributed_type.value}, which convlstm-vo sets up itself: "
            "choose plain data parallelism (`accelerate launch --multi_gpu` or torchrun) and add --sharding fsdp"
        )
    if config.sharding == "fsdp" and accelerator.num_processes == 1:
        raise TrainError(
            "--sharding fsdp: there is one process only, nothing to spread over; start several with "
            "`torchrun --nproc-per-node N -m convlstm_vo.cli train …`, or leave it out"
        )
    if config.sharding == "fsdp" and resolve_precision(config) == "fp16":
        raise TrainError(
            "--sharding fsdp: not in fp16, whose scaler knows whole gradients; add --precision bf16 or fp32"
        )
    if config.batch_size % accelerator.num_processes:
        raise TrainError(
            f"--batch-size {config.batch_size}: must be a multiple of the {accelerator.num_processes} processes"
        )


def own_lanes(accelerator: Accelerator) -> slice:
    """The lanes of this process: its clips follow each other, so its recurrent states stay right."""
    return slice(accelerator.process_index, None, accelerator.num_processes)


def mean_over_processes(value: float, accelerator: Accelerator) -> float:
    """The mean of a number that each process has; all processes must ask."""
    if accelerator.num_processes == 1:
        return value
    total = accelerator.reduce(torch.tensor([value], device=accelerator.device), "sum")
    return total.item() / accelerator.num_processes


def on_any_process(flag: bool, accelerator: Accelerator) -> bool:
    """Whether a flag is set on one process at least; all processes must ask."""
    return mean_over_processes(float(flag), accelerator) > 0


def resolve_precision(config: TrainConfig) -> str:
    """fp32, bf16 or fp16; `auto` asks the device."""
    if config.precision != "auto":
        return config.precision
    if config.device == "auto" and torch.cuda.is_available():
        return "bf16" if torch.cuda.is_bf16_supported() else "fp16"
    return "bf16" if bfloat16_pays() else "fp32"
