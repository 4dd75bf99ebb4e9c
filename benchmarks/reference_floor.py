"""How much of the error on KITTI is the reference's? Two estimators, against it and against each other.

python benchmarks/reference_floor.py --json reference_floor.json

The default network and KLT + essential matrix (OpenCV) see the same images by different means. Where both differ
from the reference alike and hardly from each other, the difference belongs to the reference, or to what both share:
images and calibration. Rotations about the camera's axes: x is pitch, y is yaw, z is roll.

How much more or less an estimator turns than the reference (yaw gain) tells of the focal length: one given too long
by a percent makes each turn too small by a percent. On rendered streets, whose camera is known exactly, the gain is
0 (`--streets`). With `--focal` the network is scored once more with focal lengths times that factor.

The reference is the path of a GPS/IMU unit, turned into the camera's axes by a calibration. If that turns by half
a degree too much, a camera seems to slip sideways by 0.9 % of its way, whatever measures it. How far it is off is
found here from KLT alone (median difference of direction, pitch and yaw; the roll cannot be seen in it), and the
network's path is scored once more in axes turned by that. These are not KITTI's figures: they say what is left of
the network's error when an alignment is taken out that another estimator has found.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from zero_shot import CLIPS, klt_essential, unseen_streets

from convlstm_vo.evaluation.metrics import score
from convlstm_vo.geometry import se3
from convlstm_vo.geometry.trajectory import Trajectory
from convlstm_vo.models.checkpoint import load_checkpoint
from convlstm_vo.odometer import estimate_trajectory
from convlstm_vo.sequences.kitti import KittiSequence

LEAST_WAY_M = 0.2  # of a frame whose direction says something
LEAST_TURN_DEG = 30.0  # of a street whose yaw gain says something


def compared(a: Trajectory, b: Trajectory, lengths_m: tuple[float, ...]) -> dict[str, object]:
    """Rotation of b against a: KITTI's r_rel; mean and spread of a frame's error in degrees, by axis."""
    result = score(a, Trajectory(a.timestamps_s, b.T_world_camera), lengths_m=lengths_m, same_start=True)
    errors = np.degrees(b.motions[:, 3:] - a.motions[:, 3:])
    return {
        "r_rel": result.r_rel_deg_per_100m,
        "mean_deg": errors.mean(0).round(4).tolist(),
        "sd_deg": errors.std(0).round(4).tolist(),
    }


def misalignment(reference: Trajectory, other: Trajectory) -> NDArray[np.float64]:
    """(3,) rotation vector that turns directions of motion of another path into those of the reference; no roll."""
    ways = [np.linalg.norm(path.motions[:, :3], axis=1) for path in (reference, other)]
    moving = np.minimum(*ways) > LEAST_WAY_M
    ahead = [(p.motions[:, :3] / w[:, None])[moving] for p, w in zip((reference, other), ways, strict=True)]
    right, down, _ = np.median(ahead[1] - ahead[0], axis=0)
    return np.array([down, -right, 0.0])


def yaw_gain(reference: Trajectory, other: Trajectory) -> tuple[float, float]:
    """By how many percent another path turns more than the reference (least squares), and degrees turned."""
    true, found = (np.degrees(path.motions[:, 4]) for path in (reference, other))
    return 100 * float((found - true) @ true / (true @ true)), float(np.abs(true).sum())


def in_turned_axes(path: Trajectory, rotvec: NDArray[np.float64]) -> Trajectory:
    """The same path, its camera's axes turned."""
    turn = np.eye(4)
    turn[:3, :3] = se3.so3_exp(rotvec)
    return Trajectory(path.timestamps_s, turn @ path.T_world_camera @ turn.T)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kitti", type=Path, default=Path("../shared/kitti"))
    parser.add_argument("--focal", type=float, default=0.99, help="factor of focal lengths to try")
    parser.add_argument("--streets", type=int, default=12, help="rendered streets, for their yaw gain")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    net = load_checkpoint()
    results: dict[str, dict[str, object]] = {}
    for street in unseen_streets(options.streets, 100):
        gain, turned = yaw_gain(street.trajectory, estimate_trajectory(net, street))
        if turned > LEAST_TURN_DEG:
            results[street.name] = {"yaw_gain_percent": gain, "turned_deg": turned}
            print(f"{street.name}: yaw gain {gain:+.2f} % over {turned:.0f} degrees", flush=True)
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
        for title in ("network", "KLT"):
            gain, turned = yaw_gain(ways["reference"], ways[title])
            results[f"{name}: yaw gain of {title}"] = {"yaw_gain_percent": gain, "turned_deg": turned}
            print(f"{name:5} yaw gain of {title}: {gain:+.2f} % over {turned:.0f} degrees", flush=True)
        turn = misalignment(ways["reference"], ways["KLT"])
        camera = sequence.camera
        sequence.camera = dataclasses.replace(camera, fx=camera.fx * options.focal, fy=camera.fy * options.focal)
        paths = {
            "network": ways["network"],
            "turned": in_turned_axes(ways["network"], turn),
            f"focal length x {options.focal}": estimate_trajectory(net, sequence).from_first_pose(),
        }
        for title, path in paths.items():
            result = score(ways["reference"], path, lengths_m=lengths, same_start=True)
            results[f"{name}: {title}"] = {
                "t_rel": result.t_rel_percent,
                "r_rel": result.r_rel_deg_per_100m,
                "turn_deg": np.degrees(turn * (title == "turned")).round(3).tolist(),
            }
            print(f"{name:5} {title}: {results[f'{name}: {title}']}", flush=True)
    if options.json:
        options.json.write_text(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
