"""Does memory earn its place? The weights trained alike with a carried state, a state that is reset, another cell.

convlstm-vo train-geometric --out DIR      # renders, trains the flow and caches its cells, which are used here
python benchmarks/recurrence.py DIR --steps 400 --seeds 0 1 2 --json recurrence.json

Measured on the cells of unseen streets as they are, on half of them with a tenth of the frames dropped or spoilt,
on that half over a bonnet, dirty or polished, and, closed loop from images, on two KITTI clips.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path

import numpy as np
import torch
from zero_shot import CLIPS
from zero_shot import measure as measure_trajectories

from convlstm_vo.models.cells import State
from convlstm_vo.models.checkpoint import load_checkpoint
from convlstm_vo.models.config import preset
from convlstm_vo.models.geometric import Cells, Estimate, GeometricNet
from convlstm_vo.models.mounting import Memory
from convlstm_vo.odometer import estimate_trajectory
from convlstm_vo.sequences.kitti import KittiSequence
from convlstm_vo.training.cell_drives import CellDrive, cache_cells
from convlstm_vo.training.geometric import WeighConfig, measure, train_weights
from convlstm_vo.training.rendered import open_drive

VARIANTS = {
    "ConvLSTM carried": ("convlstm", "carried", True),
    "ConvLSTM reset": ("convlstm", "hidden-reset", True),
    "ConvGRU carried": ("convgru", "carried", True),
    "nothing remembered": ("convlstm", "none", True),
    "geometry alone": ("convlstm", "carried", False),
}


class Forgetful(GeometricNet):
    """The network in closed loop with the memory that it was trained with."""

    memory = "carried"

    def conclude(
        self, cells: Cells, memory: Memory, hidden: State | None, before: Memory | None = None
    ) -> tuple[Estimate, State]:
        if self.memory == "none":
            blank = Memory.unpack(torch.zeros_like(memory.pack()))
            surely = torch.full_like(memory.aside, 1e12)  # where the camera looks is not found out either
            kept = {"motion": memory.motion, "height": memory.height, "aside_precision": surely}
            memory = dataclasses.replace(blank, **kept)
        return super().conclude(cells, memory, hidden if self.memory == "carried" else None, before)


def load(folder: Path) -> list[CellDrive]:
    """Cached cells of all drives of a folder."""
    drives = []
    for path in sorted(folder.glob("[0-9]*.npz")):
        with np.load(path) as values:
            drives.append(CellDrive(**dict(values)))
    return drives


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trained", type=Path)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--kitti", type=Path, default=Path("../shared/kitti"))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    cells = options.trained / "cells"
    flow = load_checkpoint(options.trained / "checkpoint").flow
    drives = [open_drive(path) for path in sorted((options.trained / "drives" / "unseen").glob("[0-9]*"))[:12]]
    spoilt = cache_cells(flow, drives, cells / "spoilt", 1)
    bonnets = cache_cells(flow, drives, cells / "unseen-bonnet", 1, plain=True, bonnet=True)
    seen = [folder for name in ("train", "heavy-*", "bonnet") for folder in sorted(cells.glob(name))]
    train, unseen = [drive for folder in seen for drive in load(folder)], load(cells / "unseen")
    clips = [KittiSequence(options.kitti, name) for name in ("06", "01")] if options.kitti.is_dir() else []
    results = json.loads(options.json.read_text()) if options.json and options.json.exists() else {}
    for seed in options.seeds:
        for name in options.variants:
            cell, memory, weigh = VARIANTS[name]
            if (key := f"{name}, seed {seed}") in results:
                continue
            net = Forgetful(preset("geometric", cell=cell), seed=seed)
            net.memory = memory
            net.flow.load_state_dict(flow.state_dict())
            net.flow.requires_grad_(False)
            config = WeighConfig(steps=options.steps, seed=seed, memory=memory, weigh=weigh)
            out = options.trained / "recurrence" / f"{name.replace(' ', '-')}-{seed}"
            train_weights(net, train, unseen, config, out)
            row: dict[str, object] = dict(measure(net, unseen, config))
            row["spoilt"] = measure(net, spoilt, config)
            row["bonnets"] = measure(net, bonnets, config)
            row["kitti"] = measure_trajectories(clips, lambda s, net=net: estimate_trajectory(net, s), CLIPS)
            results[key] = row
            print(key, row, flush=True)
            if options.json:
                options.json.write_text(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
