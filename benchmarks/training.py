"""Pairs a second of `convlstm-vo train` itself (loader, augmentation, network, optimiser, log), and of its loader.

python benchmarks/training.py --json training.json            # the original's size and batch: takes minutes
python benchmarks/training.py --batch-size 8 --steps 4        # a quicker look

The network's part, forward and backward pass without anything else, is measured in a process of its own that starts
with the allocator settings of `convlstm-vo train`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import cv2
import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from convlstm_vo.environment import training_environment
from convlstm_vo.geometry.trajectory import Trajectory
from convlstm_vo.models.config import preset
from convlstm_vo.models.network import OdometryNet
from convlstm_vo.training.cache import DecodedSequence
from convlstm_vo.training.clips import AugmentConfig, EpochPlan, collate
from convlstm_vo.training.config import TrainConfig
from convlstm_vo.training.learner import Learner
from convlstm_vo.training.loop import prefetch

ORIGINAL = 32 / 30.1  # pairs a second of the TensorFlow code at 384x1280, batch 32, on 2 cores with AMX
ENVIRONMENT = {"MKL_NUM_THREADS", "OMP_NUM_THREADS"}  # shown with the figures


def write_tree(root: Path, frames: int) -> Path:
    """A KITTI tree of one sequence of gray noise at KITTI's size, 1 m a frame."""
    folder = root / "sequences" / "00"
    (folder / "image_0").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for i in range(frames):
        noise = cv2.GaussianBlur(rng.integers(0, 255, (376, 1241), dtype=np.uint8), (0, 0), 2)
        cv2.imwrite(str(folder / "image_0" / f"{i:06d}.png"), noise)
    projection = "718.856 0 607.1928 0 0 718.856 185.2157 0 0 0 1 0"
    (folder / "calib.txt").write_text("".join(f"P{i}: {projection}\n" for i in range(4)))
    (folder / "times.txt").write_text("".join(f"{i / 10}\n" for i in range(frames)))
    motions = np.tile([0, 0, 1.0, 0, 0, 0], (frames - 1, 1))
    Trajectory.from_motions(motions).write_kitti(root / "poses" / "00.txt")
    return root


def train(tree: Path, options: argparse.Namespace, out: Path) -> list[float]:
    """Seconds of each step of the command, start-up and first step excluded."""
    size = ["--model.image-height", str(options.height), "--model.image-width", str(options.width)]
    work = ["--batch-size", str(options.batch_size), "--time-steps", "1", "--epochs", "1", "--ema", "0"]
    where = ["--data", str(tree), "--out", str(out), "--cache", str(out / "cache"), "--device", "cpu"]
    command = [sys.executable, "-m", "convlstm_vo.cli", "train", "--preset", options.preset]
    subprocess.run([*command, *size, *work, *where, "--precision", options.precision], check=True)
    rows = [json.loads(line) for line in (out / "history.jsonl").read_text().splitlines()]
    return [row["seconds_per_step"] for row in rows if row["kind"] == "train"][1:]


def network_seconds(options: argparse.Namespace) -> list[float]:
    """Seconds of forward and backward pass of each step, alone in a process set up as `train` sets up its own."""
    names = ("preset", "height", "width", "batch_size", "steps", "precision")
    arguments = [f"--{name.replace('_', '-')}={getattr(options, name)}" for name in names]
    command = [sys.executable, __file__, *arguments, "--network-only"]
    ended = subprocess.run(command, check=True, stdout=subprocess.PIPE, env=training_environment(os.environ))
    return json.loads(ended.stdout)


def time_network(options: argparse.Namespace) -> list[float]:
    """Seconds of forward and backward pass of the module that `train` optimises; the first step is left out."""
    model = preset(options.preset, image_height=options.height, image_width=options.width)
    config = TrainConfig(model=model, batch_size=options.batch_size, time_steps=1, precision=options.precision)
    learner = Learner(config).train()
    lanes, size = options.batch_size, (options.height, options.width)
    images = 255 * torch.rand(lanes, 2, 1, *size)
    intrinsics, motions = torch.tensor([360.0, 360, 320, 96]).repeat(lanes, 1), torch.zeros(lanes, 1, 6)
    seconds = []
    for _ in range(options.steps + 1):
        learner.zero_grad()
        started = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled=options.precision == "bf16"):
            loss, _ = learner(images, intrinsics, None, motions)
        loss.backward()
        seconds.append(time.perf_counter() - started)
    return seconds[1:]


def gflop_a_pair(options: argparse.Namespace) -> float:
    """Of forward and backward pass together."""
    net = OdometryNet(preset(options.preset, image_height=options.height, image_width=options.width), seed=0)
    clip = torch.zeros(1, 2, net.config.image_channels, options.height, options.width)
    with FlopCounterMode(display=False) as counter:
        motions, _ = net(clip, torch.ones(1, 4))
        motions.sum().backward()
    return counter.get_total_flops() / 1e9


def matmul_gflops(precision: str) -> float:
    """The best of many large matrix products: what the processor's units give."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    return max(_product_gflops(size, dtype) for size in (1024, 2048, 4096) for _ in range(5))


def _product_gflops(size: int, dtype: torch.dtype) -> float:
    a, b = (torch.randn(size, size).to(dtype) for _ in range(2))
    started = time.perf_counter()
    torch.nn.functional.linear(a, b)
    return 2 * size**3 / (time.perf_counter() - started) / 1e9


def loader_pairs_per_second(folder: Path, frames: int = 2000, seconds: float = 4.0) -> float:
    """From a cache file at 192x640 to batches of 8 clips of 5 motions, as training gathers them."""
    path = folder / "frames.npy"
    shape = (frames, 192, 640, 1)
    np.lib.format.open_memmap(path, "w+", np.uint8, shape)[:] = np.random.default_rng(0).integers(
        0, 255, shape[1:], dtype=np.uint8
    )
    poses = Trajectory.from_motions(np.tile([0, 0, 1.0, 0, 0.01, 0], (frames - 1, 1))).T_world_camera
    sequence = DecodedSequence("00", np.load(path, mmap_mode="r"), np.array([360.0, 360, 320, 96]), poses)
    plan = EpochPlan((frames,), 5, 8, 4, AugmentConfig(), seed=0)
    started, pairs, epoch = time.perf_counter(), 0, 0
    while time.perf_counter() - started < seconds:
        for batch in prefetch(collate([sequence], clips) for clips in plan(epoch)):
            pairs += batch.motions.shape[0] * batch.motions.shape[1]
        epoch += 1
    return pairs / (time.perf_counter() - started)


def measure(options: argparse.Namespace) -> dict[str, float | int | str | dict[str, str]]:
    """All figures by name."""
    with tempfile.TemporaryDirectory() as folder:
        tree = write_tree(Path(folder) / "tree", options.batch_size * (options.steps + 1) + 1)
        seconds = train(tree, options, Path(folder) / "run")
        loader = loader_pairs_per_second(Path(folder))
    network = network_seconds(options)
    work, peak = gflop_a_pair(options), matmul_gflops(options.precision)
    rate = options.batch_size * len(seconds) / sum(seconds)
    best = options.batch_size / min(seconds)
    return {
        "preset": options.preset,
        "size": f"{options.height}x{options.width}",
        "batch_size": options.batch_size,
        "precision": options.precision,
        "threads": torch.get_num_threads(),
        "processor": torch.cpu.get_capabilities().get("cpu_name", platform.processor()),
        "steps": len(seconds),
        "median_seconds_per_step": statistics.median(seconds),
        "pairs_per_second": rate,
        "best_pairs_per_second": best,
        "gflop_per_pair": work,
        "matmul_peak_gflops": peak,
        "share_of_peak": rate * work / peak,
        "best_share_of_peak": best * work / peak,
        "network_median_seconds": statistics.median(network),
        "network_share_of_peak": options.batch_size / statistics.median(network) * work / peak,
        "best_network_share_of_peak": options.batch_size / min(network) * work / peak,
        "ratio_to_original": rate / ORIGINAL,
        "loader_pairs_per_second_192x640": loader,
        "environment": {name: os.environ[name] for name in sorted(ENVIRONMENT & os.environ.keys())},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="ascend")
    parser.add_argument("--height", type=int, default=384)
    parser.add_argument("--width", type=int, default=1280)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--network-only", action="store_true", help="print seconds of the network's part only")
    options = parser.parse_args()
    if options.network_only:
        print(json.dumps(time_network(options)))
        return
    results = measure(options)
    for name, value in results.items():
        print(f"{name:34} {value:.3f}" if isinstance(value, float) else f"{name:34} {value}")
    if (options.height, options.width) != (384, 1280) or options.preset != "ascend":
        print("ratio_to_original compares with ascend at 384x1280: it means nothing for other sizes")
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
