"""The default network where it has never been: real KITTI clips and unseen streets, closed loop, metric, unaligned.

python benchmarks/zero_shot.py --json zero_shot.json
python benchmarks/zero_shot.py --also tiny=runs/tiny/checkpoints/last --json zero_shot.json
python benchmarks/zero_shot.py --kitti none --streets 9 --frames 1000 --lengths 100 200 300 400 500 600 700 800
python benchmarks/zero_shot.py --kitti none --streets 12 --traffic heavy

Beside it: its solver alone, with the same priors but no ConvLSTM that weighs; networks of one's own (`--also`);
KLT + essential matrix (RANSAC at 0.5 and 1.0 px), which is told the true length of each motion; and the trivial
baselines, which are told the truth's mean. Segments of 20 and 40 m; of 100 m where a clip is long enough.
"""

from __future__ import annotations

import argparse
import functools
import json
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from convlstm_vo.evaluation.baselines import BASELINES
from convlstm_vo.evaluation.metrics import score
from convlstm_vo.geometry import se3
from convlstm_vo.geometry.trajectory import Trajectory
from convlstm_vo.models.checkpoint import DEFAULT_CHECKPOINT, Network, load_checkpoint
from convlstm_vo.models.geometric import Cells, GeometricNet
from convlstm_vo.models.mounting import Memory
from convlstm_vo.odometer import estimate_trajectory
from convlstm_vo.progress import progress
from convlstm_vo.sequences.base import Sequence
from convlstm_vo.sequences.kitti import KittiSequence
from convlstm_vo.world import Mount, TrafficKind, WorldSequence

CLIPS = {"06": (20.0, 40.0), "01": (20.0, 40.0), "0005": (20.0, 40.0), "0013": (100.0,)}
ROADS = ("town", "country", "motorway")
FIRST_SEED = 5_000_000  # streets that no training saw


class GeometryAlone(GeometricNet):
    """The solver with its priors; what the ConvLSTM says of the cells is not heard."""

    def trusted_weights(self, cells: Cells, memory: Memory, trust: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return super().trusted_weights(cells, memory)


def alone(net: Network) -> GeometryAlone:
    """A network without its ConvLSTM."""
    assert isinstance(net, GeometricNet)
    out = GeometryAlone(net.config)
    out.load_state_dict(net.state_dict())
    out.mixed = net.mixed
    return out.eval().requires_grad_(False)


def klt_essential(sequence: Sequence, threshold_px: float) -> Trajectory:
    """OpenCV's classical visual odometry; the length of each motion is the true one."""
    K = sequence.camera.matrix()
    truth = sequence.trajectory
    assert truth is not None
    motions, previous = [], _gray(sequence, 0)
    for i in range(1, len(sequence)):
        current = _gray(sequence, i)
        length = float(np.linalg.norm(truth.motions[i - 1, :3]))
        motions.append(_motion(previous, current, K, threshold_px, length))
        previous = current
    return Trajectory.from_motions(np.stack(motions), truth.timestamps_s)


def _gray(sequence: Sequence, index: int) -> NDArray[np.uint8]:
    image = sequence[index].image
    return image if image.ndim == 2 else np.asarray(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), np.uint8)


def _motion(
    prev: NDArray[np.uint8], curr: NDArray[np.uint8], K: NDArray[np.float64], threshold: float, length: float
) -> NDArray[np.float64]:
    points = cv2.goodFeaturesToTrack(prev, 2000, 0.01, 7)
    seen, found, _ = cv2.calcOpticalFlowPyrLK(prev, curr, points, None, winSize=(21, 21), maxLevel=3)
    kept = found[:, 0] == 1
    a, b = points[kept, 0], seen[kept, 0]
    E, mask = cv2.findEssentialMat(a, b, K, cv2.RANSAC, 0.999, threshold)
    _, R, t, _ = cv2.recoverPose(E[:3], a, b, K, mask=mask)
    T_curr_prev = np.eye(4)
    T_curr_prev[:3, :3], T_curr_prev[:3, 3] = R, t[:, 0] * length
    return se3.motion_from_matrix(se3.inverse(T_curr_prev))


def measure(
    sequences: list[Sequence], estimate: Callable[[Sequence], Trajectory], lengths: dict[str, tuple[float, ...]]
) -> dict[str, list[float]]:
    """t_rel %, r_rel degrees / 100 m and scale bias % by sequence."""
    out = {}
    for sequence in sequences:
        truth = sequence.trajectory
        assert truth is not None
        true, found = truth.from_first_pose(), estimate(sequence).from_first_pose()
        same = Trajectory(true.timestamps_s, found.T_world_camera)
        result = score(true, same, lengths_m=lengths.get(sequence.name, (20.0, 40.0, 100.0)), same_start=True)
        bias = 100 * (float(found.distances_m[-1]) / float(true.distances_m[-1]) - 1)
        out[sequence.name] = [float(result.t_rel_percent or 0), float(result.r_rel_deg_per_100m or 0), bias]
    return out


def unseen_streets(
    count: int,
    frames: int,
    traffic: TrafficKind = "usual",
    cross_slope: bool = False,
    hilly: bool = False,
    narrow: bool = False,
    *,
    mount: Mount | None = None,
    seed: int = FIRST_SEED,
) -> list[Sequence]:
    """Drives of all kinds, up to 130 km/h, seen by KITTI's camera; those that hardly move are left out."""
    drives: list[Sequence] = []
    while len(drives) < count:
        kind = ROADS[seed % 3]
        drive = WorldSequence(
            seed,
            frames=frames,
            kind=kind,  # type: ignore[arg-type]
            traffic=traffic,
            cross_slope=cross_slope,
            hilly=hilly,
            narrow=narrow,
            mount=mount,
        )
        seed += 1
        if drive.trajectory.distances_m[-1] > 30:
            drives.append(drive)
    return drives


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kitti", type=Path, default=Path("../shared/kitti"))
    parser.add_argument("--checkpoint", type=Path, default=DEFAULT_CHECKPOINT)
    parser.add_argument("--also", nargs="*", default=[], metavar="NAME=CHECKPOINT", help="networks to measure too")
    parser.add_argument("--streets", type=int, default=12)
    parser.add_argument("--frames", type=int, default=120)
    parser.add_argument("--traffic", choices=["usual", "heavy"], default="usual", help="on streets")
    parser.add_argument("--cross-slope", action="store_true", help="streets that are not level across")
    parser.add_argument("--hilly", action="store_true", help="streets that rise and fall as KITTI's do")
    parser.add_argument("--narrow", action="store_true", help="lanes between kerbs, in town and country")
    parser.add_argument("--lengths", type=float, nargs="+", default=[20.0, 40.0, 100.0], help="of segments, metres")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    net = load_checkpoint(options.checkpoint)
    results: dict[str, dict[str, list[float]]] = {}
    clips: list[Sequence] = []
    if options.kitti.is_dir():
        clips = [KittiSequence(options.kitti, name) for name in CLIPS]
        ways: dict[str, Callable[[Sequence], Trajectory]] = {
            "default network": lambda s: estimate_trajectory(net, s),
            "geometry alone": lambda s: estimate_trajectory(alone(net), s),
            "KLT + E, 0.5 px, true scale": lambda s: klt_essential(s, 0.5),
            "KLT + E, 1.0 px, true scale": lambda s: klt_essential(s, 1.0),
        }
        for name, path in (entry.split("=", 1) for entry in options.also):
            ways[name] = functools.partial(estimate_trajectory, load_checkpoint(Path(path)))
        ways |= {name: (lambda s, path=path: path(s.trajectory)) for name, path in BASELINES.items()}
        results = {name: measure(clips, way, CLIPS) for name, way in ways.items()}
        for name, row in results.items():
            print(
                f"{name:30}", "  ".join(f"{clip} {v[0]:.2f}/{v[1]:.2f} ({v[2]:+.1f} %)" for clip, v in row.items())
            )
    if options.streets:
        roads = options.cross_slope, options.hilly, options.narrow
        drives = unseen_streets(options.streets, options.frames, options.traffic, *roads)
        with progress("Unseen streets", sum(map(len, drives))) as advance:
            lengths = dict.fromkeys((drive.name for drive in drives), tuple(options.lengths))
            row = measure(drives, lambda s: estimate_trajectory(net, s, advance), lengths)
        results["unseen streets"] = row
        values = np.array(list(row.values()))
        mean, median = values.mean(0), np.median(values, 0)
        across = "cross slope" if options.cross_slope else "level across"
        across += ", hilly" * options.hilly + ", narrow" * options.narrow
        print(f"unseen streets, {options.traffic} traffic, {across}, {len(row)} drives of {options.frames} frames")
        print(f"  mean t_rel {mean[0]:.2f} %, r_rel {mean[1]:.2f}; median {median[0]:.2f} %, {median[1]:.2f}")
        print(f"  scale bias {mean[2]:+.2f} %, spread {values[:, 2].std():.2f}")
    if options.json:
        options.json.write_text(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
