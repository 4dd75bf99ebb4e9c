"""Where frames come from. A new kind of input is one file here and one line in `OPENERS`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

from convlstm_vo.sequences.bag import BagStream, is_bag
from convlstm_vo.sequences.base import SequenceError, Stream
from convlstm_vo.sequences.kitti import KittiSequence, sequence_names
from convlstm_vo.sequences.video import CameraFor, ImageFolder, VideoStream, check_size


@dataclasses.dataclass(frozen=True)
class Wanted:
    """What was asked for beside the source: intrinsics, one of KITTI's cameras, a bag's topic, a folder's rate."""

    camera_for: CameraFor | None = None
    camera: int = 0
    topic: str | None = None
    fps: float | None = None

    def intrinsics(self, source: str) -> CameraFor:
        """For sources that carry none."""
        if self.camera_for is None:
            raise SequenceError(
                f"{source}: carries no intrinsics; give --calib FILE, --intrinsics FX FY CX CY, or --fov DEGREES"
            )
        return self.camera_for


def _open_kitti(source: str, wanted: Wanted) -> Stream | None:
    path = Path(source)
    if (path / "calib.txt").is_file() and path.parent.name == "sequences":
        sequence = KittiSequence(path.parent.parent, path.name, camera=wanted.camera)
        if wanted.camera_for is not None:
            height, width = sequence.camera.height, sequence.camera.width
            sequence.camera = check_size(wanted.camera_for(height, width), height, width, source)
        return sequence
    if (path / "sequences").is_dir():
        names = ", ".join(sequence_names(path))
        raise SequenceError(f"{source}: a KITTI tree; name one of its sequences: {path}/sequences/NAME ({names})")
    return None


def _open_bag(source: str, wanted: Wanted) -> Stream | None:
    return BagStream(source, wanted.camera_for, topic=wanted.topic) if is_bag(source) else None


def _open_folder(source: str, wanted: Wanted) -> Stream | None:
    if not Path(source).is_dir():
        return None
    return ImageFolder(source, wanted.intrinsics(source), fps=wanted.fps)


def _open_camera(source: str, wanted: Wanted) -> Stream | None:
    return VideoStream(int(source), wanted.intrinsics(source)) if source.isdecimal() else None


def _open_video(source: str, wanted: Wanted) -> Stream | None:
    if "://" not in source and not Path(source).exists():
        raise SequenceError(f"{source}: no such file or folder")
    return VideoStream(source, wanted.intrinsics(source))


# Asked in this order; the first that knows the source opens it.
OPENERS: tuple[Callable[[str, Wanted], Stream | None], ...] = (
    _open_kitti,
    _open_bag,
    _open_folder,
    _open_camera,
    _open_video,
)


def open_stream(
    source: str,
    camera_for: CameraFor | None = None,
    *,
    camera: int = 0,
    topic: str | None = None,
    fps: float | None = None,
) -> Stream:
    """Open whatever ``source`` is: a KITTI sequence, a ROS bag, a folder of images, a camera number, a video.

    Args:
        source: path, URL or camera number.
        camera_for: gives the camera for an image of (height, width); a KITTI sequence brings its own, which this
            replaces; a bag may.
        camera: which of KITTI's cameras.
        topic: of a bag's images; may be left out where there is only one.
        fps: frames a second of a folder of images that has no times.txt; by default 10.

    Raises:
        SequenceError: nothing can open it, intrinsics are missing, or an option is for another kind of source.
    """
    wanted = Wanted(camera_for, camera, topic, fps)
    for opener in OPENERS:
        stream = opener(source, wanted)
        if stream is None:
            continue
        if topic is not None and not isinstance(stream, BagStream):
            raise SequenceError(f"--topic {topic}: is for ROS bags, and {source} is none; leave it out")
        if fps is not None and not isinstance(stream, ImageFolder):
            raise SequenceError(
                f"--fps {fps:g}: is for folders of images; {source} has times of its own; leave it out"
            )
        return stream
    raise SequenceError(f"{source}: neither a KITTI sequence, nor a bag, a folder of images, a camera or a video")
