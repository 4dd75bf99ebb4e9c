"""A lens that distorts: as it is, with the distortion that is found from the drive itself, and with the true one.

python benchmarks/lens.py --json lens.json

Rendered streets through barrels (k1, k2 as OpenCV's) and through lenses that bend nothing; KITTI's clips as a
barrel would have taken them (the middle of the images, resampled). "By its field of view": intrinsics of the angle
that the image subtends as it comes (`--fov`), where the focal length is found with the distortion.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
from zero_shot import CLIPS

from convlstm_vo.evaluation.metrics import score
from convlstm_vo.geometry.camera import Camera
from convlstm_vo.geometry.trajectory import Trajectory
from convlstm_vo.models.checkpoint import load_checkpoint
from convlstm_vo.models.geometric import GeometricNet
from convlstm_vo.odometer import estimate_trajectory
from convlstm_vo.progress import progress
from convlstm_vo.self_calibration import find_bend
from convlstm_vo.sequences.base import Frame
from convlstm_vo.sequences.kitti import KittiSequence
from convlstm_vo.sequences.lens import Lens, Undistorted
from convlstm_vo.world import WorldSequence
from convlstm_vo.world.lens import Distortion

CAMERA = Camera(700.0, 700.0, 620.0, 185.0, height=376, width=1241)
STREETS = (  # seed, kind of road, k1, k2
    (5_000_000, "country", -0.3, 0.08),
    (5_000_005, "motorway", -0.25, 0.06),
    (5_000_009, "town", -0.25, 0.06),
    (5_000_004, "town", 0.1, 0.0),
    (5_000_006, "motorway", 0.0, 0.0),
)
BEND = -0.3  # of the division model, of KITTI's clips


class Recorded:
    """Frames that are kept, and the camera that is assumed to have taken them."""

    def __init__(self, name: str, frames: list[Frame], camera: Camera) -> None:
        self.name, self.frames, self.camera = name, frames, camera

    def __iter__(self) -> Iterator[Frame]:
        return iter(self.frames)


def bent(sequence: KittiSequence) -> Recorded:
    """The middle of a clip's images as a barrel would have taken it."""
    whole = sequence.camera
    height, width = int(0.88 * whole.height), int(0.8 * whole.width)
    top, left = (whole.height - height) // 2, (whole.width - width) // 2
    camera = whole.cropped(top=top, left=left, height=height, width=width)
    x, y = np.meshgrid(np.arange(width, dtype=np.float64), np.arange(height, dtype=np.float64))
    seen = np.stack([(x - camera.cx) / camera.fx, (y - camera.cy) / camera.fy], -1)
    rays = seen / (1 + BEND * (seen**2).sum(-1, keepdims=True))
    at = (rays * [whole.fx, whole.fy] + [whole.cx, whole.cy]).astype(np.float32)

    def through(frame: Frame) -> Frame:
        image = cv2.remap(frame.image, at[..., 0], at[..., 1], cv2.INTER_CUBIC, borderMode=cv2.BORDER_REPLICATE)
        return Frame(np.asarray(image, np.uint8), frame.timestamp_s, frame.index)

    return Recorded(sequence.name, [through(sequence[i]) for i in range(len(sequence))], camera)


def measure(
    net: GeometricNet, stream: Recorded | Undistorted, truth: Trajectory, lengths: tuple[float, ...]
) -> str:
    """t_rel % / r_rel (scale bias %)."""
    true, found = truth.from_first_pose(), estimate_trajectory(net, stream).from_first_pose()
    same = Trajectory(true.timestamps_s, found.T_world_camera)
    result = score(true, same, lengths_m=lengths, same_start=True)
    bias = 100 * (float(found.distances_m[-1]) / float(true.distances_m[-1]) - 1)
    return f"{result.t_rel_percent:.2f} / {result.r_rel_deg_per_100m:.2f} ({bias:+.1f})"


def compare(
    net: GeometricNet, stream: Recorded, truth: Trajectory, lengths: tuple[float, ...], told: Lens | None
) -> dict[str, str]:
    """One row: what was found, and the errors each way."""
    found = find_bend(net, stream, stream.camera)
    row = {"found": f"{found.bend:+.3f} ± {found.sd:.3f}", "as it is": measure(net, stream, truth, lengths)}
    if found.clear:
        row["with what is found"] = measure(net, Undistorted(stream, found.lens(stream.camera)), truth, lengths)
    if told is None:
        return row
    row["told"] = measure(net, Undistorted(stream, told), truth, lengths)
    camera = stream.camera
    ends = told._rays(np.array([-0.5, camera.width - 0.5]), np.full(2, camera.cy))[:, 0]
    fov = math.degrees(math.atan(ends[1]) - math.atan(ends[0]))
    guessed = Recorded(stream.name, stream.frames, Camera.from_fov(fov, height=camera.height, width=camera.width))
    row["by its field of view, as it is"] = measure(net, guessed, truth, lengths)
    found = find_bend(net, guessed, guessed.camera)
    lens = found.lens(guessed.camera, fov_deg=fov)
    row["by its field of view, found"] = measure(net, Undistorted(guessed, lens), truth, lengths)
    row["focal length"] = f"{lens.camera.fx:.0f} ({camera.fx:.0f})"
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kitti", type=Path, default=Path("../shared/kitti"))
    parser.add_argument("--frames", type=int, default=62, help="of a street")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    net = load_checkpoint()
    assert isinstance(net, GeometricNet)
    rows: dict[str, dict[str, str]] = {}

    def tell(name: str, row: dict[str, str]) -> None:
        rows[name] = row
        print(f"{name}: " + "; ".join(f"{key} {value}" for key, value in row.items()), flush=True)

    with progress("Lenses", len(STREETS) + len(CLIPS), unit="") as advance:
        for seed, kind, k1, k2 in STREETS:
            drive = WorldSequence(
                seed,
                kind=kind,  # type: ignore[arg-type]
                frames=options.frames,
                camera=CAMERA,
                distortion=Distortion(k1, k2),
            )
            stream = Recorded(drive.name, list(drive), CAMERA)
            told = Lens(CAMERA, (k1, k2, 0.0, 0.0)) if k1 else None
            lengths = (20.0, 40.0, 100.0)
            tell(f"{kind} {seed}, k1 {k1:g}, k2 {k2:g}", compare(net, stream, drive.trajectory, lengths, told))
            advance(1)
        for name, lengths in CLIPS.items() if options.kitti.is_dir() else ():
            sequence = KittiSequence(options.kitti, name)
            assert sequence.trajectory is not None
            stream = bent(sequence)
            plain = Recorded(name, list(sequence), sequence.camera)
            row = compare(net, stream, sequence.trajectory, lengths, None)
            row["found on the clip itself"] = compare(net, plain, sequence.trajectory, lengths, None)["found"]
            tell(f"{name}, division model {BEND}", row)
            advance(1)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2, ensure_ascii=False))


if __name__ == "__main__":
    main()
