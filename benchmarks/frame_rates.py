"""How the frame rate of a video matters: the same unseen streets at 60, 30, 15 and 10 frames a second.

    python benchmarks/frame_rates.py --json OUT.json

Each street is rendered once, at 60 frames a second, and shown with frames left out; as the odometer does it, from
key frames a tenth of a second apart, and with each frame measured from the last one.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from convlstm_vo import odometer
from convlstm_vo.evaluation.evaluate import save_json
from convlstm_vo.geometry import se3
from convlstm_vo.geometry.camera import Camera
from convlstm_vo.models.checkpoint import Network, load_checkpoint
from convlstm_vo.odometer import VisualOdometry
from convlstm_vo.progress import progress
from convlstm_vo.sequences.base import Frame
from convlstm_vo.world import WorldSequence

HALF_KITTI = Camera(363.6, 363.6, 309.5, 93.5, height=192, width=624)
FIRST, FPS, STEPS = 5_200_000, 60, (1, 2, 4, 6)
LEAST_WAY_M = 15.0


def drift(net: Network, frames: list[Frame], truth: np.ndarray) -> tuple[float, float]:
    """Error of the whole way, % of it, and of the whole turn, degrees per 100 m."""
    net_odometer = VisualOdometry(net, HALF_KITTI)
    end = [net_odometer.track(frame).T_world_camera for frame in frames][-1]
    true = se3.inverse(truth[0]) @ truth[-1]
    way = float(np.linalg.norm(np.diff(truth[:, :3, 3], axis=0), axis=1).sum())
    turn = float(np.degrees(se3.rotation_angle((se3.inverse(end) @ true)[None, :3, :3])[0]))
    return 100 * float(np.linalg.norm(end[:3, 3] - true[:3, 3])) / way, 100 * turn / way


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--streets", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=4.0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    net, key_s = load_checkpoint(), odometer._KEY_S
    found: dict[str, list[tuple[float, float]]] = {}
    with progress("Frame rates", options.streets) as advance:
        for seed in range(FIRST, FIRST + options.streets):
            street = WorldSequence(seed, frames=round(options.seconds * FPS) + 1, fps=float(FPS), camera=HALF_KITTI)
            advance(1)
            if street.trajectory.distances_m[-1] < LEAST_WAY_M:
                continue
            frames, truth = list(street), street.trajectory.T_world_camera
            for step in STEPS:
                for name, apart_s in (("key frames", key_s), ("each from the last", 0.0)):
                    odometer._KEY_S = apart_s
                    result = drift(net, frames[::step], truth[::step])
                    found.setdefault(f"{FPS // step} Hz, {name}", []).append(result)
    for name, results in found.items():
        mean, median = np.mean(results, 0), np.median(results, 0)
        print(
            f"{name:30} mean {mean[0]:.2f} % {mean[1]:.3f} deg/100 m, median {median[0]:.2f} {median[1]:.3f}"
            f" ({len(results)} streets)"
        )
    if options.json is not None:
        save_json(options.json, found)


if __name__ == "__main__":
    main()
