"""Other cameras: is the default network as good with those?

python benchmarks/cameras.py --json cameras.json
python benchmarks/cameras.py --only "as it is" "rolled by 3 degrees" --clips 06 01 --streets 0
python benchmarks/cameras.py --kitti none

KITTI's clips, cut, mirrored, made smaller, turned about the lens (which is exact: a turn moves pixels whatever
their depth), and spoilt as other sensors and files spoil them. The camera's height is KITTI's, its mounting is not
told. t_rel % / r_rel degrees / 100 m (scale bias), as in `zero_shot.py`.

Then unseen streets, rendered for cameras that are mounted far from straight, or low or high, of which only the
height is told, or over a bonnet, dirty or polished: means and medians.
"""

from __future__ import annotations

import argparse
import io
import json
from collections.abc import Callable
from pathlib import Path

import av
import cv2
import numpy as np
from numpy.typing import NDArray
from zero_shot import CLIPS, measure, unseen_streets

from convlstm_vo.calibration import VehicleCalibration
from convlstm_vo.geometry import se3
from convlstm_vo.geometry.camera import Camera
from convlstm_vo.geometry.trajectory import Trajectory
from convlstm_vo.models.checkpoint import DEFAULT_CHECKPOINT, load_checkpoint
from convlstm_vo.odometer import estimate_trajectory
from convlstm_vo.progress import progress
from convlstm_vo.sequences.base import Frame, Image, Sequence
from convlstm_vo.sequences.kitti import KittiSequence
from convlstm_vo.world import Mount
from convlstm_vo.world.bonnet import Bonnet

FIRST_SEED, FRAMES = 5_100_000, 60  # streets that no training saw
Change = Callable[[Image, int], Image]


class Seen:
    """A sequence whose images another camera took.

    Args:
        sequence: the real one. camera: the other one's intrinsics. change: an image and its number to the other's.
        turned: (3, 3), from coordinates of the real camera to those of the other; may be a mirror.
    """

    def __init__(
        self, sequence: Sequence, camera: Camera, change: Change, turned: NDArray[np.float64] | None = None
    ) -> None:
        self._sequence, self._change = sequence, change
        self.name, self.camera = sequence.name, camera
        truth = sequence.trajectory
        assert truth is not None
        T = np.eye(4)
        T[:3, :3] = np.eye(3) if turned is None else turned
        poses = T @ truth.T_world_camera @ np.linalg.inv(T)
        self.trajectory = Trajectory(truth.timestamps_s, poses)

    def __len__(self) -> int:
        return len(self._sequence)

    def __getitem__(self, index: int) -> Frame:
        frame = self._sequence[index]
        image = np.ascontiguousarray(self._change(frame.image, index))
        return Frame(image, frame.timestamp_s, index, frame.source)


def spoilt(change: Change) -> Callable[[Sequence], Seen]:
    """The same camera, its images changed."""
    return lambda s: Seen(s, s.camera, change)


def cut(top: float, bottom: float, left: float, right: float) -> Callable[[Sequence], Seen]:
    """Shares of the image that are cut off."""

    def seen(s: Sequence) -> Seen:
        height, width = s.camera.height, s.camera.width
        y, x = round(top * height), round(left * width)
        rows, columns = height - y - round(bottom * height), width - x - round(right * width)
        camera = s.camera.cropped(top=y, left=x, height=rows, width=columns)
        return Seen(s, camera, lambda image, _: image[y : y + rows, x : x + columns])

    return seen


def smaller(height: int, width: int) -> Callable[[Sequence], Seen]:
    """All of the image, in fewer pixels."""

    def seen(s: Sequence) -> Seen:
        camera = s.camera.resized(height=height, width=width)
        return Seen(s, camera, lambda image, _: cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA))

    return seen


def mirrored(s: Sequence) -> Seen:
    """Left is right."""
    return Seen(s, s.camera.mirrored(), lambda image, _: image[:, ::-1], np.diag([-1.0, 1.0, 1.0]))


def turned(axis: str, degrees: float, margin: tuple[int, int]) -> Callable[[Sequence], Seen]:
    """A camera turned about an axis of its own (x right, y down, z ahead), less margins that it cannot see (rows,
    columns)."""
    rotation = se3.so3_exp(np.radians(degrees) * np.eye(3)["xyz".index(axis)])
    rows, columns = margin

    def seen(s: Sequence) -> Seen:
        K, size = s.camera.matrix(), (s.camera.width, s.camera.height)
        # A point at X in the real camera is at R^T X in one that was turned by R.
        H = K @ rotation.T @ np.linalg.inv(K)
        camera = s.camera.cropped(top=rows, left=columns, height=size[1] - 2 * rows, width=size[0] - 2 * columns)

        def change(image: Image, _: int) -> Image:
            whole = cv2.warpPerspective(image, H, size, flags=cv2.INTER_CUBIC)
            return whole[rows : size[1] - rows, columns : size[0] - columns]  # type: ignore[return-value]

        return Seen(s, camera, change, rotation.T)

    return seen


def _gamma(power: float) -> Change:
    table = np.round(255 * (np.arange(256) / 255) ** power).astype(np.uint8)
    return lambda image, _: table[image]


def _noise(sd: float) -> Change:
    def change(image: Image, index: int) -> Image:
        grain = np.random.default_rng(index).normal(0, sd, image.shape)
        return np.clip(np.round(image + grain), 0, 255).astype(np.uint8)

    return change


def _flicker(share: float) -> Change:
    """Exposure by a factor of its own in each frame."""

    def change(image: Image, index: int) -> Image:
        factor = np.exp(np.random.default_rng(index).normal(0, share))
        return np.clip(np.round(image * factor), 0, 255).astype(np.uint8)

    return change


def _jpeg(quality: int) -> Change:
    def change(image: Image, _: int) -> Image:
        data = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, quality])[1]
        return cv2.imdecode(data, cv2.IMREAD_GRAYSCALE)  # type: ignore[return-value]

    return change


def _gray(image: Image) -> Image:
    return image if image.ndim == 2 else cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)  # type: ignore[return-value]


def filmed(quality: int) -> Callable[[Sequence], Seen]:
    """As an H.264 video of x264's constant rate factor ``quality``; 23 is its default. Gray, of even sides."""

    def seen(s: Sequence) -> Seen:
        height, width = s.camera.height // 2 * 2, s.camera.width // 2 * 2
        film = io.BytesIO()
        with av.open(film, "w", format="matroska") as out:
            stream = out.add_stream("libx264", rate=10, options={"crf": str(quality)})
            stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
            for i in range(len(s)):
                gray = _gray(s[i].image)[:height, :width]
                out.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(gray), format="gray")))
            out.mux(stream.encode())
        film.seek(0)
        with av.open(film) as back:
            images = [frame.to_ndarray(format="gray") for frame in back.decode(video=0)]
        camera = s.camera.cropped(top=0, left=0, height=height, width=width)
        return Seen(s, camera, lambda _, i: images[i])

    return seen


def _bonnet(image: Image, _: int) -> Image:
    """The car's own, over the lower 18 % in the middle of the image, with dirt on it and a bright edge."""
    height, width = image.shape
    y, x = np.mgrid[:height, :width].astype(np.float32)
    edge = height * (0.82 + 0.14 * (2 * x / width - 1) ** 2)
    dirt = cv2.GaussianBlur(np.random.default_rng(0).normal(0, 40, image.shape).astype(np.float32), (0, 0), 1.5)
    paint = 60 + 0.5 * (y - edge) + dirt + 80 * np.exp(-(((y - edge) / 2) ** 2))
    return np.where(y > edge, paint.clip(0, 255), image).astype(np.uint8)


def _polished(image: Image, _: int) -> Image:
    """A bonnet over as much of the image, darker than the street that it mirrors."""
    height, width = image.shape
    y, x = np.mgrid[:height, :width].astype(np.float32)
    edge = height * (0.82 + 0.14 * (2 * x / width - 1) ** 2)
    mirrored = cv2.remap(image, x, (edge - 2.5 * (y - edge)).clip(0), cv2.INTER_LINEAR)
    paint = 20 + 0.5 * mirrored + 80 * np.exp(-(((y - edge) / 2) ** 2))
    return np.where(y > edge, paint.clip(0, 255), image).astype(np.uint8)


def _written_on(image: Image, _: int) -> Image:
    """A recorder's name and speed in white, and a mark in a corner."""
    out, height = image.copy(), image.shape[0]
    cv2.putText(out, "2026-11-28 12:00:00  048 KM/H", (20, height - 15), cv2.FONT_HERSHEY_SIMPLEX, 1.0, 255, 2)
    cv2.rectangle(out, (20, 15), (120, 55), 200, -1)
    return out


def _barred(image: Image, _: int) -> Image:
    """Black bars above and below, of a tenth of the height each."""
    out, rows = image.copy(), image.shape[0] // 10
    out[:rows] = out[-rows:] = 0
    return out


CAMERAS: dict[str, Callable[[Sequence], Seen]] = {
    "as it is": spoilt(lambda image, _: image),
    "mirrored": mirrored,
    "half the pixels each way": smaller(188, 620),
    "a third of the pixels each way": smaller(125, 414),
    "middle half of the width": cut(0, 0, 0.25, 0.25),
    "upper third cut off": cut(0.33, 0, 0, 0),
    "lower quarter cut off": cut(0, 0.25, 0, 0),
    "left third cut off": cut(0, 0, 0.33, 0),
    "pitched down by 3 degrees": turned("x", -3.0, (38, 0)),
    "pitched up by 3 degrees": turned("x", 3.0, (38, 0)),
    "rolled by 3 degrees": turned("z", 3.0, (34, 12)),
    "looking 6 degrees to the left": turned("y", -6.0, (12, 80)),
    "a bonnet in view": spoilt(_bonnet),
    "a bonnet that mirrors the street": spoilt(_polished),
    "a recorder's writing": spoilt(_written_on),
    "black bars": spoilt(_barred),
    "gamma 0.5": spoilt(_gamma(0.5)),
    "gamma 2": spoilt(_gamma(2.0)),
    "contrast of a quarter": spoilt(lambda image, _: image // 4 + 60),
    "noise of 8 grey levels": spoilt(_noise(8.0)),
    "exposure that flickers by 15 %": spoilt(_flicker(0.15)),
    "JPEG of quality 25": spoilt(_jpeg(25)),
    "H.264 of quality 23": filmed(23),
    "H.264 of quality 28": filmed(28),
    "H.264 of quality 33": filmed(33),
    "blurred by 1.5 pixels": spoilt(lambda image, _: cv2.GaussianBlur(image, (0, 0), 1.5)),  # type: ignore[return-value]
}


def over_bonnet(s: Sequence, seed: int) -> Seen:
    """A bonnet of a shape, paint and shine by the seed; gray."""
    own = Bonnet(s.camera.height, s.camera.width, np.random.default_rng(seed))

    def change(image: Image, _: int) -> Image:
        return own.over(_gray(image))

    return spoilt(change)(s)


OVER_BONNETS = "over bonnets"
MOUNTS = {
    "straight": Mount(),
    "5 degrees to the right": Mount(yaw=np.radians(5)),
    "10 degrees to the left": Mount(yaw=np.radians(-10)),
    "18 degrees to the right": Mount(yaw=np.radians(18)),
    "up by 8 degrees": Mount(pitch=np.radians(8)),
    "down by 8 degrees": Mount(pitch=np.radians(-8)),
    "rolled by 6 degrees": Mount(roll=np.radians(6)),
    "0.8 m above the road": Mount(0.8),
    "3 m above the road": Mount(3.0),
    OVER_BONNETS: Mount(),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kitti", type=Path, default=Path("../shared/kitti"))
    parser.add_argument("--checkpoint", type=Path, default=DEFAULT_CHECKPOINT)
    parser.add_argument("--clips", nargs="+", choices=list(CLIPS), default=list(CLIPS))
    parser.add_argument("--only", nargs="+", choices=list(CAMERAS), default=list(CAMERAS), metavar="CAMERA")
    parser.add_argument("--streets", type=int, default=8, help="for each mounting")
    parser.add_argument("--mounts", nargs="+", choices=list(MOUNTS), default=list(MOUNTS), metavar="MOUNT")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    net = load_checkpoint(options.checkpoint)
    results: dict[str, dict[str, list[float]]] = {}
    clips = [KittiSequence(options.kitti, name) for name in options.clips] if options.kitti.is_dir() else []
    count = len(options.only) * sum(map(len, clips)) + len(options.mounts) * options.streets * FRAMES
    with progress("Cameras", count) as advance:
        for name in options.only if clips else []:
            seen: list[Sequence] = [CAMERAS[name](clip) for clip in clips]
            results[name] = measure(seen, lambda s: estimate_trajectory(net, s, advance), CLIPS)
            row = "  ".join(f"{clip} {v[0]:.2f}/{v[1]:.2f} ({v[2]:+.1f} %)" for clip, v in results[name].items())
            print(f"{name:32}", row, flush=True)
        for name in options.mounts if options.streets else []:
            known = VehicleCalibration(MOUNTS[name].height_m)
            drives = unseen_streets(options.streets, FRAMES, mount=MOUNTS[name], seed=FIRST_SEED)
            if name == OVER_BONNETS:
                drives = [over_bonnet(drive, seed) for seed, drive in enumerate(drives)]
            results[name] = measure(
                drives,
                lambda s, known=known: estimate_trajectory(net, s, advance, known),
                {},  # type: ignore[misc]
            )
            values = np.array(list(results[name].values()))
            print(
                f"{name:32} mean {values[:, 0].mean():.2f}/{values[:, 1].mean():.2f} "
                f"({values[:, 2].mean():+.2f} %), median {np.median(values[:, 0]):.2f}/"
                f"{np.median(values[:, 1]):.2f}, worst {values[:, 0].max():.1f}",
                flush=True,
            )
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
