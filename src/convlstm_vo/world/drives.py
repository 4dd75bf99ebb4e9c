"""How the car moves, and who else does: speed along the path, the body on its springs, the camera on it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from convlstm_vo.world.exact import bell, product, rotation
from convlstm_vo.world.plan import MOVER_KINDS, Line, Plan, generator, interpolate

Array = NDArray[np.float64]
AXLE_TO_CAMERA_M = 1.5  # the rear axle follows the path; the camera sits in front of it, as on KITTI's car
CROSSING = (1, 2, 5)  # mover bodies that cross at junctions
CRUISE_M_S = {"town": (8.0, 15.0), "country": (9.0, 22.0), "motorway": (20.0, 36.0)}


@dataclasses.dataclass(frozen=True)
class Mount:
    """Where the camera sits: height above the road (m), small turns of the camera on the car (radians)."""

    height_m: float = 1.65
    yaw: float = 0.0
    pitch: float = 0.0
    roll: float = 0.0

    @classmethod
    def random(cls, rng: np.random.Generator) -> Mount:
        """Anywhere from a low car to a lorry, 1 to 3 m, turned by a degree or so."""
        u, turns = rng.random(2), bell(rng, 3) * 0.015
        low = u[0] < 0.7
        height = 1.2 + 0.8 * float(u[1]) if low else 1.0 + 2.0 * float(u[1])
        return cls(height, *(float(turn) for turn in turns))


@dataclasses.dataclass(frozen=True)
class Drive:
    """A ride along a street.

    Attributes:
        timestamps_s: (n,). T_street_camera: (n, 4, 4). road_s: (n,) metres along the path.
        speed_m_s: (n,). T_street_mover: (n, m, 4, 4): other road users.
        road_plane: (n, 4): unit normal of the road under the car in the camera frame, towards the camera, and the
            camera's height above it: normal . point + height = 0 on the road.
    """

    timestamps_s: Array
    T_street_camera: Array
    road_s: Array
    speed_m_s: Array
    T_street_mover: Array
    road_plane: Array


def allowed_speed(path: Line, cruise_m_s: float, sideways_m_s2: float, brake_m_s2: float) -> Array:
    """Speed (n,) along the path that keeps sideways force and braking comfortable."""
    v2 = np.minimum(cruise_m_s**2, sideways_m_s2 / np.maximum(np.abs(path.kappa), 1e-6))
    v2[-1] = 0.0
    step = 2 * brake_m_s2 * (path.s[1] - path.s[0])
    for i in range(len(v2) - 2, -1, -1):
        v2[i] = min(v2[i], v2[i + 1] + step)
    return np.sqrt(v2)


@dataclasses.dataclass(frozen=True)
class _Ride:
    """Fine time steps of a ride: place, speed and acceleration along the path."""

    s: Array
    v: Array
    a: Array


def _stops(rng: np.random.Generator, plan: Plan) -> list[tuple[float, float]]:
    """(place, seconds) of halts: at junctions, and for no visible reason."""
    stops = [(float(begin) - 3.0, float(rng.uniform(0.5, 5.0))) for begin, _ in plan.turns if rng.random() < 0.2]
    if plan.kind != "motorway":
        for s in np.arange(120.0, plan.path.s[-1] - 60.0, 250.0):
            if rng.random() < 0.3:
                stops.append((float(s + rng.uniform(-80, 80)), float(rng.uniform(0.5, 6.0))))
    return sorted(stops)


def _ride(rng: np.random.Generator, plan: Plan, steps: int, dt: float) -> _Ride:
    low, high = CRUISE_M_S[plan.kind]
    cruise, push, brake = float(rng.uniform(low, high)), float(rng.uniform(0.8, 2.2)), float(rng.uniform(1.2, 3.0))
    limit = allowed_speed(plan.path, cruise, float(rng.uniform(1.5, 4.2)), brake)
    knots = np.arange(0.0, plan.path.s[-1] + 80, 60.0)
    mood = interpolate(plan.path.s, knots, 0.75 + 0.3 * rng.random(len(knots)))
    limit = limit * np.minimum(mood, 1.0)
    stops = _stops(rng, plan)
    s, a, wait = 8.0 + float(rng.uniform(0, 12)), 0.0, 0.0
    v = 0.0 if rng.random() < 0.2 else float(interpolate(s, plan.path.s, limit)) * float(rng.uniform(0.5, 1.0))
    out = np.empty((steps, 3))
    stops = [stop for stop in stops if stop[0] > s + v * v / (2 * brake) + 1]
    for i in range(steps):
        target = float(limit[min(int(s * 2), len(limit) - 1)])
        if stops:
            left = stops[0][0] - s
            target = min(target, math.sqrt(max(0.0, 2 * brake * 0.8 * left)))
            if left < 0.3 or (left < 1.5 and v < 0.1):
                wait, target = wait + dt, 0.0
                if wait > stops[0][1]:
                    stops, wait = stops[1:], 0.0
        wish = min(push, max(-1.4 * brake, (target - v) / 0.5))
        a += (wish - a) * min(1.0, dt / 0.25)
        if v + a * dt < 0.0:
            a = -v / dt
        v += a * dt
        s += v * dt
        out[i] = s, v, a
    return _Ride(out[:, 0], out[:, 1], out[:, 2])


def _given_ride(speed: Callable[[Array], Array], steps: int, dt: float, start_m: float) -> _Ride:
    times: Array = np.arange(steps, dtype=np.float64) * dt
    v: Array = np.asarray(speed(times), dtype=np.float64)
    way: Array = np.concatenate([[0.0], np.cumsum((v[1:] + v[:-1]) * (0.5 * dt))])
    push: Array = np.diff(v, prepend=v[:1]) / dt
    return _Ride(start_m + way, v, push)


def _smooth_noise(rng: np.random.Generator, span_m: float, spacing_m: float) -> tuple[Array, Array]:
    """(places, values of deviation about 1), to be interpolated."""
    n = int(span_m / spacing_m) + 3
    places = np.arange(n, dtype=np.float64) * spacing_m
    return places, bell(rng, n)


def _springs(push: Array, dt: float, hertz: float, damping: float) -> Array:
    """Answer of a damped spring (n,) to a push (n,), in the push's units at rest."""
    w = 2 * math.pi * hertz
    x, speed = float(push[0]), 0.0
    out = np.empty(len(push))
    for i, target in enumerate(push):
        speed += dt * (w * w * (float(target) - x) - 2 * damping * w * speed)
        x += dt * speed
        out[i] = x
    return out


def _body(rng: np.random.Generator, ride: _Ride, plan: Plan, dt: float) -> tuple[Array, Array, Array]:
    """Pitch (rad, nose up), roll (rad) and heave (m, up) of the body on its springs."""
    span = float(ride.s[-1]) + 20
    rough = float(rng.uniform(0.5, 2.4)) * {"town": 1.0, "country": 1.0, "motorway": 0.6}[plan.kind]
    fine, coarse = _smooth_noise(rng, span, 0.7), _smooth_noise(rng, span, 4.5)
    tilt = _smooth_noise(rng, span, 1.1)

    def bumps(s: Array) -> Array:
        return rough * (0.0035 * interpolate(s, *fine) + 0.009 * interpolate(s, *coarse))

    front, back = bumps(ride.s + 2.7), bumps(ride.s)
    kappa = interpolate(ride.s, plan.path.s, plan.path.kappa)
    pitch = _springs((front - back) / 2.7 + 0.0055 * ride.a, dt, 1.4, 0.35)
    # Moments of the tyres against the body lean it outwards in a bend.
    roll_push = -0.006 * kappa * ride.v**2 + rough * 0.0028 * interpolate(ride.s, *tilt)
    return pitch, _springs(roll_push, dt, 1.6, 0.35), _springs((front + back) / 2, dt, 1.3, 0.35)


def make_drive(seed: int, plan: Plan, *, frames: int, fps: float = 10.0, mount: Mount | None = None,
               speed: Callable[[Array], Array] | None = None, start_m: float = 10.0) -> Drive:  # fmt: skip
    """Drive along a plan's path; everything follows from the seed, bit for bit.

    Args:
        frames: how many images. fps: images a second. mount: where the camera sits.
        speed: metres a second at times in seconds (n,), from ``start_m`` on; drawn from the seed where None.
    """
    rng, mount = generator(seed, 2), mount or Mount()
    per_frame = max(4, math.ceil(60.0 / fps))
    dt = 1.0 / (fps * per_frame)
    steps = (frames - 1) * per_frame + 1
    ride = _ride(rng, plan, steps, dt) if speed is None else _given_ride(speed, steps, dt, start_m)
    pitch, roll, heave = (values[::per_frame] for values in _body(rng, ride, plan, dt))
    s, v = ride.s[::per_frame], ride.v[::per_frame]
    wander = _smooth_noise(rng, float(s[-1]) + 40, 25.0)
    poses, planes = _camera_poses(plan.path, s, wander, pitch, roll, heave, mount)
    times = np.arange(frames) / fps
    movers = _movers(rng, plan, times, s, v)
    return Drive(times, poses, s, v, movers, planes)


def _road_frame(path: Line, s: Array, d: float = 0.0) -> tuple[Array, Array]:
    """Positions (n, 3) of the path, and headings, slopes along and across (n, 3) of the road at places s and d
    metres to the right, over a car's length."""
    x0, y0, z0, psi = path.at(s)
    _, y1, _, _ = path.at(s + 2.7)
    return np.stack([x0, y0, z0], -1), np.stack([psi, (y0 - y1) / 2.7, path.across(s, d)[1]], -1)


def _camera_poses(path: Line, s: Array, wander: tuple[Array, Array], pitch: Array, roll: Array, heave: Array,
                  mount: Mount) -> tuple[Array, Array]:  # fmt: skip
    places, angles = _road_frame(path, s)
    aside = 0.12 * interpolate(s, *wander)
    drift = (0.12 * interpolate(s + 2.0, *wander) - 0.12 * interpolate(s - 2.0, *wander)) / 4.0
    fixed = rotation(mount.yaw, mount.pitch, mount.roll)
    poses, planes = np.tile(np.eye(4), (len(s), 1, 1)), np.empty((len(s), 4))
    for i in range(len(s)):
        psi, slope = float(angles[i, 0]) + float(drift[i]), float(angles[i, 1])
        road = rotation(psi, slope, float(angles[i, 2]))
        body = product(road, rotation(0.0, float(pitch[i]), float(roll[i])))
        camera = product(body, fixed)
        arm = np.array([[float(aside[i])], [-mount.height_m - float(heave[i])], [AXLE_TO_CAMERA_M]])
        poses[i, :3, :3] = camera
        poses[i, :3, 3] = places[i] + product(road, arm)[:, 0]
        up = product(np.swapaxes(camera, -1, -2), -road[:, 1:2])[:, 0]
        planes[i] = *up, mount.height_m + float(heave[i])
    return poses, planes


# --- other road users -------------------------------------------------------------------------------------------


def _movers(rng: np.random.Generator, plan: Plan, times: Array, s: Array, v: Array) -> Array:
    """Poses (n, m, 4, 4) of all MOVER_KINDS."""
    dense = float(rng.random())
    tracks = []
    for number, kind in enumerate(MOVER_KINDS):
        role = "cycle" if kind == "cyclist" else "lead" if number == 0 else "oncoming"
        if rng.random() > 0.25 + 0.75 * dense:
            role = "away"
        if number in CROSSING and len(plan.turns):
            tracks.append(_crossing(rng, plan, times, s))
            continue
        tracks.append(_track(rng, plan, role, times, s, v))
    return np.stack(tracks, axis=1)


def _track(rng: np.random.Generator, plan: Plan, role: str, times: Array, s: Array, v: Array) -> Array:
    gap0, pace = float(rng.uniform(12, 35)), float(rng.uniform(0.7, 1.2))
    if role == "lead":
        gap = (
            gap0
            + 0.8 * v
            + 4.0 * interpolate(times, np.arange(0, times[-1] + 20, 9.0), bell(rng, int(times[-1] / 9) + 3))
        )
        return on_path(plan.path, s + np.maximum(gap, 7.0), 0.0, False)
    if role == "away":
        return on_path(plan.path, np.full(len(times), -1.0), 0.0, False)
    oncoming = role == "oncoming"
    cruise = float(rng.uniform(3.5, 6.5)) if not oncoming else pace * 0.5 * sum(CRUISE_M_S[plan.kind])
    at, places = float(s[0] + rng.uniform(10, 220)), []
    for i in range(len(times)):
        dt = float(times[1] - times[0]) if len(times) > 1 else 0.0
        at += (-cruise if oncoming else cruise) * dt
        # Whoever has fallen behind comes back far ahead, out of sight.
        if at < s[i] - 25.0:
            at = float(s[i]) + float(rng.uniform(150, 320))
        elif at > s[i] + 330.0:
            at = float(s[i]) - 24.0
        places.append(at)
    d = -2 * plan.lane_m if oncoming else min(1.6, 1.0 + 0.3 * float(rng.random()))
    return on_path(plan.path, np.array(places), d, oncoming)


def _crossing(rng: np.random.Generator, plan: Plan, times: Array, s: Array) -> Array:
    """Someone who drives straight over each junction while the car comes near it, mostly from the side."""
    line, places, d = plan.path, np.full(len(times), -1e3), 0.0
    poses = on_path(line, places, 0.0, False)
    for k, (begin, _) in enumerate(plan.turns):
        near = np.flatnonzero(s > begin - rng.uniform(14, 40))
        ours, pace, side = rng.random() < 0.3, float(rng.uniform(6, 12)), -1.0 if rng.random() < 0.5 else 1.0
        if not len(near):
            break
        # Along the road that the car will take, or towards it on its own.
        line = plan.legs[k].line if ours else plan.legs[k + 1].line
        centre = plan.legs[k].end_s if ours else plan.legs[k + 1].start_s
        side = -1.0 if ours else side
        d = side * plan.lane_m
        places = centre + side * pace * (times - times[near[0]])
        close = np.abs(places - centre) < 75.0
        poses[close] = on_path(line, places[close], d, side < 0)
    return poses


def on_path(path: Line, s: Array, d: float, reverse: bool) -> Array:
    """Poses (n, 4, 4) at places s, d metres to the right; far under the ground where the path has none."""
    places, angles = _road_frame(path, s, d)
    drop, _ = path.across(s, d)
    poses = np.tile(np.eye(4), (len(s), 1, 1))
    for i in range(len(s)):
        psi, slope, lean = (float(angle) for angle in angles[i])
        turn = rotation(math.pi, 0.0, 0.0) if reverse else np.eye(3)
        poses[i, :3, :3] = product(rotation(psi, slope, lean), turn)
        aside = np.array([[d], [float(drop[i])], [0.0]])
        poses[i, :3, 3] = places[i] + product(rotation(psi, slope, 0.0), aside)[:, 0]
        if not path.s[0] < s[i] < path.s[-1]:
            poses[i, 1, 3] += 1e4
    return poses
