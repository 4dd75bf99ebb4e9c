"""What a training run would do, without doing it: its data opened, its steps counted, its memory estimated."""

from __future__ import annotations

from convlstm_vo.sequences.base import Sequence
from convlstm_vo.training.config import TrainConfig, TrainError
from convlstm_vo.training.devices import make_accelerator, resolve_precision
from convlstm_vo.training.learner import build_network
from convlstm_vo.training.memory import describe_memory
from convlstm_vo.training.run import check_out, open_sequences, open_stream
from convlstm_vo.training.schedule import RunPlan


def describe_run(config: TrainConfig) -> str:
    """The plan of a run as lines for the terminal; writes nothing, neither checkpoints nor the frame cache.

    Every sequence is opened: images counted, calibration, times and poses read. Frames are decoded by the run
    itself.

    Raises:
        ConvlstmVoError: whatever would stop the run before its first step.
    """
    check_out(config)
    accelerator = make_accelerator(config)
    plan, lines = _plan(config)
    steps = plan.epoch(0).steps
    lines.append(
        f"Steps: {steps} an epoch of {config.batch_size} clips of {config.time_steps} motions, "
        f"{plan.steps} in {config.epochs} epochs"
    )
    if config.init or config.flownet:
        build_network(config)  # whether the weights fit
    lanes = config.batch_size // accelerator.num_processes
    lines.append(describe_memory(config, lanes, accelerator.device, resolve_precision(config)))
    return "\n".join([*lines, "Dry run: nothing trained, nothing written"])


def _plan(config: TrainConfig) -> tuple[RunPlan, list[str]]:
    """The run's steps, and lines about what it learns from and is measured on."""
    training, validation = open_sequences(config)
    stream = open_stream(config)
    lines = [_describe("Validate on", validation)] if validation else []
    if stream is None:
        return RunPlan(config, tuple(map(len, training))), [_describe("Learn from", training), *lines]
    plan = RunPlan(config, stream.lengths, stream.identity())
    lengths = stream.lengths(0)
    shown = f"Learn from a stream: {len(lengths)} sequences with {sum(lengths)} frames in the first epoch"
    return plan, [shown, *lines]


def _describe(what: str, sequences: list[Sequence]) -> str:
    """Names and numbers of frames, on a line."""
    for sequence in sequences:
        if sequence.trajectory is None:
            raise TrainError(f"sequence {sequence.name}: has no ground-truth poses (poses/{sequence.name}.txt)")
    parts = ", ".join(f"{sequence.name} ({len(sequence)})" for sequence in sequences)
    return f"{what} {len(sequences)} sequences with {sum(map(len, sequences))} frames: {parts}"
