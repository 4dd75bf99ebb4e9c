"""Sequences without end: those of an epoch are shown while those of the next one are made or read."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import json
import multiprocessing
import os
from abc import ABC, abstractmethod
from collections.abc import Callable
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray

from convlstm_vo.sequences.base import Sequence
from convlstm_vo.training.cache import CacheError, DecodedSequence, decode_sequence
from convlstm_vo.training.shards import Shard, read_shard

Job = Callable[[], list[DecodedSequence]]


class EpochStream(ABC):
    """Gives the sequences of each epoch; an epoch is a function of its number alone.

    A resumed run so sees what an uninterrupted one would have seen. Memory holds two epochs: the one that is shown
    and the one that is being made.
    """

    def __init__(self) -> None:
        self._pool: Executor | None = None
        self._pending: dict[int, list[Future[list[DecodedSequence]]]] = {}

    @abstractmethod
    def lengths(self, epoch: int) -> tuple[int, ...]:
        """Frames of each sequence of an epoch."""

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """What must stay the same for a run to be resumed, as plain values."""

    @abstractmethod
    def _jobs(self, epoch: int) -> list[Job]:
        """Functions that together give the sequences of an epoch, in this order."""

    @abstractmethod
    def _make_pool(self) -> Executor:
        """What runs the jobs."""

    def __call__(self, epoch: int, *, ahead: bool = True) -> list[DecodedSequence]:
        """The sequences of an epoch; those of the next one are begun, unless ``ahead`` is false."""
        for number in [key for key in self._pending if key not in (epoch, epoch + 1)]:
            for future in self._pending.pop(number):
                future.cancel()
        self._begin(epoch)
        if ahead:
            self._begin(epoch + 1)
        sequences = [sequence for future in self._pending.pop(epoch) for sequence in future.result()]
        found = tuple(map(len, sequences))
        if found != self.lengths(epoch):
            raise CacheError(f"sequences of {list(found)} frames, where {list(self.lengths(epoch))} were promised")
        return sequences

    def _begin(self, epoch: int) -> None:
        if epoch in self._pending:
            return
        if self._pool is None:
            self._pool = self._make_pool()
        self._pending[epoch] = [self._pool.submit(job) for job in self._jobs(epoch)]

    def close(self) -> None:
        """End the workers."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            self._pool = None
        self._pending.clear()


class SequenceStream(EpochStream):
    """Sequences of which none is shown twice and none is on disk, made by other processes.

    Args:
        make: gives sequence number 0, 1, 2, …; it and what it gives are sent to other processes, so both must be
            picklable (a function at the top of a module; a sequence that is decoded or rendered lazily).
        per_epoch: how many sequences make an epoch.
        frames: of each of them.
        height, width, channels: of the decoded frames.
        workers: processes; by default all cores.
    """

    def __init__(
        self,
        make: Callable[[int], Sequence],
        per_epoch: int,
        *,
        frames: int,
        height: int,
        width: int,
        channels: int,
        workers: int | None = None,
    ) -> None:
        super().__init__()
        self._make, self._per_epoch, self._frames = make, per_epoch, frames
        self._size = (height, width, channels)
        self._workers = workers or os.cpu_count() or 1

    def lengths(self, epoch: int) -> tuple[int, ...]:
        return (self._frames,) * self._per_epoch

    def identity(self) -> dict[str, Any]:
        return {"lengths": list(self.lengths(0))}

    def _make_pool(self) -> Executor:
        # Spawned, not forked: a fork would copy torch's and OpenCV's threads in whatever state they are.
        return ProcessPoolExecutor(self._workers, mp_context=multiprocessing.get_context("spawn"))

    def _jobs(self, epoch: int) -> list[Job]:
        first = epoch * self._per_epoch
        numbers = range(first, first + self._per_epoch)
        return [functools.partial(_decode, self._make, number, self._size) for number in numbers]


def _decode(make: Callable[[int], Sequence], number: int, size: tuple[int, int, int]) -> list[DecodedSequence]:
    height, width, channels = size
    return [decode_sequence(make(number), height=height, width=width, channels=channels, threads=1)]


class ShardStream(EpochStream):
    """Shards in an order that a seed draws anew for each pass, some of them at a time.

    An epoch shows the next ``window`` shards; their clips are mixed with each other (`EpochPlan`), frames within a
    clip and clips within a walk stay in order. Memory holds two windows, whatever the collection's size.

    Args:
        folder: where the shards are, see `find_shards`.
        shards: all of them.
        window: shards in an epoch.
        seed: of the order.
        height, width, channels: of the decoded frames.
        workers: threads that read and decode; by default all cores.
    """

    def __init__(
        self,
        folder: str,
        shards: list[Shard],
        window: int,
        *,
        seed: int,
        height: int,
        width: int,
        channels: int,
        workers: int | None = None,
    ) -> None:
        super().__init__()
        self._folder, self._shards, self._seed = folder, shards, seed
        self._size = {"height": height, "width": width, "channels": channels}
        self._workers = workers or os.cpu_count() or 1
        self.window = min(window, len(shards))

    def shards(self, epoch: int) -> list[Shard]:
        """The shards of an epoch."""
        first = epoch * self.window
        return [self._shard(number) for number in range(first, first + self.window)]

    def _shard(self, number: int) -> Shard:
        """Number 0, 1, 2, …, counted over all passes."""
        turn, place = divmod(number, len(self._shards))
        return self._shards[self._order(turn)[place]]

    def _order(self, turn: int) -> NDArray[np.int64]:
        return _permutation(self._seed, turn, len(self._shards))

    def lengths(self, epoch: int) -> tuple[int, ...]:
        return tuple(itertools.chain.from_iterable(shard.lengths for shard in self.shards(epoch)))

    def identity(self) -> dict[str, Any]:
        content = json.dumps([dataclasses.asdict(shard) for shard in self._shards])
        return {"shards": hashlib.sha256(content.encode()).hexdigest()[:20], "shard_window": self.window}

    def describe(self) -> str:
        """A line for the terminal: how many, how much is shown at a time, and what that takes."""
        frames = sum(sum(shard.lengths) for shard in self._shards)
        largest = max(sum(shard.lengths) for shard in self._shards) * self.window
        kept = 2 * largest * self._size["height"] * self._size["width"] * self._size["channels"]
        return (
            f"Shards: {len(self._shards)} with {frames} frames; an epoch shows {self.window} of them, and two "
            f"epochs in memory take at most {kept / 2**30:.2f} GiB"
        )

    def _jobs(self, epoch: int) -> list[Job]:
        return [functools.partial(read_shard, self._folder, shard, **self._size) for shard in self.shards(epoch)]

    def _make_pool(self) -> Executor:
        # OpenCV decodes without Python's lock and reading waits for disk or network, so threads are enough.
        return ThreadPoolExecutor(self._workers)


@functools.lru_cache(maxsize=4)
def _permutation(seed: int, turn: int, count: int) -> NDArray[np.int64]:
    return np.random.default_rng([seed, 7, turn]).permutation(count)
