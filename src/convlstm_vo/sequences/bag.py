"""Frames from a ROS bag (ROS 1 .bag, ROS 2 folder, .mcap or .db3), with intrinsics where the bag has them.

No ROS is needed: ``pip install 'convlstm-vo[bags]'`` brings a reader.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np

from convlstm_vo.geometry.camera import Camera
from convlstm_vo.geometry.trajectory import FRAME_PERIOD_S
from convlstm_vo.sequences.base import Frame, Image, SequenceError, decode_image
from convlstm_vo.sequences.lens import Lens, lens_of
from convlstm_vo.sequences.video import CameraFor, check_size

if TYPE_CHECKING:
    from rosbags.highlevel import AnyReader
    from rosbags.interfaces import Connection

SUFFIXES = (".bag", ".mcap", ".db3")
_IMAGES = ("sensor_msgs/msg/Image", "sensor_msgs/msg/CompressedImage")
_INFO = "sensor_msgs/msg/CameraInfo"
_BAYER = {  # OpenCV names a pattern by its second row, ROS by its first
    "bayer_rggb8": cv2.COLOR_BayerBG2RGB,
    "bayer_bggr8": cv2.COLOR_BayerRG2RGB,
    "bayer_gbrg8": cv2.COLOR_BayerGR2RGB,
    "bayer_grbg8": cv2.COLOR_BayerGB2RGB,
}
_COLOURS = {"bgr8": cv2.COLOR_BGR2RGB, "rgba8": cv2.COLOR_RGBA2RGB, "bgra8": cv2.COLOR_BGRA2RGB}
_YUV = {
    "yuv422": cv2.COLOR_YUV2RGB_UYVY,
    "uyvy": cv2.COLOR_YUV2RGB_UYVY,
    "yuv422_yuy2": cv2.COLOR_YUV2RGB_YUY2,
    "yuyv": cv2.COLOR_YUV2RGB_YUY2,
}
_CHANNELS = {"rgb8": 3, "bgr8": 3, "8uc3": 3, "rgba8": 4, "bgra8": 4} | dict.fromkeys(_YUV, 2)


def is_bag(source: str) -> bool:
    """Whether a path looks like a bag."""
    path = Path(source)
    return path.suffix.lower() in SUFFIXES or (path / "metadata.yaml").is_file()


class BagStream:
    """The images of one topic of a bag, in the order of their recording; read once or many times.

    Where the bag has the topic's ``camera_info``, its intrinsics are taken and its distortion is removed, unless
    ``camera_for`` gives a camera.

    Args:
        path: a ``.bag``, ``.mcap`` or ``.db3`` file, or the folder of a ROS 2 bag.
        camera_for: gives the camera for an image of (height, width).
        topic: of the images; may be left out where there is only one.

    Attributes:
        approximate_length: the number of images.
        restamped: images read so far whose stamps did not follow the one before. The clock is then taken to have
            been set back: these and all later images get times that go on from there.

    Raises:
        SequenceError: not a readable bag, no or several topics of images, an encoding that is not of a camera, or
            intrinsics that are neither given nor in the bag.
    """

    trajectory = None
    restamped = 0

    def __init__(self, path: Path | str, camera_for: CameraFor | None = None, *, topic: str | None = None) -> None:
        self.path = Path(path)
        self.name = self.path.stem
        with _opened(self.path) as reader:
            connection = _choose(reader, self.path, topic)
            self.topic = connection.topic
            self.approximate_length = sum(c.msgcount for c in reader.connections if c.topic == self.topic)
            first = next(self._read(reader), None)
            if first is None:
                raise SequenceError(f"{path}: {self.topic} has no image in it")
            height, width = first.image.shape[:2]
            self._size = (height, width)
            self.lens: Lens | None = None
            if camera_for is not None:
                self.camera = check_size(camera_for(height, width), height, width, str(path))
            else:
                self.camera = self._from_info(reader, height, width)

    def __iter__(self) -> Iterator[Frame]:
        self.restamped, last_s, shift_s, period_s = 0, -math.inf, 0.0, FRAME_PERIOD_S
        with _opened(self.path) as reader:
            for frame in self._read(reader):
                now_s = frame.timestamp_s + shift_s
                if now_s <= last_s:
                    shift_s += last_s + period_s - now_s
                    now_s = last_s + period_s
                    self.restamped += 1
                elif last_s > -math.inf:
                    period_s = min(now_s - last_s, 1.0)
                frame, last_s = dataclasses.replace(frame, timestamp_s=now_s), now_s
                if frame.image.shape[:2] != self._size:
                    raise SequenceError(f"{frame.source}: the image has another size than the first one")
                if self.lens is not None:
                    frame = dataclasses.replace(frame, image=self.lens.undistort(frame.image))
                yield frame

    def _read(self, reader: AnyReader) -> Iterator[Frame]:
        connections = [c for c in reader.connections if c.topic == self.topic]
        for index, (connection, recorded_ns, raw) in enumerate(reader.messages(connections=connections)):
            source = f"{self.path}, {self.topic}, image {index}"
            try:
                message: Any = reader.deserialize(raw, connection.msgtype)
                image = _decode(message, source)
            except SequenceError:
                raise
            except Exception as error:  # a truncated message fails in many ways
                raise SequenceError(f"{source}: cannot be decoded ({error}); cut the bag before it") from None
            stamp = message.header.stamp
            seconds = stamp.sec + 1e-9 * stamp.nanosec
            yield Frame(image, seconds if seconds > 0 else 1e-9 * recorded_ns, index, source)

    def _from_info(self, reader: AnyReader, height: int, width: int) -> Camera:
        """Intrinsics from the camera_info beside the images."""
        beside = self.topic.removesuffix("/compressed").rpartition("/")[0] + "/camera_info"
        found = [c for c in reader.connections if c.msgtype == _INFO and c.topic == beside and c.msgcount]
        everything = sorted({c.topic for c in reader.connections if c.msgtype == _INFO and c.msgcount})
        if not found:
            there = f" (it has {', '.join(everything)})" if everything else ""
            raise SequenceError(
                f"{self.path}: no {beside} with the intrinsics of {self.topic}{there}; give --calib FILE, "
                "--intrinsics FX FY CX CY, or --fov DEGREES"
            )
        connection, _, raw = next(reader.messages(connections=found))
        info: Any = reader.deserialize(raw, connection.msgtype)
        K, D, P = (np.asarray(getattr(info, name, None) if hasattr(info, name) else getattr(info, name.lower()))
                   for name in "KDP")  # fmt: skip
        if (info.height, info.width) != (height, width) or K[0] <= 0:
            raise SequenceError(
                f"{self.path}: {beside} is of a {info.height}x{info.width} image with fx {K[0]:g}, but the images "
                f"are {height}x{width}; give --calib FILE, --intrinsics FX FY CX CY, or --fov DEGREES"
            )
        name = self.topic.removesuffix("/compressed").rpartition("/")[2]
        if name.startswith("image_rect") and P[0] > 0:  # image_proc has undistorted these
            return Camera(float(P[0]), float(P[5]), float(P[2]), float(P[6]), height=height, width=width)
        raw_camera = Camera(float(K[0]), float(K[4]), float(K[2]), float(K[5]), height=height, width=width)
        coefficients = tuple(float(value) for value in D)
        self.lens = lens_of(raw_camera, coefficients, info.distortion_model, f"{self.path}, {beside}")
        return raw_camera if self.lens is None else self.lens.rectified


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[AnyReader]:
    try:
        from rosbags.highlevel import AnyReader
        from rosbags.typesys import Stores, get_typestore
    except ModuleNotFoundError:
        raise SequenceError(f"{path}: to read bags, pip install 'convlstm-vo[bags]'") from None
    if not path.exists():
        raise SequenceError(f"{path}: no such file or folder")
    try:
        # Older ROS 2 bags do not say what their messages look like; images look alike in all.
        reader = AnyReader([path], default_typestore=get_typestore(Stores.ROS2_HUMBLE))
        reader.open()
    except Exception as error:  # damaged bags fail in many ways, down to the database's
        raise SequenceError(f"{path}: cannot be read as a bag ({error}); try `rosbag reindex` on it") from None
    try:
        yield reader
    finally:
        reader.close()


def _choose(reader: AnyReader, path: Path, topic: str | None) -> Connection:
    images = {c.topic: c for c in reader.connections if c.msgtype in _IMAGES and c.msgcount}
    names = ", ".join(sorted(images)) or "none"
    if topic is not None:
        if topic not in images:
            raise SequenceError(f"{path}: no images in topic '{topic}'; topics with images: {names}")
        return images[topic]
    if len(images) != 1:
        what = "several topics of images; choose one with --topic" if images else "no topic of images"
        raise SequenceError(f"{path}: {what} ({names})")
    return next(iter(images.values()))


def _decode(message: Any, source: str) -> Image:
    """A sensor_msgs Image or CompressedImage as uint8 gray (height, width) or RGB (height, width, 3)."""
    if not hasattr(message, "encoding"):
        image = decode_image(message.data)
        if image is None:
            raise SequenceError(f"{source}: a damaged {message.format} image; cut the bag before it")
        return image
    kind, height, width = message.encoding.lower(), message.height, message.width
    wide = kind in ("mono16", "16uc1")
    if not (wide or kind in _CHANNELS or kind in _BAYER or kind in ("mono8", "8uc1")):
        raise SequenceError(
            f"{source}: encoding '{message.encoding}' is not one of a camera; choose another --topic"
        )
    channels = _CHANNELS.get(kind, 1)
    # Rows may end with padding.
    rows = np.frombuffer(message.data, np.uint8)[: height * message.step].reshape(height, message.step)
    pixels = rows[:, : width * channels * (2 if wide else 1)]
    if wide:
        deep = np.ascontiguousarray(pixels).view(">u2" if message.is_bigendian else "<u2")
        return (deep >> 8).astype(np.uint8)
    pixels = np.ascontiguousarray(pixels).reshape(height, width, channels)
    if kind in _BAYER:
        return cv2.cvtColor(pixels[..., 0], _BAYER[kind])  # type: ignore[return-value]
    if kind in _YUV:
        return cv2.cvtColor(pixels, _YUV[kind])  # type: ignore[return-value]
    if kind in _COLOURS:
        return cv2.cvtColor(pixels, _COLOURS[kind])  # type: ignore[return-value]
    return pixels[..., 0] if channels == 1 else pixels
