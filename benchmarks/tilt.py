"""The road's tilt, and the camera's mounting, as the default network finds them while driving on unseen streets.

python benchmarks/tilt.py --json tilt.json
python benchmarks/tilt.py --random --json tilt_random.json   # cameras, mountings, light and frame rates at random

Closed loop, from a fresh state; the camera's height is told, its mounting is not. *Tilt*: angle between the road
under the car and the camera's axis, against the world's exact one, of each frame from the 10th on; *of spells*:
means over ten frames, the first ten apart. *Mounting*: the slow part of it, at the end of a drive, against the
drive's mean.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from zero_shot import FIRST_SEED, unseen_streets

from convlstm_vo.calibration import VehicleCalibration
from convlstm_vo.models.checkpoint import DEFAULT_CHECKPOINT, load_checkpoint
from convlstm_vo.models.mounting import Memory, turned_aside
from convlstm_vo.models.scene import road_slopes
from convlstm_vo.odometer import VisualOdometry
from convlstm_vo.progress import progress
from convlstm_vo.sequences.base import Sequence
from convlstm_vo.training.rendered import random_sequence
from convlstm_vo.world import WorldSequence

ENOUGH_DEG, START = 0.1, 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, default=DEFAULT_CHECKPOINT)
    parser.add_argument("--streets", type=int, default=24)
    parser.add_argument("--frames", type=int, default=120)
    parser.add_argument("--random", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    net = load_checkpoint(options.checkpoint)
    drives: list[Sequence] = unseen_streets(options.streets, options.frames)
    if options.random:
        seeds = range(FIRST_SEED, FIRST_SEED + options.streets)
        drives = [random_sequence(seed, options.frames, height=192, width=640) for seed in seeds]
    errors = np.full(
        (len(drives), options.frames, 2), np.nan
    )  # roll, tilt in degrees; of frames from the second on
    mounting = np.empty((len(drives), 2))
    with progress("Unseen streets", sum(map(len, drives))) as advance:
        for number, drive in enumerate(drives):
            assert isinstance(drive, WorldSequence)
            true = road_slopes(torch.from_numpy(drive.road_plane[:, :3])).rad2deg().numpy()
            calibration = VehicleCalibration(drive.mount.height_m)
            odometer = VisualOdometry(net, drive.camera, calibration=calibration)
            for k, frame in enumerate(drive):
                odometer.track(frame)
                if k:
                    assert odometer._state is not None
                    memory = Memory.unpack(odometer._state[-1])
                    memory = turned_aside(memory, torch.zeros_like(memory.aside))  # in the camera's own axes
                    errors[number, k] = memory.slopes[0].rad2deg().numpy() - true[k]
                    mounting[number] = memory.mounting[0].rad2deg().numpy() - true.mean(0)
                advance(1)
    settled = errors[:, START:]
    spells = np.abs(errors[:, 1 : 1 + (options.frames - 1) // 10 * 10, 1].reshape(len(drives), -1, 10).mean(2))
    results = {
        "tilt_deg_median": float(np.median(np.abs(settled[..., 1]))),
        "tilt_deg_mean": float(np.abs(settled[..., 1]).mean()),
        "tilt_deg_bias": float(settled[..., 1].mean()),
        "tilt_deg_of_drives_median": float(np.median(np.abs(settled[..., 1].mean(1)))),
        "roll_deg_median": float(np.median(np.abs(settled[..., 0]))),
        "share_within_0.1_deg": float((np.abs(settled[..., 1]) < ENOUGH_DEG).mean()),
        "mounting_deg_median": float(np.median(np.abs(mounting[:, 1]))),
        "tilt_deg_first_spell_median": float(np.median(spells[:, 0])),
        "tilt_deg_later_spells_median": float(np.median(spells[:, 1:])),
    }
    for name, value in results.items():
        print(f"{name:30}{value:8.3f}")
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
