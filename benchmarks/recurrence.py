"""Does memory earn its place? The weights trained alike with a carried state, a state that is reset, another cell.

convlstm-vo train-geometric --out DIR      # renders, trains the flow and caches its cells, which are used here
python benchmarks/recurrence.py DIR --steps 300 --seeds 0 1 2 --json recurrence.json
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch

from convlstm_vo.models.checkpoint import build
from convlstm_vo.models.config import preset
from convlstm_vo.models.geometric import GeometricNet
from convlstm_vo.training.geometric import CellDrive, WeighConfig, measure, train_weights

VARIANTS = {
    "ConvLSTM carried": ("convlstm", "carried"),
    "ConvLSTM reset": ("convlstm", "hidden-reset"),
    "ConvGRU carried": ("convgru", "carried"),
    "nothing remembered": ("convlstm", "none"),
}


def load(folder: Path) -> list[CellDrive]:
    """Cached cells of all drives of a folder."""
    drives = []
    for path in sorted(folder.glob("[0-9]*.npz")):
        with np.load(path) as values:
            drives.append(CellDrive(**dict(values)))
    return drives


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("trained", type=Path)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    train, unseen = load(options.trained / "cells" / "train"), load(options.trained / "cells" / "unseen")
    results = {}
    for seed in options.seeds:
        for name, (cell, memory) in VARIANTS.items():
            net = build(preset("geometric", cell=cell), seed=seed)
            assert isinstance(net, GeometricNet)
            config = WeighConfig(steps=options.steps, seed=seed, memory=memory)
            train_weights(net, train, unseen, config, options.trained / "recurrence" / f"{cell}-{memory}-{seed}")
            results[f"{name}, seed {seed}"] = measure(net, unseen, config)
            print(name, seed, results[f"{name}, seed {seed}"], flush=True)
            if options.json:
                options.json.write_text(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
