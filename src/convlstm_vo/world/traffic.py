"""Heavy traffic: a lorry or a car close ahead, lanes full of others, all from a seed.

What the usual streets hardly show and cameras on real roads see daily: most of the picture moves, much of it as the
camera itself does, so that it seems to stand at infinity.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from convlstm_vo.world import meshes
from convlstm_vo.world.drives import Drive, on_path
from convlstm_vo.world.exact import bell
from convlstm_vo.world.meshes import Mesh
from convlstm_vo.world.plan import Plan, generator, interpolate

Array = NDArray[np.float64]
Traffic = Callable[[Plan, Drive], Sequence[tuple[Mesh, Array]]]
"""Bodies of other road users with their poses (frames, 4, 4), for a drive along a plan."""

TrafficKind = Literal["usual", "heavy"]

_HALF_LENGTH_M = {"lorry": 5.5, "van": 2.6, "car": 2.2}


def heavy_traffic(seed: int) -> Traffic:
    """A leader at a short distance nine times of ten, and neighbours in the next lane: with us, or against us.

    The same seed, plan and drive give the same traffic bit for bit.
    """

    def traffic(plan: Plan, drive: Drive) -> list[tuple[Mesh, Array]]:
        rng, others = generator(seed, 8), []
        if rng.random() < 0.9:
            kind = ("lorry", "lorry", "van", "car")[int(rng.integers(4))]
            # From our rear axle to the leader's middle: some metres, and less than a second at any speed.
            near = 5.0 + _HALF_LENGTH_M[kind] + float(rng.uniform(0.5, 8.0))
            gap = near + float(rng.uniform(0.0, 0.8)) * drive.speed_m_s + _sway(rng, drive, 1.5)
            place = drive.road_s + np.maximum(gap, near)
            others.append((_body(rng, kind), on_path(plan.path, place, float(rng.uniform(-0.4, 0.4)), False)))
        against = plan.kind != "motorway" and rng.random() < 0.5
        others += _oncoming(rng, plan, drive) if against else _beside(rng, plan, drive)
        return others

    return traffic


def _beside(rng: np.random.Generator, plan: Plan, drive: Drive) -> list[tuple[Mesh, Array]]:
    """A column in the lane to the left that goes about as fast as we do."""
    others, at = [], float(rng.uniform(-3.0, 8.0))
    faster = float(rng.uniform(-1.0, 1.0)) * (drive.timestamps_s - drive.timestamps_s[-1] / 2)
    for _ in range(int(rng.integers(2, 6))):
        kind = ("car", "car", "van", "lorry")[int(rng.integers(4))]
        at += _HALF_LENGTH_M[kind]
        place = drive.road_s + at + faster + _sway(rng, drive, 0.8)
        others.append((_body(rng, kind), on_path(plan.path, place, -2 * plan.lane_m, False)))
        at += _HALF_LENGTH_M[kind] + float(rng.uniform(1.5, 9.0))
    return others


def _oncoming(rng: np.random.Generator, plan: Plan, drive: Drive) -> list[tuple[Mesh, Array]]:
    """A stream in the other lane; who has passed comes again far ahead."""
    count, speed, spacing = int(rng.integers(3, 8)), float(rng.uniform(2.0, 13.0)), float(rng.uniform(9.0, 22.0))
    others, begin, span = [], float(rng.uniform(-20.0, 30.0)), count * spacing
    for k in range(count):
        kind = ("car", "car", "car", "van", "lorry")[int(rng.integers(5))]
        at = drive.road_s[0] + begin + k * spacing - speed * drive.timestamps_s
        behind = drive.road_s - 15.0
        at = behind + np.mod(at - behind, max(span, 80.0))
        others.append((_body(rng, kind), on_path(plan.path, at, -2 * plan.lane_m, True)))
    return others


def _sway(rng: np.random.Generator, drive: Drive, by_m: float) -> Array:
    """How far somebody falls back and catches up, smooth over some seconds: (frames,) of that deviation."""
    times = drive.timestamps_s
    places = np.arange(0.0, times[-1] + 12.0, 5.0)
    return by_m * interpolate(times, places, bell(rng, len(places)))


def _body(rng: np.random.Generator, kind: str) -> Mesh:
    return meshes.lorry(rng) if kind == "lorry" else meshes.car(rng, van=kind == "van")
