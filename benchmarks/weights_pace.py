"""How fast the weights are trained on cached flow: one process and two, in turn.

convlstm-vo train-geometric --out DIR      # renders, trains the flow and caches its cells, which are used here
python benchmarks/weights_pace.py DIR --json weights_pace.json

Frames a second, median of updates of 8 lanes by 8 frames: one process with one thread, one with two, and two
processes that share the lanes. Quote ratios: all is measured in one run.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import tempfile
import time
from pathlib import Path
from statistics import median

import torch
from recurrence import load

from convlstm_vo.models.config import preset
from convlstm_vo.models.geometric import GeometricNet
from convlstm_vo.training.cell_drives import CellDrive
from convlstm_vo.training.geometric import WeighConfig, WeighRun

WAYS = {"one process": (1, 1), "one process, two threads": (1, 2), "two processes": (2, 1)}


def pace(drives: list[CellDrive], processes: int, threads: int, updates: int) -> float:
    """Frames a second."""
    torch.set_num_threads(threads)
    net = GeometricNet(preset("geometric"), seed=0)
    net.flow.requires_grad_(False)
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as block:
        config = WeighConfig()
        run = WeighRun(net, drives, config, Path(folder))
        run.helpers = [block.enter_context(run.helper()) for _ in range(processes - 1)]
        seconds = []
        for _ in range(updates):
            began = time.perf_counter()
            run.update()
            seconds.append(time.perf_counter() - began)
    return config.lanes * config.frames / median(seconds[3:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trained", type=Path)
    parser.add_argument("--updates", type=int, default=24, help="the first three do not count")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    drives = load(options.trained / "cells" / "train")
    found: dict[str, list[float]] = {name: [] for name in WAYS}
    for _ in range(options.rounds):
        for name, (processes, threads) in WAYS.items():
            found[name].append(pace(drives, processes, threads, options.updates))
            print(f"{name:25s} {found[name][-1]:6.1f} frames/s", flush=True)
    for name, values in found.items():
        print(f"{name:25s} median {median(values):6.1f} frames/s")
    if options.json:
        options.json.write_text(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
