"""How much of the rotation error on KITTI is the reference's? Two estimators, against it and against each other.

python benchmarks/reference_floor.py --json reference_floor.json

The default network and KLT + essential matrix (OpenCV) see the same images by different means. Where both differ
from the reference alike and hardly from each other, the difference belongs to the reference, or to what both share:
images and calibration. Rotations about the camera's axes: x is pitch, y is yaw, z is roll.
"""

from __future__ import annotations

import argparse
import itertools
import json
from pathlib import Path

import numpy as np
from zero_shot import CLIPS, klt_essential

from convlstm_vo.evaluation.metrics import score
from convlstm_vo.geometry.trajectory import Trajectory
from convlstm_vo.models.checkpoint import load_checkpoint
from convlstm_vo.odometer import estimate_trajectory
from convlstm_vo.sequences.kitti import KittiSequence


def compared(a: Trajectory, b: Trajectory, lengths_m: tuple[float, ...]) -> dict[str, object]:
    """Rotation of b against a: KITTI's r_rel; mean and spread of a frame's error in degrees, by axis."""
    result = score(a, Trajectory(a.timestamps_s, b.T_world_camera), lengths_m=lengths_m, same_start=True)
    errors = np.degrees(b.motions[:, 3:] - a.motions[:, 3:])
    return {
        "r_rel": result.r_rel_deg_per_100m,
        "mean_deg": errors.mean(0).round(4).tolist(),
        "sd_deg": errors.std(0).round(4).tolist(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kitti", type=Path, default=Path("../shared/kitti"))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    net, results = load_checkpoint(), {}
    for name, lengths in CLIPS.items():
        sequence = KittiSequence(options.kitti, name)
        assert sequence.trajectory is not None
        ways = {
            "reference": sequence.trajectory,
            "network": estimate_trajectory(net, sequence),
            "KLT": klt_essential(sequence, 0.5),
        }
        ways = {key: way.from_first_pose() for key, way in ways.items()}
        for (first, a), (second, b) in itertools.combinations(ways.items(), 2):
            row = compared(a, b, lengths)
            results[f"{name}: {second} against {first}"] = row
            print(
                f"{name:5} {second:8} against {first:10} r_rel {row['r_rel']:.2f}  mean {row['mean_deg']}", end=""
            )
            print(f"  spread {row['sd_deg']} degrees a frame, x y z", flush=True)
    if options.json:
        options.json.write_text(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
