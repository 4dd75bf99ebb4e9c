"""Small KITTI trees for tests: a textured plane far ahead that grows as the camera comes nearer."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np

from convlstm_vo.geometry.trajectory import Trajectory

HEIGHT, WIDTH = 48, 160


def write_tree(root: Path, sequences: dict[str, int], *, seed: int = 0) -> Path:
    """Write sequences of the given numbers of frames, each moving 1 m forward a frame at 10 Hz."""
    rng = np.random.default_rng(seed)
    for name, frames in sequences.items():
        folder = root / "sequences" / name
        (folder / "image_0").mkdir(parents=True)
        texture = cv2.GaussianBlur(rng.integers(0, 255, (300, 1000)).astype(np.uint8), (0, 0), 2)
        for i in range(frames):
            zoom = 1 / (1 + 0.02 * i)
            height, width = round(300 * zoom), round(1000 * zoom)
            top, left = (300 - height) // 2, (1000 - width) // 2
            image = cv2.resize(texture[top : top + height, left : left + width], (WIDTH, HEIGHT))
            cv2.imwrite(str(folder / "image_0" / f"{i:06d}.png"), image)
        projection = "100 0 79.5 0 0 100 23.5 0 0 0 1 0"
        (folder / "calib.txt").write_text("".join(f"P{i}: {projection}\n" for i in range(4)))
        (folder / "times.txt").write_text("".join(f"{i / 10}\n" for i in range(frames)))
        motions = np.tile([0, 0, 1.0, 0, 0, 0], (frames - 1, 1))
        motions[:, 4] = 0.02 * np.sin(np.arange(frames - 1))
        Trajectory.from_motions(motions).write_kitti(root / "poses" / f"{name}.txt")
    return root
