"""What a run needs to go on exactly where it stood, on disk: written aside, checked, with the one before kept."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from convlstm_vo.models.checkpoint import CheckpointError, save_checkpoint
from convlstm_vo.models.network import OdometryNet

STATE_FILE = "training_state.pt"
CHECKSUM_FILE = "checksums.json"
_FORMAT = 2  # of the training state
_CHUNK = 1 << 20  # bytes


@dataclasses.dataclass
class Progress:
    """Where a run stands."""

    epoch: int = 0
    step: int = 0  # within the epoch
    updates: int = 0
    best_loss: float = math.inf
    epochs_since_best: int = 0


class RunCheckpoints:
    """The checkpoints of a run: ``best``, ``last``, the one before it, and those kept for good.

    ``last`` is written as ``last.new``; then ``last`` becomes ``last.previous``, and ``last.new`` becomes ``last``.
    Wherever a run is killed, a whole one stands under one of these names.

    Args:
        out: folder of the run.
    """

    def __init__(self, out: Path) -> None:
        self.folder = out / "checkpoints"

    def path(self, name: str) -> Path:
        """The folder of a checkpoint."""
        return self.folder / name

    def candidates(self) -> list[Path]:
        """Folders to resume from that exist, newest first."""
        paths = (self.path(name) for name in ("last.new", "last", "last.previous"))
        return [path for path in paths if path.is_dir()]

    def save(self, name: str, net: OdometryNet, state: dict[str, Any]) -> None:
        """Write a checkpoint with a training state.

        Raises:
            CheckpointError: see `save_checkpoint`; those that were there stay.
        """
        extra_files: dict[str, Callable[[Path], None]] = {
            STATE_FILE: lambda path: torch.save({"format": _FORMAT, **state}, path),
            CHECKSUM_FILE: lambda path: _write_checksums(path),
        }
        save_checkpoint(self.path("last.new" if name == "last" else name), net, extra_files=extra_files)
        if name == "last":
            self._rotate()

    def _rotate(self) -> None:
        shutil.rmtree(self.path("last.previous"), ignore_errors=True)
        if self.path("last").is_dir():
            self.path("last").rename(self.path("last.previous"))
        self.path("last.new").rename(self.path("last"))

    def read_newest(self, warn: Callable[[str], None]) -> tuple[Path, dict[str, Any]] | None:
        """The newest whole checkpoint and its training state; None where there is no checkpoint at all.

        Args:
            warn: told of every damaged one and of what is used instead.

        Raises:
            CheckpointError: there are some, but all are damaged.
        """
        problems: list[str] = []
        for folder in self.candidates():
            try:
                state = read_training_state(folder)
            except CheckpointError as error:
                problems.append(str(error))
                continue
            for problem in problems:
                warn(f"Warning: {problem}; going on from the one before it, {folder}")
            return folder, state
        if problems:
            raise CheckpointError("; ".join(problems))
        return None

    def set_aside_newer(self, folder: Path) -> None:
        """Rename the damaged checkpoints that are newer than ``folder``: the next save would keep one."""
        for path in self.candidates():
            if path == folder:
                return
            damaged = path.with_name(f"{path.name}.damaged")
            shutil.rmtree(damaged, ignore_errors=True)
            path.rename(damaged)

    def clean(self) -> None:
        """Remove what a killed run left half-written, and finish a replacement that it had begun."""
        for path in self.folder.glob(".*"):
            name = path.name.removeprefix(".").removesuffix(".previous")
            if path.name.endswith(".previous") and not self.path(name).exists():
                path.rename(self.path(name))
            elif path.is_dir():
                shutil.rmtree(path, ignore_errors=True)


def read_training_state(folder: Path) -> dict[str, Any]:
    """The training state of a checkpoint; tensors and plain values only, never code.

    Raises:
        CheckpointError: a checkpoint without one, a damaged file, or one of another version.
    """
    try:
        state: dict[str, Any] = torch.load(folder / STATE_FILE, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise CheckpointError(
            f"{folder}: has no {STATE_FILE}, so it cannot be resumed; use it with --init"
        ) from None
    except Exception as error:  # torch.load raises many kinds for a damaged file
        raise CheckpointError(f"{folder / STATE_FILE}: is damaged ({_first_line(error)})") from None
    _verify(folder)
    if state.get("format") != _FORMAT:
        raise CheckpointError(
            f"{folder}: its training state is of another version of convlstm-vo; start from its weights with --init"
        )
    return state


def _verify(folder: Path) -> None:
    """A changed bit in a weight loads without complaint; its checksum tells."""
    try:
        expected = json.loads((folder / CHECKSUM_FILE).read_text())
    except (OSError, ValueError):
        raise CheckpointError(f"{folder / CHECKSUM_FILE}: is missing or damaged") from None
    found = _checksums(folder)
    for name, checksum in expected.items():
        if found.get(name) != checksum:
            raise CheckpointError(f"{folder / name}: is {'damaged' if name in found else 'missing'}")


def _write_checksums(path: Path) -> None:
    path.write_text(json.dumps(_checksums(path.parent)) + "\n")


def _checksums(folder: Path) -> dict[str, int]:
    return {path.name: _crc(path) for path in sorted(folder.iterdir()) if path.name != CHECKSUM_FILE}


def _crc(path: Path) -> int:
    checksum = 0
    with path.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            checksum = zlib.crc32(chunk, checksum)
    return checksum


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
