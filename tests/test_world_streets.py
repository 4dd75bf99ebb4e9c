"""What stands where and how the car moves: nothing in its way, and only what a car can do."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from convlstm_vo.geometry.trajectory import read_kitti
from convlstm_vo.world import KITTI_CAMERA, Mount, Sensor, WorldSequence, make_drive
from convlstm_vo.world import plan as plan_module
from convlstm_vo.world.bank import bank, halved, ripmap
from convlstm_vo.world.drives import Drive
from convlstm_vo.world.exact import bell, product, relative_to_first, rotation, sincos
from convlstm_vo.world.plan import make_plan
from convlstm_vo.world.streets import Street

KINDS = ("town", "country", "motorway")
GROUND_TRUTH = Path(__file__).parents[2] / "shared" / "trajectories" / "ground_truth"


@pytest.fixture(scope="module", params=KINDS)
def ride(request: pytest.FixtureRequest) -> tuple[Street, Drive]:
    world = WorldSequence(21, frames=120, kind=request.param)
    return dataclasses.replace(world.street, plan=world.plan), world.drive


def rates_deg(poses: NDArray) -> NDArray:
    """Yaw, pitch, roll (n - 1, 3) a frame."""
    R = np.swapaxes(poses[:-1, :3, :3], 1, 2) @ poses[1:, :3, :3]
    return np.degrees(Rotation.from_matrix(R).as_rotvec())[:, [1, 0, 2]]


def test_sine_and_cosine_are_those_of_the_library() -> None:
    for angle in np.linspace(-12, 12, 997):
        assert sincos(float(angle)) == pytest.approx((math.sin(angle), math.cos(angle)), abs=4e-15)


def test_rotations_are_yaw_then_pitch_then_roll() -> None:
    for yaw, pitch, roll in [(0.3, 0.02, -0.1), (-2.0, -0.3, 0.2)]:
        expected = Rotation.from_euler("YXZ", [yaw, pitch, roll]).as_matrix()
        np.testing.assert_allclose(rotation(yaw, pitch, roll), expected, atol=1e-15)
    rng = np.random.default_rng(0)
    A, B = rng.normal(size=(5, 3, 3)), rng.normal(size=(5, 3, 3))
    np.testing.assert_allclose(product(A, B), A @ B, atol=1e-14)


def test_bell_is_nearly_normal() -> None:
    x = bell(np.random.default_rng(0), 20000)
    assert abs(x.mean()) < 0.03 and abs(x.std() - 1) < 0.02 and np.abs(x).max() < 3.5


def test_a_ripmap_holds_the_means_of_its_picture() -> None:
    picture = np.random.default_rng(0).integers(0, 255, (16, 32)).astype(np.uint8)
    block = ripmap(picture)
    assert (halved(block, 0) == picture).all()
    np.testing.assert_allclose(halved(block, 2), picture.reshape(4, 4, 8, 4).mean((1, 3)), atol=1.0)
    wide = block[32 - 16 :, 0:32][:8]  # halved once along v only
    np.testing.assert_allclose(wide, picture.reshape(8, 2, 32).mean(1), atol=1.0)


def test_pictures_fill_their_range() -> None:
    pictures = bank()
    assert len(pictures.names) == len(pictures.textures) == len(pictures.means)
    assert len(pictures.atlas) == (4 << (pictures.textures[:, 1] + pictures.textures[:, 2])).sum()


def test_nothing_stands_in_the_cars_way(ride: tuple[Street, Drive]) -> None:
    street, drive = ride
    scene, path = street.scene, street.plan.path
    quads = scene.quads[: scene.ranges[scene.movers_from, 0]].astype(float)
    s = np.arange(drive.road_s[0], drive.road_s[-1] + 6, 0.5)
    x, y, z, _ = path.at(s)
    for corner in (quads[:, 0], quads[:, 2], quads.mean(1)):
        for k in range(len(s)):
            near = (corner[:, 0] - x[k]) ** 2 + (corner[:, 2] - z[k]) ** 2 < 0.95**2
            above = y[k] - corner[near, 1]
            assert not ((above > 0.25) & (above < 2.0)).any()


def test_the_car_moves_as_cars_do(ride: tuple[Street, Drive]) -> None:
    street, drive = ride
    poses = drive.T_street_camera
    R = poses[:, :3, :3]
    np.testing.assert_allclose(R @ np.swapaxes(R, 1, 2), np.tile(np.eye(3), (len(R), 1, 1)), atol=1e-14)
    assert (drive.speed_m_s >= 0).all() and drive.speed_m_s.max() < 131 / 3.6
    assert (np.diff(drive.road_s) >= -1e-9).all()
    assert np.abs(np.diff(drive.speed_m_s)).max() < 0.6  # m/s a frame at 10 Hz
    rates = rates_deg(poses)
    assert np.abs(rates[:, 0]).max() < 6.5 and np.abs(rates[:, 1:]).max() < 2.0
    _, y, _, _ = street.plan.path.at(drive.road_s)
    assert np.abs((y - poses[:, 1, 3]) - 1.65).max() < 0.35


def test_the_camera_hangs_where_it_is_mounted() -> None:
    plan = make_plan(21, "country", 60.0)
    low, high = (make_drive(21, plan, frames=20, mount=Mount(h, 0.02, -0.03, 0.01)) for h in (1.0, 3.0))
    np.testing.assert_allclose(high.road_plane[:, 3] - low.road_plane[:, 3], 2.0, atol=1e-9)
    plain = make_drive(21, plan, frames=20)
    turn = np.swapaxes(plain.T_street_camera[:, :3, :3], 1, 2) @ low.T_street_camera[:, :3, :3]
    np.testing.assert_allclose(turn, np.tile(rotation(0.02, -0.03, 0.01), (20, 1, 1)), atol=1e-12)
    normals = low.road_plane[:, :3]
    np.testing.assert_allclose(np.linalg.norm(normals, axis=1), 1.0, atol=1e-12)
    assert (normals[:, 1] < -0.9).all()  # up is -y


def test_seeds_bring_stops_turns_and_speed() -> None:
    drives = [WorldSequence(seed, frames=150).drive for seed in range(16)]
    speeds = np.concatenate([drive.speed_m_s for drive in drives])
    assert speeds.min() < 0.05 and speeds.max() > 15
    yaw = np.concatenate([rates_deg(drive.T_street_camera)[:, 0] for drive in drives])
    assert yaw.min() < -2 and yaw.max() > 2
    fast = WorldSequence(1, frames=60, kind="motorway", fps=30.0).drive
    assert np.diff(fast.timestamps_s) == pytest.approx(1 / 30)


def test_junction_turns_reach_five_degrees_a_frame() -> None:
    sharpest = [
        np.abs(rates_deg(WorldSequence(seed, frames=250, kind="town").drive.T_street_camera)[:, 0]).max()
        for seed in range(60, 80)
    ]
    assert 4.0 < max(sharpest) < 6.0
    tight = max(float(np.abs(make_plan(seed, "town", 600.0).path.kappa).max()) for seed in range(6))
    assert tight > 1 / 7.5  # a corner of 7.5 m at 6.5 m/s is 5 degrees a frame


@pytest.mark.skipif(not GROUND_TRUTH.is_dir(), reason="KITTI's trajectories are not here")
def test_long_paths_do_not_pass_through_roads(monkeypatch: pytest.MonkeyPatch) -> None:
    def largest_step() -> float:
        """Between the path and roads that it meets far from where it leads along them: the largest."""
        plan = WorldSequence(5_000_007, frames=1000).plan
        steps = [0.0]
        for leg in plan.legs:
            for s in np.arange(0.0, float(plan.path.s[-1]), 5.0):
                x, y, z, _ = (float(v) for v in plan.path.at(s))
                away = np.hypot(leg.line.x - x, leg.line.z - z)
                if not leg.start_s - 30 <= s <= leg.end_s + 30 and away.min() < leg.half_width_m + 5:
                    steps.append(abs(y - float(leg.line.y[away.argmin()])))
        return max(steps)

    assert largest_step() < 0.15
    monkeypatch.setattr(plan_module, "_MOST_DRAWS", 0)
    assert largest_step() > 0.5


def test_motion_is_distributed_like_kittis() -> None:
    world = np.concatenate([rates_deg(WorldSequence(k, frames=300).drive.T_street_camera) for k in range(24)])
    real = np.concatenate(
        [rates_deg(read_kitti(GROUND_TRUTH / f"{name}.txt").T_world_camera) for name in ("00", "05", "07", "09")]
    )
    for axis in (1, 2):  # pitch and roll rates
        np.testing.assert_allclose(*(np.percentile(np.abs(x[:, axis]), [50, 95]) for x in (world, real)), rtol=0.45)
    assert 0.2 < np.percentile(np.abs(world[:, 0]), 95) / np.percentile(np.abs(real[:, 0]), 95) < 2


def test_other_road_users_keep_to_the_road(ride: tuple[Street, Drive]) -> None:
    street, drive = ride
    at = drive.T_street_mover[:, :, :3, 3]
    here = at[..., 1] < 5e3  # the others are parked far under the ground
    assert here.any()
    clearance = street.plan.clearance_m(at[here][:, 0], at[here][:, 2])
    assert clearance.max() < 2.5
    steps = np.linalg.norm(np.diff(at, axis=0), axis=-1)
    gone = np.linalg.norm(at[:-1] - drive.T_street_camera[:-1, None, :3, 3], axis=-1)
    jumps = (steps > 6.0) & here[:-1] & here[1:]
    assert (gone[jumps] > 20.0).all()  # nobody jumps in sight


def test_looks_change_pictures_but_not_labels() -> None:
    camera = KITTI_CAMERA.resized(height=94, width=310)
    look = Sensor(gamma=1.0, blur_px=0.8, noise=4, key=60, vignetting=0.4, drift_stops=0.3, shutter=0.3, jpeg=50)
    plain, poor = (WorldSequence(5, frames=8, kind="town", camera=camera, sensor=s) for s in (None, look))
    (a, truth_a), (b, truth_b) = (world.frame_and_truth(3) for world in (plain, poor))
    np.testing.assert_array_equal(truth_a.depth, truth_b.depth)
    np.testing.assert_array_equal(truth_a.flow, truth_b.flow)
    assert a.image.mean() > b.image.mean() + 15
    assert (plain.trajectory.T_world_camera == poor.trajectory.T_world_camera).all()
    assert WorldSequence(7, sensor="random").sensor != WorldSequence(8, sensor="random").sensor


def test_random_mountings_are_possible_ones() -> None:
    mounts = [WorldSequence(seed, mount="random").mount for seed in range(40)]
    heights = [mount.height_m for mount in mounts]
    assert min(heights) >= 1.0 and max(heights) <= 3.0 and len(set(heights)) == 40
    assert max(abs(mount.pitch) for mount in mounts) < math.radians(4)


def test_first_pose_is_the_identity() -> None:
    poses = relative_to_first(WorldSequence(3, frames=5, kind="country").drive.T_street_camera)
    assert (poses[0] == np.eye(4)).all()
    np.testing.assert_allclose(np.linalg.norm(poses[:, :3, 3], axis=1)[1:] > 0, True)
