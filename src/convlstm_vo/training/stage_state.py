"""The file from which an interrupted stage of `train-geometric` goes on: written aside, for the same run only."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from convlstm_vo.geometry.files import replacing, write_atomically
from convlstm_vo.training.config import TrainError

_FORMAT = 1
_NUMBERS = ("first weights", "drives")  # settings that are checksums, which say nothing to a reader


class StateFile:
    """The state of a run on disk.

    Args:
        path: of the file.
        settings: plain values that the run's outcome follows from; only a run of the same ones goes on.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        self.path = path
        self._settings: dict[str, Any] = json.loads(json.dumps(settings))

    def write(self, state: Mapping[str, Any]) -> None:
        """Replace what is there.

        Raises:
            TrainError, WriteError: a full disk; what was there stays.
        """
        try:
            with replacing(self.path) as temporary:
                torch.save({"format": _FORMAT, "settings": self._settings, **state}, temporary)
        except RuntimeError as error:  # torch.save reports a full disk so
            raise TrainError(f"{self.path}: cannot be written ({error}); is the disk full?") from None

    def read(self) -> dict[str, Any] | None:
        """What was written last; None where nothing was.

        Raises:
            TrainError: a damaged file, or the state of a run with other settings.
        """
        if not self.path.exists():
            return None
        anew = f"remove {self.path.name} to train this stage from its beginning"
        try:
            state: dict[str, Any] = torch.load(self.path, weights_only=True, map_location="cpu")
            written = state.get("format")
        except Exception as error:  # torch.load raises many kinds for a damaged file
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise TrainError(f"{self.path}: is damaged ({reason}); {anew}") from None
        if written != _FORMAT or "settings" not in state:
            raise TrainError(f"{self.path}: was written by another version of convlstm-vo; {anew}")
        saved = state["settings"]
        for key in [*self._settings, *saved]:
            old, new = saved.get(key), self._settings.get(key)
            if old != new:
                what = f"other {key}" if key in _NUMBERS else f"{key} {old!r}, but now it is {new!r}"
                raise TrainError(
                    f"{self.path}: is of a run with {what}; go on with the same settings, name another --out, or "
                    f"{anew}"
                )
        return state


def trained_part(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """All but the flow, which does not change."""
    return {name: value for name, value in weights.items() if not name.startswith("flow.")}


def weights_checksum(weights: Mapping[str, Tensor]) -> int:
    """CRC of names and values."""
    checksum = 0
    for name, value in weights.items():
        checksum = zlib.crc32(name.encode(), checksum)
        checksum = zlib.crc32(value.detach().cpu().contiguous().numpy().tobytes(), checksum)
    return checksum


def forget_rows_after(path: Path, **position: int) -> None:
    """Drop rows of a log later than where a run stands, since it will report them again, and halves of rows.

    Args:
        position: values of the keys of a row that count, the one that counts most first.
    """
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        try:
            row = json.loads(line)
        except ValueError:  # the disk was full, or the power went
            continue
        if [row[key] for key in position] <= list(position.values()):
            kept.append(line)
    write_atomically(path, "".join(kept))
