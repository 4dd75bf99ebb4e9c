"""All that a run is between two steps, taken apart for a checkpoint and put together again."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from convlstm_vo.models.checkpoint import load_weights
from convlstm_vo.models.network import OdometryNet, State
from convlstm_vo.training.config import TrainError
from convlstm_vo.training.sharding import spread_all_as, spread_as, spread_optimizer_state, whole
from convlstm_vo.training.state import Progress

if TYPE_CHECKING:
    from convlstm_vo.training.loop import Trainer


def capture(trainer: Trainer) -> dict[str, Any]:
    """A run as tensors and plain values. All processes must call it."""
    pending = trainer.steps_done % trainer.config.accumulate != 0
    gradients = {name: weight.grad for name, weight in trainer.learner.named_parameters()} if pending else {}
    ema, scaler = trainer.ema, trainer.accelerator.scaler
    return {
        "weights": {key: value.clone() for key, value in whole(trainer.net.state_dict()).items()},
        "loss": whole(trainer.loss.state_dict()),
        "ema": whole(ema.state_dict()) if ema is not None else None,
        "optimizer": whole(trainer.optimizer.state_dict()),
        "scaler": scaler.state_dict() if scaler is not None else None,
        "gradients": whole(gradients),
        "progress": dataclasses.asdict(trainer.progress),
        "recurrent_state": gather_lanes(trainer.state, trainer.accelerator),
        "random_states": gather_random_states(trainer.accelerator),
        "run": trainer.run_plan.identity(),
    }


def check_resumable(trainer: Trainer, folder: Path, state: dict[str, Any]) -> None:
    """Refuse what would not be the same run.

    Raises:
        TrainError: a checkpoint of a run with other data or options.
        CheckpointError: one of another architecture.
    """
    for key, value in trainer.run_plan.identity().items():
        if state["run"].get(key, value) != value:  # earlier versions saved fewer keys
            raise TrainError(
                f"{folder}: was trained with other sequences or options: {key} was {state['run'].get(key)}, now "
                f"{value}; resume with the same ones, or start from its weights with --init"
            )
    if state["loss"].keys() != trainer.loss.state_dict().keys():
        raise TrainError(
            f"{folder}: was trained with{'' if state['loss'] else 'out'} --loss.learned-weights; resume with "
            "the same options, or start from its weights with --init"
        )
    before, now = len(state["random_states"]), trainer.accelerator.num_processes
    if before != now and not trainer.config.other_processes:
        raise TrainError(
            f"{folder}: was saved by {before} process{'es' if before > 1 else ''}, this run has {now}, so it will "
            f"not repeat to the last bit; start {before} again, or add --other-processes to go on all the same"
        )
    net = OdometryNet(trainer.config.model, seed=0) if trainer.sharded else trainer.net
    load_weights(net, folder)  # names the first difference of another architecture


def restore(trainer: Trainer, state: dict[str, Any]) -> None:
    """Everything as `capture` found it; the number of processes may be another one."""
    own = trainer.net.state_dict()
    trainer.net.load_state_dict(spread_all_as(state["weights"], own))
    trainer.loss.load_state_dict(spread_all_as(state["loss"], trainer.loss.state_dict()))
    if trainer.ema is not None and state["ema"] is not None:
        average = spread_all_as(state["ema"]["average"], own)
        trainer.ema.load_state_dict({**state["ema"], "average": average})
    trainer.optimizer.load_state_dict(spread_optimizer_state(state["optimizer"], trainer.optimizer))
    if trainer.accelerator.scaler is not None and state["scaler"] is not None:
        trainer.accelerator.scaler.load_state_dict(state["scaler"])
    weights = dict(trainer.learner.named_parameters())
    for name, gradient in state["gradients"].items():
        weights[name].grad = spread_as(gradient, weights[name]) if gradient is not None else None
    trainer.progress = Progress(**state["progress"])
    trainer.state = deal_lanes(state["recurrent_state"], trainer.lanes, trainer.accelerator.device)
    restore_random_states(state["random_states"], trainer.accelerator)


# --- what each process has for itself: random numbers, and the recurrent states of its lanes ---------------------


def gather_random_states(accelerator: Accelerator) -> list[dict[str, torch.Tensor]]:
    """The states of torch's generators (dropout), one entry a process."""
    own = {"cpu": torch.get_rng_state()}
    if accelerator.device.type == "cuda":
        own["cuda"] = torch.cuda.get_rng_state(accelerator.device)
    return gather_object([own]) if accelerator.num_processes > 1 else [own]


def restore_random_states(states: list[dict[str, torch.Tensor]], accelerator: Accelerator) -> None:
    """Set the generators of this process; with another number of processes they stay as seeded."""
    if len(states) != accelerator.num_processes:
        return
    own = states[accelerator.process_index]
    torch.set_rng_state(own["cpu"])
    if "cuda" in own and accelerator.device.type == "cuda":
        torch.cuda.set_rng_state(own["cuda"], accelerator.device)


def gather_lanes(state: State | None, accelerator: Accelerator) -> State | None:
    """Recurrent states of all lanes in their order, from those of each process (lanes rank::processes)."""
    if state is None or accelerator.num_processes == 1:
        return state
    processes = accelerator.num_processes
    # Gathered, they stand by process and then by lane.
    gathered = (accelerator.gather(part).unflatten(0, (processes, -1)) for part in state)
    return tuple(part.transpose(0, 1).flatten(0, 1).contiguous() for part in gathered)


def deal_lanes(state: State | None, lanes: slice, device: torch.device) -> State | None:
    """The part of `gather_lanes` that belongs to one process, whatever the number of processes was."""
    return None if state is None else tuple(part[lanes].to(device) for part in state)
