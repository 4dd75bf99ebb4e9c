"""All pictures in one array, each with its smaller versions; drawn once a process and shared by all streets."""

from __future__ import annotations

import dataclasses
import functools

import numpy as np
from numpy.typing import NDArray

from convlstm_vo.world.textures import (
    Picture,
    asphalt_grain,
    bare_branches,
    car_side,
    facade,
    grass,
    lattice,
    leaves,
    noise,
    planks,
    road_surface,
    roof,
    shop,
    signboard,
    slabs,
    to_picture,
    treeline,
)


def ripmap(picture: Picture) -> Picture:
    """A picture (h, w), powers of two, with all its versions halved along each axis: (2h, 2w); see `texels`."""
    h, w = picture.shape
    block = np.zeros((2 * h, 2 * w), np.uint8)
    tall = picture.astype(np.float32)
    for j in range(h.bit_length()):
        wide = tall
        row = 2 * h - (2 * h >> j)
        for i in range(w.bit_length()):
            column = 2 * w - (2 * w >> i)
            block[row : row + wide.shape[0], column : column + wide.shape[1]] = wide + 0.5
            wide = 0.5 * (wide[:, 0::2] + wide[:, 1::2]) if wide.shape[1] > 1 else wide
        tall = 0.5 * (tall[0::2] + tall[1::2]) if tall.shape[0] > 1 else tall
    return block


def halved(block: Picture, level: int) -> Picture:
    """The version of a ripmap that is halved so many times along both axes (or as often as it can be)."""
    h, w = block.shape[0] // 2, block.shape[1] // 2
    j, i = min(level, h.bit_length() - 1), min(level, w.bit_length() - 1)
    y, x = 2 * h - (2 * h >> j), 2 * w - (2 * w >> i)
    return block[y : y + (h >> j), x : x + (w >> i)]


@dataclasses.dataclass(frozen=True)
class Bank:
    """All pictures as one array for the compiled code.

    Attributes:
        atlas: flat uint8, ripmaps one after the other.
        textures: (t, 3) int64: offset, log2 of width, log2 of height.
        names: index of each picture. means: (t,). deviations: (t, 12) of each version halved along both axes.
    """

    atlas: Picture
    textures: NDArray[np.int64]
    names: dict[str, int]
    means: NDArray[np.float64]
    deviations: NDArray[np.float64]

    def with_pictures(self, pictures: dict[str, Picture]) -> Bank:
        """A bank with more pictures at its end (a street's shadow maps)."""
        blocks, rows, offset = [self.atlas], [self.textures], len(self.atlas)
        means, deviations = [self.means], [self.deviations]
        names = dict(self.names)
        for name, picture in pictures.items():
            h, w = picture.shape
            names[name] = len(names)
            rows.append(np.array([[offset, w.bit_length() - 1, h.bit_length() - 1]]))
            block = ripmap(picture)
            blocks.append(block.ravel())
            means.append(np.array([picture.mean()]))
            deviations.append(np.array([[halved(block, level).std() for level in range(12)]]))
            offset += 4 * h * w
        return Bank(
            np.concatenate(blocks), np.concatenate(rows), names, np.concatenate(means), np.concatenate(deviations)
        )


def _pairs(rng: np.random.Generator) -> dict[str, tuple[Picture, Picture]]:
    """Pictures with a mask."""
    return {
        "leaf0": leaves(rng, count=1500, size=6, round_card=True),
        "leaf1": leaves(rng, count=2600, size=4, round_card=True),
        "leaf2": leaves(rng, count=900, size=8, round_card=True),
        "twigs": bare_branches(rng),
        "treeline": treeline(rng),
        "planks": planks(rng, gap=5, period=16),
        "pickets": planks(rng, gap=12, period=22),
        "lattice": lattice(rng),
    }


@functools.lru_cache(maxsize=1)
def bank() -> Bank:
    """The pictures that all streets share."""
    rng = np.random.Generator(np.random.PCG64(20261122))
    pictures: dict[str, Picture] = {"grain": asphalt_grain(rng)}
    for i, (patches, cracks, stains) in enumerate([(3, 2, 90), (26, 20, 160), (9, 45, 260)]):
        pictures[f"road{i}"] = road_surface(rng, patches=patches, cracks=cracks, stains=stains)
    pictures |= {"grass": grass(rng), "rough": to_picture(40 * noise(rng, 256, 256, 0.5))}
    pictures |= {"blotch": to_picture(34 * noise(rng, 256, 256, 1.5))}
    pictures |= {
        "slabs": slabs(rng, across=8, along=8, joint=4),
        "bricks": slabs(rng, across=32, along=12, joint=3),
    }
    pictures |= {"blocks": slabs(rng, across=10, along=6, joint=6), "roof": roof(rng), "sign": signboard(rng)}
    pictures |= {"hedge": leaves(rng, count=7000, size=4, round_card=False)[0], "car": car_side(rng)}
    for i in range(6):
        pictures[f"facade{i}"] = facade(rng, shutters=i in (1, 4), arched=i in (2, 4), plinth=i % 2 == 0)
    pictures |= {"shop0": shop(rng), "shop1": shop(rng), "clouds": to_picture(50 * noise(rng, 512, 512, 1.5))}
    for name, (tone, mask) in _pairs(rng).items():
        pictures |= {name: tone, f"{name}_mask": mask}
    nothing = Bank(np.zeros(0, np.uint8), np.zeros((0, 3), np.int64), {}, np.zeros(0), np.zeros((0, 12)))
    return nothing.with_pictures(pictures)
