"""From decoded sequences to batches of clips: which frames, in which order, with which labels.

A *walk* is a run of consecutive clips of one sequence over which the recurrent state is carried. An epoch cuts
every sequence into walks at random places and deals them out to the *lanes* of a batch: lane b of one step goes
on where lane b of the step before stopped, or is marked fresh.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from convlstm_vo.errors import ConvlstmVoError
from convlstm_vo.geometry import se3
from convlstm_vo.training.cache import DecodedSequence


class ClipError(ConvlstmVoError):
    """Sequences that give no clips."""


@dataclasses.dataclass(frozen=True)
class AugmentConfig:
    """Changes to training clips that keep their labels true."""

    mirror: float = 0.5
    """Probability of flipping a walk left to right; the motion and the principal point are mirrored with it."""
    reverse: float = 0.0
    """Probability of playing a walk backwards; its motions are those of the reversed order."""
    skip: tuple[int, ...] = (1,)
    """Steps between used frames, drawn for each walk; 1 is every frame."""
    brightness: float = 0.2
    """Largest change of brightness, as a share of the full range."""
    contrast: float = 0.2
    """Largest relative change of contrast."""
    gamma: float = 0.2
    """Largest change of gamma (as its logarithm)."""

    def __post_init__(self) -> None:
        if not self.skip or min(self.skip) < 1:
            raise ClipError(f"augment.skip {self.skip}: needs one or more steps of at least 1 frame")
        for name in ("mirror", "reverse"):
            if not 0 <= getattr(self, name) <= 1:
                raise ClipError(f"augment.{name} {getattr(self, name)}: a probability lies between 0 and 1")
        for name in ("brightness", "contrast", "gamma"):
            if not 0 <= getattr(self, name) < 1:
                raise ClipError(f"augment.{name} {getattr(self, name)}: must lie between 0 and 1 (1 excluded)")


NO_AUGMENTATION = AugmentConfig(mirror=0, brightness=0, contrast=0, gamma=0)


@dataclasses.dataclass(frozen=True)
class Clip:
    """time + 1 frames of one sequence, in the order in which they are shown."""

    sequence: int
    frames: tuple[int, ...]
    mirror: bool
    fresh: bool


@dataclasses.dataclass(frozen=True)
class Batch:
    """A batch of clips.

    Attributes:
        images: uint8 (batch, time + 1, channels, height, width).
        intrinsics: float32 (batch, 4).
        motions: float32 (batch, time, 6), the labels.
        fresh: bool (batch,), where the recurrent state must start anew.
        clips: where the images come from, for messages.
    """

    images: Tensor
    intrinsics: Tensor
    motions: Tensor
    fresh: Tensor
    clips: tuple[Clip, ...] = ()

    def to(self, device: torch.device) -> Batch:
        images, intrinsics, motions, fresh = (
            tensor.to(device, non_blocking=True)
            for tensor in (self.images, self.intrinsics, self.motions, self.fresh)
        )
        return Batch(images, intrinsics, motions, fresh, self.clips)


@dataclasses.dataclass(frozen=True)
class EpochPlan:
    """Which clips make up an epoch; a function of its fields alone, so that a resumed run finds its place.

    Attributes:
        lengths: frames of each sequence.
        time_steps: motions in a clip.
        batch_size: lanes.
        carry_clips: clips over which the state is carried before it is reset; 0 for whole sequences.
        augment: mirror, reverse and skip are drawn for each walk.
        seed: of the run.
        weights: how often each sequence is shown in an epoch; empty for once.
    """

    lengths: tuple[int, ...]
    time_steps: int
    batch_size: int
    carry_clips: int
    augment: AugmentConfig
    seed: int
    weights: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if self.weights and len(self.weights) != len(self.lengths):
            raise ClipError(f"{len(self.weights)} weights for {len(self.lengths)} sequences: give one each")
        if not self.lengths or max(self.lengths) <= self.time_steps * min(self.augment.skip):
            raise ClipError(
                f"sequences of {list(self.lengths)} frames give no clip: one needs {self.time_steps} motions, so "
                f"{self.time_steps * min(self.augment.skip) + 1} frames; shorten the clips (--time-steps)"
            )

    @property
    def steps(self) -> int:
        """Steps in an epoch: each motion is shown about once."""
        weights = self.weights or [1] * len(self.lengths)
        clips = sum(w * ((n - 1) // self.time_steps) for w, n in zip(weights, self.lengths, strict=True))
        return max(1, int(clips // self.batch_size))

    def __call__(self, epoch: int) -> Iterator[tuple[Clip, ...]]:
        """The steps of an epoch: one clip for each lane."""
        rng = np.random.default_rng([self.seed, epoch])
        queue: list[list[Clip]] = []
        lanes: list[list[Clip]] = [[] for _ in range(self.batch_size)]
        for _ in range(self.steps):
            for lane in lanes:
                if not lane:
                    # Lanes never wait: when all walks are dealt out, the sequences are cut anew.
                    while not queue:
                        queue = self._walks(rng)
                    lane.extend(queue.pop())
            yield tuple(lane.pop(0) for lane in lanes)

    def _walks(self, rng: np.random.Generator) -> list[list[Clip]]:
        """All sequences cut into walks at random places, in random order."""
        numbers = [number for number in range(len(self.lengths)) for _ in range(self._times(number, rng))]
        walks = [walk for number in numbers for walk in self._cut(number, rng)]
        return [walks[i] for i in rng.permutation(len(walks))]

    def _times(self, sequence: int, rng: np.random.Generator) -> int:
        """How often a sequence is shown this time: its weight, a fraction of which is drawn."""
        if not self.weights:
            return 1
        whole, fraction = divmod(self.weights[sequence], 1)
        return int(whole) + int(rng.random() < fraction)

    def _cut(self, sequence: int, rng: np.random.Generator) -> Iterator[list[Clip]]:
        length = self.lengths[sequence]
        start = int(rng.integers(0, min(self.time_steps, max(1, length - self.time_steps))))
        while True:
            fitting = [skip for skip in self.augment.skip if start + self.time_steps * skip < length]
            if not fitting:
                return
            skip = int(rng.choice(fitting))
            count = (length - 1 - start) // (self.time_steps * skip)
            count = min(count, self._walk_limit)
            span = count * self.time_steps * skip
            yield self._walk(sequence, np.arange(start, start + span + 1, skip), rng)
            start += span

    @property
    def _walk_limit(self) -> int:
        # Even whole sequences are cut so that each lane has work of its own.
        return self.carry_clips or self.steps

    def _walk(self, sequence: int, frames: NDArray[np.int64], rng: np.random.Generator) -> list[Clip]:
        mirror = bool(rng.random() < self.augment.mirror)
        if rng.random() < self.augment.reverse:
            frames = frames[::-1]
        t = self.time_steps
        starts = range(0, len(frames) - t, t)
        return [Clip(sequence, tuple(frames[i : i + t + 1].tolist()), mirror, fresh=i == 0) for i in starts]


def sequential_clips(length: int, time_steps: int) -> list[Clip]:
    """A whole sequence from first to last frame in clips of ``time_steps`` motions (the last one shorter)."""
    starts = range(0, length - 1, time_steps)
    return [
        Clip(0, tuple(range(i, min(i + time_steps, length - 1) + 1)), mirror=False, fresh=i == 0) for i in starts
    ]


def collate(sequences: list[DecodedSequence], clips: tuple[Clip, ...]) -> Batch:
    """Gather the frames and labels of one clip for each lane."""
    items = [_read_clip(sequences[clip.sequence], clip) for clip in clips]
    images, intrinsics, motions = (np.stack(parts) for parts in zip(*items, strict=True))
    return Batch(
        torch.from_numpy(images).permute(0, 1, 4, 2, 3),
        torch.from_numpy(intrinsics).float(),
        torch.from_numpy(motions).float(),
        torch.tensor([clip.fresh for clip in clips]),
        clips,
    )


def _read_clip(sequence: DecodedSequence, clip: Clip) -> tuple[NDArray, NDArray, NDArray]:
    """Images (time + 1, height, width, channels), intrinsics (4,) and motions (time, 6) of one clip."""
    frames = np.array(clip.frames)
    images, intrinsics = sequence.images[frames], sequence.intrinsics
    poses = sequence.T_world_camera[frames]
    motions = se3.motion_from_matrix(se3.relative(poses[:-1], poses[1:]))
    if clip.mirror:
        width = images.shape[2]
        images = images[:, :, ::-1]
        intrinsics = intrinsics * [1, 1, -1, 1] + [0, 0, width - 1, 0]
        motions = se3.mirror_motion(motions)
    return images, intrinsics, motions


def photometric_draws(batch_size: int, seed: int) -> Tensor:
    """Random numbers (3, batch_size) in -1..1 for `augment_photometric`.

    Drawn for the whole batch, on the CPU: every device, and every way of dealing lanes out to processes, sees the
    same changes.
    """
    return torch.rand(3, batch_size, generator=torch.Generator().manual_seed(seed)).mul(2).sub(1)


def augment_photometric(images: Tensor, config: AugmentConfig, draws: Tensor) -> Tensor:
    """Change brightness, contrast and gamma of each clip at random.

    Args:
        images: (batch, time + 1, channels, height, width), 0..255.
        draws: (3, batch), see `photometric_draws`.

    Returns:
        float32 images of the same shape, 0..255; the same change for all frames of a clip.
    """
    brightness, contrast, gamma = (
        values[:, None, None, None, None] * limit
        for values, limit in zip(
            draws.to(images.device), (config.brightness, config.contrast, config.gamma), strict=True
        )
    )
    unit = images.float().div(255).clamp(1e-3, 1).pow(gamma.exp())
    return ((unit - 0.5) * (1 + contrast) + 0.5 + brightness).clamp(0, 1).mul(255)
