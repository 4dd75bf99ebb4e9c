"""Where frames come from. A new kind of input is one file here and one line in `OPENERS`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from convlstm_vo.sequences.base import SequenceError, Stream
from convlstm_vo.sequences.kitti import KittiSequence, sequence_names
from convlstm_vo.sequences.video import CameraFor, ImageFolder, VideoStream


def _open_kitti(source: str, camera_for: CameraFor | None, camera: int) -> Stream | None:
    path = Path(source)
    if (path / "calib.txt").is_file() and path.parent.name == "sequences":
        return KittiSequence(path.parent.parent, path.name, camera=camera)
    if (path / "sequences").is_dir():
        names = ", ".join(sequence_names(path))
        raise SequenceError(f"{source}: a KITTI tree; name one of its sequences: {path}/sequences/NAME ({names})")
    return None


def _open_folder(source: str, camera_for: CameraFor | None, camera: int) -> Stream | None:
    return ImageFolder(source, _required(camera_for, source)) if Path(source).is_dir() else None


def _open_camera(source: str, camera_for: CameraFor | None, camera: int) -> Stream | None:
    return VideoStream(int(source), _required(camera_for, source)) if source.isdecimal() else None


def _open_video(source: str, camera_for: CameraFor | None, camera: int) -> Stream | None:
    if "://" not in source and not Path(source).exists():
        raise SequenceError(f"{source}: no such file or folder")
    return VideoStream(source, _required(camera_for, source))


def _required(camera_for: CameraFor | None, source: str) -> CameraFor:
    if camera_for is None:
        raise SequenceError(
            f"{source}: carries no intrinsics; give --calib FILE, --intrinsics FX FY CX CY, or --fov DEGREES"
        )
    return camera_for


# Asked in this order; the first that knows the source opens it.
OPENERS: tuple[Callable[[str, CameraFor | None, int], Stream | None], ...] = (
    _open_kitti,
    _open_folder,
    _open_camera,
    _open_video,
)


def open_stream(source: str, camera_for: CameraFor | None = None, *, camera: int = 0) -> Stream:
    """Open whatever ``source`` is: a KITTI sequence folder, a folder of images, a camera number, a video.

    Args:
        source: path, URL or camera number.
        camera_for: gives the camera for an image of (height, width); a KITTI sequence brings its own.
        camera: which of KITTI's cameras.

    Raises:
        SequenceError: nothing can open it, or intrinsics are missing.
    """
    for opener in OPENERS:
        stream = opener(source, camera_for, camera)
        if stream is not None:
            return stream
    raise SequenceError(f"{source}: neither a KITTI sequence, nor a folder of images, a camera or a video")
