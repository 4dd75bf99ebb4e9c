"""Milliseconds a frame of the whole odometer (resize, network, pose), state carried, decoding excluded.

python benchmarks/streaming.py --json streaming.json
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np

from convlstm_vo.environment import bfloat16_pays, set_for_streaming

set_for_streaming()  # as `convlstm-vo run` does; torch must not be there yet

import torch

from convlstm_vo.geometry.camera import Camera
from convlstm_vo.models.config import preset
from convlstm_vo.models.network import OdometryNet
from convlstm_vo.odometer import VisualOdometry
from convlstm_vo.sequences.base import Frame
from convlstm_vo.world import WorldSequence

CASES = {
    "tiny 96x320": ("tiny", 96, 320),
    "ascend 192x640": ("ascend", 192, 640),
    "ascend 384x1280": ("ascend", 384, 1280),
}
CAMERA = Camera(718.856, 718.856, 607.1928, 185.2157, height=376, width=1241)


def median_ms(name: str, height: int, width: int, frames: int) -> float:
    """Median time of one frame of KITTI's size."""
    rng = np.random.default_rng(0)
    odometer = VisualOdometry(OdometryNet(preset(name, image_height=height, image_width=width), seed=0), CAMERA)
    images = rng.integers(0, 255, (4, CAMERA.height, CAMERA.width), dtype=np.uint8)
    seconds = [odometer.track(Frame(images[i % 4], i / 10, i)).seconds for i in range(frames + 3)]
    return 1000 * statistics.median(seconds[3:])


def rendered(frames: int) -> list[Frame]:
    """A street at KITTI's size."""
    return list(WorldSequence(38, frames=frames, kind="town", camera=CAMERA))


def default_ms(frames: int) -> float:
    """Median time of one frame of the default network, on a rendered street at KITTI's size."""
    # By another process: one that has rendered has memory at hand, which one that reads a film has not.
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as others:
        drive = others.submit(rendered, frames + 3).result()
    odometer = VisualOdometry.from_checkpoint(camera=CAMERA)
    return 1000 * statistics.median([odometer.track(frame).seconds for frame in drive][3:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--frames", type=int, default=30)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    results = {case: median_ms(*arguments, options.frames) for case, arguments in CASES.items()}
    results = {"default 192x632": default_ms(options.frames)} | results
    precision = "bf16" if bfloat16_pays() else "fp32"
    print(f"{torch.get_num_threads()} threads, fp32 (convolutions of the default network: {precision})")
    for case, value in results.items():
        print(f"{case:18} {value:7.1f} ms a frame  {1000 / value:6.1f} frames/s")
    if options.json:
        options.json.write_text(json.dumps({"threads": torch.get_num_threads(), "ms_per_frame": results}, indent=2))


if __name__ == "__main__":
    main()
