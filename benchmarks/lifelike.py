"""Rendered frames beside real ones: grey levels, gradients, spectra, corners, and how hard they are to track.

    python benchmarks/lifelike.py [--kitti DIR] [--json OUT.json] [--sheet OUT.png] [--rendered-sheet OUT.jpg]

Real frames carry no flow, so flow is judged the same way on both sides: by its distance from the epipolar lines of
the true motion, and by how well forward and backward flow agree. Odometry is KLT corners and an essential matrix
(RANSAC, 0.5 px), against the true rotation and direction. KITTI's frames are licensed CC BY-NC-SA: the sheet that
shows them is for looking at, not for the repository; --rendered-sheet shows rendered frames only.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import cv2
import numpy as np
from numpy.typing import NDArray

from convlstm_vo.geometry.camera import Camera
from convlstm_vo.geometry.se3 import relative
from convlstm_vo.sequences.kitti import KittiSequence
from convlstm_vo.world import WorldSequence

Image = NDArray[np.uint8]
Pair = tuple[Image, Image, Camera, NDArray[np.float64]]


def image_statistics(image: Image) -> dict[str, float]:
    """Single numbers that describe one frame."""
    grey = image.astype(np.float32)
    dy, dx = np.gradient(cv2.GaussianBlur(grey, (0, 0), 0.7))
    gradient = np.hypot(dx, dy)
    least = cv2.cornerMinEigenVal(image, 3)
    local = (least == cv2.dilate(least, np.ones((9, 9)))) & (least > 2e-3)
    h, w = image.shape
    road = grey[int(0.78 * h) : int(0.97 * h), int(0.38 * w) : int(0.62 * w)]
    detail = road - cv2.GaussianBlur(road, (0, 0), 4)
    fast = cv2.FastFeatureDetector_create(20).detect(image)
    return {
        "grey mean": float(grey.mean()),
        "grey deviation": float(grey.std()),
        "grey 5 %": float(np.percentile(grey, 5)),
        "grey median": float(np.median(grey)),
        "grey 95 %": float(np.percentile(grey, 95)),
        "share at 250 or more": float((grey >= 250).mean()),
        "gradient mean": float(gradient.mean()),
        "gradient median": float(np.median(gradient)),
        "gradient 95 %": float(np.percentile(gradient, 95)),
        "spectrum slope": spectrum_slope(grey),
        "corners a 10,000 px": float(local.sum() / image.size * 1e4),
        "FAST corners a 10,000 px": len(fast) / image.size * 1e4,
        "road detail, grey levels": float(detail.std()),
    }


def spectrum_slope(grey: NDArray[np.float32]) -> float:
    """Exponent of the amplitude spectrum between 0.02 and 0.35 cycles a pixel (about -1.2 for nature)."""
    size = min(grey.shape)
    window = np.hanning(size)[:, None] * np.hanning(size)
    frequency = np.hypot(np.fft.fftfreq(size)[:, None], np.fft.fftfreq(size)[None])
    edges = np.geomspace(0.02, 0.35, 16)
    rings = np.digitize(frequency, edges)
    power = np.zeros(15)
    for left in (0, (grey.shape[1] - size) // 2, grey.shape[1] - size):
        crop = grey[:size, left : left + size]
        spectrum = np.abs(np.fft.fft2((crop - crop.mean()) * window)) ** 2
        power += [spectrum[rings == k + 1].mean() for k in range(15)]
    return float(np.polyfit(np.log(edges[:-1] * edges[1:]) / 2, np.log(power) / 2, 1)[0])


def pair_statistics(pair: Pair) -> dict[str, float]:
    """How hard a pair of frames is for classical tracking."""
    a, b, camera, T = pair
    out = flow_statistics(a, b, camera, T)
    out.update(odometry_statistics(a, b, camera, T))
    return out


def epipolar_distance(camera: Camera, T_prev_curr: NDArray, p: NDArray, q: NDArray) -> NDArray:
    """Distance (n,) in pixels of points q in the current image from the epipolar lines of p in the previous one."""
    T = np.linalg.inv(T_prev_curr)
    t = T[:3, 3]
    cross = np.array([[0, -t[2], t[1]], [t[2], 0, -t[0]], [-t[1], t[0], 0]])
    K = np.linalg.inv(camera.matrix())
    F = K.T @ cross @ T[:3, :3] @ K
    lines = np.c_[p, np.ones(len(p))] @ F.T
    return np.abs((np.c_[q, np.ones(len(q))] * lines).sum(1)) / np.maximum(
        np.hypot(lines[:, 0], lines[:, 1]), 1e-12
    )


def flow_statistics(a: Image, b: Image, camera: Camera, T: NDArray) -> dict[str, float]:
    """DIS flow: its distance from the true epipolar lines, and forward against backward."""
    dis = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    forward, backward = dis.calc(a, b, None), dis.calc(b, a, None)
    ys, xs = np.mgrid[4 : a.shape[0] : 8, 4 : a.shape[1] : 8]
    p = np.stack([xs.ravel(), ys.ravel()], 1).astype(np.float32)
    f = forward[ys.ravel(), xs.ravel()]
    back = cv2.remap(
        backward, *(np.ascontiguousarray((p + f)[:, k]).reshape(-1, 1) for k in (0, 1)), cv2.INTER_LINEAR
    )
    round_trip = np.linalg.norm(f + back[:, 0], axis=1)
    inside = ((p + f) >= 0).all(1) & ((p + f) < [a.shape[1] - 1, a.shape[0] - 1]).all(1)
    error = epipolar_distance(camera, T, p[inside], (p + f)[inside])
    return {
        "DIS off the epipolar line, median px": float(np.median(error)),
        "DIS off the epipolar line, 90 % px": float(np.percentile(error, 90)),
        "DIS there and back, median px": float(np.median(round_trip[inside])),
        "DIS there and back, share over 1 px": float((round_trip[inside] > 1).mean()),
    }


def odometry_statistics(a: Image, b: Image, camera: Camera, T: NDArray) -> dict[str, float]:
    """KLT corners and an essential matrix."""
    corners = cv2.goodFeaturesToTrack(a, 2000, 0.01, 8)
    moved, found, _ = cv2.calcOpticalFlowPyrLK(a, b, corners, None, winSize=(21, 21), maxLevel=4)
    again, returned, _ = cv2.calcOpticalFlowPyrLK(b, a, moved, None, winSize=(21, 21), maxLevel=4)
    good = (found & returned).ravel().astype(bool) & (np.linalg.norm(again - corners, axis=-1).ravel() < 0.5)
    p, q = corners[good, 0], moved[good, 0]
    E, mask = cv2.findEssentialMat(q, p, camera.matrix(), cv2.RANSAC, 0.999, 0.5)
    _, R, t, _ = cv2.recoverPose(E[:3], q, p, camera.matrix(), mask=mask.copy())
    rotation = np.degrees(np.linalg.norm(cv2.Rodrigues(R @ T[:3, :3].T)[0]))
    fitted = np.eye(4)
    fitted[:3, :3], fitted[:3, 3] = R, t.ravel()
    cosine = float(t.ravel() @ T[:3, 3] / np.linalg.norm(T[:3, 3]))
    return {
        "KLT corners": float(len(corners)),
        "KLT share tracked": float(good.mean()),
        "KLT off the epipolar line, median px": float(np.median(epipolar_distance(camera, T, p, q))),
        # From the line of the fitted motion: noise of the true poses, which only real frames have, drops out.
        "KLT off the fitted line, median px": float(np.median(epipolar_distance(camera, fitted, p, q))),
        "E inliers": float(mask.mean()),
        "E rotation error, degrees": float(rotation),
        "E direction error, degrees": float(np.degrees(np.arccos(np.clip(cosine, -1, 1)))),
    }


def real_pairs(folder: Path, names: list[str], count: int) -> Iterator[Pair]:
    """Pairs of real frames with their true motion, spread over each sequence."""
    for name in names:
        sequence = KittiSequence(folder, name)
        assert sequence.trajectory is not None
        poses = sequence.trajectory.T_world_camera
        for i in np.linspace(0, len(sequence) - 2, count).astype(int):
            a, b = (sequence[int(i) + k].image for k in (0, 1))
            yield a, b, sequence.camera, relative(poses[i], poses[i + 1])


def rendered_pairs(seed: int, drives: int, count: int, look: Literal["random"] | None) -> Iterator[Pair]:
    """The same of built-in streets."""
    for k in range(drives):
        world = WorldSequence(seed + k, frames=120, sensor=look)
        poses = world.trajectory.T_world_camera
        for i in np.linspace(4, 118, count).astype(int):
            yield world[int(i)].image, world[int(i) + 1].image, world.camera, relative(poses[i], poses[i + 1])


def measure(pairs: Iterator[Pair]) -> tuple[dict[str, NDArray], list[Image]]:
    """Statistics by name: (n,) each; and the frames."""
    rows, frames = [], []
    for pair in pairs:
        row = image_statistics(pair[0])
        if np.linalg.norm(pair[3][:3, 3]) > 0.15:  # a direction needs some motion
            row.update(pair_statistics(pair))
        rows.append(row)
        frames.append(pair[0])
    keys = max(rows, key=len).keys()
    return {key: np.array([row[key] for row in rows if key in row]) for key in keys}, frames


def table(real: dict[str, NDArray], rendered: dict[str, NDArray]) -> dict[str, Any]:
    """Quartiles of both."""
    out = {}
    for key in rendered:
        out[key] = {"rendered": np.percentile(rendered[key], [25, 50, 75]).round(4).tolist()}
        if key in real:
            out[key]["real"] = np.percentile(real[key], [25, 50, 75]).round(4).tolist()
    return out


def sheet(columns: list[list[Image]], rows: int, width: int) -> Image:
    """A contact sheet: one column for each list, frames spread over it."""

    def cell(frames: list[Image], row: int) -> Image:
        frame = frames[int((row + 0.5) / rows * len(frames))]
        return cv2.resize(frame, (width, round(width * 376 / 1241)), interpolation=cv2.INTER_AREA)  # type: ignore[return-value]

    return np.vstack([np.hstack([cell(frames, row) for frames in columns]) for row in range(rows)])


def main() -> None:
    """Print the table; write what was asked for."""
    shared = Path(__file__).parents[2] / "shared" / "kitti"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kitti", type=Path, default=shared)
    parser.add_argument("--names", nargs="+", default=["06", "01", "0005", "0013"])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--sheet", type=Path)
    parser.add_argument("--rendered-sheet", type=Path)
    parser.add_argument("--drives", type=int, default=16)
    parser.add_argument("--pairs", type=int, default=6, help="pairs of frames a rendered drive")
    parser.add_argument("--seed", type=int, default=500)
    parser.add_argument("--random-look", action="store_true", help="with random degradations")
    options = parser.parse_args()
    cv2.setRNGSeed(0)
    rendered, frames = measure(
        rendered_pairs(options.seed, options.drives, options.pairs, "random" if options.random_look else None)
    )
    real, real_frames = {}, []
    if (options.kitti / "sequences").is_dir():
        count = options.drives * options.pairs // len(options.names)
        real, real_frames = measure(real_pairs(options.kitti, options.names, count))
    results = table(real, rendered)
    print(f"{'quartiles':40} {'real':>30} {'rendered':>30}")
    for key, row in results.items():
        print(f"{key:40} {row.get('real')!s:>30} {row['rendered']!s:>30}")
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n")
    if options.sheet and real_frames:
        cv2.imwrite(str(options.sheet), sheet([real_frames, frames], 8, 620))
    if options.rendered_sheet:
        half = len(frames) // 2
        picture = sheet([frames[:half], frames[half:]], 6, 496)
        cv2.imwrite(str(options.rendered_sheet), picture, [cv2.IMWRITE_JPEG_QUALITY, 80])


if __name__ == "__main__":
    main()
