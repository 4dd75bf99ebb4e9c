"""Roads that rise and fall as KITTI's do: how sharply, and that nothing else is changed by it."""

from pathlib import Path

import numpy as np
import pytest

from convlstm_vo.geometry.camera import Camera
from convlstm_vo.geometry.trajectory import read_kitti
from convlstm_vo.world import WorldSequence, make_plan

SMALL = Camera(181.8, 181.8, 159.5, 47.5, height=96, width=320)
KINDS = ("town", "country", "motorway")
TRUTH = Path(__file__).parents[2] / "shared" / "trajectories" / "ground_truth"


def curvature(places) -> np.ndarray:
    """Of heights along a path (n, 3), over 40 m: second differences, 1/m."""
    s = np.concatenate([[0.0], np.cumsum(np.linalg.norm(np.diff(places, axis=0), axis=1))])
    moved = np.concatenate([[True], np.diff(s) > 0.05])
    height = np.interp(np.arange(0.0, s[-1], 5.0), s[moved], -places[moved, 1])
    # Means over 20 m, 20 m apart: what a GPS is unsure of from metre to metre counts little.
    mean = np.convolve(height, np.ones(4) / 4, "valid")
    return (mean[8:] - 2 * mean[4:-4] + mean[:-8]) / 400.0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(4))
def test_the_map_is_the_same_and_junctions_are_level(kind, seed) -> None:
    gentle, plan = make_plan(seed, kind, 600), make_plan(seed, kind, 600, hilly=True)
    for name in ("s", "kappa", "psi", "x", "z"):
        np.testing.assert_array_equal(getattr(gentle.path, name), getattr(plan.path, name))
    slope = np.diff(plan.path.y) / 0.5
    assert 0 < np.abs(slope).max() < 0.12
    assert np.abs(np.diff(slope)).max() < 0.01  # in half a metre: no steps
    for begin, end in plan.turns:
        assert not slope[(plan.path.s[1:] > begin) & (plan.path.s[1:] < end)].any()


@pytest.mark.skipif(not TRUTH.is_dir(), reason="needs ../shared/trajectories")
def test_it_rises_and_falls_as_kittis_roads_do_and_gentle_ones_do_not() -> None:
    def amounts(paths) -> np.ndarray:
        return np.percentile(np.abs(np.concatenate([curvature(p) for p in paths])), [75, 90, 97])

    def drawn(hilly: bool) -> np.ndarray:
        lines = [make_plan(100 + k, KINDS[k % 3], 600, hilly=hilly).path for k in range(60)]
        return amounts([np.stack([line.x, line.y, line.z], 1) for line in lines])

    kitti = amounts([read_kitti(path).positions_xyz for path in sorted(TRUTH.glob("[01][0-9].txt"))])
    np.testing.assert_allclose(drawn(True), kitti, rtol=0.35)
    assert (drawn(False) < 0.75 * kitti).all()


def test_the_car_stays_on_its_road() -> None:
    drive = WorldSequence(5_000_003, frames=40, kind="country", camera=SMALL, hilly=True, cross_slope=True)
    path = drive.plan.path
    for k in range(0, 40, 8):
        T = drive.drive.T_street_camera[k]
        nearest = np.hypot(path.x - T[0, 3], path.z - T[2, 3]).argmin()
        assert path.y[nearest] - T[1, 3] == pytest.approx(drive.mount.height_m, abs=0.2)


def test_the_option_changes_what_is_seen() -> None:
    gentle, hilly = (WorldSequence(3, frames=4, kind="country", camera=SMALL, hilly=h) for h in (False, True))
    np.testing.assert_array_equal(gentle.drive.road_s, hilly.drive.road_s)
    assert (gentle[2].image != hilly[2].image).mean() > 0.02
