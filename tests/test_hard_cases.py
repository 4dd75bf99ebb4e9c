"""Start-up, loss and recovery of the default network on rendered streets; see benchmarks/hard_cases.py."""

from __future__ import annotations

import functools

import numpy as np
import pytest
from benchmarks.hard_cases import (
    CAMERA,
    CASES,
    FIRST_SEED,
    MOST_FRAMES,
    Film,
    Outcome,
    Ride,
    covered,
    judge,
    long_stop,
    show,
    standing_start,
    steady,
    streams_across,
    streets,
)

from convlstm_vo.geometry import se3
from convlstm_vo.models.checkpoint import load_checkpoint
from convlstm_vo.models.geometric import GeometricNet
from convlstm_vo.odometer import TrackedFrame, VisualOdometry
from convlstm_vo.sequences.base import Frame
from convlstm_vo.world import WorldSequence

LIMITS = {  # beyond what the network can do on every street; the benchmark says how far
    "start at 130 km/h, 5 Hz",  # 7.2 m: hardly a cell is in sight in both frames
    "every 3rd frame",  # asphalt that repeats itself: one street in three locks late or not at all
    "30 frames left out",  # one jump in three passes for a motion in its first frame
    "backwards, every 2nd frame",  # as every 3rd
    "behind a lorry on a motorway, 90 km/h",  # boxed in: two streets of three are flagged, not found
}
FAST = {"start at 130 km/h, 10 Hz", "believed 0, is 3.6 m"}  # hardly a tenth of the image is measured


@functools.cache
def net() -> GeometricNet:
    loaded = load_checkpoint()
    assert isinstance(loaded, GeometricNet)
    return loaded


def check(film: Film, *, out: float = 0.1, false_alarms: int = 0) -> Outcome:
    outcome = judge(film, show(net(), film))
    assert outcome.frames is not None and outcome.frames <= MOST_FRAMES
    assert outcome.lost == outcome.unseen  # said to be lost where it was
    assert outcome.false_alarms <= false_alarms
    assert outcome.out <= out
    assert outcome.r_degrees < 0.15
    return outcome


@pytest.mark.parametrize(
    "case, shots",
    [
        ("start at 130 km/h, 20 Hz", 8),
        ("start at 130 km/h, 10 Hz", 8),
        ("believed 0, is 1.5 m", 15),
        ("believed 2 m, is 0", 15),
        ("believed 0, is 3.6 m", 20),
        ("believed to turn by 4 degrees more", 15),
        ("another street", 18),
        ("every 2nd frame", 10),
        ("backwards", 10),
    ],
)
def test_locks(case, shots):
    check(CASES[case](streets(case, 1)[0]).until(shots), false_alarms=2 * (case in FAST))


def test_the_next_mark_of_the_road_does_not_pass_for_driving_backwards():
    """Boxed in by lorries, there is little but a dashed line; each taken for the next one ahead, they fit too."""
    check(CASES["behind a lorry on a motorway, 90 km/h"](FIRST_SEED).until(7))


def test_stands_and_drives_off():
    outcome = check(standing_start(FIRST_SEED, after_s=0.5).until(20))
    assert outcome.drift_m is not None and outcome.drift_m < 0.05


@pytest.mark.parametrize("frames", [3, 10])
def test_covered_lens_in_a_turn(frames):
    film = covered(streets("lens covered for 10 frames in a turn", 1)[0], frames)
    check(film.until(film.event + 6))


def test_does_not_drift_while_cars_cross():
    film = long_stop(FIRST_SEED, streams_across(11.0, 8.0), frames=14)
    outcome = check(film.until(film.event + 6))
    assert outcome.drift_m is not None and outcome.drift_m < 0.1


def test_without_a_road_a_search_is_not_repeated_with_each_frame(monkeypatch):
    """The search takes a dozen times as long as a frame."""
    ride = Ride(FIRST_SEED, steady(6.0), frames=14, kind="town")
    odometer, searches, search = VisualOdometry(net(), CAMERA), [], net().search
    monkeypatch.setattr(net(), "search", lambda view, memory: searches.append(1) or search(view, memory))
    for k, frame in enumerate(ride):
        image = frame.image.copy()
        image[98:] = 0
        tracked = odometer.track(Frame(image, frame.timestamp_s, k))
        assert k == 0 or not tracked.metric
    assert 1 <= len(searches) <= 3


@pytest.mark.parametrize("street, shows", [(FIRST_SEED + 1, True), (FIRST_SEED + 3, False)])
def test_asphalt_that_shows_nothing_gives_no_scale(street, shows):
    """The second street has a junction without texture: a guess there that is off by over a tenth says so."""
    film = covered(street, 3).until(8)
    tracked, metric = show(net(), film), []
    for k in range(1, 8):
        true, covariance = film.truth(k), tracked[k].covariance
        assert true is not None and covariance is not None
        way = float(np.linalg.norm(true[:3, 3]))
        error = way - float(np.linalg.norm(tracked[k].T_prev_curr[:3, 3]))
        assert abs(error) < 8 * np.sqrt(covariance[2, 2])
        assert abs(error) < 0.1 * way or not tracked[k].metric
        metric.append(tracked[k].metric)
    assert all(metric) if shows else (not metric[0] and sum(metric) <= 2)


def test_locked_means_five_good_frames():
    ride = WorldSequence(FIRST_SEED, frames=12, camera=CAMERA)
    film = Film([(ride, i) for i in range(12)])
    poses = ride.trajectory.T_world_camera
    motions = [np.eye(4), *se3.relative(poses[:-1], poses[1:])]
    motions[4] = motions[4] @ se3.matrix_from_motion(np.array([0, 0, 1.0, 0, 0, 0]))
    tracked = [TrackedFrame(k, 0.0, T, np.eye(4), 0.0) for k, T in enumerate(motions)]
    assert judge(film, tracked).frames == 5
    tracked[9] = TrackedFrame(9, 0.0, motions[4], np.eye(4), 0.0)
    assert judge(film, tracked).frames is None


@pytest.mark.slow
@pytest.mark.parametrize("case", [case for case in CASES if case not in LIMITS])
def test_all_cases(case):
    for seed in streets(case, 2):
        film = CASES[case](seed)
        outcome = check(film, out=0.3, false_alarms=8 * (case in FAST))
        assert outcome.drift_m is None or outcome.drift_m < 0.2
