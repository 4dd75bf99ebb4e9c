"""Batches for training the flow, made on the device that trains: rendered pairs with exact flow, any light."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from convlstm_vo.geometry import se3
from convlstm_vo.models.scene import (
    canyon_inverse_depth,
    cell_rays,
    flow_of,
    road_inverse_depth,
    road_slopes,
    seen_after,
)
from convlstm_vo.training.rendered import NEAREST_M, SHARES, RenderedDrive

_STEPS = (1, 1, 1, 1, 1, 1, 1, 2, -1, -1)  # frames from the first image of a pair to the second
_GUESSES = ((0.5, 0.002, 0.04, 0.01), (0.35, 0.005, 0.12, 0.03), (0.15, 0.012, 0.3, 0.15))
"""How wrong the predicted motion is: how often, turn in rad, share of the way, camera heights."""


@dataclasses.dataclass(frozen=True)
class FlowBatch:
    """Pairs with their true and predicted flow; lengths in camera heights.

    Attributes:
        prev, curr: (batch, 1, height, width) grey levels. predicted, target: (batch, 2, rows, columns) pixels.
        valid, road: (batch, rows, columns) bool: known and in view; on the road.
    """

    prev: Tensor
    curr: Tensor
    predicted: Tensor
    target: Tensor
    valid: Tensor
    road: Tensor


class FlowData:
    """Drives as the flow learns from them.

    A GPU holds everything (0.2 MB a frame); a CPU leaves the images on disk and holds what cells need.

    Args:
        drives: all of one size. device: where batches are made.
    """

    def __init__(self, drives: Sequence[RenderedDrive], device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self.lengths = torch.tensor([len(drive) for drive in drives])
        self.first = self.lengths.cumsum(0) - self.lengths
        self._images: Sequence[NDArray[np.uint8]] | Tensor = [drive.images for drive in drives]
        if self.device.type != "cpu":
            self._images = torch.cat(
                [torch.from_numpy(np.array(images)).to(self.device) for images in self._images]
            )
        self.inverse_depth = self._put(
            [of_cells(drive.shares) * np.float32(drive.height_m / (SHARES * NEAREST_M)) for drive in drives]
        )
        self.moving = self._put([of_cells(np.unpackbits(drive.moving, axis=-1)) > 0 for drive in drives])
        self.T_world_camera = self._put([drive.T_world_camera for drive in drives])
        self.slopes = self._put(
            [road_slopes(torch.from_numpy(drive.road_plane[:, :3].astype(np.float32))).numpy() for drive in drives]
        )
        self.intrinsics = self._put([drive.intrinsics[None].astype(np.float32) for drive in drives])
        self.height_m = self._put([np.array([drive.height_m]) for drive in drives])

    def _put(self, parts: Sequence[NDArray[np.generic]]) -> Tensor:
        return torch.from_numpy(np.concatenate(parts)).to(self.device)

    def images(self, drive: Tensor, index: Tensor) -> Tensor:
        """Grey levels (batch, 1, height, width) of frames (batch,) of drives (batch,), both on the CPU."""
        if isinstance(self._images, Tensor):
            return self._images[(self.first[drive] + index).to(self.device)][:, None].float()
        found = [self._images[d][i] for d, i in zip(drive.tolist(), index.tolist(), strict=True)]
        return torch.from_numpy(np.stack(found))[:, None].float()

    def random_batch(self, size: int, crop_width: int, seed: tuple[int, int]) -> FlowBatch:
        """Random pairs of frames in a random light, predicted nearly right, in windows of so many columns.

        The same numbers give the same pairs on one kind of device; on another the noise differs.
        """
        chance = np.random.Generator(np.random.PCG64(seed))
        drive = torch.from_numpy(chance.integers(len(self.lengths), size=size))
        hop = torch.tensor(_STEPS)[torch.from_numpy(chance.integers(len(_STEPS), size=size))]
        room = self.lengths[drive] - hop.abs()
        index = (torch.from_numpy(chance.random(size)) * room).long() - hop.clamp_max(0)
        noise = torch.Generator(self.device).manual_seed(int(chance.integers(2**62)))
        batch = self.pairs(drive, index, index + hop, noise)
        prev, curr = change_lights(batch.prev, batch.curr, noise)
        return cropped(dataclasses.replace(batch, prev=prev, curr=curr), crop_width, chance)

    def pairs(
        self, drive: Tensor, index: Tensor, other: Tensor, noise: torch.Generator, *, good: bool = False
    ) -> FlowBatch:
        """Whole pairs of frames, their light as rendered.

        Args:
            drive, index, other: (batch,) on the CPU. noise: of the prediction. good: predict well.
        """
        at, to = ((self.first[drive] + i).to(self.device) for i in (index, other))
        of = drive.to(self.device)
        rho = self.inverse_depth[at]
        intrinsics, slopes = self.intrinsics[of], self.slopes[at]
        truth = se3.relative(self.T_world_camera[at], self.T_world_camera[to])
        truth[:, :3, 3] /= self.height_m[of, None]
        rays = cell_rays(intrinsics, *rho.shape[1:])
        target = flow_of(rays, rho, se3.motion_from_matrix(truth).float(), intrinsics)
        tilted = slopes + torch.randn(slopes.shape, generator=noise, device=self.device) * (
            0.004 if good else 0.008
        )
        guess = se3.motion_from_matrix(mispredicted(truth, noise, good=good)).float()
        predicted = flow_of(rays, canyon_inverse_depth(rays, tilted), guess, intrinsics).clamp(-400, 400)
        prev, curr = self.images(drive, index), self.images(drive, other)
        height, width = prev.shape[-2:]
        seen = rays[:, :2] * intrinsics[:, :2, None, None] + intrinsics[:, 2:, None, None] + target
        size = torch.tensor([width - 1, height - 1], device=self.device)[:, None, None]
        in_view = (seen_after(rays, rho, truth.float())[:, 2] > 0.1) & ((seen > 0) & (seen < size)).all(1)
        plane = road_inverse_depth(rays, slopes)
        road = ((rho - plane).abs() < 0.03 * plane) & (plane > 0.02)
        return FlowBatch(prev, curr, predicted, target, in_view & ~self.moving[at], road)


def good_pair(drive: RenderedDrive, index: int, other: int, seed: int) -> FlowBatch:
    """Two frames of a drive, whole, as rendered and predicted well."""
    both = [index, other]
    frames = {
        field.name: getattr(drive, field.name)[both]
        for field in dataclasses.fields(drive)
        if field.name in ("images", "shares", "moving", "T_world_camera", "road_plane")
    }
    data, one = FlowData([dataclasses.replace(drive, **frames)]), torch.ones(1, dtype=torch.long)
    return data.pairs(0 * one, 0 * one, one, torch.Generator().manual_seed(seed), good=True)


def of_cells(values: NDArray[np.generic]) -> NDArray[np.float32]:
    """Mean of the four middle pixels of each cell of 4x4: (..., height, width) to (..., height / 4, width / 4)."""
    mean = sum(values[..., y::4, x::4].astype(np.float32) for y in (1, 2) for x in (1, 2)) / 4
    return np.asarray(mean, np.float32)


def mispredicted(T: Tensor, noise: torch.Generator, *, good: bool) -> Tensor:
    """Motions (batch, 4, 4) nearly like true ones: as the last motion predicts them, or as a search finds them."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=noise, device=T.device, dtype=T.dtype)

    share = torch.tensor([often for often, *_ in _GUESSES], device=T.device)
    kind = torch.multinomial(share, len(T), replacement=True, generator=noise)
    turn, scale, shift = torch.tensor([how for _, *how in _GUESSES], device=T.device, dtype=T.dtype)[
        torch.zeros_like(kind) if good else kind
    ].unbind(1)
    out = T.clone()
    axes = torch.tensor([[0.7, 1.2, 0.7], [0.3, 0.2, 1.0]], device=T.device, dtype=T.dtype)
    out[:, :3, :3] = T[:, :3, :3] @ se3.so3_exp(normal(len(T), 3) * axes[0] * turn[:, None])
    out[:, :3, 3] = (
        T[:, :3, 3] * (1 + normal(len(T), 1) * scale[:, None]) + normal(len(T), 3) * axes[1] * shift[:, None]
    )
    return out


def change_lights(prev: Tensor, curr: Tensor, noise: torch.Generator) -> tuple[Tensor, Tensor]:
    """Contrast, exposure and noise as other cameras have them; exposure differs a little between the frames.

    Args:
        prev, curr: grey levels, (batch, 1, height, width).
    """

    def uniform() -> Tensor:
        return torch.rand(len(prev), 1, 1, 1, generator=noise, device=prev.device)

    def normal(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=noise, device=prev.device)

    contrast = torch.where(uniform() < 0.4, 1.0, 0.2 + 1.1 * uniform())
    grain = torch.where(uniform() < 0.5, 0.0, 2.0 * uniform())
    out = []
    for image in (prev, curr):
        light = (image - 100) * (contrast * (0.05 * normal(contrast)).exp()) + 100 + 4 * normal(contrast)
        out.append((light + grain * normal(image)).round().clamp(0, 255))
    return out[0], out[1]


def cropped(batch: FlowBatch, width: int, chance: np.random.Generator) -> FlowBatch:
    """Random windows, each mirrored half of the time."""
    count, cells = len(batch.prev), width // 4
    left = torch.from_numpy(chance.integers(0, (batch.target.shape[-1] - cells) // 2 + 1, size=count)) * 2
    mirror = torch.from_numpy(chance.random(count) < 0.5)
    out = []
    for field in dataclasses.fields(batch):
        value: Tensor = getattr(batch, field.name)
        scale = 4 if field.name in ("prev", "curr") else 1
        columns = torch.arange(cells * scale)
        columns = left[:, None] * scale + torch.where(mirror[:, None], columns.flip(0), columns)
        index = columns.view(count, *[1] * (value.dim() - 2), -1).to(value.device)
        value = value.gather(-1, index.expand(*value.shape[:-1], -1))
        if field.name in ("predicted", "target"):
            sign = torch.stack([1 - 2 * mirror.float(), torch.ones(count)], 1)[:, :, None, None]
            value = value * sign.to(value.device)
        out.append(value)
    return FlowBatch(*out)
