"""Sequences into shards: `convlstm-vo shard`. What a shard is: `shards.py`."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import itertools
import json
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import cv2
import numpy as np

from convlstm_vo.geometry.files import replacing, write_atomically
from convlstm_vo.progress import progress
from convlstm_vo.sequences.base import Image, Sequence, fit_image
from convlstm_vo.sequences.kitti import open_kitti, sequence_names
from convlstm_vo.training.shards import FORMAT, INDEX_FILE, Piece, Shard, ShardError, webdataset

Encoding = Literal["png", "jpg", "npy"]
_JPEG_QUALITY = 95


@dataclasses.dataclass(frozen=True)
class ShardOptions:
    """Pack a KITTI-layout tree into shards for collections that fit no memory and no disk of one machine."""

    data: Path
    """KITTI-layout tree."""
    out: Path
    """Folder for the shards; the same command goes on where it was interrupted."""
    sequences: tuple[str, ...] = ()
    """Sequences to pack; none named: all with ground truth."""
    camera: Literal[0, 1, 2, 3] = 0
    """Which image folder: 0 and 1 are gray, 2 and 3 colour."""
    frames: int = 500
    """Frames in a shard at most; a longer sequence goes on in the next one, and short ones share one."""
    size: tuple[int, int] | None = None
    """Height and width to shrink frames to; none: as they are. That of the network makes shards small and fast."""
    encoding: Encoding = "png"
    """png: no loss; jpg: a fifth of the size, quality 95; npy: not compressed, for fast disks."""

    def __post_init__(self) -> None:
        if self.frames < 2:
            raise ShardError(f"--frames {self.frames}: a shard holds at least 2, or there is no motion in it")
        if self.size is not None and min(self.size) < 1:
            raise ShardError(f"--size {self.size[0]} {self.size[1]}: height and width must be positive")


def pack(options: ShardOptions) -> Path:
    """Write the shards that options ask for; the path of their index."""
    names = options.sequences or tuple(
        name for name in sequence_names(options.data) if (options.data / "poses" / f"{name}.txt").exists()
    )
    if not names and sequence_names(options.data):
        raise ShardError(f"{options.data}: no sequence with ground truth to pack (poses/NAME.txt)")
    sequences: list[Sequence] = list(open_kitti(options.data, names, camera=options.camera))
    with progress(
        "Packing frames", sum(map(sum, (s.lengths for s in plan_shards(sequences, options.frames))))
    ) as bar:
        return write_shards(
            sequences,
            options.out,
            frames=options.frames,
            size=options.size,
            encoding=options.encoding,
            advance=bar,
        )


def write_shards(
    sequences: list[Sequence],
    out: Path,
    *,
    frames: int = 500,
    size: tuple[int, int] | None = None,
    encoding: Encoding = "png",
    threads: int | None = None,
    advance: Callable[[int], None] = lambda count: None,
) -> Path:
    """Pack sequences with poses into shards. Those that an interrupted run has written are kept.

    Args:
        frames: in a shard at most.
        size: (height, width) to shrink frames to.
        threads: that read and encode, a shard each; by default one a core.
        advance: called with the number of frames done.

    Returns:
        The path of the index.

    Raises:
        ShardError: sequences without poses or two of one name, or a folder with shards of something else.
        SequenceError, WriteError: an image that cannot be read; no room.
    """
    webdataset()
    by_name = {sequence.name: sequence for sequence in sequences}
    if len(by_name) < len(sequences):
        raise ShardError("two sequences have the same name; rename one, names tell frames apart in a shard")
    for sequence in sequences:
        if sequence.trajectory is None:
            raise ShardError(f"sequence {sequence.name}: has no ground-truth poses, so it cannot be learnt from")
    shards = plan_shards(sequences, frames)
    _begin(out, shards, {"size": size and list(size), "encoding": encoding, "source": _fingerprint(sequences)})

    def write(shard: Shard) -> None:
        path = out / shard.name
        if not path.exists():
            _write_shard(path, shard, by_name, size, encoding)
        advance(sum(shard.lengths))

    with ThreadPoolExecutor(threads or os.cpu_count()) as pool:
        try:
            for done in [pool.submit(write, shard) for shard in shards]:
                done.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)  # shards that are begun are written, no other
            raise
    return out / INDEX_FILE


def plan_shards(sequences: list[Sequence], frames: int) -> list[Shard]:
    """What goes into which shard, in order.

    Sequences that fit share a shard, others are cut into even parts. The frame at a cut is on both sides: no motion
    is lost, none comes twice.
    """
    shards: list[list[Piece]] = [[]]
    for sequence in sequences:
        pieces = _cut(sequence.name, len(sequence), frames)
        if len(pieces) > 1 or sum(map(len, [*shards[-1], *pieces])) > frames:
            shards.append([])
        for piece in pieces[:-1]:
            shards[-1].append(piece)
            shards.append([])
        shards[-1].extend(pieces[-1:])
    return [Shard(f"{number:06d}.tar", tuple(pieces)) for number, pieces in enumerate(filter(None, shards))]


def _cut(name: str, length: int, frames: int) -> list[Piece]:
    """A sequence in as few even parts as frames in a shard allow; none of a single frame, which has no motion."""
    motions = length - 1
    parts = -(-motions // (frames - 1))
    cuts = [motions * part // parts for part in range(parts + 1)] if parts else []
    return [Piece(name, start, stop + 1) for start, stop in itertools.pairwise(cuts)]


def _begin(out: Path, shards: list[Shard], origin: dict[str, Any]) -> None:
    """Write the index; refuse a folder with another one."""
    listed = [
        {"name": shard.name, "pieces": [[p.sequence, p.start, p.stop] for p in shard.pieces]} for shard in shards
    ]
    index = {"format": FORMAT, "origin": origin, "shards": listed}
    path = out / INDEX_FILE
    if not path.exists():
        write_atomically(path, json.dumps(index) + "\n")
        return
    try:
        same = json.loads(path.read_text(encoding="utf-8")) == index
    except (OSError, ValueError):
        same = False
    if not same:
        raise ShardError(f"{path}: shards of other data or options are there; choose another --out, or delete them")


def _fingerprint(sequences: list[Sequence]) -> str:
    """Changes with names, lengths, poses and, where there are files, with each image's size and time."""
    digest = hashlib.sha256()
    for sequence in sequences:
        digest.update(f"{sequence.name}\0{len(sequence)}\n".encode())
        if sequence.trajectory is not None:
            digest.update(np.ascontiguousarray(sequence.trajectory.T_world_camera).tobytes())
        for path in getattr(sequence, "images", []):
            status = path.stat()
            digest.update(f"{status.st_size}\0{status.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:20]


def _write_shard(
    path: Path, shard: Shard, sequences: dict[str, Sequence], size: tuple[int, int] | None, encoding: Encoding
) -> None:
    with (
        replacing(path) as temporary,
        temporary.open("wb") as stream,
        # With one time for all files the same frames give the same bytes, whoever packs them and when.
        webdataset().TarWriter(stream, encoder=False, mtime=0) as writer,
    ):
        for piece in shard.pieces:
            for index in range(piece.start, piece.stop):
                writer.write(_sample(sequences[piece.sequence], index, size, encoding))


def _sample(
    sequence: Sequence, index: int, size: tuple[int, int] | None, encoding: Encoding
) -> dict[str, str | bytes]:
    """The two files of a frame, as webdataset takes them."""
    image, camera = sequence[index].image, sequence.camera
    if size is not None:
        height, width = size
        fitted = fit_image(image, height=height, width=width, channels=1 if image.ndim == 2 else 3)
        image, camera = (
            fitted.squeeze(-1) if image.ndim == 2 else fitted,
            camera.resized(height=height, width=width),
        )
    assert sequence.trajectory is not None
    pose = sequence.trajectory.T_world_camera[index, :3].ravel().tolist()
    labels = {"T_world_camera": pose, "intrinsics": camera.intrinsics.tolist()}
    return {
        "__key__": f"{sequence.name}/{index:06d}",
        encoding: encode_image(image, encoding),
        "json": json.dumps(labels).encode(),
    }


def encode_image(image: Image, encoding: Encoding) -> bytes:
    """The content of an image file; `shards.image_of` reads it."""
    if encoding == "npy":
        stream = io.BytesIO()
        np.save(stream, image)
        return stream.getvalue()
    shown = cv2.cvtColor(image, cv2.COLOR_RGB2BGR) if image.ndim == 3 else image
    options = [cv2.IMWRITE_JPEG_QUALITY, _JPEG_QUALITY] if encoding == "jpg" else []
    return bytes(cv2.imencode(f".{encoding}", shown, options)[1])
