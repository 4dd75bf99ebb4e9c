"""All surfaces of a street as flat arrays, the form in which compiled code wants them."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
from numpy.typing import NDArray

from convlstm_vo.world.bank import Bank, bank
from convlstm_vo.world.meshes import Light, Mesh, gradients, turned
from convlstm_vo.world.textures import Picture

Array = NDArray[np.float64]


@dataclasses.dataclass(frozen=True)
class Material:
    """How a surface's texture coordinates (metres, or shares of a card) become tone.

    Attributes:
        a, repeats_a, strength_a: first picture ("" for none), repeats for each unit of u and v, strength.
        b, repeats_b, strength_b: second one.
        mask: picture that says where the surface is (with the first one's repeats), or "".
        light, light_repeats, light_v0: a map of shadows, its repeats, and the v at which it begins.
        marks: (m, 8) road marks, columns as in `shade`.
    """

    a: str = ""
    repeats_a: tuple[float, float] = (1.0, 1.0)
    strength_a: float = 1.0
    b: str = ""
    repeats_b: tuple[float, float] = (1.0, 1.0)
    strength_b: float = 1.0
    mask: str = ""
    light: str = ""
    light_repeats: tuple[float, float] = (1.0, 1.0)
    light_v0: float = 0.0
    marks: Array | None = None


def _every(metres: float) -> tuple[float, float]:
    return (1 / metres, 1 / metres)


def _leaf(name: str) -> Material:
    return Material(name, (1, 1), 1.0, mask=f"{name}_mask")


THINGS: dict[str, Material] = {
    "white": Material(),
    "plaster": Material("rough", _every(1.7), 0.65, "blotch", _every(9.0), 0.3),
    "rough": Material("rough", _every(0.9), 0.5),
    "bark": Material("rough", (1 / 0.4, 1 / 2.2), 0.9),
    "bricks": Material("bricks", _every(2.4), 0.8, "blotch", _every(7.0), 0.4),
    "stone": Material("blocks", _every(2.0), 0.9, "blotch", _every(5.0), 0.5),
    "roof": Material("roof", _every(4.0), 1.2, "blotch", _every(11.0), 0.5),
    "paint": Material("blotch", _every(2.5), 0.25),
    "glass": Material("blotch", _every(1.1), 1.3),
    "metal": Material("blotch", _every(0.7), 0.3, "rough", _every(0.6), 0.2),
    "car": Material("car", (1, 1), 0.9),
    "sign": Material("sign", _every(1.0), 0.9),
    "hedge": Material("hedge", _every(1.1), 0.9, "blotch", _every(3.7), 0.5),
    "planks": Material("planks", (1 / 1.9, 1 / 1.2), 0.7, "rough", _every(0.8), 0.4, mask="planks_mask"),
    "pickets": Material("pickets", (1 / 1.6, 1 / 1.0), 0.6, "rough", _every(0.7), 0.4, mask="pickets_mask"),
    "lattice": Material("lattice", (1 / 2.4, 1 / 2.4), 0.5, mask="lattice_mask"),
    "treeline": Material("treeline", (1.0, 1.0), 0.9, "hedge", (9.0, 3.0), 0.5, mask="treeline_mask"),
    "rail": Material("blotch", _every(1.5), 0.4, "rough", (1.0, 4.0), 0.3),
    **{f"facade{i}": Material(f"facade{i}", (1, 1), 1.0, "rough", (1.3, 1.3), 0.6) for i in range(6)},
    **{f"shop{i}": Material(f"shop{i}", (1, 1), 1.0, "rough", (1.3, 1.3), 0.2) for i in range(2)},
    **{name: _leaf(name) for name in ("leaf0", "leaf1", "leaf2", "twigs")},
}


@dataclasses.dataclass(frozen=True)
class Scene:
    """Surfaces, grouped into objects, with the tables that compiled code reads.

    Attributes:
        quads: (n, 4, 3) float32 corners, metres, in the street's frame (movers': in their own).
        uvs: (n, 8) float32; tones: (n,) float32; materials: (n,) int32.
        ranges: (m, 4) first and end of each object's quads as seen from nearby, and from far away.
        middles: (m, 3), radii: (m,) a sphere around each.
        material_table, marks, masks: see `shade` and `raster`. bank: pictures.
        movers_from: objects from here on are bodies of movers, one after the other.
    """

    quads: NDArray[np.float32]
    uvs: NDArray[np.float32]
    tones: NDArray[np.float32]
    materials: NDArray[np.int32]
    ranges: NDArray[np.int64]
    middles: Array
    radii: Array
    material_table: Array
    marks: Array
    masks: Array
    bank: Bank
    movers_from: int


class SceneBuilder:
    """Collects bodies in the street's frame."""

    def __init__(self, light: Light) -> None:
        self.light = light
        self.recipes: dict[str, Material] = dict(THINGS)
        self.pictures: dict[str, Picture] = {}
        self._parts: list[tuple[NDArray, NDArray, NDArray]] = []
        self._names: list[str] = []
        self._ranges: list[list[int]] = []
        self._spheres: list[Array] = []

    def put(self, mesh: Mesh, psi: float = 0.0, x: float = 0.0, y: float = 0.0, z: float = 0.0) -> None:
        """Add a body whose front looks along heading psi and which stands at (x, y, z)."""
        quads, uvs, normals, albedos = mesh.joined()
        details = np.array(mesh.details)
        order = np.argsort(details, kind="stable")
        quads = turned(quads[order], psi, x, y, z)
        tones = albedos[order] * self.light.on(turned(normals[order], psi, 0.0, 0.0, 0.0))
        self._parts.append((quads.astype(np.float32), gradients(quads, uvs[order]), tones.astype(np.float32)))
        first, end = len(self._names), len(self._names) + len(quads)
        self._ranges.append([first, end - int((details > 0).sum()), first + int((details < 0).sum()), end])
        self._names += [mesh.materials[i] for i in order]
        low, high = quads.min((0, 1)), quads.max((0, 1))
        radius = np.sqrt(((high - low) ** 2).sum()) / 2
        self._spheres.append(np.array([*((low + high) / 2), radius]))

    def __len__(self) -> int:
        return len(self._ranges)

    def finished(self, movers_from: int) -> Scene:
        """The whole as arrays."""
        pictures = bank().with_pictures(self.pictures)
        used = sorted(set(self._names))
        number = {name: i for i, name in enumerate(used)}
        table, marks, masks = material_arrays([self.recipes[name] for name in used], pictures)
        quads, uvs, tones = (np.concatenate(part) for part in zip(*self._parts, strict=True))
        spheres = np.array(self._spheres)
        ranges = np.array(self._ranges)
        materials = np.array([number[name] for name in self._names], dtype=np.int32)
        return Scene(quads, uvs, tones, materials, ranges, spheres[:, :3], spheres[:, 3],
                     table, marks, masks, pictures, movers_from)  # fmt: skip


def material_arrays(recipes: list[Material], pictures: Bank) -> tuple[Array, Array, Array]:
    """Table of materials (m, 27), of marks (k, 8) and of masks (m, 3) for compiled code; see `shade`."""
    rows, masks, marks, count = [], [], [], 0
    for recipe in recipes:
        painted = np.zeros((0, 8)) if recipe.marks is None else recipe.marks
        layers = [
            *_layer(pictures, recipe.a, recipe.repeats_a, recipe.strength_a),
            *_layer(pictures, recipe.b, recipe.repeats_b, recipe.strength_b),
            *_layer(pictures, recipe.light, recipe.light_repeats, 1.0),
        ]
        rows.append([*layers, recipe.light_v0, count, count + len(painted)])
        masks.append([pictures.names[recipe.mask] if recipe.mask else -1, *recipe.repeats_a])
        marks.append(painted)
        count += len(painted)
    return np.array(rows, dtype=np.float64), np.concatenate(marks), np.array(masks, dtype=np.float64)


def _layer(pictures: Bank, name: str, repeats: tuple[float, float], strength: float) -> list[float]:
    if not name:
        return [-1.0] + [0.0] * 7
    number = pictures.names[name]
    _, log_w, log_h = pictures.textures[number]
    deviations = pictures.deviations[number] * strength
    # The first level at which the layer changes a tone by less than one grey level in 80.
    flat = np.flatnonzero(deviations * 80 / 128 < 1.0)
    last = 2.0 * flat[0] if len(flat) else 99.0
    density = [math.log2(repeats[0]) + log_w, math.log2(repeats[1]) + log_h]
    return [number, *repeats, strength, *density, last, pictures.means[number]]
