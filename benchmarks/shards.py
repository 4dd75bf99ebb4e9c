"""Clips a second from shards of the same frames: webdataset and litdata.

python benchmarks/shards.py --json shards.json       # litdata is measured where it is installed
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

CLIP = 6  # frames: five motions
SHARD = 500  # frames
HEIGHT, WIDTH = 192, 640


def frames(count: int) -> Iterator[NDArray[np.uint8]]:
    """Smooth noise that moves: compresses about as a street does."""
    rng = np.random.default_rng(0)
    texture = cv2.GaussianBlur(rng.integers(0, 255, (HEIGHT, WIDTH + count), dtype=np.uint8), (0, 0), 2)
    texture = cv2.normalize(texture, None, 0, 255, cv2.NORM_MINMAX)
    for i in range(count):
        yield np.ascontiguousarray(texture[:, i : i + WIDTH])


def encoded(count: int) -> Iterator[dict[str, Any]]:
    for i, image in enumerate(frames(count)):
        yield {"png": cv2.imencode(".png", image)[1].tobytes(), "pose": json.dumps([float(i)] * 12).encode()}


def decode(png: bytes) -> NDArray[np.uint8]:
    return cv2.imdecode(np.frombuffer(png, np.uint8), cv2.IMREAD_UNCHANGED)  # type: ignore[return-value]


def write_webdataset(samples: Iterable[dict[str, Any]], folder: Path) -> None:
    import webdataset as wds

    with wds.ShardWriter(str(folder / "%06d.tar"), maxcount=SHARD, verbose=0) as sink:
        for i, sample in enumerate(samples):
            sink.write({"__key__": f"{i:08d}", "png": sample["png"], "json": sample["pose"]})


def read_webdataset(folder: Path) -> Iterator[dict[str, Any]]:
    import webdataset as wds

    urls = [str(path) for path in sorted(folder.glob("*.tar"))]
    yield from wds.DataPipeline(wds.SimpleShardList(urls), wds.tarfile_to_samples())


def write_litdata(samples: Iterable[dict[str, Any]], folder: Path) -> None:
    from litdata.streaming.writer import BinaryWriter

    writer = BinaryWriter(str(folder), chunk_size=SHARD)
    for i, sample in enumerate(samples):
        writer[i] = sample
    writer.done()
    writer.merge()


def read_litdata(folder: Path) -> Iterator[dict[str, Any]]:
    from litdata import StreamingDataset

    yield from StreamingDataset(str(folder), shuffle=False)


def rate(samples: Iterable[dict[str, Any]], *, decoding: bool) -> float:
    """Clips a second, in order, decoded or as bytes."""
    started, count = time.perf_counter(), 0
    clip: list[Any] = []
    for sample in samples:
        clip.append(decode(sample["png"]) if decoding else sample["png"])
        count, clip = count + 1, clip if len(clip) < CLIP else []
    return count / CLIP / (time.perf_counter() - started)


def measure(count: int, rounds: int) -> dict[str, float]:
    """The best of some rounds for each library, all reading the same bytes from the page cache."""
    ways: dict[str, tuple[Callable, Callable]] = {"webdataset": (write_webdataset, read_webdataset)}
    if importlib.util.find_spec("litdata"):
        ways["litdata"] = (write_litdata, read_litdata)
    results: dict[str, float] = {}
    for name, (write, read) in ways.items():
        with tempfile.TemporaryDirectory() as folder:
            started = time.perf_counter()
            write(encoded(count), Path(folder))
            results[f"{name}_seconds_to_write"] = time.perf_counter() - started
            size = sum(path.stat().st_size for path in Path(folder).iterdir())
            results[f"{name}_bytes_a_frame"] = size / count
            for decoding in (False, True):
                kind = "decoded" if decoding else "bytes"
                rates = [rate(read(Path(folder)), decoding=decoding) for _ in range(rounds)]
                results[f"{name}_clips_per_second_{kind}"] = max(rates)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=3000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    results = measure(options.frames, options.rounds)
    for name, value in results.items():
        print(f"{name:40} {value:.1f}")
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
