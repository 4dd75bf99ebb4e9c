"""From a configuration to a trained network: the sequences that it names, decoded, and the loop over them."""

from __future__ import annotations

import json
from pathlib import Path

from convlstm_vo.config import to_dict
from convlstm_vo.geometry.files import write_atomically
from convlstm_vo.progress import progress
from convlstm_vo.sequences.kitti import open_kitti, sequence_names
from convlstm_vo.training.cache import DecodedSequence, decode_sequence, default_cache_folder
from convlstm_vo.training.config import TrainConfig, TrainError
from convlstm_vo.training.log import TrainingLog
from convlstm_vo.training.loop import train


def run_training(config: TrainConfig) -> Path:
    """Load the sequences that a configuration names and train on them; the best checkpoint's folder."""
    training, validation = load_training_data(config)
    last = config.out / "checkpoints" / "last"
    if last.exists() and not config.resume:
        raise TrainError(f"{last}: a run is there already; go on with --resume or choose another --out")
    write_atomically(config.out / "train.json", json.dumps(to_dict(config), indent=2) + "\n")
    return train(config, training, validation, TrainingLog(config.out))


def load_training_data(config: TrainConfig) -> tuple[list[DecodedSequence], list[DecodedSequence]]:
    """Decoded training and validation sequences."""
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
    with progress("Decoding frames", sum(map(len, [*sequences, *validation]))) as advance:
        decoded = [decode_sequence(s, **size, folder=folder, advance=advance) for s in [*sequences, *validation]]
    return decoded[: len(sequences)], decoded[len(sequences) :]
