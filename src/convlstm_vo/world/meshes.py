"""Bodies made of flat quads: walls, roofs, crowns, cars. Each stands at its own origin, up is -y, front is +z."""

from __future__ import annotations

import dataclasses
import itertools
import math

import numpy as np
from numpy.typing import NDArray

from convlstm_vo.world.exact import sincos

Array = NDArray[np.float64]


@dataclasses.dataclass(frozen=True)
class Light:
    """Sun and sky over a street.

    Attributes:
        sun_xyz: (3,) unit vector towards the sun. sun: its strength on a surface that faces it. sky: light from
            everywhere else.
    """

    sun_xyz: Array
    sun: float
    sky: float

    def on(self, normals: Array) -> Array:
        """Light on surfaces with unit normals (..., 3)."""
        facing = (normals * self.sun_xyz).sum(-1)
        up = -normals[..., 1]
        result: Array = self.sky * (0.7 + 0.3 * up) + self.sun * np.maximum(facing, 0.0)
        return result


@dataclasses.dataclass
class Mesh:
    """Quads under construction.

    Attributes:
        quads: (n, 4, 3) corners, metres. uvs: (n, 3, 2) texture coordinates of the first three, metres.
        normals: (n, 3) unit, outwards. albedos: (n,). materials: (n,) names.
        details: (n,) -1 for quads drawn only nearby, 1 only far away, 0 always.
    """

    quads: list[Array] = dataclasses.field(default_factory=list)
    uvs: list[Array] = dataclasses.field(default_factory=list)
    normals: list[Array] = dataclasses.field(default_factory=list)
    albedos: list[Array] = dataclasses.field(default_factory=list)
    materials: list[str] = dataclasses.field(default_factory=list)
    details: list[int] = dataclasses.field(default_factory=list)

    def add(self, quads: Array, material: str, albedo: float | Array, *, uvs: Array | None = None,
            normals: Array | None = None, detail: int = 0) -> Mesh:  # fmt: skip
        """Add quads (n, 4, 3) whose first two edges turn so that their cross product points outwards."""
        quads = np.asarray(quads, dtype=np.float64).reshape(-1, 4, 3)
        self.quads.append(quads)
        self.uvs.append(edge_uvs(quads) if uvs is None else np.broadcast_to(uvs, (len(quads), 3, 2)))
        self.normals.append(normals_of(quads) if normals is None else np.broadcast_to(normals, (len(quads), 3)))
        self.albedos.append(np.broadcast_to(np.asarray(albedo, dtype=np.float64), len(quads)))
        self.materials += [material] * len(quads)
        self.details += [detail] * len(quads)
        return self

    def joined(self) -> tuple[Array, Array, Array, Array]:
        """quads, uvs, normals and albedos as single arrays."""
        return tuple(np.concatenate(part) for part in (self.quads, self.uvs, self.normals, self.albedos))  # type: ignore[return-value]


def _cross(a: Array, b: Array) -> Array:
    """Cross products of (n, 3); numpy's own is slow for few."""
    out = np.empty(np.broadcast_shapes(a.shape, b.shape))
    out[..., 0] = a[..., 1] * b[..., 2] - a[..., 2] * b[..., 1]
    out[..., 1] = a[..., 2] * b[..., 0] - a[..., 0] * b[..., 2]
    out[..., 2] = a[..., 0] * b[..., 1] - a[..., 1] * b[..., 0]
    return out


def normals_of(quads: Array) -> Array:
    """Unit normals (n, 3) of quads; zero for those without area."""
    n = _cross(quads[:, 1] - quads[:, 0], quads[:, 2] - quads[:, 0])
    size = np.sqrt((n * n).sum(-1, keepdims=True))
    return n / np.maximum(size, 1e-12)


def edge_uvs(quads: Array) -> Array:
    """Texture coordinates in metres: u along the first edge, v along the second (rectangles)."""
    width = np.sqrt(((quads[:, 1] - quads[:, 0]) ** 2).sum(-1))
    height = np.sqrt(((quads[:, 2] - quads[:, 1]) ** 2).sum(-1))
    zero = np.zeros_like(width)
    return np.stack([zero, zero, width, zero, width, height], axis=-1).reshape(-1, 3, 2)


def gradients(quads: Array, uvs: Array) -> NDArray[np.float32]:
    """(n, 8): for u and v, the gradient in space (1/m) and the value at the first corner."""
    e1, e2 = quads[:, 1] - quads[:, 0], quads[:, 2] - quads[:, 0]
    n = _cross(e1, e2)
    square = np.maximum((n * n).sum(-1, keepdims=True), 1e-18)
    along1, along2 = _cross(e2, n) / square, _cross(n, e1) / square
    out = np.zeros((len(quads), 8))
    for k in range(2):
        d1, d2 = uvs[:, 1, k] - uvs[:, 0, k], uvs[:, 2, k] - uvs[:, 0, k]
        out[:, 4 * k : 4 * k + 3] = d1[:, None] * along1 + d2[:, None] * along2
        out[:, 4 * k + 3] = uvs[:, 0, k]
    return out.astype(np.float32)


def wall(x0: float, z0: float, x1: float, z1: float, low: float, high: float) -> list[list[float]]:
    """An upright rectangle from (x0, z0) to (x1, z1), seen from the right-hand side of that direction."""
    return [[x0, -low, z0], [x1, -low, z1], [x1, -high, z1], [x0, -high, z0]]


def box(w: float, h: float, d: float, *, x: float = 0, z: float = 0, low: float = 0) -> Array:
    """Four sides and a lid (5, 4, 3) of a box w (x) by d (z), standing from low to low + h, middle at (x, z)."""
    a, b, c, e = x - w / 2, x + w / 2, z - d / 2, z + d / 2
    top = low + h
    sides = [
        wall(a, c, b, c, low, top),
        wall(b, c, b, e, low, top),
        wall(b, e, a, e, low, top),
        wall(a, e, a, c, low, top),
    ]
    return np.array([*sides, [[a, -top, c], [b, -top, c], [b, -top, e], [a, -top, e]]])


def cards(middles: Array, normals: Array, half: Array, turn: Array) -> Array:
    """Square cards (n, 4, 3) around middles (n, 3), facing along unit normals (n, 3); turn (n, 3): any."""
    a = _cross(normals, turn)
    a /= np.maximum(np.sqrt((a * a).sum(-1, keepdims=True)), 1e-9)
    b = _cross(normals, a)
    a, b = a * half[:, None], b * half[:, None]
    return np.stack([middles - a - b, middles + a - b, middles + a + b, middles - a + b], axis=1)


def unit_vectors(rng: np.random.Generator, n: int) -> Array:
    """Random directions (n, 3)."""
    v = rng.random((n, 3)) * 2 - 1
    return v / np.maximum(np.sqrt((v * v).sum(-1, keepdims=True)), 1e-6)


CARD_UV = np.array([[0.0, 0.0], [1.0, 0.0], [1.0, 1.0]])


def crown(rng: np.random.Generator, mesh: Mesh, leaf: str, size_xyz: tuple[float, float, float], low: float,
          count: int, albedo: float) -> Mesh:  # fmt: skip
    """Leaf cards over an ellipsoid of half axes size_xyz, its lowest point at ``low``; shaded as a round body.

    From far away a few large cards stand in.
    """
    size = np.array(size_xyz)
    few = max(4, round(3.5 * size_xyz[1] / size_xyz[0]))
    for number, growth, detail in ((count, 1.0, -1), (few, 1.7, 1)):
        out = unit_vectors(rng, number)
        reach = (0.35 + 0.65 * np.sqrt(rng.random(number)))[:, None]
        middles = out * reach * size * (0.8 if detail < 0 else 0.55) - [0.0, low + size[1], 0.0]
        half = (0.36 + 0.22 * rng.random(number)) * min(size_xyz) * growth
        facing = unit_vectors(rng, number) + 0.4 * out
        facing /= np.sqrt((facing * facing).sum(-1, keepdims=True))
        inner = 0.55 + 0.45 * reach[:, 0] - 0.18 * out[:, 1] + 0.3 * (rng.random(number) - 0.5)
        quads = cards(middles, facing, half, unit_vectors(rng, number))
        mesh.add(quads, leaf, albedo * inner, uvs=CARD_UV, normals=out, detail=detail)
    return mesh


def pole(mesh: Mesh, radius: float, height: float, material: str, albedo: float, *, x: float = 0, z: float = 0,
         low: float = 0, sides: int = 5, taper: float = 1.0) -> Mesh:  # fmt: skip
    """A round post, at its top ``taper`` times as thick as at its foot."""
    corners = [sincos(2 * math.pi * i / sides) for i in range(sides + 1)]
    for (s0, c0), (s1, c1) in itertools.pairwise(corners):
        quad = np.array(wall(x + radius * c0, z + radius * s0, x + radius * c1, z + radius * s1, low, low + height))
        quad[2:, ::2] = np.array([x, z]) + (quad[2:, ::2] - [x, z]) * taper
        mesh.add(quad[None], material, albedo)
    return mesh


def tree(rng: np.random.Generator, height: float, leaf: str, *, slim: bool = False) -> Mesh:
    """A trunk and a crown."""
    mesh = Mesh()
    bare = height * rng.uniform(0.18, 0.38)
    radius = height * (0.14 if slim else rng.uniform(0.22, 0.34))
    thick = 0.03 + rng.uniform(0.007, 0.014) * height
    pole(mesh, thick, height * 0.65, "bark", rng.uniform(0.1, 0.26), sides=4 if height < 5 else 6, taper=0.5)
    _branches(rng, mesh, thick, bare, height)
    half = (height - bare) / 2
    return crown(rng, mesh, leaf, (radius, half, radius), bare, int(9 + 1.6 * height), rng.uniform(0.16, 0.34))


def _branches(rng: np.random.Generator, mesh: Mesh, thick: float, bare: float, height: float) -> None:
    """A few flat boughs from the trunk into the crown."""
    for _ in range(4):
        sine, cosine = sincos(float(rng.uniform(0, 2 * math.pi)))
        low, out, up = (
            bare * rng.uniform(0.8, 1.4),
            height * rng.uniform(0.1, 0.22),
            height * rng.uniform(0.1, 0.25),
        )
        w = thick * 0.4
        foot, tip = [0.0, -low, 0.0], [out * sine, -low - up, out * cosine]
        quad = [[foot[0], foot[1] + w, foot[2]], [tip[0], tip[1] + w / 3, tip[2]], [tip[0], tip[1] - w / 3, tip[2]],
                [foot[0], foot[1] - w, foot[2]]]  # fmt: skip
        mesh.add(np.array([quad]), "bark", 0.12, detail=-1)


def thicket(rng: np.random.Generator, height: float, leaf: str) -> Mesh:
    """A tall shrub with leaves down to the ground."""
    return crown(rng, Mesh(), leaf, (height * 0.42, height * 0.5, height * 0.42), -0.2, int(6 + 1.3 * height),
                 rng.uniform(0.14, 0.34))  # fmt: skip


def bush(rng: np.random.Generator, size: float, leaf: str) -> Mesh:
    """A low round plant."""
    return crown(
        rng, Mesh(), leaf, (size, size * 0.7, size), -0.3 * size, int(10 + 8 * size), rng.uniform(0.14, 0.3)
    )


def house(rng: np.random.Generator, w: float, d: float, floors: int, gable_to_street: bool) -> Mesh:
    """Walls with windows, a roof that overhangs, a chimney; the front (with doors) looks along +x."""
    mesh, storey = Mesh(), 3.1
    h = floors * storey
    facade, albedo = f"facade{rng.integers(6)}", rng.uniform(0.22, 0.7)
    bays_w, bays_d = max(1, round(w / 3.2)), max(1, round(d / 3.2))
    low = storey if floors > 1 and rng.random() < 0.35 else 0.0
    for i, quad in enumerate(box(d, h - low, w, low=low)[:4]):
        bays = bays_w if i % 2 else bays_d
        uv = np.array([[0, 0], [bays, 0], [bays, (h - low) / storey]], dtype=np.float64)
        mesh.add(quad[None], facade, albedo, uvs=uv)
        if low:
            ground = np.array([wall(quad[0, 0], quad[0, 2], quad[1, 0], quad[1, 2], 0, low)])
            mesh.add(ground, f"shop{rng.integers(2)}", albedo, uvs=np.array([[0, 0], [bays, 0], [bays, 1.0]]))
    rise = (w if gable_to_street else d) * rng.uniform(0.25, 0.5)
    _roof(mesh, w, d, h, rise, gable_to_street, albedo, rng.uniform(0.1, 0.3))
    if rng.random() < 0.7:
        mesh.add(
            box(0.6, rise + 0.9, 0.8, x=rng.uniform(-1, 1), z=rng.uniform(-w / 4, w / 4), low=h), "bricks", 0.24
        )
    return mesh


def _roof(
    mesh: Mesh, w: float, d: float, h: float, rise: float, gable_to_street: bool, albedo: float, tiles: float
) -> None:
    over, a, b = 0.5, d / 2, w / 2
    if gable_to_street:
        ridge = [[a + over, -h - rise, 0.0], [-a - over, -h - rise, 0.0]]
        eaves = [[[-a - over, -h + 0.2, s * (b + over)], [a + over, -h + 0.2, s * (b + over)]] for s in (-1, 1)]
        gables = [
            [[s * a, -h, -s * b], [s * a, -h, s * b], [s * a, -h - rise, 0.0], [s * a, -h - rise, 0.0]]
            for s in (1, -1)
        ]
    else:
        ridge = [[0.0, -h - rise, b + over], [0.0, -h - rise, -b - over]]
        eaves = [[[s * (a + over), -h + 0.2, -b - over], [s * (a + over), -h + 0.2, b + over]] for s in (1, -1)]
        gables = [
            [[-s * a, -h, s * -b], [s * a, -h, s * -b], [0.0, -h - rise, s * -b], [0.0, -h - rise, s * -b]]
            for s in (1, -1)
        ]
    (e0, e1), (f0, f1) = eaves
    slopes = np.array([[e0, e1, ridge[0], ridge[1]], [f1, f0, ridge[1], ridge[0]]], dtype=np.float64)
    normals = normals_of(slopes)
    normals *= np.where(normals[:, 1:2] > 0, -1.0, 1.0)
    mesh.add(slopes, "roof", tiles, normals=normals)
    mesh.add(np.array(gables, dtype=np.float64), "plaster", albedo)


def car(rng: np.random.Generator, *, van: bool = False) -> Mesh:
    """A car of about 4.3 x 1.75 x 1.45 m (or a van): body, cabin, windows, wheels, lamps; its front is +z."""
    mesh = Mesh()
    length, width = rng.uniform(3.8, 4.7) + 0.7 * van, rng.uniform(1.68, 1.85) + 0.2 * van
    waist, top = rng.uniform(0.85, 0.98) + 0.25 * van, rng.uniform(1.4, 1.55) + 0.65 * van
    paint = float(rng.choice([0.03, 0.05, 0.09, 0.16, 0.3, 0.45, 0.65]))
    a, b = width / 2, length / 2
    body = box(width, waist - 0.25, length, low=0.25)
    uv = np.array([[0, 0], [1, 0], [1, 1.0]])
    mesh.add(body[[1, 3]], "car", paint * 1.1, uvs=uv).add(body[[0, 2]], "paint", paint).add(
        body[4:], "paint", paint
    )
    front, back = b * rng.uniform(0.35, 0.5) + 0.5 * van, -b * rng.uniform(0.75, 0.98)
    c, f, r = a * 0.78, front - 0.65, back + (0.12 if van else rng.uniform(0.2, 0.6))
    lo, hi = -waist, -top
    glass = [
        [[-a, lo, back], [a, lo, back], [c, hi, r], [-c, hi, r]],
        [[a, lo, front], [-a, lo, front], [-c, hi, f], [c, hi, f]],
        [[a, lo, back], [a, lo, front], [c, hi, f], [c, hi, r]],
        [[-a, lo, front], [-a, lo, back], [-c, hi, r], [-c, hi, f]],
    ]
    mesh.add(np.array(glass), "glass", 0.05)
    mesh.add(np.array([[[-c, hi, r], [c, hi, r], [c, hi, f], [-c, hi, f]]]), "paint", paint)
    for side in (-1.0, 1.0):
        pillar = side * (a + c) / 2 * 1.004
        for z in (back * 0.8, 0.0, front * 0.62):
            mesh.add(np.array([wall(pillar, z - 0.05, pillar, z + 0.05, waist, top)]), "paint", paint, detail=-1)
        for z in (-b * 0.62, b * 0.64):
            _wheel(mesh, side * (a + 0.01), z, 0.31)
    _lamps(mesh, a, b, waist)
    return mesh


def lorry(rng: np.random.Generator) -> Mesh:
    """A lorry of 6 to 11 m, 2.3 to 2.55 m wide and up to 4 m high, of any skin and colour, with doors and lamps and
    perhaps letters; its front is +z."""
    length, width = rng.uniform(6.0, 11.0), rng.uniform(2.3, 2.55)
    low, top = rng.uniform(0.6, 1.1), rng.uniform(2.4, 4.0)
    a, b = width / 2, length / 2
    paint = float(rng.choice([0.05, 0.12, 0.25, 0.4, 0.6]))
    skin = ("metal", "paint", "rough", "planks")[int(rng.integers(4))]
    mesh = Mesh().add(
        box(width, top - low, length - 1.6, z=-0.8, low=low), "metal" if skin == "planks" else skin, paint
    )
    if skin == "planks":
        mesh.add(box(width + 0.02, top - low, length - 1.6, z=-0.81, low=low), skin, paint * 1.2)
    mesh.add(
        box(width, rng.uniform(2.2, 3.0) - 0.4, 1.6, z=b - 0.8, low=0.4), "paint", float(rng.uniform(0.05, 0.6))
    )
    mesh.add(box(width - 0.3, 0.4, length - 0.4, low=0.35), "rough", 0.05)
    for x in (-a * 0.98, 0.0, a * 0.98):
        mesh.add(box(0.05, top - low - 0.1, 0.03, x=x, z=-b - 0.015, low=low), "paint", paint * 0.5, detail=-1)
    if rng.random() < 0.6:  # letters
        half, foot = rng.uniform(0.3, 0.9), rng.uniform(low + 0.1, top - 0.9)
        mesh.add(np.array([wall(-half, -b - 0.02, half, -b - 0.02, foot, foot + 0.8)]), "sign", 0.5)
    for side in (-1.0, 1.0):
        for z in (-b + 1.2, -b + 2.4, b - 1.3):
            _wheel(mesh, side * (a + 0.01), z, 0.48)
    _lamps(mesh, a, b, low)
    return mesh


def _wheel(mesh: Mesh, x: float, z: float, radius: float) -> None:
    rim = [sincos(math.pi / 4 * i) for i in range(8)]
    for r, albedo, out in ((radius, 0.02, 0.0), (radius * 0.62, 0.3, 0.012)):
        p = [[x + math.copysign(out, x), -radius + r * s, z + r * c] for s, c in rim]
        mesh.add(np.array([[p[0], p[1], p[2], p[3]], [p[3], p[4], p[7], p[0]], [p[4], p[5], p[6], p[7]]]), "paint",
                 albedo, normals=np.array([math.copysign(1.0, x), 0.0, 0.0]))  # fmt: skip


def _lamps(mesh: Mesh, a: float, b: float, waist: float) -> None:
    for side in (-1.0, 1.0):
        x = side * a * 0.78
        for z, albedo in ((-b - 0.01, 0.22), (b + 0.01, 0.6)):
            mesh.add(
                np.array([wall(x - 0.16, z, x + 0.16, z, waist - 0.26, waist - 0.1)]), "paint", albedo, detail=-1
            )
    for z in (-b - 0.012, b + 0.012):
        mesh.add(np.array([wall(-0.26, z, 0.26, z, 0.45, 0.56)]), "sign", 0.6, detail=-1)


def cyclist(rng: np.random.Generator) -> Mesh:
    """A rider on a bicycle, from slim boxes."""
    mesh = Mesh()
    for z in (-0.52, 0.52):
        _wheel(mesh, 0.02, z, 0.33)
    coat, legs = rng.uniform(0.05, 0.6), rng.uniform(0.03, 0.3)
    mesh.add(box(0.05, 0.45, 0.9, low=0.45), "paint", 0.08)
    mesh.add(box(0.3, 0.55, 0.22, z=-0.1, low=0.45), "rough", legs)
    mesh.add(box(0.42, 0.58, 0.26, z=0.0, low=1.0), "rough", coat)
    return mesh.add(box(0.18, 0.26, 0.2, z=0.08, low=1.6), "rough", rng.uniform(0.1, 0.4))


def turned(points: Array, psi: float, x: float, y: float, z: float) -> Array:
    """Points (..., 3) of a body whose front looks along heading psi and which stands at (x, y, z)."""
    sine, cosine = sincos(psi)
    out = np.empty_like(points)
    out[..., 0] = cosine * points[..., 0] + sine * points[..., 2] + x
    out[..., 1] = points[..., 1] + y
    out[..., 2] = cosine * points[..., 2] - sine * points[..., 0] + z
    return out
