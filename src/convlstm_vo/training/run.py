"""From a configuration to a trained network: the sequences that it names, decoded, and the loop over them."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

from accelerate import PartialState

from convlstm_vo.config import to_dict
from convlstm_vo.geometry.files import write_atomically
from convlstm_vo.progress import progress
from convlstm_vo.sequences.kitti import open_kitti, sequence_names
from convlstm_vo.training.cache import DecodedSequence, decode_sequence, default_cache_folder
from convlstm_vo.training.config import TrainConfig, TrainError
from convlstm_vo.training.log import TrainingLog
from convlstm_vo.training.loop import train
from convlstm_vo.training.state import RunCheckpoints


def run_training(config: TrainConfig) -> Path:
    """Load the sequences that a configuration names and train on them; the best checkpoint's folder.

    With ``find_lr`` nothing is trained: learning rates are tried, and the picture of their losses is returned.
    Under `accelerate launch` every process calls this.
    """
    processes = PartialState(cpu=config.device == "cpu")
    with processes.local_main_process_first():  # which fills the cache, the others map what they find
        training, validation = load_training_data(config, quiet=not processes.is_local_main_process)
    log = TrainingLog(config.out, quiet=not processes.is_main_process)
    if config.find_lr:
        return suggest_learning_rate(config, training, log)
    if not config.resume and (found := RunCheckpoints(config.out).candidates()):
        raise TrainError(f"{found[0]}: a run is there already; go on with --resume or choose another --out")
    if processes.is_main_process:
        write_atomically(config.out / "train.json", json.dumps(to_dict(config), indent=2) + "\n")
    return train(config, training, validation, log)


def suggest_learning_rate(config: TrainConfig, training: list[DecodedSequence], log: TrainingLog) -> Path:
    """Print and draw the losses of growing learning rates; the picture."""
    from convlstm_vo.training.finder import find_learning_rate

    curve = find_learning_rate(config, training, log)
    for rate, loss in list(zip(curve.rates, curve.losses, strict=True))[:: max(1, len(curve.rates) // 20)]:
        log.message(f"  learning rate {rate:8.1e}   loss {loss:.4g}")
    log.message(f"Suggestion: --lr {curve.suggestion:.1e}")
    return curve.save(config.out) if not log.quiet else config.out


def load_training_data(
    config: TrainConfig, *, quiet: bool = False
) -> tuple[list[DecodedSequence], list[DecodedSequence]]:
    """Decoded training and validation sequences; ``quiet`` without a progress bar."""
    if config.data is None:
        raise TrainError("--data DIR is missing: a KITTI odometry tree (`convlstm-vo simulate` makes one)")
    names = config.sequences or tuple(
        name
        for name in sequence_names(config.data)
        if name not in config.validate and (config.data / "poses" / f"{name}.txt").exists()
    )
    names = names[: config.max_sequences or None]
    sequences = open_kitti(config.data, names, camera=config.camera)
    validation = open_kitti(config.data, config.validate, camera=config.camera) if config.validate else []
    model = config.model
    size = {"height": model.image_height, "width": model.image_width, "channels": model.image_channels}
    folder = config.cache or default_cache_folder()
    total = sum(map(len, [*sequences, *validation]))
    bar = contextlib.nullcontext(lambda count: None) if quiet else progress("Decoding frames", total)
    with bar as advance:
        decoded = [decode_sequence(s, **size, folder=folder, advance=advance) for s in [*sequences, *validation]]
    return decoded[: len(sequences)], decoded[len(sequences) :]
