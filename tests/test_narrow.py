"""Lanes between kerbs: that the car fits between them, and that what rises beside it is seen where it is told."""

import numpy as np
import pytest

from convlstm_vo.geometry.camera import Camera
from convlstm_vo.sequences.kitti import KittiSequence
from convlstm_vo.world import SimulateConfig, WorldError, WorldSequence, make_plan, simulate

CAMERA = Camera(363.6, 363.6, 319.5, 95.5, height=192, width=640)
HALF_CAR_M = 0.95


def seen_beside(drive: WorldSequence, frame: int) -> tuple[np.ndarray, np.ndarray]:
    """Metres to the right of the camera, and above the road's plane, of what stands 4 to 9 m ahead."""
    truth, plane, K = drive.ground_truth(frame), drive.road_plane[frame], CAMERA
    rows, columns = np.mgrid[: K.height, : K.width]
    rays = np.stack([(columns - K.cx) / K.fx, (rows - K.cy) / K.fy, np.ones_like(rows)], -1)
    points = rays * truth.depth[..., None]
    near = (truth.depth > 4) & (truth.depth < 9) & ~truth.moving
    return points[near][:, 0], (points[near] @ plane[:3]) + plane[3]


@pytest.mark.parametrize("kind", ["town", "country"])
@pytest.mark.parametrize("seed", range(5))
def test_the_way_is_the_same_and_the_car_fits_between_the_kerbs(kind, seed) -> None:
    usual, plan = make_plan(seed, kind, 600), make_plan(seed, kind, 600, narrow=True)
    for name in ("s", "x", "y", "z", "psi"):
        np.testing.assert_array_equal(getattr(usual.path, name), getattr(plan.path, name))
    for leg in plan.legs:
        assert leg.kerbs is not None
        assert 1.3 < plan.lane_m - leg.kerbs.island_m < 2.5
        assert 1.3 < leg.half_width_m - plan.lane_m < 3.7
        assert 0.03 < leg.kerbs.heights_m[0] < 0.17
        assert all(0.03 < height < 0.17 or height == 0 for height in leg.kerbs.heights_m[1:])
    # At junctions, too, its middle stays on asphalt, though it cuts corners.
    for (begin, end), (x, _, z, half) in zip(plan.turns, plan.junctions, strict=True):
        turning = (plan.path.s > begin) & (plan.path.s < end)
        x_car, z_car = plan.path.x[turning], plan.path.z[turning]
        assert ((np.hypot(x_car - x, z_car - z) < half) | (plan.clearance_m(x_car, z_car) < 0)).all()


def test_a_motorway_stays_as_it_is() -> None:
    usual, plan = make_plan(2, "motorway", 300), make_plan(2, "motorway", 300, narrow=True)
    assert [leg.kerbs for leg in plan.legs] == [None] * len(plan.legs)
    assert [leg.half_width_m for leg in usual.legs] == [leg.half_width_m for leg in plan.legs]
    assert usual.lane_m == plan.lane_m


@pytest.mark.parametrize("seed", [5_190_000, 5_190_005, 5_190_009])
def test_the_island_is_seen_where_it_is_told(seed) -> None:
    drive = WorldSequence(seed, frames=30, kind="country", camera=CAMERA, narrow=True)
    leg, lane = drive.plan.legs[0], drive.plan.lane_m
    assert leg.kerbs is not None
    checked = 0
    for frame in (0, 16):
        aside, above = seen_beside(drive, frame)
        on_lane = np.abs(aside) < 1.1
        assert on_lane.sum() > 100
        assert np.abs(above[on_lane]).max() < 0.04
        middle = np.abs(aside + lane) < 0.2
        crest = leg.kerbs.heights_m[0] + leg.kerbs.rises_m[0]
        if middle.sum() > 20:
            assert np.median(above[middle]) - np.median(above[on_lane]) == pytest.approx(crest, abs=0.03)
            checked += 1
    assert checked


@pytest.mark.parametrize("seed", [6, 14, 20])  # roads wide enough to park on, but for our lane
def test_nobody_parks_in_our_way(seed) -> None:
    drive = WorldSequence(seed, frames=60, kind="town", camera=CAMERA, narrow=True, cross_slope=True)
    for frame in range(0, 60, 12):
        aside, above = seen_beside(drive, frame)
        ahead = np.abs(aside) < HALF_CAR_M
        assert above[ahead].max() < 0.3


def test_simulate_has_the_option(tmp_path) -> None:
    config = SimulateConfig(
        out=tmp_path / "a", frames=2, seed=3, road="town", height=96, width=320, workers=1, narrow=True
    )
    simulate(config, progress=False)
    usual, narrow = (
        WorldSequence(3, frames=2, kind="town", camera=config.camera, narrow=value) for value in (False, True)
    )
    np.testing.assert_array_equal(usual.drive.road_s, narrow.drive.road_s)
    assert (usual[1].image != narrow[1].image).mean() > 0.02
    np.testing.assert_array_equal(KittiSequence(tmp_path / "a", "00")[1].image, narrow[1].image)
    with pytest.raises(WorldError, match="other options"):  # a folder holds one kind of street
        simulate(
            SimulateConfig(out=tmp_path / "a", frames=2, seed=3, road="town", height=96, width=320, workers=1),
            progress=False,
        )
