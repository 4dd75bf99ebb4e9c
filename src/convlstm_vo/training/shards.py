"""Collections of any size as shards: tar files of some hundred frames each, read one after the other.

A shard has two files a frame, ``SEQUENCE/000123.png`` (or jpg, npy) and ``SEQUENCE/000123.json`` with its pose and
intrinsics: the layout of webdataset, which any tar program unpacks. ``index.json`` beside the shards tells what is
in each, so that a run can be planned, and resumed, before anything is read. `packing.py` writes them.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import io
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from convlstm_vo.errors import ConvlstmVoError
from convlstm_vo.geometry.camera import Camera
from convlstm_vo.sequences.base import Image, decode_image, fit_image
from convlstm_vo.training.cache import DecodedSequence

INDEX_FILE = "index.json"
FORMAT = 1
_AGAIN = "pack it again with `convlstm-vo shard`"
_SUFFIXES = ("png", "jpg", "npy")


class ShardError(ConvlstmVoError):
    """Shards that cannot be written, found or read."""


@dataclasses.dataclass(frozen=True)
class Piece:
    """Consecutive frames of a sequence: those from ``start`` to before ``stop``."""

    sequence: str
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


@dataclasses.dataclass(frozen=True)
class Shard:
    """One file of an index."""

    name: str
    pieces: tuple[Piece, ...]

    @property
    def lengths(self) -> tuple[int, ...]:
        """Frames of each piece."""
        return tuple(map(len, self.pieces))


def webdataset() -> Any:
    """The library, imported where it is needed.

    Raises:
        ShardError: it is not installed.
    """
    try:
        import webdataset as library
    except ImportError:
        raise ShardError("shards need webdataset: pip install 'convlstm-vo[shards]'") from None
    return library


# --- finding ------------------------------------------------------------------------------------------------------


def find_shards(source: str) -> tuple[str, list[Shard]]:
    """The shards that a folder, a pattern or a URL names.

    Args:
        source: what `convlstm-vo shard` wrote: ``DIR``, ``DIR/0000*.tar``, ``https://host/DIR``, ``s3://bucket/DIR``
            (with the ``aws`` program), ``gs://bucket/DIR`` (``gsutil``), ``pipe:ssh host cat /DIR/{}``.

    Returns:
        Where they are, for `locate`, and the shards in their order.

    Raises:
        ShardError: no index there or a damaged one, a pattern that no shard matches, or a shard that is missing.
    """
    folder, pattern = _split(source)
    shards = _read_index(folder)
    chosen = [shard for shard in shards if fnmatch.fnmatch(shard.name, pattern)]
    if not chosen:
        first, last = (shards[0].name, shards[-1].name) if shards else ("none", "none")
        raise ShardError(f"--shards {source}: no shard has such a name; {folder} holds {first} to {last}")
    if _is_local(folder):
        for shard in chosen:
            if not (Path(folder) / shard.name).is_file():
                raise ShardError(
                    f"{Path(folder) / shard.name}: is missing; was packing interrupted? The same "
                    "`convlstm-vo shard` command goes on where it stopped"
                )
    return folder, chosen


def locate(folder: str, name: str) -> str:
    """Path or URL of a file beside the index, as webdataset opens it."""
    if folder.startswith("pipe:"):
        return folder.replace("{}", name)
    if folder.startswith("s3://"):
        return f"pipe:aws s3 cp --only-show-errors '{folder}/{name}' -"
    return f"{folder}/{name}"


def _split(source: str) -> tuple[str, str]:
    """The folder, and which of its shards: ``DIR/0*.tar`` → ``DIR``, ``0*.tar``."""
    if source.startswith("pipe:"):
        if "{}" not in source:
            raise ShardError(
                f"--shards {source}: a pipe needs {{}} where the file's name goes, e.g. pipe:cat DIR/{{}}"
            )
        return source, "*"
    folder, _, name = source.rstrip("/").rpartition("/")
    if name.endswith(".tar") or any(sign in name for sign in "*?["):
        return folder or ".", name
    return source.rstrip("/") or "/", "*"


def _is_local(folder: str) -> bool:
    return "://" not in folder and not folder.startswith("pipe:")


def _read_index(folder: str) -> list[Shard]:
    where = locate(folder, INDEX_FILE)
    try:
        with webdataset().gopen(where) as stream:
            index = json.loads(stream.read())
        if index["format"] != FORMAT:
            raise ShardError(f"{where}: format {index['format']}, but this version reads {FORMAT}: {_AGAIN}")
        return [
            Shard(shard["name"], tuple(Piece(*piece) for piece in shard["pieces"])) for shard in index["shards"]
        ]
    except (FileNotFoundError, NotADirectoryError):
        raise ShardError(f"{where}: no such file; --shards names a folder that `convlstm-vo shard` wrote") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ShardError(f"{where}: cannot be read as the index of shards ({error!r})") from None


# --- reading ------------------------------------------------------------------------------------------------------


def read_shard(folder: str, shard: Shard, *, height: int, width: int, channels: int) -> list[DecodedSequence]:
    """The pieces of a shard, decoded at a network's size; from first to last byte, once.

    Raises:
        ShardError: a shard that is cut short or damaged, one that is not what the index says, a frame without pose.
    """
    where = locate(folder, shard.name)
    samples = _samples(where)
    pieces = []
    for piece in shard.pieces:
        frames = (_sample_of(where, next(samples, None), piece, index) for index in range(piece.start, piece.stop))
        pieces.append(_decode_piece(where, piece, frames, (height, width, channels)))
    if (extra := next(samples, None)) is not None:
        raise ShardError(f"{where}: holds {extra['__key__']}, of which {INDEX_FILE} knows nothing; {_AGAIN}")
    return pieces


def _samples(where: str) -> Iterator[dict[str, Any]]:
    """What webdataset finds in a tar file: a dictionary a frame, its files by suffix."""
    library = webdataset()
    try:
        with library.gopen(where) as stream:  # webdataset itself would leave it open
            files = library.tariterators.tar_file_expander([{"url": where, "stream": stream}])
            yield from library.tariterators.group_by_keys(files)
    except ShardError:
        raise
    except Exception as error:  # tarfile, pipes and curl raise many kinds
        reason = (str(error.args[0]) if error.args else repr(error)).splitlines()[0]
        raise ShardError(
            f"{where}: is cut short, damaged or out of reach ({reason}); copy it again, or {_AGAIN}"
        ) from error


def _sample_of(where: str, sample: dict[str, Any] | None, piece: Piece, index: int) -> dict[str, Any]:
    """The sample, if it is the frame that the index promises here."""
    expected = f"{piece.sequence}/{index:06d}"
    if sample is None or sample["__key__"] != expected:
        found = "the end" if sample is None else f"frame {sample['__key__']}"
        raise ShardError(
            f"{where}: {found} where frame {expected} should stand; it is cut short or changed: {_AGAIN}"
        )
    if "json" not in sample:
        raise ShardError(f"{where}, frame {expected}: has no pose ({expected}.json is missing); {_AGAIN}")
    if not any(suffix in sample for suffix in _SUFFIXES):
        raise ShardError(f"{where}, frame {expected}: has no image (png, jpg or npy); is it cut short? {_AGAIN}")
    return sample


def _decode_piece(
    where: str, piece: Piece, samples: Iterable[dict[str, Any]], size: tuple[int, int, int]
) -> DecodedSequence:
    height, width, channels = size
    images: NDArray[np.uint8] | None = None
    poses = np.tile(np.eye(4), (len(piece), 1, 1))
    camera: Camera | None = None
    for number, sample in enumerate(samples):
        image = _image(where, sample)
        poses[number, :3], camera = _labels(where, sample, image)
        if images is None:  # gray frames are kept as one channel: see `decode_sequence`
            images = np.empty((len(piece), height, width, 1 if image.ndim == 2 else channels), np.uint8)
        images[number] = fit_image(image, height=height, width=width, channels=images.shape[-1])
    assert images is not None and camera is not None  # a piece has two frames at least
    name = f"{piece.sequence} (from frame {piece.start}, {Path(where).name})"
    return DecodedSequence(name, images, camera.resized(height=height, width=width).intrinsics, poses)


def _image(where: str, sample: dict[str, Any]) -> Image:
    """uint8 (height, width) gray or (height, width, 3) RGB."""
    suffix = next(suffix for suffix in _SUFFIXES if suffix in sample)
    try:
        image = image_of(sample[suffix], suffix)
    except ValueError as error:
        raise ShardError(f"{where}, frame {sample['__key__']}: the image is damaged ({error}); {_AGAIN}") from None
    return image


def image_of(content: bytes, suffix: str) -> Image:
    """An image from the bytes of a file; see `packing.encode_image`.

    Raises:
        ValueError: they are not an image.
    """
    if suffix == "npy":
        return np.load(io.BytesIO(content), allow_pickle=False)
    found = decode_image(content)
    if found is None:
        raise ValueError("OpenCV cannot decode it")
    return found


def _labels(where: str, sample: dict[str, Any], image: Image) -> tuple[NDArray[np.float64], Camera]:
    """Pose ``T_world_camera`` (3, 4) and camera of a frame."""
    try:
        labels = json.loads(sample["json"])
        pose = np.array(labels["T_world_camera"], dtype=np.float64).reshape(3, 4)
        fx, fy, cx, cy = map(float, labels["intrinsics"])
        camera = Camera(fx, fy, cx, cy, height=image.shape[0], width=image.shape[1])
    except (ValueError, KeyError, TypeError) as error:
        raise ShardError(
            f"{where}, frame {sample['__key__']}: no pose that can be read ({error!r}); {_AGAIN}"
        ) from None
    if not np.isfinite(pose).all():
        raise ShardError(f"{where}, frame {sample['__key__']}: its pose is not 12 finite numbers; {_AGAIN}")
    return pose, camera
