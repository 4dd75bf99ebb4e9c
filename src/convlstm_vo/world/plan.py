"""The lines on the map: the path that the car drives, and the roads (legs) that it is part of.

Plan coordinates are those of a street's frame: x right, y down, z forward, at the path's start. A heading psi is
to the right of z: forward is (sin psi, cos psi) in (x, z), the right-hand side (cos psi, -sin psi).
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from convlstm_vo.world.exact import sincos

Array = NDArray[np.float64]
_Slope = TypeVar("_Slope", float, Array)
StreetKind = Literal["town", "country", "motorway"]
STEP_M = 0.5
_MOST_DRAWS = 30  # of a path, until one does not pass through a road
MOVER_KINDS = ("car", "car", "car", "car", "car", "van", "van", "cyclist", "cyclist", "cyclist")


def generator(seed: int, what: int) -> np.random.Generator:
    """Random numbers for one purpose: a street, its drive and its camera must not disturb each other's."""
    return np.random.Generator(np.random.PCG64([seed, what]))


def interpolate(at: Array | float, known: Array, values: Array) -> Array:
    """Linear interpolation of values (n,) known at increasing places, with one fixed order of operations."""
    at = np.asarray(at, dtype=np.float64)
    i = np.clip(np.searchsorted(known, at, side="right") - 1, 0, len(known) - 2)
    share = np.clip((at - known[i]) / (known[i + 1] - known[i]), 0.0, 1.0)
    result: Array = values[i] + share * (values[i + 1] - values[i])
    return result


BANK_PROFILE = ((0.2, 0.0), (1.2, 0.5), (3.0, 1.0), (4.5, 0.9), (7.5, 0.0))
"""Metres beyond the carriageway, and the share of a bank's height there."""


def _bank_profile(beyond_m: float) -> float:
    for (a, low), (b, high) in itertools.pairwise(BANK_PROFILE):
        if a <= beyond_m < b:
            return low + (high - low) * (beyond_m - a) / (b - a)
    return 0.0


@dataclasses.dataclass(frozen=True)
class Section:
    """A road's surface across its direction, along a line: two straight sides that meet in the road's middle, and
    banks beside them.

    Attributes:
        lean: (n,) slope of both sides, positive where the right-hand one lies lower (superelevation).
        crown: (n,) by how much more each side falls towards its edge (drainage).
        banks: (2, n) how high the verge rises, left and right, metres.
        middle_m: where the road's middle is, metres to the right of the line. half_width_m: of the carriageway.
        kerbs_m: height of a kerb left and right; 0: none.
    """

    lean: Array
    crown: Array
    banks: Array
    middle_m: float
    half_width_m: float
    kerbs_m: tuple[float, float] = (0.0, 0.0)

    def drop(self, lean: _Slope, crown: _Slope, bank: _Slope, d: float) -> _Slope:
        """How far the surface lies under the line, d metres to the right of it, kerbs left out. Outside the
        carriageway: as high as its edge there, over the bank, and further out as low as its lower edge, where the
        fields begin.

        Args:
            bank: of the side that d lies on.
        """
        middle = self._of_side(lean, crown, -self.middle_m)
        there = self._of_side(lean, crown, d - self.middle_m)
        beyond = abs(d - self.middle_m) - self.half_width_m
        outside = min(max((beyond - 0.7) / 6.8, 0.0), 1.0)
        low = (abs(lean) + crown) * self.half_width_m
        return there + outside * (low - there) - middle - bank * _bank_profile(beyond)

    def tilt(self, lean: _Slope, crown: _Slope, d: float) -> _Slope:
        """Slope across, d metres to the right of the line, on the carriageway."""
        return lean + crown if d > self.middle_m else lean - crown

    def _of_side(self, lean: _Slope, crown: _Slope, d: float) -> _Slope:
        within = min(max(d, -self.half_width_m), self.half_width_m)
        return lean * within + crown * abs(within)


@dataclasses.dataclass(frozen=True)
class Line:
    """A curve over the map with its height.

    Attributes:
        s: (n,) metres along it. x, z: (n,) plan. y: (n,) height, downwards. psi: (n,) heading, radians.
        kappa: (n,) curvature, 1/m, positive to the right. section: the road's surface across; None: level.
    """

    s: Array
    x: Array
    y: Array
    z: Array
    psi: Array
    kappa: Array
    section: Section | None = None

    def at(self, s: Array | float) -> tuple[Array, Array, Array, Array]:
        """x, y, z, psi at places s (clamped to its ends)."""
        x, y, z, psi = (interpolate(s, self.s, values) for values in (self.x, self.y, self.z, self.psi))
        return x, y, z, psi

    def part(self, keep: slice | NDArray[np.bool_]) -> Line:
        """Some of its points."""
        x = self.section
        section = x and dataclasses.replace(x, lean=x.lean[keep], crown=x.crown[keep], banks=x.banks[:, keep])
        return Line(
            self.s[keep], self.x[keep], self.y[keep], self.z[keep], self.psi[keep], self.kappa[keep], section
        )

    def until(self, s: float) -> Line:
        """The part up to place s."""
        return self.part(self.s <= s)

    def across(self, s: Array | float, d: float) -> tuple[Array, Array]:
        """How far the road's surface lies under the line d metres to its right, and its slope across there."""
        if self.section is None:
            return np.zeros(np.shape(s)), np.zeros(np.shape(s))
        side = self.section.banks[int(d > self.section.middle_m)]
        lean, crown, bank = (interpolate(s, self.s, v) for v in (self.section.lean, self.section.crown, side))
        return self.section.drop(lean, crown, bank, d), self.section.tilt(lean, crown, d)

    def place(self, s: float, d: float) -> tuple[float, float, float, float]:
        """x, y, z, psi at s metres along and d metres to the right, on the ground."""
        # Lines are cut at equal steps; this is `at` for one place, without numpy's cost for each call.
        step = float(self.s[1] - self.s[0])
        i = min(max(int((s - float(self.s[0])) / step), 0), len(self.s) - 2)
        share = min(max((s - float(self.s[i])) / step, 0.0), 1.0)
        x, y, z, psi = (
            a + share * (b - a)
            for a, b in ((float(v[i]), float(v[i + 1])) for v in (self.x, self.y, self.z, self.psi))
        )
        sine, cosine = sincos(psi)
        if self.section is not None:
            section = self.section
            across = section.lean, section.crown, section.banks[int(d > section.middle_m)]
            lean, crown, bank = (float(v[i] + share * (v[i + 1] - v[i])) for v in across)
            y += section.drop(lean, crown, bank, d)
        return x + d * cosine, y, z - d * sine, psi


@dataclasses.dataclass(frozen=True)
class Kerbs:
    """What rises close to the lanes of a narrow road, all in metres.

    Attributes:
        island_m: half the width of the island between its two lanes.
        heights_m: of the kerbs of the island and to the left and right of the road; 0: none.
        rises_m: by how much more the ground rises from there, to the island's middle and across the pavements.
        verges_m: by how much more again, left and right, up to their outer edges.
    """

    island_m: float
    heights_m: tuple[float, float, float]
    rises_m: tuple[float, float, float]
    verges_m: tuple[float, float]


@dataclasses.dataclass(frozen=True)
class Leg:
    """A road: its middle line, half its width, and the part of it that the car drives.

    Attributes:
        line: the middle line. half_width_m: of the carriageway. start_s, end_s: the driven part (of line.s).
        drop_m: how far it lies under the others, so that crossing roads never share a surface.
        driven: False for side streets.
        kerbs: of a narrow road; None: the usual ones.
    """

    line: Line
    half_width_m: float
    start_s: float
    end_s: float
    drop_m: float
    driven: bool = True
    kerbs: Kerbs | None = None


@dataclasses.dataclass(frozen=True)
class Plan:
    """Path, legs and junctions of a street.

    Attributes:
        path: where the car's middle goes. lane_m: its distance to the right of the road's middle.
        legs: all roads. junctions: (k, 4): x, y, z, half size of the paved square at each.
        turns: (k, 2): path metres where each junction turn begins and ends.
    """

    kind: StreetKind
    path: Line
    lane_m: float
    legs: list[Leg]
    junctions: Array
    turns: Array

    def until(self, s: float) -> Plan:
        """The plan without roads, and ends of roads, that cannot be seen before the car has driven s metres."""
        count = sum(leg.start_s < s + 200.0 for leg in self.legs)
        legs = [
            dataclasses.replace(leg, line=leg.line.until(max(s, leg.start_s) + 330.0)) for leg in self.legs[:count]
        ]
        return dataclasses.replace(self, legs=legs, junctions=self.junctions[: count - 1])

    def clearance_m(self, x: Array, z: Array) -> Array:
        """Distance of points (n,) from the nearest carriageway's edge; negative on a road."""
        best = np.full(np.shape(x), np.inf)
        for leg in self.legs:
            lx, lz = leg.line.x[::4], leg.line.z[::4]
            square = (np.asarray(x)[..., None] - lx) ** 2 + (np.asarray(z)[..., None] - lz) ** 2
            best = np.minimum(best, np.sqrt(square.min(-1)) - leg.half_width_m)
        return best


def trace(kappa: Array, slope: Array, *, x: float = 0, y: float = 0, z: float = 0, psi: float = 0) -> Line:
    """Follow curvature and slope (n,), both at steps of STEP_M, from a starting place."""
    heading = psi + np.concatenate([[0.0], np.cumsum((kappa[:-1] + kappa[1:]) * (0.5 * STEP_M))])
    middle = 0.5 * (heading[:-1] + heading[1:])
    directions = np.array([sincos(float(angle)) for angle in middle]).reshape(-1, 2)
    xs = x + np.concatenate([[0.0], np.cumsum(directions[:, 0] * STEP_M)])
    zs = z + np.concatenate([[0.0], np.cumsum(directions[:, 1] * STEP_M)])
    ys = y - np.concatenate([[0.0], np.cumsum((slope[:-1] + slope[1:]) * (0.5 * STEP_M))])
    return Line(np.arange(len(kappa), dtype=np.float64) * STEP_M, xs, ys, zs, heading, kappa)


def _bend(angle: float, radius: float, ease: float) -> Array:
    """Curvature of a bend that eases in and out (clothoids of length ``ease``)."""
    top = math.copysign(1.0 / radius, angle)
    ramp = np.linspace(0.0, top, max(2, round(ease / STEP_M)))
    turned = abs(float(ramp.sum())) * STEP_M
    flat = max(1, round((abs(angle) - 2 * turned) * radius / STEP_M))
    shape = np.concatenate([ramp, np.full(flat, top), ramp[::-1]])
    # Scale so that the angle comes out as asked, whatever the rounding to steps did.
    return shape * (angle / (float(np.cumsum(shape)[-1]) * STEP_M))


def _meander(rng: np.random.Generator, length_m: float, strength: float = 1.0) -> Array:
    """Curvature of a stretch that is straight but for a slow swing, as most roads are: its turns add up to none."""
    n = round(length_m / STEP_M)
    phase = (np.arange(n) + 0.5) / n
    # A cubic that starts, ends and sums to zero; sines would not be the same on every machine.
    shape = phase * (1 - phase) * (1 - 2 * phase) * 10.4
    result: Array = shape * (
        strength * 0.02 * (2 * float(rng.random()) - 1) * max(0.0, 3 * float(rng.random()) - 1)
    )
    return result


def _town_parts(rng: np.random.Generator, length_m: float) -> list[tuple[Array, bool]]:
    parts: list[tuple[Array, bool]] = []
    heading, total = 0.0, 0.0
    while total < length_m:
        straight = _meander(rng, rng.uniform(20, 85))
        kind, side = rng.random(), -1.0 if rng.random() < 0.5 else 1.0
        if abs(heading + side * 1.6) > 1.9:
            side = -side
        if kind < 0.5:
            turn = _bend(side * rng.uniform(1.35, 1.75), rng.uniform(5.5, 11.0), rng.uniform(2.5, 5.0))
        elif kind < 0.95:
            turn = _bend(side * rng.uniform(0.3, 1.5), 15.0 + 55.0 * rng.random() ** 2, rng.uniform(4, 9))
        else:
            turn = np.zeros(round(20 / STEP_M))
        heading += float(np.cumsum(turn)[-1]) * STEP_M
        parts += [(straight, False), (turn, kind < 0.5)]
        total += (len(straight) + len(turn)) * STEP_M
    return parts


def _open_parts(rng: np.random.Generator, length_m: float, kind: StreetKind) -> list[tuple[Array, bool]]:
    low, high, most = (35.0, 300.0, 1.4) if kind == "country" else (350.0, 1800.0, 0.5)
    parts: list[tuple[Array, bool]] = []
    heading, total = 0.0, 0.0
    if kind == "motorway" and rng.random() < 0.3:  # a ramp comes first
        parts = [
            (_bend((1 if rng.random() < 0.5 else -1) * rng.uniform(0.8, 1.7), rng.uniform(45, 90), 30.0), False)
        ]
    while total < length_m:
        radius = float(rng.uniform(low, high))
        angle = float(rng.uniform(0.1, 1.0)) * min(most, 260.0 / radius)
        side = -1.0 if rng.random() < 0.5 else 1.0
        side = -side if abs(heading + side * angle) > 1.5 else side
        bend = _bend(side * angle, radius, min(40.0, 0.3 * angle * radius))
        straight = _meander(rng, rng.uniform(20, 150), 0.3)
        heading += side * angle
        parts += [(straight, False), (bend, False)]
        total += (len(straight) + len(bend)) * STEP_M
    return parts


def _slopes(
    rng: np.random.Generator, s: Array, kind: StreetKind, turns: Array, hills: np.random.Generator | None
) -> Array:
    """Slope along the path: it changes every 40 m or so, and is none at junctions, where roads must meet."""
    steep = {"town": 0.03, "country": 0.07, "motorway": 0.035}[kind] * rng.random()
    spacing = {"town": 35.0, "country": 45.0, "motorway": 120.0}[kind]
    knots = np.arange(-1.0, s[-1] / spacing + 2) * spacing
    slope = interpolate(s, knots, steep * (2 * rng.random(len(knots)) - 1))
    if hills is not None:
        slope = _hilly(hills, s, kind)
    for begin, end in turns:
        away = np.maximum(np.maximum(begin - s, s - end), 0.0)
        slope = slope * np.clip((away - 12.0) / 20.0, 0.0, 1.0)
    return slope


def _hilly(rng: np.random.Generator, s: Array, kind: StreetKind) -> Array:
    """Slope along a path that rises and falls as KITTI's roads do, in crests, dips and ramps of 15 to 120 m.

    Their curvature, over 40 m, has KITTI's percentiles (`benchmarks/world.py`), which has flat streets and steep
    ones. What a ruler laid on the road ahead is off by grows with its square: at 20 m, 0.002 / m is 0.4 m.
    """
    steepest = {"town": 0.11, "country": 0.12, "motorway": 0.07}[kind]
    u = rng.random()
    steep = steepest * (0.1 + 0.9 * u * u)
    short, long = {"town": (15.0, 60.0), "country": (15.0, 60.0), "motorway": (25.0, 120.0)}[kind]
    lengths = short + (long - short) * rng.random(round(s[-1] / short) + 3)
    knots = np.cumsum(lengths) - lengths[0] - long
    return interpolate(s, knots, steep * (2 * rng.random(len(knots)) - 1))


def _extended(line: Line, before: float, after: float) -> Line:
    """A line with straight, level pieces added to both ends."""
    n, m = round(before / STEP_M), round(after / STEP_M)
    (s0, c0), (s1, c1) = sincos(float(line.psi[0])), sincos(float(line.psi[-1]))
    back, ahead = np.arange(-n, 0) * STEP_M, np.arange(1, m + 1) * STEP_M
    x = np.concatenate([line.x[0] + back * s0, line.x, line.x[-1] + ahead * s1])
    z = np.concatenate([line.z[0] + back * c0, line.z, line.z[-1] + ahead * c1])

    def pad(values: Array, start: float, end: float) -> Array:
        return np.concatenate([np.full(n, start), values, np.full(m, end)])

    y, psi = pad(line.y, line.y[0], line.y[-1]), pad(line.psi, line.psi[0], line.psi[-1])
    s = np.concatenate([line.s[0] + back, line.s, line.s[-1] + ahead])
    across = line.section and dataclasses.replace(
        line.section,
        lean=pad(line.section.lean, line.section.lean[0], line.section.lean[-1]),
        crown=pad(line.section.crown, line.section.crown[0], line.section.crown[-1]),
        banks=np.stack([pad(bank, bank[0], bank[-1]) for bank in line.section.banks]),
    )
    return Line(s, x, y, z, psi, pad(line.kappa, 0.0, 0.0), across)


def _shifted(line: Line, d: float) -> Line:
    """The line d metres to the right of another."""
    turns = np.array([sincos(float(angle)) for angle in line.psi])
    shifted = dataclasses.replace(line, x=line.x + d * turns[:, 1], z=line.z - d * turns[:, 0])
    if line.section is None:
        return shifted
    section = dataclasses.replace(line.section, middle_m=line.section.middle_m - d)
    return dataclasses.replace(shifted, y=line.y + line.across(line.s, d)[0], section=section)


def _meeting(a: Leg, b: Leg) -> tuple[float, float, float]:
    """Where the end of leg a, drawn on, meets the beginning of leg b, drawn back: x, y, z."""
    ax, ay, az, apsi = (float(v) for v in a.line.at(a.end_s))
    bx, _, bz, bpsi = (float(v) for v in b.line.at(b.start_s))
    (sa, ca), (sb, cb) = sincos(apsi), sincos(bpsi)
    t = ((bx - ax) * cb - (bz - az) * sb) / (sa * cb - ca * sb)
    return ax + t * sa, ay, az + t * ca


def make_plan(
    seed: int,
    kind: StreetKind,
    length_m: float,
    *,
    cross_slope: bool = False,
    hilly: bool = False,
    narrow: bool = False,
) -> Plan:
    """Draw path and roads for a drive of at least ``length_m``, bit for bit the same for a seed.

    A path that crosses one of its other roads at another height, which of long ones a few do, is drawn again.

    Args:
        cross_slope: roads that fall from their middle to their edges and lean into bends, in open country with
            banks and kerbs beside them, in place of level ones.
        hilly: roads that rise and fall as KITTI's do, in place of gentler ones.
        narrow: in town and country, lanes between kerbs: an island close to their left, and ground that rises
            close to their right.
    """
    rng, across = generator(seed, 1), generator(seed, 9) if cross_slope else None
    hills = generator(seed, 10) if hilly else None
    kerbs = generator(seed, 11) if narrow and kind != "motorway" else None
    plan = _draw_plan(rng, kind, length_m, across, hills, kerbs)
    for _ in range(_MOST_DRAWS):
        if not _passes_through_a_road(plan):
            break
        plan = _draw_plan(rng, kind, length_m, across, hills, kerbs)
    return plan


def _passes_through_a_road(plan: Plan) -> bool:
    """Whether the path comes upon a road, with its pavements, that it does not lead along and that is not level
    with it: there is one ground only, so the car would drive through it."""
    path = plan.path
    for leg in plan.legs:
        elsewhere = (path.s < leg.start_s - 30) | (path.s > leg.end_s + 30)  # its junctions are level
        x, y, z = (values[elsewhere][::4] for values in (path.x, path.y, path.z))
        line_x, line_y, line_z = (values[::4] for values in (leg.line.x, leg.line.y, leg.line.z))
        square = (x[:, None] - line_x) ** 2 + (z[:, None] - line_z) ** 2
        nearest = square.argmin(1)
        near = square.min(1) < (leg.half_width_m + 7.0) ** 2
        if bool((near & (np.abs(y - line_y[nearest]) > 0.1)).any()):
            return True
    return False


def _mean_over(values: Array, span_m: float) -> Array:
    """Moving mean of values at steps of STEP_M, of which the first and the last go on outside."""
    half = round(span_m / STEP_M / 2)
    padded = np.concatenate([np.full(half + 1, values[0]), values, np.full(half, values[-1])])
    sums: Array = np.cumsum(padded)
    return (sums[2 * half + 1 :] - sums[: -2 * half - 1]) / (2 * half + 1)


def _section(rng: np.random.Generator, path: Line, kind: StreetKind, turns: Array, lane_m: float,
             half_width_m: float) -> Section:  # fmt: skip
    """How a road lies across: a crown or one slope to a side for the rain, and in open country a lean into bends.

    Slopes are those that roads are built with: 1.5 to 3 % for drainage, at most 7 % in bends, which are reached
    over some tens of metres; none at junctions, where roads must meet.
    """
    fall = float(rng.uniform(0.01, 0.035))
    roof = rng.random() < {"town": 0.75, "country": 0.75, "motorway": 0.2}[kind]
    side = 1.0 if kind == "motorway" or rng.random() < 0.5 else -1.0
    lean, crown = np.full(len(path.s), 0.0 if roof else side * fall), np.full(len(path.s), fall if roof else 0.0)
    if kind != "town":
        most, radius = float(rng.uniform(0.03, 0.07)), float(rng.uniform(80, 250 if kind == "country" else 700))
        into = most * np.clip(path.kappa * radius, -1.0, 1.0)
        share = np.clip(np.abs(into) / fall, 0.0, 1.0)  # a bend's lean takes the place of what is for the rain
        lean, crown = _mean_over(lean * (1 - share) + into, 36.0), _mean_over(crown * (1 - share), 36.0)
    for begin, end in turns:
        away = np.maximum(np.maximum(begin - path.s, path.s - end), 0.0)
        level = np.clip((away - 6.0) / 14.0, 0.0, 1.0)
        lean, crown = lean * level, crown * level
    banks, kerbs = _banks(rng, path.s, kind)
    return Section(lean, crown, banks, -lane_m, half_width_m, kerbs)


def _banks(rng: np.random.Generator, s: Array, kind: StreetKind) -> tuple[Array, tuple[float, float]]:
    """Banks (2, n) and kerbs beside a road through open country: on some sides it is cut into the land, so that
    grass rises right beside the lane, here and there or all along."""
    banks, kerbs = np.zeros((2, len(s))), [0.0, 0.0]
    if kind == "town":  # its pavements and gardens are level
        return banks, (0.0, 0.0)
    for side in (0, 1):
        rises, kerb = rng.random() < 0.6, rng.random() < (0.4 if kind == "country" else 0.0)
        most, most_kerb = float(0.1 + 1.7 * rng.random() ** 1.5), float(rng.uniform(0.06, 0.16))
        spacing = float(rng.uniform(25, 70))
        knots = np.arange(-1.0, s[-1] / spacing + 2) * spacing
        shares = np.clip(1.5 * rng.random(len(knots)) - 0.25, 0.0, 1.0)
        if rises:
            banks[side] = interpolate(s, knots, most * shares)
        kerbs[side] = most_kerb if kerb else 0.0
    return banks, (kerbs[0], kerbs[1])


def _kerbs(rng: np.random.Generator, island_m: float) -> Kerbs:
    """A kerb is 4 to 16 cm high, and one side in four has none; pavements rise by up to 12 cm, verges by 40."""
    heights = [float(rng.uniform(0.04, 0.16)) for _ in range(3)]
    sides = [height if rng.random() < 0.75 else 0.0 for height in heights[1:]]
    rises = float(rng.uniform(0.0, 0.15)), float(rng.uniform(0.0, 0.12)), float(rng.uniform(0.0, 0.12))
    verges = float(0.4 * rng.random() ** 2), float(0.4 * rng.random() ** 2)
    return Kerbs(island_m, (heights[0], sides[0], sides[1]), rises, verges)


def _draw_plan(
    rng: np.random.Generator,
    kind: StreetKind,
    length_m: float,
    across: np.random.Generator | None,
    hills: np.random.Generator | None,
    kerbs: np.random.Generator | None,
) -> Plan:
    parts = _town_parts(rng, length_m) if kind == "town" else _open_parts(rng, length_m, kind)
    parts = [(np.zeros(round(30 / STEP_M)), False), *parts, (np.zeros(round(60 / STEP_M)), False)]
    kappa = np.concatenate([part for part, _ in parts])
    ends = np.cumsum([len(part) for part, _ in parts])
    spans = [
        ((end - len(part)) * STEP_M, end * STEP_M) for (part, turn), end in zip(parts, ends, strict=True) if turn
    ]
    turns = np.array(spans, dtype=np.float64).reshape(-1, 2)
    s: Array = np.arange(len(kappa), dtype=np.float64) * STEP_M
    path = trace(kappa, _slopes(rng, s, kind, turns, hills))
    lane = {"town": 1.75, "country": 1.6, "motorway": 1.9}[kind]
    widths = {"town": (4.6, 6.4), "country": (2.9, 3.6), "motorway": (5.6, 5.8)}[kind]
    island = beyond = 0.0
    if kerbs is not None:
        island = float(kerbs.uniform(0.4, 1.5))
        lane = island + float(kerbs.uniform(1.35, 2.4))
        widths = (lane + 1.35, lane + (3.6 if kind == "town" else 2.0))
        beyond = 3.0  # a junction, whose corners the car cuts
    if across is not None:
        path = dataclasses.replace(path, section=_section(across, path, kind, turns, lane, widths[0]))
    legs: list[Leg] = []
    starts, stops = [0.0, *turns[:, 1]], [*turns[:, 0], float(s[-1])]
    for k, (begin, end) in enumerate(zip(starts, stops, strict=True)):
        keep = slice(round(begin / STEP_M), round(end / STEP_M) + 1)
        piece = path.part(keep)
        last = k == len(starts) - 1
        before, after = (40.0 if k == 0 else rng.uniform(50, 90)), (350.0 if last else rng.uniform(60, 140))
        line = _extended(_shifted(piece, -lane), float(before), float(after))
        half_width = float(rng.uniform(*widths))
        if line.section is not None:
            line = dataclasses.replace(line, section=dataclasses.replace(line.section, half_width_m=half_width))
        beside = None if kerbs is None else _kerbs(kerbs, island)
        legs.append(Leg(line, half_width, begin, end, 0.015 * (k % 3), kerbs=beside))
    crossings = [
        (*_meeting(a, b), max(a.half_width_m, b.half_width_m) + 3.5 + beyond) for a, b in itertools.pairwise(legs)
    ]
    return Plan(kind, path, lane, legs, np.array(crossings).reshape(-1, 4), turns)
