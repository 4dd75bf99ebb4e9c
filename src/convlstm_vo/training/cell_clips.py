"""Clips for training what the default network does with its flow: walks through drives whose cells are cached."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from convlstm_vo.models.geometric import Cells
from convlstm_vo.training.cell_drives import CellDrive, bent, mirrored


@dataclasses.dataclass
class CellClip:
    """Frames of several drives: cells (lanes, frames, 7, rows, columns) and truth; ``fresh`` where one begins.

    ``bend`` (lanes,) is what they were `bent` by, None: not at all. ``group`` is the number of the lanes that it
    belongs to, of which each group has a state of its own.
    """

    cells: Tensor
    motions: Tensor
    slopes: Tensor
    first: Tensor
    fresh: Tensor
    bend: Tensor | None = None
    group: int = 0

    def split(self, count: int) -> list[CellClip]:
        """Its lanes in so many parts."""
        columns = [
            [value] * count if value is None or isinstance(value, int) else value.tensor_split(count)
            for value in vars(self).values()
        ]
        return [CellClip(*values) for values in zip(*columns, strict=True)]


@dataclasses.dataclass
class Lane:
    """A walk through a drive: as it is shown, the next frame, and what made it (number, mirrored, bend)."""

    drive: CellDrive
    at: int
    source: tuple[int, bool, float]


class Clips:
    """Endless clips; each lane walks through a drive from a random start, then through another one.

    Lanes of a batch have one size of grid. Drives of other sizes are groups with lanes of their own; each clip
    belongs to one group, to larger ones more often.

    Args:
        drives: of at least ``frames`` frames each.
        lanes, frames: of a clip.
        bend: standard deviation of the systematic error of the road's flow (`bent`) that most drives are given.
    """

    def __init__(self, drives: Sequence[CellDrive], *, lanes: int, frames: int, bend: float, seed: int) -> None:
        self._drives, self._size, self._frames, self._bend = drives, lanes, frames, bend
        self._rng = np.random.Generator(np.random.PCG64([seed, 5]))
        sizes = [drive.cells.shape[2:] for drive in drives]
        self.groups = [[i for i, own in enumerate(sizes) if own == size] for size in dict.fromkeys(sizes)]
        self._lanes: list[list[Lane]] = [[] for _ in self.groups]

    def __iter__(self) -> Iterator[CellClip]:
        return self

    def __next__(self) -> CellClip:
        frames, group = self._frames, self._pick_group()
        lanes, fresh = self._lanes[group], []
        for number in range(self._size):
            new = len(lanes) <= number or lanes[number].at + frames > len(lanes[number].drive)
            if new:
                lanes[number : number + 1] = [self._begin(self.groups[group])]
            fresh.append(new)
        first = np.stack([lane.drive.motions[lane.at - 1] if lane.at else lane.drive.first for lane in lanes])
        cells, motions, slopes = (
            torch.from_numpy(np.stack([getattr(lane.drive, name)[lane.at : lane.at + frames] for lane in lanes]))
            for name in ("cells", "motions", "slopes")
        )
        for lane in lanes:
            lane.at += frames
        bend = torch.tensor([lane.source[2] for lane in lanes])
        return CellClip(cells, motions, slopes, torch.from_numpy(first), torch.tensor(fresh), bend, group)

    def state_dict(self) -> dict[str, Any]:
        """Where it stands, in plain values."""
        lanes = [[(*lane.source, lane.at) for lane in lanes] for lanes in self._lanes]
        return {"rng": self._rng.bit_generator.state, "lanes": lanes}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where another one stood, over the same drives."""
        self._rng.bit_generator.state = state["rng"]
        self._lanes = [
            [Lane(self._shown(*source), at, source) for *source, at in lanes] for lanes in state["lanes"]
        ]

    def _pick_group(self) -> int:
        if len(self.groups) == 1:
            return 0
        frames = np.array([sum(len(self._drives[i]) for i in group) for group in self.groups], float)
        return int(self._rng.choice(len(self.groups), p=frames / frames.sum()))

    def _begin(self, group: list[int]) -> Lane:
        number = group[int(self._rng.integers(len(group)))]
        start = int(self._rng.integers(0, max(1, len(self._drives[number]) - 3 * self._frames)))
        mirror = bool(self._rng.random() < 0.5)
        bend = float(self._rng.normal(0, self._bend)) if self._rng.random() < 0.7 else 0.0
        return Lane(self._shown(number, mirror, bend), start, (number, mirror, bend))

    def _shown(self, number: int, mirror: bool, bend: float) -> CellDrive:
        drive = mirrored(self._drives[number]) if mirror else self._drives[number]
        return bent(drive, bend) if bend else drive


def whole_drives(drives: Sequence[CellDrive], lanes: int) -> Iterator[CellClip]:
    """Whole drives, those of one length and grid side by side."""
    by_shape: dict[tuple[int, ...], list[CellDrive]] = {}
    for drive in drives:
        by_shape.setdefault(drive.cells.shape, []).append(drive)
    for alike in by_shape.values():
        for i in range(0, len(alike), lanes):
            cells, motions, slopes, first = (
                torch.from_numpy(np.stack([getattr(drive, name) for drive in alike[i : i + lanes]]))
                for name in ("cells", "motions", "slopes", "first")
            )
            yield CellClip(cells, motions, slopes, first, torch.ones(len(cells), dtype=torch.bool))


def as_cells(values: Tensor) -> Cells:
    """Cells of one frame of each lane, from (lanes, 7, rows, columns)."""
    return Cells(values[:, :3], values[:, 3:5], values[:, 5], values[:, 6])
