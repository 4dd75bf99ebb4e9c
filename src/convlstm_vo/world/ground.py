"""What lies on the ground: carriageways with their marks, kerbs, pavements, verges, fields, hills, shadows."""

from __future__ import annotations

import itertools
import math

import cv2
import numpy as np
from numpy.typing import NDArray

from convlstm_vo.world.exact import sincos
from convlstm_vo.world.meshes import Mesh
from convlstm_vo.world.plan import Leg, Plan, interpolate
from convlstm_vo.world.scene import Material, SceneBuilder
from convlstm_vo.world.textures import Picture, noise

Array = NDArray[np.float64]
MAP_M, MAP_WIDTH_M, MAP_TEXEL_M = 128.0, 32.0, 0.125


class Shadows:
    """Sunlight on a leg's surface, drawn as maps of 128 m by 32 m.

    Attributes:
        maps: pictures (256, 1024), v across, u along; 255 is full sun. along, aside: how far the shadow of a point
            one metre high lies along the leg and to its right, by place.
    """

    def __init__(self, leg: Leg, sun_xyz: Array, darkest: float) -> None:
        line = leg.line
        self.leg, self.sun, self.darkest = leg, sun_xyz, darkest
        self.s0 = float(line.s[0])
        count = math.ceil((float(line.s[-1]) - self.s0) / MAP_M)
        self.maps = [np.full((256, 1024), 255, np.uint8) for _ in range(count)]

    def offset(self, s: float, height: float) -> tuple[float, float]:
        """Shift (along, aside) in metres of the shadow of a point so high above the ground."""
        sine, cosine = sincos(float(interpolate(s, self.leg.line.s, self.leg.line.psi)))
        dx, dz = (-self.sun[k] / max(-self.sun[1], 0.12) * height for k in (0, 2))
        return float(dx * sine + dz * cosine), float(dx * cosine - dz * sine)

    def _windows(self, s: float, d: float, reach: float):  # type: ignore[no-untyped-def]
        """Maps that a shape around (s, d) touches, with its place in their texels."""
        for k, image in enumerate(self.maps):
            at = s - self.s0 - k * MAP_M
            if -reach < at < MAP_M + reach and abs(d) < MAP_WIDTH_M / 2 + reach:
                yield image, at / MAP_TEXEL_M, (d + MAP_WIDTH_M / 2) / MAP_TEXEL_M

    def polygon(self, corners_sd: Array, softness_m: float) -> None:
        """Darken the hull of points (n, 2) with an edge so soft."""
        middle = corners_sd.mean(0)
        reach = float(np.abs(corners_sd - middle).max()) + 1
        for image, x, y in self._windows(float(middle[0]), float(middle[1]), reach):
            points = ((corners_sd - middle) / MAP_TEXEL_M + [x, y]).astype(np.int32)
            shape: Picture = np.zeros(image.shape, np.uint8)
            cv2.fillConvexPoly(shape, cv2.convexHull(points.reshape(-1, 1, 2)), 255)
            size = 2 * round(softness_m / MAP_TEXEL_M / 2) + 1
            if size > 1:
                shape = np.asarray(cv2.blur(shape, (size, size)), np.uint8)
            _darken(image, shape, self.darkest)

    def leaves(
        self, rng: np.random.Generator, stamp: Picture, s: float, d: float, radius: float, count: int
    ) -> None:
        """Dapple the ground around (s, d) with a picture of leaves, several times over."""
        for _ in range(count):
            ds, dd = (rng.random(2) - 0.5) * 1.2 * radius
            half = max(2, int(radius * rng.uniform(0.5, 0.9) / MAP_TEXEL_M))
            turned = np.rot90(stamp, int(rng.integers(4)))
            shape = np.asarray(cv2.resize(turned, (2 * half, 2 * half), interpolation=cv2.INTER_AREA), np.uint8)
            for image, x, y in self._windows(s + ds, d + dd, 2 * radius):
                _paste(image, shape, int(x) - half, int(y) - half, self.darkest)


def _darken(image: Picture, shape: Picture, darkest: float) -> None:
    shade = (255 - shape.astype(np.float32) * (1 - darkest)).astype(np.uint8)
    np.minimum(image, shade, out=image)


def _paste(image: Picture, shape: Picture, x: int, y: int, darkest: float) -> None:
    h, w = image.shape
    x0, y0, x1, y1 = max(x, 0), max(y, 0), min(x + shape.shape[1], w), min(y + shape.shape[0], h)
    if x0 < x1 and y0 < y1:
        _darken(image[y0:y1, x0:x1], shape[y0 - y : y1 - y, x0 - x : x1 - x], darkest)


def _strip(leg: Leg, s: Array, d: tuple[float, float], heights: tuple[float, float]) -> tuple[Array, Array]:
    """Quads between lateral distances d along places s, each as two triangles: (2k, 4, 3), with u, v (2k, 3, 2)."""
    x, y, z, psi = leg.line.at(s)
    turns = np.array([sincos(float(angle)) for angle in psi])
    a, b = (
        np.stack([x + e * turns[:, 1], y + leg.line.across(s, e)[0] - up + leg.drop_m, z - e * turns[:, 0]], -1)
        for e, up in zip(d, heights, strict=True)
    )
    along = s - leg.line.s[0]
    # Seen from above, left to right and onwards, so that the normal points up.
    first = np.stack([a[:-1], b[:-1], b[1:], b[1:]], 1)
    second = np.stack([a[:-1], b[1:], a[1:], a[1:]], 1)
    across = math.hypot(d[1] - d[0], heights[1] - heights[0])
    v0, v1 = np.full(len(s) - 1, d[0]), np.full(len(s) - 1, d[0] + across)
    u0, u1 = along[:-1], along[1:]
    uv1 = np.stack([u0, v0, u0, v1, u1, v1], -1).reshape(-1, 3, 2)
    uv2 = np.stack([u0, v0, u1, v1, u1, v0], -1).reshape(-1, 3, 2)
    return np.stack([first, second], 1).reshape(-1, 4, 3), np.stack([uv1, uv2], 1).reshape(-1, 3, 2)


def _places(leg: Leg, near_junction: NDArray[np.bool_]) -> Array:
    """Where to cut a leg into pieces: often in bends and near junctions, seldom elsewhere."""
    fine = np.arange(leg.line.s[0], leg.line.s[-1] - 0.25, 1.0)
    bent: NDArray[np.bool_] = np.abs(interpolate(fine, leg.line.s, leg.line.kappa)) > 0.004
    keep = bent | near_junction[: len(fine)] | (np.arange(len(fine)) % 8 == 0)
    keep[-1] = True
    return fine[keep]


def lay_leg(
    builder: SceneBuilder, plan: Plan, k: int, bands: list[tuple[float, float, float, float, str, float]]
) -> None:
    """Lay a road's bands: (from d, to d, height at each, material, albedo), cut away where other roads run."""
    leg = plan.legs[k]
    fine = np.arange(leg.line.s[0], leg.line.s[-1] - 0.25, 1.0)
    x, _, z, _ = leg.line.at(fine)
    near = np.zeros(len(fine), bool)
    for jx, _, jz, _ in plan.junctions:
        near |= (x - jx) ** 2 + (z - jz) ** 2 < 24.0**2
    s = _places(leg, near)
    for piece in _pieces(s, leg.line.s[0]):
        mesh = Mesh()
        for d0, d1, h0, h1, material, albedo in bands:
            quads, uvs = _strip(leg, piece, (d0, d1), (h0, h1))
            # Bands beside the carriageway end where another road begins.
            keep = np.ones(len(quads), bool) if material.startswith("road") else _free(plan, k, quads)
            chunk = math.floor((float(piece[0]) - leg.line.s[0]) / MAP_M)
            name = f"{material}:{k}:{chunk}" if f"{material}:{k}:{chunk}" in builder.recipes else material
            if keep.any():
                mesh.add(quads[keep], name, albedo, uvs=uvs[keep])
        if mesh.quads:
            builder.put(mesh)


def _pieces(s: Array, s0: float) -> list[Array]:
    """Runs of up to 12 intervals that share their ends and never cross from one map of shadows to the next."""
    maps = np.floor((s - s0) / MAP_M)
    cuts = [0]
    for i in range(1, len(s)):
        if i == len(s) - 1 or i - cuts[-1] == 12 or maps[i] != maps[cuts[-1]]:
            cuts.append(i)
    return [s[a : b + 1] for a, b in itertools.pairwise(cuts)]


def _free(plan: Plan, k: int, quads: Array) -> NDArray[np.bool_]:
    middle = quads[:, :3].mean(1)
    free = np.ones(len(quads), bool)
    for jx, _, jz, half in plan.junctions:
        free &= (np.abs(middle[:, 0] - jx) > 200) | ((middle[:, 0] - jx) ** 2 + (middle[:, 2] - jz) ** 2 > half**2)
    for other in range(max(0, k - 1), min(len(plan.legs), k + 2)):
        if other != k:
            line = plan.legs[other].line
            square = (middle[:, 0, None] - line.x) ** 2 + (middle[:, 2, None] - line.z) ** 2
            free &= square.min(-1) > (plan.legs[other].half_width_m + 0.2) ** 2
    return free


def pave_junction(builder: SceneBuilder, plan: Plan, k: int, material: str, albedo: float) -> None:
    """An octagon of asphalt under the crossing of two legs."""
    x, y, z, half = plan.junctions[k]
    psi = float(interpolate(plan.legs[k].end_s, plan.legs[k].line.s, plan.legs[k].line.psi))
    rim = []
    for i in range(8):
        sine, cosine = sincos(psi + math.pi / 8 + i * math.pi / 4)
        rim.append([x + half * 1.12 * sine, y + 0.05, z + half * 1.12 * cosine])
    quads = np.array(
        [[rim[i], rim[i + 1], rim[(i + 2) % 8], rim[(i + 3) % 8]] for i in (0, 4)]
        + [[rim[3], rim[4], rim[7], rim[0]]]
    )
    up = np.array([0.0, -1.0, 0.0])
    builder.put(Mesh().add(quads, material, albedo, uvs=quads[:, :3, ::2], normals=up))


def lay_terrain(builder: SceneBuilder, plan: Plan, hills: Hills, material: str, albedo: float) -> None:
    """Ground around the roads; coarser and a little lower with distance."""
    up = np.array([0.0, -1.0, 0.0])
    for cell, reach, sink in ((14.0, 70.0, 0.16), (60.0, 420.0, 0.8)):
        (xs, zs), inside = _grid(plan, cell, reach)
        height = np.stack([hills.level(np.full(len(zs), x), zs) for x in xs]) + sink
        for block in np.unique(inside // 4, axis=0):
            cells = inside[(inside // 4 == block).all(1)]
            mesh = Mesh()
            for tri in (((0, 0), (1, 0), (1, 1), (1, 1)), ((0, 0), (1, 1), (0, 1), (0, 1))):
                at = [(cells[:, 0] + i, cells[:, 1] + j) for i, j in tri]
                quads = np.stack([np.stack([xs[i], height[i, j], zs[j]], -1) for i, j in at], 1)
                mesh.add(quads, material, albedo, uvs=quads[:, :3, ::2], normals=up)
            builder.put(mesh)


def _leg_points(plan: Plan) -> Array:
    """Points of all roads' middle lines, as low as their lower edge, so that fields do not lie on a road."""
    points = []
    for leg in plan.legs:
        line, section = leg.line, leg.line.section
        low = line.y if section is None else line.y + (np.abs(section.lean) + section.crown) * leg.half_width_m
        points.append(np.stack([line.x, low, line.z], -1)[::10])
    return np.concatenate(points)


def _grid(plan: Plan, cell: float, reach: float) -> tuple[tuple[Array, Array], NDArray[np.int64]]:
    """Grid lines in x and z, and the cells (n, 2) within reach of a road."""
    points = _leg_points(plan)[:, ::2]
    low, high = np.floor((points.min(0) - reach) / cell), np.ceil((points.max(0) + reach) / cell)
    xs, zs = (np.arange(low[k], high[k] + 2) * cell for k in (0, 1))
    wanted = np.zeros((len(xs) - 1, len(zs) - 1), np.uint8)
    at = ((points - [xs[0], zs[0]]) / cell).astype(np.int64)
    wanted[at[:, 0], at[:, 1]] = 1
    size = 2 * math.ceil(reach / cell) + 1
    wanted = cv2.dilate(wanted, cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (size, size)))  # type: ignore[assignment]
    return (xs, zs), np.argwhere(wanted)


class Hills:
    """The height of the ground: that of the nearest road beside it, hilly further out."""

    def __init__(self, plan: Plan, rng: np.random.Generator, height_m: float) -> None:
        self.points, self.height_m = _leg_points(plan), height_m
        self.swell = noise(rng, 64, 64, 1.8).astype(np.float64)

    def level(self, x: Array, z: Array) -> Array:
        """y (downwards) at points (n,) of the map."""
        square = (x[:, None] - self.points[:, 0]) ** 2 + (z[:, None] - self.points[:, 2]) ** 2
        nearest = square.argmin(-1)
        away = np.sqrt(square[np.arange(len(x)), nearest])
        # Between roads of different heights, a mean that favours the nearer one.
        weight = 1.0 / (square + 25.0) ** 2
        between = (weight * self.points[:, 1]).sum(-1) / weight.sum(-1)
        level = np.where(away < 25.0, self.points[nearest, 1], between)
        ramp = np.clip((away - 14.0) / 90.0, 0.0, 1.0)
        return level - self.height_m * ramp * ramp * (self._swell(x / 25.0, z / 25.0) + 0.3)

    def _swell(self, u: Array, v: Array) -> Array:
        i, j = np.floor(u).astype(int), np.floor(v).astype(int)
        fu, fv = u - i, v - j
        corner = [[self.swell[(i + a) % 64, (j + b) % 64] for b in (0, 1)] for a in (0, 1)]
        low = corner[0][0] * (1 - fv) + corner[0][1] * fv
        high = corner[1][0] * (1 - fv) + corner[1][1] * fv
        return low * (1 - fu) + high * fu


def road_material(rng: np.random.Generator, shadow: str, marks: Array, contrast: float) -> Material:
    """Asphalt with marks; contrast 1 is coarse, 0.1 nearly bare of texture."""
    picture = f"road{rng.integers(3)}"
    grain = 1 / rng.uniform(3.0, 5.0)
    return Material(picture, (1 / 64, 1 / 8), contrast, "grain", (grain, grain), 1.1 * contrast, light=shadow,
                    light_repeats=(1 / MAP_M, 1 / MAP_WIDTH_M), light_v0=-MAP_WIDTH_M / 2, marks=marks)  # fmt: skip
