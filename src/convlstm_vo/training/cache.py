"""Frames decoded once: a memory-mapped uint8 array per sequence at the network's size."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import zlib
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from convlstm_vo.errors import ConvlstmVoError
from convlstm_vo.geometry.files import replacing
from convlstm_vo.sequences.base import Sequence, fit_image

Advance = Callable[[int], None]
_FORMAT = 1  # raise it when the pixels for the same source would change


class CacheError(ConvlstmVoError):
    """A frame cache that cannot be built or read."""


@dataclasses.dataclass(frozen=True)
class DecodedSequence:
    """All that training needs of a sequence.

    Attributes:
        name: for messages and logs.
        images: uint8 (frames, height, width, channels), in memory or memory-mapped.
        intrinsics: (4,) fx, fy, cx, cy in pixels of ``images``.
        T_world_camera: (frames, 4, 4).
    """

    name: str
    images: NDArray[np.uint8]
    intrinsics: NDArray[np.float64]
    T_world_camera: NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.images)


def identity_of(sequences: list[DecodedSequence]) -> dict[str, Any]:
    """What tells sequences from others of the same lengths, in plain values."""
    checksum = 0
    for sequence in sequences:
        checksum = zlib.crc32(sequence.T_world_camera.tobytes(), checksum)
    return {"sequences": [sequence.name for sequence in sequences], "checksum of poses": checksum}


def default_cache_folder() -> Path:
    """``$XDG_CACHE_HOME/convlstm-vo/frames``, by default under ``~/.cache``."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "convlstm-vo" / "frames"


def decode_sequence(
    sequence: Sequence,
    *,
    height: int,
    width: int,
    channels: int,
    folder: Path | None = None,
    threads: int | None = None,
    advance: Advance = lambda count: None,
) -> DecodedSequence:
    """Decode and resize every frame of a sequence with ground truth, or map what an earlier run left in ``folder``.

    Gray frames are kept as one channel even for a network that takes three: a third of the memory.

    Args:
        folder: where the cache lives; None keeps the frames in memory.
        threads: that decode, by default one a core; a sequence that is rendered while it is read wants one.
        advance: called with the number of frames done.

    Raises:
        CacheError: the sequence has no ground truth, or the cache folder has no room.
        SequenceError: an image that cannot be read.
    """
    if sequence.trajectory is None:
        raise CacheError(f"sequence {sequence.name}: has no ground-truth poses, so it cannot be learnt from")
    stored = 1 if sequence[0].image.ndim == 2 else channels
    shape = (len(sequence), height, width, stored)
    paths: list[Path] = getattr(sequence, "images", [])
    if folder is None or not paths:
        images = np.empty(shape, np.uint8)
        _fill(images, sequence, threads, advance)
    else:
        path = folder / f"{sequence.name}-{_fingerprint(paths, shape)}.npy"
        if not path.exists():
            _build(path, shape, sequence, threads, advance)
        else:
            advance(shape[0])
        images = _map(path, shape)
    camera = sequence.camera.resized(height=height, width=width)
    return DecodedSequence(sequence.name, images, camera.intrinsics, sequence.trajectory.T_world_camera)


def _fingerprint(paths: Iterable[Path], shape: tuple[int, ...]) -> str:
    """Changes whenever an image is added, removed, replaced or touched, or another size is asked for."""
    digest = hashlib.sha256(repr((_FORMAT, shape)).encode())
    for path in paths:
        status = path.stat()
        digest.update(f"{path.resolve()}\0{status.st_size}\0{status.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:20]


def _build(path: Path, shape: tuple[int, ...], sequence: Sequence, threads: int | None, advance: Advance) -> None:
    # Two runs may build the same cache at once: each writes its own file, and the last rename wins.
    with replacing(path) as temporary:
        images = np.lib.format.open_memmap(temporary, "w+", np.uint8, shape)
        # The space is taken first: writing to a map on a full disk would kill the process without a word.
        if hasattr(os, "posix_fallocate"):
            with temporary.open("r+b") as stream:
                os.posix_fallocate(stream.fileno(), 0, temporary.stat().st_size)
        _fill(images, sequence, threads, advance)
        images.flush()
        del images  # Windows renames no file that is mapped


def _map(path: Path, shape: tuple[int, ...]) -> NDArray[np.uint8]:
    try:
        images = np.load(path, mmap_mode="r")
    except ValueError as error:
        raise CacheError(f"{path}: is damaged ({error}); delete it, it is built again") from None
    if images.shape != shape or images.dtype != np.uint8:
        raise CacheError(f"{path}: holds {images.dtype} {images.shape}, not uint8 {shape}; delete it")
    return images


def _fill(images: NDArray[np.uint8], sequence: Sequence, threads: int | None, advance: Advance) -> None:
    _, height, width, channels = images.shape

    def decode(index: int) -> None:
        images[index] = fit_image(sequence[index].image, height=height, width=width, channels=channels)
        advance(1)

    # OpenCV decodes and resizes without Python's lock, so threads are enough.
    with ThreadPoolExecutor(max_workers=threads or os.cpu_count()) as pool:
        for _ in pool.map(decode, range(len(images))):
            pass
