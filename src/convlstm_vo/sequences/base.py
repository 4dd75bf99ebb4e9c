"""What a sequence is: frames in order, the camera that took them and, where known, its trajectory."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol, runtime_checkable

import cv2
import numpy as np
from numpy.typing import NDArray

from convlstm_vo.errors import ConvlstmVoError
from convlstm_vo.geometry.camera import Camera
from convlstm_vo.geometry.trajectory import Trajectory

Image = NDArray[np.uint8]


class SequenceError(ConvlstmVoError):
    """Input that cannot be read as a sequence of frames."""


@dataclasses.dataclass(frozen=True)
class Frame:
    """One image of a sequence.

    Attributes:
        image: uint8, (height, width) gray or (height, width, 3) RGB.
        timestamp_s: time in seconds.
        index: its number in the sequence, from 0.
        source: where it came from, for messages.
    """

    image: Image
    timestamp_s: float
    index: int
    source: str = ""


@runtime_checkable
class Stream(Protocol):
    """Frames in order, of which only the next is known: a camera or a video."""

    name: str
    camera: Camera

    def __iter__(self) -> Iterator[Frame]: ...


@runtime_checkable
class Sequence(Stream, Protocol):
    """Frames that can be read in any order, with the camera's trajectory where it is known."""

    @property
    def trajectory(self) -> Trajectory | None: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Frame: ...


def read_image(path: Path, *, size: tuple[int, int] | None = None, rule: str = "") -> Image:
    """Read an image file as uint8, (height, width) gray or (height, width, 3) RGB.

    Args:
        path: a PNG, JPEG or whatever else OpenCV reads; 16-bit gray is scaled to 8 bits.
        size: the (height, width) that it must have.
        rule: why it must, for the message.

    Raises:
        SequenceError: missing, truncated or not an image, or of another size.
    """
    if path.suffix.lower() == ".png":
        _check_png_is_whole(path)
    try:
        image = decode_image(path.read_bytes())  # OpenCV opens no file with such names as Windows allows
    except OSError as error:
        what = "no such file" if isinstance(error, FileNotFoundError) else f"cannot be read ({error.strerror})"
        raise SequenceError(f"{path}: {what}; replace it or cut the sequence before it") from None
    if image is None:
        raise SequenceError(
            f"{path}: cannot be decoded as an image (truncated or damaged); "
            "replace it or cut the sequence before it"
        )
    if size is not None and image.shape[:2] != size:
        raise SequenceError(
            f"{path}: the image is {image.shape[0]}x{image.shape[1]}, but {rule or 'the sequence'} "
            f"has {size[0]}x{size[1]} (height x width); all frames of a sequence must have one size"
        )
    return image


def decode_image(content: bytes | NDArray[np.uint8]) -> Image | None:
    """An image file's content as uint8, (height, width) gray or (height, width, 3) RGB; None if it is damaged."""
    data = np.frombuffer(content, np.uint8)
    try:
        image = cv2.imdecode(data, cv2.IMREAD_ANYCOLOR) if len(data) else None
    except cv2.error:
        return None
    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB) if image is not None and image.ndim == 3 else image  # type: ignore[return-value]


def _check_png_is_whole(path: Path) -> None:
    """OpenCV fills the missing part of a truncated PNG with gray and reports nothing; its end mark tells."""
    try:
        with path.open("rb") as stream:
            stream.seek(0, 2)
            stream.seek(max(0, stream.tell() - 64))
            whole = b"IEND" in stream.read()
    except OSError:
        return  # the decoder's own message is better
    if not whole:
        raise SequenceError(f"{path}: the PNG is truncated (its end mark is missing); copy it again")


def fit_image(image: Image, *, height: int, width: int, channels: int) -> Image:
    """Bring an image to a network's size and number of channels (1 gray, 3 RGB): uint8 (height, width, channels).

    The whole image is resized, so both ratios may differ; `Camera.resized` says what that does to intrinsics.
    """
    if channels == 1 and image.ndim == 3:
        image = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)  # type: ignore[assignment]
    if image.shape[:2] != (height, width):
        # Averaging areas keeps a shrunken image free of aliasing, which would look like motion.
        shrinking = height < image.shape[0] and width < image.shape[1]
        method = cv2.INTER_AREA if shrinking else cv2.INTER_LINEAR
        image = cv2.resize(image, (width, height), interpolation=method)  # type: ignore[assignment]
    if image.ndim == 2:
        image = np.repeat(image[..., None], channels, axis=-1)
    return image
