"""Start-up, loss and recovery of the default network on rendered streets, against exact truth.

python benchmarks/hard_cases.py --json hard_cases.json

Each case is driven on several streets that no training saw; the worst of them is printed. *Locked*: from this frame
on the motion is within 10 % of its length (5 cm where the car hardly moves) and 0.2 degrees, for 5 frames; asked
are 10 or fewer. *Lost*: frames said to be lost, of those that no picture tells; *false*: of the others. *After*:
mean errors once locked. *Out*: share of motions beyond the tolerance once locked. *Told*: of all motions beyond it,
those that were said to be lost or without metric scale; *doubted*: of all others. *Drift*: over a stop.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from convlstm_vo.geometry import se3
from convlstm_vo.geometry.camera import Camera
from convlstm_vo.models.checkpoint import DEFAULT_CHECKPOINT, Network, load_checkpoint
from convlstm_vo.models.mounting import Memory
from convlstm_vo.odometer import TrackedFrame, VisualOdometry
from convlstm_vo.sequences.base import Frame
from convlstm_vo.world import Traffic, WorldSequence, heavy_traffic, make_drive, make_plan
from convlstm_vo.world.drives import Drive, on_path
from convlstm_vo.world.exact import rotation
from convlstm_vo.world.meshes import Mesh, box, car
from convlstm_vo.world.plan import Plan, generator

Array = NDArray[np.float64]
CAMERA = Camera(363.6, 363.6, 309.5, 93.5, height=192, width=624)
FIRST_SEED = 7_000_000  # streets that no training saw
WITHIN, AT_LEAST_M, DEGREES, HOLD = 0.1, 0.05, 0.2, 5
MOST_FRAMES = 10
MOST_ASIDE = 6.0  # m/s^2 in bends
Speed = Callable[[Array], Array]


class Ride(WorldSequence):
    """A street along which the car drives as told, among the road users that it is told.

    Args:
        speed: metres a second at times in seconds (n,). start: path metres, of a plan. traffic: other road users.
            Each is the world's own where None.
    """

    def __init__(
        self,
        seed: int,
        speed: Speed | None = None,
        *,
        start: Callable[[Plan], float] = lambda plan: 15.0,
        traffic: Traffic | None = None,
        **options,  # type: ignore[no-untyped-def]
    ) -> None:
        super().__init__(seed, camera=CAMERA, traffic=traffic or "usual", **options)
        self.speed, self.start = speed, start

    @functools.cached_property
    def plan(self) -> Plan:
        if self.speed is None:
            return make_plan(self.seed, self.kind, 40.0 * self.frames / self.fps + 40)
        times = np.arange(0, self.frames / self.fps, 0.1)
        return make_plan(self.seed, self.kind, float(self.speed(times).max()) * self.frames / self.fps + 180)

    @functools.cached_property
    def _usual_drive(self) -> Drive:
        return make_drive(
            self.seed,
            self.plan,
            frames=self.frames,
            fps=self.fps,
            mount=self.mount,
            speed=self.speed,
            start_m=self.start(self.plan),
        )


@dataclasses.dataclass
class Film:
    """What the odometer is shown.

    Attributes:
        shots: street and frame number, in order. covered: shots of a covered lens. event: the shot from which on it
            is to lock again. wrong: the motion that the odometer is made to believe in before that shot, as a
            function of the last one (6,), in camera heights and radians.
        part: shots (from, to) over which the drift is told, e.g. a stop.
    """

    shots: list[tuple[WorldSequence, int]]
    event: int = 1
    covered: frozenset[int] = frozenset()
    wrong: Callable[[torch.Tensor], torch.Tensor] | None = None
    part: tuple[int, int] | None = None

    def until(self, shots: int) -> Film:
        """The film's beginning."""
        return dataclasses.replace(self, shots=self.shots[:shots])

    def truth(self, k: int) -> Array | None:
        """Motion (4, 4) from shot k - 1 to k; None where no picture can tell."""
        (a, i), (b, j) = self.shots[k - 1], self.shots[k]
        if a is not b or {k - 1, k} & self.covered or abs(j - i) > 5:
            return None
        poses = a.trajectory.T_world_camera
        return se3.relative(poses[i], poses[j])


@dataclasses.dataclass
class Outcome:
    """How a film went.

    Attributes:
        frames: until locked, 1 being at once; None: never.
        lost: shots said to be lost, of the ``unseen`` that no picture tells. false_alarms: of the others.
        out: share of motions after locking that are beyond the tolerance.
        t_percent, t_cm, r_degrees: mean error of the motions after locking; of the mean way (None where the car
            hardly moves), in all, and of the rotation.
        wrong, told, doubted: motions beyond the tolerance, those of them said to be lost or without metric scale,
            and others of which that was said.
        drift_m, drift_degrees: over the part that the film asks for.
        errors: of all motions: way in metres, error in metres, error in degrees.
    """

    frames: int | None
    lost: int
    unseen: int
    false_alarms: int
    out: float
    t_percent: float | None
    t_cm: float
    r_degrees: float
    wrong: int
    told: int
    doubted: int
    drift_m: float | None = None
    drift_degrees: float | None = None
    errors: list[tuple[float, float, float]] = dataclasses.field(default_factory=list, repr=False)

    @property
    def good(self) -> bool:
        return self.frames is not None and self.frames <= MOST_FRAMES


def show(net: Network, film: Film) -> list[TrackedFrame]:
    """Run the odometer over a film."""
    odometer, tracked = VisualOdometry(net, CAMERA), []
    for k, (sequence, index) in enumerate(film.shots):
        frame = sequence[index]
        image = np.zeros_like(frame.image) if k in film.covered else frame.image
        if film.wrong is not None and k == film.event:
            assert odometer._state is not None
            memory = Memory.unpack(odometer._state[-1].clone())
            memory.motion, memory.known = film.wrong(memory.motion[0])[None], torch.ones_like(memory.known)
            odometer._state = (*odometer._state[:-1], memory.pack())
        tracked.append(odometer.track(Frame(image, k / sequence.fps, k)))
    return tracked


def judge(film: Film, tracked: list[TrackedFrame]) -> Outcome:
    """Compare with the truth."""
    truth = [None, *(film.truth(k) for k in range(1, len(film.shots)))]
    errors = [_error(T, t) for T, t in zip(truth, tracked, strict=True)]
    good = [e is not None and e[1] < max(WITHIN * e[0], AT_LEAST_M) and e[2] < DEGREES for e in errors]
    locks = [k for k in range(film.event, len(good) - HOLD + 1) if all(good[k : k + HOLD])]
    since = locks[0] if locks else film.event
    rest = np.array([e for e in errors[since:] if e is not None])
    unseen = [k for k in range(1, len(truth)) if truth[k] is None]
    lost = {k for k, t in enumerate(tracked) if t.status == "lost"}
    way = float(rest[:, 0].mean())
    seen = [(good[k], t.status == "lost" or not t.metric) for k, t in enumerate(tracked) if truth[k] is not None]
    outcome = Outcome(
        frames=locks[0] - film.event + 1 if locks else None,
        lost=len(lost & set(unseen)),
        unseen=len(unseen),
        false_alarms=len(lost - set(unseen)),
        out=1 - sum(good[since:]) / len(rest),
        t_percent=100 * float(rest[:, 1].mean()) / way if way > 0.1 else None,
        t_cm=100 * float(rest[:, 1].mean()),
        r_degrees=float(rest[:, 2].mean()),
        wrong=sum(not right for right, _ in seen),
        told=sum(told and not right for right, told in seen),
        doubted=sum(told and right for right, told in seen),
        errors=[(float("nan"),) * 3 if e is None else e for e in errors],
    )
    if film.part:
        a, b = film.part
        (sequence, i), (_, j) = film.shots[a], film.shots[b]
        poses = sequence.trajectory.T_world_camera
        found = se3.relative(tracked[a].T_world_camera, tracked[b].T_world_camera)
        _, outcome.drift_m, outcome.drift_degrees = _difference(se3.relative(poses[i], poses[j]), found)
    return outcome


def _difference(true: Array, found: Array) -> tuple[float, float, float]:
    """Way, error in metres, error in degrees."""
    turn = float(np.degrees(se3.rotation_angle(true[:3, :3].T @ found[:3, :3])))
    return float(np.linalg.norm(true[:3, 3])), float(np.linalg.norm(true[:3, 3] - found[:3, 3])), turn


def _error(true: Array | None, tracked: TrackedFrame) -> tuple[float, float, float] | None:
    return None if true is None else _difference(true, tracked.T_prev_curr)


# --- rides ------------------------------------------------------------------------------------------------------


def steady(metres_a_second: float) -> Speed:
    return lambda t: np.full(np.shape(t), metres_a_second)


def pull_away(after_s: float, push: float = 2.0, most: float = 14.0) -> Speed:
    return lambda t: np.clip(push * (t - after_s), 0.0, most)


def stop_and_go(speed: float, begin_s: float, stand_s: float, brake: float = 4.0, push: float = 2.0) -> Speed:
    """Brake to a stop, which is reached at ``begin_s``, stand, and drive on."""
    return lambda t: np.minimum(
        np.where(t < begin_s, brake * (begin_s - t), push * np.maximum(t - begin_s - stand_s, 0.0)), speed
    )


def mid_turn(speed: float, frames: int) -> Callable[[Plan], float]:
    """Start such that the first turn's middle is reached after so many frames (at 10 Hz) at this speed."""
    return lambda plan: (
        max(1.0, float(plan.turns[0].mean()) - 1.5 - speed * frames / 10) if len(plan.turns) else 15.0
    )


def whole(ride: WorldSequence) -> list[tuple[WorldSequence, int]]:
    return [(ride, i) for i in range(len(ride))]


# --- other road users -------------------------------------------------------------------------------------------


def lorry() -> Mesh:
    """A box on wheels, 2.5 m wide and 3.6 m high, with doors and lamps."""
    mesh = Mesh().add(box(2.5, 2.9, 9.0, low=0.7), "metal", 0.35).add(box(2.3, 0.45, 8.8, low=0.3), "rough", 0.06)
    for x in (-1.22, -0.02, 1.18):
        mesh.add(box(0.05, 2.7, 0.03, x=x, z=-4.51, low=0.8), "paint", 0.08)
    for x in (-0.95, 0.95):
        mesh.add(box(0.4, 0.2, 0.04, x=x, z=-4.42, low=0.5), "sign", 0.5)
    return mesh


def driving(plan: Plan, s: Array, d: float = 0.0, *, reverse: bool = False) -> Array:
    """Poses (n, 4, 4) at path metres s, d metres to the right."""
    return on_path(plan.path, s, d, reverse)


def crossing(plan: Plan, s: float, aside: Array, *, to_the_right: bool) -> Array:
    """Poses (n, 4, 4) square to the path at path metres s, ``aside`` metres (n,) to its right."""
    poses = on_path(plan.path, np.full(len(aside), s), 0.0, False)
    turned = np.tile(np.eye(4), (len(aside), 1, 1))
    turned[:, :3, :3] = rotation(np.pi / 2 if to_the_right else -np.pi / 2, 0.0, 0.0)
    turned[:, 0, 3] = aside
    return poses @ turned


def behind_a_lorry(gap_m: float, lanes: Sequence[float] = ()) -> Traffic:
    """A lorry ahead (from our axle to its middle) at our speed, cars beside us at about the same."""

    def traffic(plan: Plan, drive: Drive) -> list[tuple[Mesh, Array]]:
        rng = generator(int(plan.path.psi[-1] * 1e6) & 0xFFFF, 77)
        s = drive.road_s
        others = [(lorry(), driving(plan, s + gap_m))]
        for d in lanes:
            for ahead in (4.0, 11.5, 19.0, 27.0):
                sway = ahead + 0.5 * np.sin(drive.timestamps_s + ahead)
                others.append((car(rng, van=rng.random() < 0.4), driving(plan, s + sway, d)))
        return others

    return traffic


def streams_across(gap_m: float, speed: float, spacing_m: float = 7.5) -> Traffic:
    """Two streams of cars that cross ahead, one each way, without end."""

    def traffic(plan: Plan, drive: Drive) -> list[tuple[Mesh, Array]]:
        rng, others = generator(1, 78), []
        at = float(drive.road_s[np.argmin(drive.speed_m_s)])
        count = 9
        span = count * spacing_m
        for row, right in enumerate((False, True)):
            for k in range(count):
                way = (k * spacing_m + row * 3.0 + speed * drive.timestamps_s) % span - span / 2
                mesh = car(rng, van=rng.random() < 0.5)
                T = crossing(plan, at + gap_m + 3.2 * row, way if right else -way, to_the_right=right)
                T[drive.road_s > at + 0.4, 1, 3] += 1e4  # the way is free when the car drives on
                others.append((mesh, T))
        return others

    return traffic


def lorry_leaves(gap_m: float, after_s: float, push: float = 1.2) -> Traffic:
    """A lorry that stands before us drives off."""

    def traffic(plan: Plan, drive: Drive) -> list[tuple[Mesh, Array]]:
        gone = 0.5 * push * np.maximum(drive.timestamps_s - after_s, 0.0) ** 2
        return [(lorry(), driving(plan, drive.road_s[0] + gap_m + gone))]

    return traffic


# --- the cases --------------------------------------------------------------------------------------------------


def covered(seed: int, frames: int) -> Film:
    speed, before = 5.0, 8
    ride = Ride(
        seed, steady(speed), start=mid_turn(speed, before + frames), frames=before + frames + 25, kind="town"
    )
    dark = range(before, before + frames)
    return Film(whole(ride), event=dark.stop + 1, covered=frozenset(dark), part=(before - 1, dark.stop))


def motorway(seed: int, fps: float, speed: float = 36.1, frames: int = 30) -> Film:
    return Film(whole(Ride(seed, steady(speed), frames=frames, fps=fps, kind="motorway")))


def believing(seed: int, speed: float, wrong: Callable[[torch.Tensor], torch.Tensor]) -> Film:
    ride = Ride(seed, steady(speed), frames=24, kind=("town", "country")[seed % 2])
    return Film(whole(ride), event=8, wrong=wrong)


def ahead_by(heights: float) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda motion: torch.tensor([0, 0, heights, 0, 0, 0], dtype=motion.dtype)


def turned_by(degrees: float) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda motion: motion + torch.tensor([0, 0, 0, 0, np.radians(degrees), 0], dtype=motion.dtype)


def jump(seed: int, *, street: bool) -> Film:
    rides = [Ride(seed + k, frames=60, kind=("town", "country")[(seed + k) % 2]) for k in (0, 1)]
    shots = whole(rides[0])[:8] + whole(rides[street])[38:58]
    return Film(shots, event=9)


def long_stop(seed: int, traffic: Traffic | None = None, frames: int = 60) -> Film:
    begin = 1.5
    speed = stop_and_go(6.0, begin, frames / 10)
    ride = Ride(seed, speed, traffic=traffic, frames=frames + 40, kind="town", start=mid_turn(3.0, 55))
    stop = round(begin * 10)
    return Film(whole(ride), event=stop + frames + 1, part=(stop, stop + frames))


def hop(seed: int, by: int) -> Film:
    ride = Ride(seed, frames=24 * abs(by), kind=("town", "country")[seed % 2])
    return Film([(ride, i) for i in (range(0, len(ride), by) if by > 0 else range(len(ride) - 1, -1, by))])


def standing_start(seed: int, traffic: Traffic | None = None, after_s: float = 1.5) -> Film:
    ride = Ride(seed, pull_away(after_s), frames=round(10 * after_s) + 30, kind="town", traffic=traffic)
    return Film(whole(ride), event=round(10 * after_s) + 1, part=(0, round(10 * after_s)))


def stuck_behind(seed: int, speed: float, kind: str = "town") -> Film:
    d = {"town": -3.5, "motorway": -3.8}[kind]
    traffic = behind_a_lorry(14.0 if speed < 20 else 18.0, (d,))
    return Film(whole(Ride(seed, steady(speed), traffic=traffic, frames=30, kind=kind)))  # type: ignore[arg-type]


def heavy(seed: int) -> Film:
    kind = ("town", "country", "motorway")[seed % 3]
    return Film(whole(Ride(seed, traffic=heavy_traffic(seed), frames=40, kind=kind)))  # type: ignore[arg-type]


def lorry_drives_off(seed: int) -> Film:
    ride = Ride(seed, steady(0.0), traffic=lorry_leaves(11.0, 1.0), frames=50, kind="town")
    return Film(whole(ride), part=(0, 49))


CASES: dict[str, Callable[[int], Film]] = {
    "standstill, from the first frame": lambda seed: dataclasses.replace(standing_start(seed), event=1),
    "standstill, driving off": standing_start,
    "start at 130 km/h, 20 Hz": lambda seed: motorway(seed, 20.0),
    "start at 130 km/h, 10 Hz": lambda seed: motorway(seed, 10.0),
    "start at 130 km/h, 5 Hz": lambda seed: motorway(seed, 5.0),
    "start at 90 km/h in the country, 10 Hz": lambda seed: Film(
        whole(Ride(seed, steady(25.0), frames=30, kind="country"))
    ),
    "believed 0, is 1.5 m": lambda seed: believing(seed, 15.0, ahead_by(0.0)),
    "believed 2 m, is 0": lambda seed: believing(seed, 0.0, ahead_by(2.0 / 1.65)),
    "believed 0, is 3.6 m": lambda seed: dataclasses.replace(motorway(seed, 10.0), event=8, wrong=ahead_by(0.0)),
    "believed to turn by 4 degrees more": lambda seed: believing(seed, 10.0, turned_by(4.0)),
    "believed to turn by 4 degrees less": lambda seed: believing(seed, 10.0, turned_by(-4.0)),
    "lens covered for 2 frames in a turn": lambda seed: covered(seed, 2),
    "lens covered for 3 frames in a turn": lambda seed: covered(seed, 3),
    "lens covered for 5 frames in a turn": lambda seed: covered(seed, 5),
    "lens covered for 10 frames in a turn": lambda seed: covered(seed, 10),
    "lens covered for 30 frames in a turn": lambda seed: covered(seed, 30),
    "30 frames left out": lambda seed: jump(seed, street=False),
    "another street": lambda seed: jump(seed, street=True),
    "stop of 60 frames, driving on": long_stop,
    "stop of 60 frames, cars cross, driving on": lambda seed: long_stop(seed, streams_across(11.0, 8.0)),
    "standing, the lorry ahead drives off": lorry_drives_off,
    "in a jam, all drive off together": lambda seed: standing_start(seed, behind_a_lorry(14.0, (-3.5,))),
    "heavy traffic of the world's": heavy,
    "behind a lorry in town, 36 km/h": lambda seed: stuck_behind(seed, 10.0),
    "behind a lorry on a motorway, 90 km/h": lambda seed: stuck_behind(seed, 25.0, "motorway"),
    "every 2nd frame": lambda seed: hop(seed, 2),
    "every 3rd frame": lambda seed: hop(seed, 3),
    "backwards": lambda seed: hop(seed, -1),
    "backwards, every 2nd frame": lambda seed: hop(seed, -2),
}


def streets(case: str, count: int) -> list[int]:
    """Seeds for a case: bends can be driven at its speed, and a drive of the world's own does not stand still."""

    def fits(seed: int) -> bool:
        ride = CASES[case](seed).shots[0][0]
        assert isinstance(ride, Ride)
        path, drive = ride.plan.path, ride.drive
        aside = np.interp(drive.road_s, path.s, path.kappa) * drive.speed_m_s**2
        if "in a turn" in case and not len(ride.plan.turns):
            return False
        return float(np.abs(aside).max()) < MOST_ASIDE and (ride.speed is not None or drive.speed_m_s.min() > 4)

    return list(itertools.islice(filter(fits, range(FIRST_SEED, FIRST_SEED + 1000)), count))


def worst(outcomes: list[Outcome]) -> Outcome:
    """The worst of each figure."""

    def most(values: list[float | None]) -> float | None:
        known = [v for v in values if v is not None]
        return max(known) if known else None

    frames = [o.frames for o in outcomes]
    return Outcome(
        frames=None if None in frames else max(f for f in frames if f is not None),
        lost=sum(o.lost for o in outcomes),
        unseen=sum(o.unseen for o in outcomes),
        false_alarms=sum(o.false_alarms for o in outcomes),
        out=max(o.out for o in outcomes),
        t_percent=most([o.t_percent for o in outcomes]),
        t_cm=max(o.t_cm for o in outcomes),
        r_degrees=max(o.r_degrees for o in outcomes),
        wrong=sum(o.wrong for o in outcomes),
        told=sum(o.told for o in outcomes),
        doubted=sum(o.doubted for o in outcomes),
        drift_m=most([o.drift_m for o in outcomes]),
        drift_degrees=most([o.drift_degrees for o in outcomes]),
    )


def row(case: str, o: Outcome) -> str:
    """A line of the table."""
    t = f"{o.t_percent:.1f} %" if o.t_percent is not None else f"{o.t_cm:.1f} cm"
    drift = "" if o.drift_m is None else f"{o.drift_m:.3f} m {o.drift_degrees:.2f}°"
    frames = "never" if o.frames is None else str(o.frames)
    cells = [f"{o.lost}/{o.unseen}", str(o.false_alarms), t, f"{o.r_degrees:.3f}°", f"{100 * o.out:.0f} %",
             f"{o.told}/{o.wrong}", str(o.doubted), drift]  # fmt: skip
    return f"{case:44}{frames:>7}" + "".join(f"{cell:>{w}}" for cell, w in zip(cells, WIDTHS, strict=True))


WIDTHS = (8, 7, 9, 9, 7, 8, 9, 16)
NAMES = ("lost", "false", "t after", "r after", "out", "told", "doubted", "drift")
HEAD = f"{'case':44}{'locked':>7}" + "".join(f"{name:>{width}}" for name, width in zip(NAMES, WIDTHS, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, default=DEFAULT_CHECKPOINT)
    parser.add_argument("--streets", type=int, default=3, help="of each case")
    parser.add_argument("--only", default="", help="cases whose name has this in it")
    parser.add_argument("--errors", action="store_true", help="way (m), error (m), error (degrees) of all motions")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    net = load_checkpoint(options.checkpoint)
    results = {}
    print(HEAD)
    for case in (name for name in CASES if options.only in name):
        outcomes = []
        for seed in streets(case, options.streets):
            film = CASES[case](seed)
            tracked = show(net, film)
            outcomes.append(judge(film, tracked))
            if options.errors:
                for k, (t, e) in enumerate(zip(tracked, outcomes[-1].errors, strict=True)):
                    mark = "event" if k == film.event else ""
                    print(
                        f"{seed} {k:3} {e[0]:6.3f} {e[1]:6.3f} {e[2]:6.3f} {t.T_prev_curr[2, 3]:7.3f} "
                        f"{t.status} {'' if t.metric else 'not metric '}{mark}"
                    )
        print(row(case, worst(outcomes)), flush=True)
        results[case] = {"worst": _plain(worst(outcomes)), "streets": [_plain(o) for o in outcomes]}
    if options.json:
        options.json.write_text(json.dumps(results, indent=2))


def _plain(outcome: Outcome) -> dict[str, object]:
    return {k: v for k, v in dataclasses.asdict(outcome).items() if k != "errors"}


if __name__ == "__main__":
    main()
