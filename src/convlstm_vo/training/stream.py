"""Sequences without end: fresh ones for every epoch, decoded by other processes while the network learns."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor

from convlstm_vo.sequences.base import Sequence
from convlstm_vo.training.cache import CacheError, DecodedSequence, decode_sequence


class SequenceStream:
    """The sequences of each epoch, none of them shown twice, none of them on disk.

    Args:
        make: gives sequence number 0, 1, 2, …; it and what it gives are sent to other processes, so both must be
            picklable (a function at the top of a module; a sequence that is decoded or rendered lazily).
        per_epoch: how many sequences make an epoch.
        frames: of each of them.
        height, width, channels: of the decoded frames.
        workers: processes; by default all cores.

    An epoch is a function of its number alone, so a resumed run sees what an uninterrupted one would have seen.
    Memory holds two epochs: the one that is shown and the one that is being made.
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
        self._make, self._per_epoch = make, per_epoch
        self.lengths = (frames,) * per_epoch
        self._size = (height, width, channels)
        self._workers = workers or os.cpu_count() or 1
        self._pool: ProcessPoolExecutor | None = None
        self._pending: dict[int, list[Future[DecodedSequence]]] = {}

    def __call__(self, epoch: int, *, ahead: bool = True) -> list[DecodedSequence]:
        """The sequences of an epoch; those of the next one are begun, unless ``ahead`` is false."""
        for number in [key for key in self._pending if key not in (epoch, epoch + 1)]:
            for future in self._pending.pop(number):
                future.cancel()
        self._begin(epoch)
        if ahead:
            self._begin(epoch + 1)
        sequences = [future.result() for future in self._pending.pop(epoch)]
        if tuple(map(len, sequences)) != self.lengths:
            raise CacheError(
                f"sequences of {list(map(len, sequences))} frames, where {self.lengths[0]} were promised"
            )
        return sequences

    def _begin(self, epoch: int) -> None:
        if epoch in self._pending:
            return
        if self._pool is None:
            # Spawned, not forked: a fork would copy torch's and OpenCV's threads in whatever state they are.
            spawn = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(self._workers, mp_context=spawn)
        first = epoch * self._per_epoch
        numbers = range(first, first + self._per_epoch)
        self._pending[epoch] = [self._pool.submit(_decode, self._make, number, self._size) for number in numbers]

    def close(self) -> None:
        """End the processes."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            self._pool = None
        self._pending.clear()


def _decode(make: Callable[[int], Sequence], number: int, size: tuple[int, int, int]) -> DecodedSequence:
    height, width, channels = size
    return decode_sequence(make(number), height=height, width=width, channels=channels, threads=1)
