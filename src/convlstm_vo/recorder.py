"""Where tracked frames go while they come in: a trajectory file, and a sketch of the path for a picture.

Both need a constant amount of memory, however long the video is.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from types import TracebackType
from typing import IO, Literal

import numpy as np
from numpy.typing import NDArray

from convlstm_vo.geometry.files import WriteError, replacing, write_atomically
from convlstm_vo.geometry.trajectory import Trajectory, kitti_row, tum_row
from convlstm_vo.odometer import TrackedFrame

TrajectoryFormat = Literal["kitti", "tum"]


class TrajectoryFile:
    """A trajectory file that is written row by row, and appears under its name when the block ends.

    An interruption (Ctrl-C) keeps the rows so far. An error keeps them too, but under another name, ``partial``:
    nobody is to take them for the whole.

    Attributes:
        written: what was written, once the block has ended.
    """

    def __init__(self, path: Path, format: TrajectoryFormat) -> None:
        self.path, self.format = path, format
        self.partial = path.with_name(f"{path.stem}.partial{path.suffix}")
        self.written: Path | None = None
        self._stack = contextlib.ExitStack()
        self._stream: IO[str] | None = None

    def __enter__(self) -> TrajectoryFile:
        self._temporary = self._stack.enter_context(replacing(self.path))
        self._stream = self._stack.enter_context(self._temporary.open("w", encoding="utf-8"))
        return self

    def add(self, frame: TrackedFrame) -> None:
        """Append one pose."""
        row = kitti_row(frame.T_world_camera)
        if self.format == "tum":
            row = tum_row(frame.timestamp_s, frame.T_world_camera)
        assert self._stream is not None, "use it in a with block"
        try:
            self._stream.write(row)
        except OSError as error:
            raise WriteError(f"{self.path}: cannot be written ({error.strerror}); is the disk full?") from None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None or issubclass(kind, KeyboardInterrupt):  # which itself goes on
            self._stack.__exit__(None, None, None)
            self.written = self.path
            self.partial.unlink(missing_ok=True)
            return
        with contextlib.suppress(WriteError, OSError):  # of a full disk, say; the error is what is told
            self._keep_partial()
        # `replacing` would take an OSError, which may be the input's, for one of the file's.
        self._stack.__exit__(RuntimeError, RuntimeError(), None)

    def _keep_partial(self) -> None:
        assert self._stream is not None
        self._stream.flush()
        if self._stream.tell():
            write_atomically(self.partial, self._temporary.read_bytes())
            self.written = self.partial


class PathSketch:
    """At most ``limit`` poses of a path (None: all), evenly spread: whenever it is full, every second one is
    dropped."""

    def __init__(self, limit: int | None = 4096) -> None:
        self.limit, self._every, self._count = limit, 1, 0
        self._rows: list[tuple[float, NDArray[np.float64]]] = []

    def add(self, frame: TrackedFrame) -> None:
        """Take in one pose."""
        if self._count % self._every == 0:
            self._rows.append((frame.timestamp_s, frame.T_world_camera))
        self._count += 1
        if self.limit is not None and len(self._rows) >= self.limit:
            self._rows, self._every = self._rows[::2], self._every * 2

    def trajectory(self) -> Trajectory:
        """The kept poses."""
        times, poses = zip(*self._rows, strict=True)
        return Trajectory(np.array(times), np.stack(poses))


class Tally:
    """What there is to tell of a drive when it is over.

    Args:
        limit: of poses in the sketch; see `PathSketch`.

    Attributes:
        sketch: of the path. count: frames. seconds: time that they took. way_m: sum of all motions.
        lost, guessed: frames that were lost, and those whose motion has a guessed length.
    """

    def __init__(self, limit: int | None = 4096) -> None:
        self.sketch = PathSketch(limit)
        self.count = self.lost = self.guessed = 0
        self.seconds = self.way_m = 0.0

    def add(self, frame: TrackedFrame) -> None:
        """Take in one frame."""
        self.sketch.add(frame)
        self.count += 1
        self.seconds += frame.seconds
        self.way_m += float(np.linalg.norm(frame.T_prev_curr[:3, 3]))
        self.lost += frame.status == "lost"
        self.guessed += frame.status == "ok" and not frame.metric
