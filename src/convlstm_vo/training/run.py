"""From a configuration to a trained network: the sequences that it names, decoded, and the loop over them."""

from __future__ import annotations

import contextlib
import functools
import json
from pathlib import Path

import torch
from accelerate import PartialState

from convlstm_vo.config import to_dict
from convlstm_vo.geometry.files import write_atomically
from convlstm_vo.models.checkpoint import read_config
from convlstm_vo.models.network import OdometryNet
from convlstm_vo.progress import progress
from convlstm_vo.sequences.base import Sequence
from convlstm_vo.sequences.kitti import open_kitti, sequence_names
from convlstm_vo.training.cache import DecodedSequence, decode_sequence, default_cache_folder
from convlstm_vo.training.config import TrainConfig, TrainError, WorldConfig
from convlstm_vo.training.log import TrainingLog
from convlstm_vo.training.loop import train
from convlstm_vo.training.shards import find_shards
from convlstm_vo.training.state import RunCheckpoints
from convlstm_vo.training.stream import EpochStream, SequenceStream, ShardStream


def run_training(config: TrainConfig) -> Path:
    """Load the sequences that a configuration names and train on them; the best checkpoint's folder.

    With ``find_lr`` nothing is trained: learning rates are tried, and the picture of their losses is returned.
    Under `accelerate launch` every process calls this.
    """
    check_network(config)
    processes = PartialState(cpu=config.device == "cpu")
    with processes.local_main_process_first():  # which fills the cache, the others map what they find
        training, validation = load_training_data(config, quiet=not processes.is_local_main_process)
    log = TrainingLog(config.out, quiet=not processes.is_main_process)
    try:
        if config.find_lr:
            return suggest_learning_rate(config, training, log)
        check_out(config)
        if processes.is_main_process:
            write_atomically(config.out / "train.json", json.dumps(to_dict(config), indent=2) + "\n")
        best = train(config, training, validation, log)
        if processes.num_processes > 1:
            processes.wait_for_everyone()
            processes.destroy_process_group()  # left to the interpreter's exit, it may abort
        return best
    finally:
        if isinstance(training, EpochStream):
            training.close()


def check_network(config: TrainConfig) -> None:
    """Raise ModelError or CheckpointError for a network that cannot be built, or begun: decoding takes long."""
    with torch.device("meta"):
        OdometryNet(config.model)
    if config.init is not None:
        read_config(config.init)


def check_out(config: TrainConfig) -> None:
    """Raise TrainError where a new run would meet an older one in --out."""
    if not config.resume and (found := RunCheckpoints(config.out).candidates()):
        raise TrainError(f"{found[0]}: a run is there already; go on with --resume or choose another --out")


def suggest_learning_rate(
    config: TrainConfig, training: list[DecodedSequence] | EpochStream, log: TrainingLog
) -> Path:
    """Print and draw the losses of growing learning rates; the picture."""
    from convlstm_vo.training.finder import find_learning_rate

    curve = find_learning_rate(config, training, log)
    for rate, loss in list(zip(curve.rates, curve.losses, strict=True))[:: max(1, len(curve.rates) // 20)]:
        log.message(f"  learning rate {rate:8.1e}   loss {loss:.4g}")
    log.message(f"Suggestion: --lr {curve.suggestion:.1e}")
    return curve.save(config.out) if not log.quiet else config.out


def world_drive(config: WorldConfig, number: int) -> Sequence:
    """One drive of the endless stream, in KITTI's camera at half its size, not rendered yet."""
    from convlstm_vo.world import KITTI_CAMERA, WorldSequence

    return WorldSequence(
        config.first_seed + number,
        frames=config.frames,
        kind=config.road,
        camera=KITTI_CAMERA.resized(height=188, width=620),
        fps=config.fps,
        mount="random" if config.mounting == "random" else None,
        sensor="random" if config.look == "random" else None,
    )


def load_training_data(
    config: TrainConfig, *, quiet: bool = False
) -> tuple[list[DecodedSequence] | EpochStream, list[DecodedSequence]]:
    """Training sequences, decoded or as a stream, and decoded validation sequences; ``quiet`` without a bar."""
    training, validation = open_sequences(config)
    for sequence in validation:
        if len(sequence) < 2:
            raise TrainError(f"--validate {sequence.name}: has {len(sequence)} frame, so no motion to measure on")
    decoded = _decode(config, [*training, *validation], quiet=quiet) if training or validation else []
    stream = open_stream(config)
    if isinstance(stream, ShardStream) and not quiet:
        print(stream.describe())
    return decoded[: len(training)] if stream is None else stream, decoded[len(training) :]


def open_stream(config: TrainConfig) -> EpochStream | None:
    """The endless streets or the shards that a configuration names; None where it learns from --data."""
    if config.shards is not None:
        return _sharded(config)
    return _endless(config) if config.world.drives else None


def open_sequences(config: TrainConfig) -> tuple[list[Sequence], list[Sequence]]:
    """The sequences of --data to learn from (none beside a stream) and to validate on, not decoded yet."""
    names = () if config.world.drives or config.shards is not None else _training_names(config)
    if not (chosen := (*names, *config.validate)):
        return [], []
    opened: list[Sequence] = list(open_kitti(_data(config), chosen, camera=config.camera))
    return opened[: len(names)], opened[len(names) :]


def _training_names(config: TrainConfig) -> tuple[str, ...]:
    names = config.sequences or tuple(
        name
        for name in sequence_names(_data(config))
        if name not in config.validate and (_data(config) / "poses" / f"{name}.txt").exists()
    )
    if not names:
        raise TrainError(f"{config.data}: no sequence with ground truth to learn from (poses/NAME.txt)")
    return names[: config.max_sequences or None]


def _data(config: TrainConfig) -> Path:
    if config.data is None:
        raise TrainError(
            "--data DIR is missing: a KITTI odometry tree (`convlstm-vo simulate` makes one); or learn from "
            "endless built-in streets with --world.drives 16, or from --shards"
        )
    return config.data


def _endless(config: TrainConfig) -> SequenceStream:
    model = config.model
    return SequenceStream(
        functools.partial(world_drive, config.world),
        config.world.drives,
        frames=config.world.frames,
        height=model.image_height,
        width=model.image_width,
        channels=model.image_channels,
    )


def _sharded(config: TrainConfig) -> ShardStream:
    assert config.shards is not None
    model = config.model
    return ShardStream(
        *find_shards(config.shards),
        config.shard_window,
        seed=config.seed,
        height=model.image_height,
        width=model.image_width,
        channels=model.image_channels,
    )


def _decode(config: TrainConfig, sequences: list[Sequence], *, quiet: bool) -> list[DecodedSequence]:
    """Sequences at the network's size, decoded once and for all."""
    model = config.model
    size = {"height": model.image_height, "width": model.image_width, "channels": model.image_channels}
    folder = config.cache or default_cache_folder()
    bar = (
        contextlib.nullcontext(lambda count: None)
        if quiet
        else progress("Decoding frames", sum(map(len, sequences)))
    )
    with bar as advance:
        return [decode_sequence(sequence, **size, folder=folder, advance=advance) for sequence in sequences]
