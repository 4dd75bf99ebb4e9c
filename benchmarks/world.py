"""How fast the built-in world renders, and how its car moves beside KITTI's.

    python benchmarks/world.py [--json OUT.json] [--kitti-poses DIR] [--plot OUT.png]

Speed: frames a second at 620x188 of all cores, in processes as `convlstm-vo simulate` uses them, warm, on streets
that are already built, poses only and with depth, flow and mask. CPU time a frame is also given, since a shared
machine's wall time says little. Vertical curvature: of crests, dips and ramps, over 40 m, of paths usual and hilly.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import time
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from convlstm_vo.geometry.trajectory import read_kitti
from convlstm_vo.world import KITTI_CAMERA, WorldSequence, make_plan

CAMERA = KITTI_CAMERA.resized(height=188, width=620)
KINDS = ("town", "country", "motorway")


def time_frames(job: tuple[int, str, bool, int]) -> tuple[float, float, float]:
    """(wall, CPU seconds) of rendering a drive's frames in order, and CPU seconds of building its street."""
    seed, kind, labels, frames = job
    cv2.setNumThreads(1)
    start = time.process_time()
    world = WorldSequence(seed, frames=frames, kind=kind, camera=CAMERA)  # type: ignore[arg-type]
    world.frame_and_truth(0)
    built = time.process_time() - start
    wall, cpu = time.perf_counter(), time.process_time()
    for index in range(frames):
        if labels:
            world.frame_and_truth(index)
        else:
            world[index]
    return time.perf_counter() - wall, time.process_time() - cpu, built


def speed(frames: int, workers: int) -> dict[str, Any]:
    """Frames a second by kind of road and mode."""
    out: dict[str, Any] = {"image": "620x188", "workers": workers}
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        pool.map(time_frames, [(0, "country", True, 3)] * workers)  # compile, or load what is compiled
        for kind in KINDS:
            for labels in (False, True):
                laps = pool.map(time_frames, [(10 + k, kind, labels, frames) for k in range(workers)], chunksize=1)
                wall, cpu, built = (np.array(column) for column in zip(*laps, strict=True))
                out[f"{kind}{' with depth and flow' if labels else ''}"] = {
                    "frames_per_s": round(float(frames * workers / wall.max()), 1),
                    "cpu_ms_a_frame": round(float(cpu.mean() / frames * 1e3), 1),
                    "frames_per_cpu_s_on_2_cores": round(float(2 * frames / cpu.mean()), 1),
                    "street_cpu_s": round(float(built.mean()), 2),
                }
    return out


def motion_statistics(T_world_camera: np.ndarray, period_s: float = 0.1) -> dict[str, np.ndarray]:
    """Speed (m/s), yaw, pitch and roll rates (degrees a frame) of a drive."""
    steps = np.linalg.inv(T_world_camera[:-1]) @ T_world_camera[1:]
    R = steps[:, :3, :3]
    rates = np.degrees(np.stack([R[:, 0, 2] - R[:, 2, 0], R[:, 2, 1] - R[:, 1, 2], R[:, 1, 0] - R[:, 0, 1]], 1) / 2)
    return {
        "speed m/s": np.linalg.norm(steps[:, :3, 3], axis=1) / period_s,
        "yaw deg/frame": rates[:, 0],
        "pitch deg/frame": rates[:, 1],
        "roll deg/frame": rates[:, 2],
    }


def gathered(drives: list[np.ndarray]) -> dict[str, np.ndarray]:
    """Statistics of several drives as one."""
    each = [motion_statistics(poses) for poses in drives]
    return {key: np.concatenate([one[key] for one in each]) for key in each[0]}


def world_drives(count: int, frames: int) -> list[np.ndarray]:
    """Poses of drives of the mixed kind, nothing rendered."""
    return [WorldSequence(1000 + k, frames=frames).drive.T_street_camera for k in range(count)]


def dynamics(kitti: Path, count: int, frames: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Percentiles of the world's drives and of KITTI's, and how far they overlap; with the raw numbers."""
    raw = {"world": gathered(world_drives(count, frames))}
    if kitti.is_dir():
        raw["kitti 00-10"] = gathered(
            [read_kitti(path).T_world_camera for path in sorted(kitti.glob("[01][0-9].txt"))]
        )
    table: dict[str, Any] = {}
    for key in raw["world"]:
        table[key] = {
            name: np.percentile(values[key], [1, 5, 50, 95, 99]).round(3).tolist() for name, values in raw.items()
        }
        if len(raw) == 2:
            table[key]["overlap"] = round(overlap(*(values[key] for values in raw.values())), 2)
    return table, raw


def vertical_curvature(places: np.ndarray, span_m: float = 40.0) -> np.ndarray:
    """Of a path (n, 3) of places, y down: by parabolas over so many metres, every 5 m; 1/m, positive in a dip."""
    s = np.concatenate([[0.0], np.cumsum(np.linalg.norm(np.diff(places, axis=0), axis=1))])
    moved = np.concatenate([[True], np.diff(s) > 0.05])  # a car that stands goes nowhere
    at = np.arange(0.0, s[-1], 1.0)
    height, half = -np.interp(at, s[moved], places[moved, 1]), round(span_m / 2)
    x = np.arange(-half, half + 1.0)
    bend = np.linalg.pinv(np.stack([np.ones_like(x), x, x * x / 2], 1))[2]
    return np.array([bend @ height[i - half : i + half + 1] for i in range(half, len(at) - half, 5)])


def profiles(kitti: Path, count: int) -> dict[str, list[float]]:
    """Percentiles 50, 75, 90, 97 of the amount of vertical curvature, 1/km: of KITTI's drives, and of paths."""
    drives: dict[str, list[np.ndarray]] = {}
    if kitti.is_dir():
        paths = {path.stem: read_kitti(path).positions_xyz for path in sorted(kitti.glob("[01][0-9].txt"))}
        drives = {"kitti 00-10": list(paths.values())} if paths else {}
        if "01" in paths:
            drives["kitti 01 (motorway)"] = [paths["01"]]
    for hilly in (False, True):
        for kind in ("town", "country", "motorway"):
            lines = [make_plan(5_000_000 + k, kind, 600.0, hilly=hilly).path for k in range(count)]
            name = f"{kind}{', hilly' if hilly else ''}"
            drives[name] = [np.stack([line.x, line.y, line.z], 1) for line in lines]
    each = {name: np.concatenate([vertical_curvature(places) for places in all_]) for name, all_ in drives.items()}
    return {
        name: (1000 * np.percentile(np.abs(values), [50, 75, 90, 97])).round(2).tolist()
        for name, values in each.items()
    }


def overlap(a: np.ndarray, b: np.ndarray) -> float:
    """Area that two histograms share, 0 to 1."""
    both = np.concatenate([a, b])
    edges = np.linspace(*np.percentile(both, [0.5, 99.5]), 41)
    (p, _), (q, _) = (np.histogram(np.clip(x, edges[0], edges[-1]), edges) for x in (a, b))
    return float(np.minimum(p / p.sum(), q / q.sum()).sum())


def plot(raw: dict[str, Any], path: Path) -> None:
    """The distributions, one panel each."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 4, figsize=(13, 2.8), layout="constrained")
    for axis, key in zip(axes, raw["world"], strict=True):
        low, high = np.percentile(np.concatenate([values[key] for values in raw.values()]), [0.3, 99.7])
        for name, values in raw.items():
            axis.hist(values[key], np.linspace(low, high, 60), density=True, histtype="step", label=name)
        axis.set_xlabel(key)
        axis.set_yscale("linear" if key.startswith("speed") else "log")
    axes[0].legend()
    figure.savefig(path, dpi=80)


def main() -> None:
    """Print the tables; write them as JSON if asked."""
    shared = Path(__file__).parents[2] / "shared" / "trajectories" / "ground_truth"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--kitti-poses", type=Path, default=shared)
    parser.add_argument("--frames", type=int, default=100)
    parser.add_argument("--drives", type=int, default=24)
    options = parser.parse_args()
    results: dict[str, Any] = {"speed": speed(options.frames, os.cpu_count() or 1)}
    for key, value in results["speed"].items():
        print(f"{key:36} {value}")
    results["dynamics"], raw = dynamics(options.kitti_poses, options.drives, 300)
    print("percentiles 1, 5, 50, 95, 99")
    for key, rows in results["dynamics"].items():
        for name, value in rows.items():
            print(f"{key:16} {name:12} {value}")
    print("vertical curvature, 1/km, percentiles 50, 75, 90, 97 of its amount")
    results["vertical curvature"] = profiles(options.kitti_poses, 60)
    for name, value in results["vertical curvature"].items():
        print(f"{name:24} {value}")
    if options.plot:
        plot(raw, options.plot)
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
