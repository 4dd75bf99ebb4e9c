"""What stands where: a street is drawn from a seed as a plan, a light, and bodies along its roads."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from convlstm_vo.world import meshes
from convlstm_vo.world.bank import bank
from convlstm_vo.world.exact import sincos
from convlstm_vo.world.ground import Hills, Shadows, lay_leg, lay_terrain, pave_junction, road_material
from convlstm_vo.world.meshes import Light, Mesh
from convlstm_vo.world.plan import BANK_PROFILE, MOVER_KINDS, Kerbs, Leg, Plan, Section, StreetKind, generator
from convlstm_vo.world.planting import Planter
from convlstm_vo.world.scene import Material, Scene, SceneBuilder

Array = NDArray[np.float64]


@dataclasses.dataclass(frozen=True)
class Weather:
    """Light and air of a street.

    Attributes:
        light: sun and sky on surfaces. sky: (4,): light at the horizon, above, of clouds, and the clouds' picture.
        haze: (2,): share of haze per metre, its light. darkest: sunlight left in shadow.
    """

    light: Light
    sky: Array
    haze: Array
    darkest: float


@dataclasses.dataclass(frozen=True)
class Street:
    """Everything that stands still.

    Attributes:
        plan: path and roads. weather: light and air. scene: all surfaces; bodies of movers at its end.
    """

    seed: int
    plan: Plan
    weather: Weather
    scene: Scene


def make_weather(rng: np.random.Generator) -> Weather:
    """Sunny, hazy or overcast, with the sun high or low."""
    overcast = rng.random() < 0.25
    sine, cosine = sincos(float(rng.uniform(0, 2 * math.pi)))
    up = float(rng.uniform(0.12, 0.4) if rng.random() < 0.25 else rng.uniform(0.35, 0.85))  # low sun now and then
    level = math.sqrt(1 - up * up)
    sun_xyz = np.array([level * sine, -up, level * cosine])
    sun = 0.1 if overcast else float(rng.uniform(0.9, 1.7))
    sky_light = float(rng.uniform(0.65, 0.8) if overcast else rng.uniform(0.16, 0.36))
    darkest = sky_light / (sky_light + sun * up)
    horizon = float(rng.uniform(0.9, 1.6))
    above = horizon * float(rng.uniform(0.85, 1.0) if overcast else rng.uniform(0.35, 0.8))
    clouds = float(rng.uniform(0, 0.6) if rng.random() < 0.6 else 0.0)
    sky = np.array([horizon, above, clouds, bank().names["clouds"]])
    haze = np.array([1 / rng.uniform(900, 5000), 0.8 * horizon])
    return Weather(Light(sun_xyz, sun, sky_light), sky, haze, darkest)


def _marks(rng: np.random.Generator, plan: Plan, leg: Leg) -> Array:
    """Road marks of a leg, (m, 8); see `shade`."""
    rows, hw, tone = [], leg.half_width_m, float(rng.uniform(2.6, 5.0))
    line_s = leg.line.s - leg.line.s[0]
    s0, s1 = 0.0, float(line_s[-1])
    free = [(s0, s1)]
    for jx, _, jz, half in plan.junctions:
        square = (leg.line.x - jx) ** 2 + (leg.line.z - jz) ** 2
        if square.min() < 9.0:
            at = float(line_s[square.argmin()])
            free = [
                piece
                for a, b in free
                for piece in ((a, min(b, at - half)), (max(a, at + half), b))
                if piece[1] > piece[0]
            ]
    dash = float(rng.uniform(2.5, 6.0)), float(rng.uniform(0.3, 0.55))
    period, share = dash[0] / dash[1], dash[1]
    style = rng.random()
    for a, b in free:
        if plan.kind == "town":
            if style < 0.7:
                rows.append([0.0, 0.06, period, period * share, 1.3, a, b, tone])
            if style < 0.25 and leg.kerbs is None:
                rows += [[side * (hw - 2.05), 0.05, 1e6, 1e6, -10.0, a, b, tone] for side in (-1, 1)]
        else:
            # Rows come first-come, first-served in the shader: no two may overlap.
            middle = [1e6, 1e6, -10.0] if style < 0.15 else [period, period * share, 2.0]
            rows.append([0.0, 0.06, *middle, a, b, tone])
            if style < 0.85 or plan.kind == "motorway":
                rows += [[side * (hw - 0.25), 0.07, 1e6, 1e6, -10.0, a, b, tone] for side in (-1, 1)]
    return np.array(rows).reshape(-1, 8)


Band = tuple[float, float, float, float, str, float]


def _bands(rng: np.random.Generator, kind: StreetKind, leg: Leg, walk: float, road_albedo: float) -> list[Band]:
    hw = leg.half_width_m
    sides = [(-hw, hw)] if leg.line.section is None else [(-hw, 0.0), (0.0, hw)]
    bands = [(left, right, 0.0, 0.0, "road", road_albedo) for left, right in sides]
    if leg.kerbs is not None:
        return bands + _kerbed_bands(rng, leg, leg.kerbs, walk if kind == "town" else 0.8)
    if kind == "town":
        up, paving = 0.12, float(rng.uniform(0.2, 0.36))
        bands += [
            (hw, hw, 0.0, up, "kerb", paving * 0.8), (hw, hw + 0.16, up, up, "kerb", paving * 1.3),
            (hw + 0.16, hw + 0.16 + walk, up, up + 0.03, "walk", paving),
            (hw + 0.16 + walk, hw + 4 + walk, up + 0.03, 0.05, "verge", 0.2),
            (-hw, -hw, up, 0.0, "kerb", paving * 0.8), (-hw - 0.16, -hw, up, up, "kerb", paving * 1.3),
            (-hw - 0.16 - walk, -hw - 0.16, up + 0.03, up, "walk", paving),
            (-hw - 4 - walk, -hw - 0.16 - walk, 0.05, up + 0.03, "verge", 0.2),
        ]  # fmt: skip
    else:
        soil, green = float(rng.uniform(0.16, 0.3)), float(rng.uniform(0.13, 0.24))
        if leg.line.section is not None:
            return bands + _verge_bands(leg.line.section, hw, soil, green)
        bands += [
            (hw, hw + 0.7, 0.0, -0.03, "soil", soil), (hw + 0.7, hw + 7.5, -0.03, -0.05, "verge", green),
            (-hw - 0.7, -hw, -0.03, 0.0, "soil", soil), (-hw - 7.5, -hw - 0.7, -0.05, -0.03, "verge", green),
        ]  # fmt: skip
    return bands


def _kerbed_bands(rng: np.random.Generator, leg: Leg, kerbs: Kerbs, walk: float) -> list[Band]:
    """The island of a narrow road, and kerbs, pavements and verges close to its lanes."""
    paving, green, top = float(rng.uniform(0.2, 0.36)), float(rng.uniform(0.13, 0.24)), kerbs.heights_m[0]
    inside, crest = kerbs.island_m - 0.16, top + kerbs.rises_m[0]
    planted = rng.random() < 0.6
    profile = [(0.0, crest), (inside, top), (kerbs.island_m, top), (kerbs.island_m, 0.0)]
    middle = ("verge", green) if planted else ("walk", paving)
    bands = _mirrored(profile, [middle, ("kerb", 1.3 * paving), ("kerb", 0.8 * paving)], (-1, 1))
    for side in (0, 1):
        edge, up, rise = leg.half_width_m, kerbs.heights_m[1 + side], kerbs.rises_m[1 + side]
        across = edge + 0.16 + walk
        profile = [(edge, 0.0), (edge, up), (edge + 0.16, up), (across, up + rise)]
        profile.append((across + 3.84, up + rise + kerbs.verges_m[side]))
        materials = [("kerb", 0.8 * paving), ("kerb", 1.3 * paving), ("walk", paving), ("verge", green)]
        if not up:  # no upright side
            profile, materials = profile[1:], materials[1:]
        bands += _mirrored(profile, materials, (2 * side - 1,))
    return bands


def _mirrored(
    profile: Sequence[tuple[float, float]], materials: Sequence[tuple[str, float]], sides: Sequence[int]
) -> list[Band]:
    """Bands of a profile, (metres from the middle, height) outwards, on some sides (-1 left, 1 right) of it."""
    bands: list[Band] = []
    for side in sides:
        for ((a, up), (b, on)), (material, albedo) in zip(itertools.pairwise(profile), materials, strict=True):
            ends = (a, b, up, on) if side > 0 else (-b, -a, on, up)  # bands run from left to right
            bands.append((*ends, material, albedo))
    return bands


def _verge_bands(section: Section, hw: float, soil: float, green: float) -> list[Band]:
    """Beside a road with a cross slope: kerb or soil, then grass over the bank (whose rise is the section's)."""
    bands: list[Band] = []
    for side, kerb in zip((-1, 1), section.kerbs_m, strict=True):
        edges = [0.0, *(at for at, _ in BANK_PROFILE)]
        heights = [kerb, kerb, *(kerb * (1 - at / 7.5) - 0.05 * at / 7.5 for at in edges[2:])]
        first = [("kerb", 1.5 * soil)] if kerb else [("soil", soil)] * 2
        materials = first + [("verge", green)] * (len(edges) - 1 - len(first))
        if kerb:  # its upright side
            edges, heights, materials = [0.0, *edges], [0.0, *heights], [("kerb", soil), *materials]
        profile = [(hw + at, up) for at, up in zip(edges, heights, strict=True)]
        bands += _mirrored(profile, materials, (side,))
    return bands


def _ground_materials(
    rng: np.random.Generator, builder: SceneBuilder, shadows: list[Shadows | None], plan: Plan
) -> None:
    """Materials of the ground: each stretch of 128 m has its own map of shadows."""
    contrast = (0.07, 0.5, 1.0, 1.5, 2.0)[int(rng.integers(5))] * float(rng.uniform(0.8, 1.2))
    slabs = ("slabs", "bricks", "blocks", "rough")[int(rng.integers(4))]
    grass = float(rng.uniform(1.0, 1.8))
    size = 1 / float(rng.uniform(1.4, 2.6))
    for k, leg in enumerate(plan.legs):
        marks = _marks(rng, plan, leg)
        road = road_material(rng, "", marks, contrast)
        shadow = shadows[k]
        count = len(shadow.maps) if shadow else 0
        for chunk in range(count):
            name = f"shadow:{k}:{chunk}"
            assert shadow is not None
            builder.pictures[name] = shadow.maps[chunk]
            # u runs on from chunk to chunk, and the map repeats with it.
            lit = dataclasses.replace(road, light=name)
            soil = dataclasses.replace(lit, marks=None, b="rough", repeats_b=(size, size), strength_b=0.5, a="")
            walk = dataclasses.replace(
                soil, a=slabs, repeats_a=(size, size), strength_a=0.6, b="blotch", repeats_b=(0.13, 0.13)
            )
            verge = dataclasses.replace(
                soil, a="grass", repeats_a=(0.23, 0.23), strength_a=grass, b="blotch", repeats_b=(0.07, 0.07)
            )
            for base, recipe in (("road", lit), ("soil", soil), ("kerb", soil), ("walk", walk), ("verge", verge)):
                builder.recipes[f"{base}:{k}:{chunk}"] = recipe
    builder.recipes["pad"] = dataclasses.replace(road_material(rng, "", np.zeros((0, 8)), contrast), light="")
    builder.recipes["field"] = Material("grass", (0.19, 0.19), grass, "blotch", (0.021, 0.021), 0.6)


def make_street(
    seed: int, plan: Plan, *, driven_m: float = math.inf, movers: Sequence[Mesh] | None = None
) -> Street:
    """Draw everything along a plan's roads.

    Args:
        seed: whatever; the same seed and plan give the same street bit for bit.
        plan: of `make_plan`. driven_m: how far the car will get; what lies far beyond is left out.
        movers: bodies of other road users; None for the usual ones.
    """
    rng, kind = generator(seed, 6), plan.kind
    plan = plan.until(driven_m)
    weather = make_weather(rng)
    builder = SceneBuilder(weather.light)
    hills = Hills(plan, rng, {"town": 1.5, "country": 9.0, "motorway": 6.0}[kind] * float(rng.random()))
    shadows: list[Shadows | None] = [Shadows(leg, weather.light.sun_xyz, weather.darkest) for leg in plan.legs]
    planter = Planter(builder, plan, hills, rng)
    walks = [float(rng.uniform(1.2, 3.5)) for _ in plan.legs]
    for leg, shadow, walk in zip(plan.legs, shadows, walks, strict=True):
        planter.leg, planter.shadows = leg, shadow
        _furnish(planter, kind, walk)
    _ground_materials(rng, builder, shadows, plan)
    road_albedo = float(rng.uniform(0.12, 0.34))
    for k, leg in enumerate(plan.legs):
        lay_leg(builder, plan, k, _bands(rng, kind, leg, walks[k], road_albedo))
    for k in range(len(plan.junctions)):
        pave_junction(builder, plan, k, "pad", road_albedo)
    lay_terrain(builder, plan, hills, "field", float(rng.uniform(0.14, 0.26)))
    _horizon(builder, plan, hills, rng)
    movers_from = len(builder)
    for body in _mover_bodies(rng) if movers is None else movers:
        builder.put(body)
    return Street(seed, plan, weather, builder.finished(movers_from))


def _furnish(planter: Planter, kind: StreetKind, walk: float) -> None:
    if planter.rng.random() < {"town": 0.15, "country": 0.35, "motorway": 0.0}[kind]:
        planter.avenue()
    for side in (-1.0, 1.0):
        if kind == "town":
            planter.town_side(side, walk)
            planter.street_furniture(side)
            planter.bollards(side)
        else:
            planter.country_side(side)
            if kind == "motorway":
                planter.rail(side * (planter.leg.half_width_m + 1.2))


def _horizon(builder: SceneBuilder, plan: Plan, hills: Hills, rng: np.random.Generator) -> None:
    """Edges of far woods all around."""
    points = np.stack([plan.path.x, plan.path.z], -1)[::80]
    for x, z in points:
        for _ in range(6):
            sine, cosine = sincos(float(rng.uniform(0, 2 * math.pi)))
            away, width, height = rng.uniform(90, 380), rng.uniform(50, 140), rng.uniform(9, 26)
            px, pz = x + away * sine, z + away * cosine
            if plan.clearance_m(np.array([px]), np.array([pz]))[0] < 0.6 * width + 8:
                continue
            y = float(hills.level(np.array([px]), np.array([pz]))[0]) + 1.2
            wall_ends = (-width / 2 * cosine, width / 2 * sine, width / 2 * cosine, -width / 2 * sine)
            quad = np.array([meshes.wall(*wall_ends, 0.0, height)])
            uv = np.array([[0, 0.03], [1, 0.03], [1, 0.94]]) * [width / 90, 1.0] + [rng.random(), 0.0]
            builder.put(
                Mesh().add(quad, "treeline", rng.uniform(0.2, 0.36), uvs=uv, normals=np.array([0.0, -1.0, 0.0])),
                0.0,
                px,
                y,
                pz,
            )


def _mover_bodies(rng: np.random.Generator) -> list[Mesh]:
    return [
        meshes.cyclist(rng) if kind == "cyclist" else meshes.car(rng, van=kind == "van") for kind in MOVER_KINDS
    ]
