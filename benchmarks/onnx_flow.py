"""The learned flow in onnxruntime and in torch: milliseconds a frame, and how far they are apart.

    python benchmarks/onnx_flow.py [--kitti DIR] [--json OUT.json]

Both at 192x640 in float32, with as many threads as torch has, in turns, so that other jobs slow down both alike;
the processor's time, summed over threads, stands beside that of the clock. Pairs are of KITTI 06 where that is at
hand, otherwise of a rendered street.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import onnxruntime
import torch
from numpy.typing import NDArray

from convlstm_vo.export import export_flow
from convlstm_vo.geometry.camera import Camera
from convlstm_vo.models import kernels
from convlstm_vo.models.checkpoint import load_checkpoint
from convlstm_vo.models.geometric import GeometricNet
from convlstm_vo.sequences.kitti import KittiSequence
from convlstm_vo.world import WorldSequence

HEIGHT, WIDTH = 192, 640
CAMERA = Camera(363.6, 363.6, 319.5, 95.5, height=HEIGHT, width=WIDTH)
Inputs = dict[str, NDArray[np.float32]]


def pairs(kitti: Path, count: int) -> Iterator[Inputs]:
    """Neighbouring frames, nothing predicted."""
    frames = KittiSequence(kitti, "06") if kitti.is_dir() else WorldSequence(38, frames=count + 1, camera=CAMERA)
    images = []
    for _, frame in zip(range(count + 1), frames, strict=False):
        image = frame.image if frame.image.ndim == 2 else cv2.cvtColor(frame.image, cv2.COLOR_RGB2GRAY)
        small = cv2.resize(image, (WIDTH, HEIGHT), interpolation=cv2.INTER_AREA)
        images.append(small[None, None].astype(np.float32))
    predicted = np.zeros((1, 2, HEIGHT // 4, WIDTH // 4), np.float32)
    for prev, curr in itertools.pairwise(images):
        yield {"prev": prev, "curr": curr, "predicted": predicted}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kitti", type=Path, default=Path("../shared/kitti"))
    parser.add_argument("--frames", type=int, default=30)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    net = load_checkpoint()
    net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # as the odometer has it
    assert isinstance(net, GeometricNet)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "flow.onnx"
        export_flow(net, path, height=HEIGHT, width=WIDTH)
        settings = onnxruntime.SessionOptions()
        settings.intra_op_num_threads = torch.get_num_threads()
        session = onnxruntime.InferenceSession(path, settings, providers=["CPUExecutionProvider"])

    def by_torch(inputs: Inputs) -> NDArray[np.float32]:
        return net.flow(*map(torch.from_numpy, inputs.values())).flow.numpy()

    def by_torch_alone(inputs: Inputs) -> NDArray[np.float32]:
        usable, kernels.usable = kernels.usable, lambda *tensors, **options: False
        try:
            return by_torch(inputs)
        finally:
            kernels.usable = usable

    ways = {
        "onnxruntime": lambda inputs: session.run(["flow"], inputs)[0],
        "torch, fused Lucas-Kanade (default)": by_torch,
        "torch alone": by_torch_alone,
    }
    clock: dict[str, list[float]] = {name: [] for name in ways}
    processor: dict[str, list[float]] = {name: [] for name in ways}
    worst, typical = [], []
    with torch.inference_mode():
        for inputs in pairs(options.kitti, options.frames + 2):
            flows = []
            for name, way in ways.items():
                start, busy = time.perf_counter(), time.process_time()
                flows.append(way(inputs))
                clock[name].append(time.perf_counter() - start)
                processor[name].append(time.process_time() - busy)
            apart = np.abs(flows[0] - flows[1])
            worst.append(float(apart.max()))
            typical.append(float(np.median(apart)))
    figures: dict[str, Any] = {"threads": torch.get_num_threads(), "worst_px": max(worst)}
    for name in ways:
        by_clock, busy = (1000 * statistics.median(times[name][2:]) for times in (clock, processor))
        figures[name] = {"ms_per_frame": by_clock, "processor_ms_per_frame": busy}
        print(f"{name:36} {by_clock:7.1f} ms a frame, {busy:7.1f} ms of the processor")
    print(f"apart: median {statistics.median(typical):.1e} px, worst cell of all {max(worst):.1e} px")
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
