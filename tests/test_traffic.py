"""Heavy traffic: where it drives, that it moves, that it is the same each time."""

import numpy as np
import pytest

from convlstm_vo.geometry.camera import Camera
from convlstm_vo.world import (
    SimulateConfig,
    WorldError,
    WorldSequence,
    heavy_traffic,
    make_drive,
    make_plan,
    simulate,
)
from convlstm_vo.world.drives import AXLE_TO_CAMERA_M
from convlstm_vo.world.meshes import lorry
from convlstm_vo.world.plan import generator

SMALL = Camera(181.8, 181.8, 159.5, 47.5, height=96, width=320)


@pytest.mark.parametrize("kind", ["town", "country", "motorway"])
@pytest.mark.parametrize("seed", range(4))
def test_nobody_drives_through_the_camera_or_through_each_other(kind, seed) -> None:
    plan = make_plan(seed, kind, 400)
    drive = make_drive(seed, plan, frames=60)
    others = heavy_traffic(seed)(plan, drive)
    boxes = []
    for body, T in others:
        corners = np.concatenate(body.quads).reshape(-1, 3)
        boxes.append((corners.min(0), corners.max(0)))
        camera = np.einsum("nji,nj->ni", T[:, :3, :3], drive.T_street_camera[:, :3, 3] - T[:, :3, 3])
        inside = (np.abs(camera[:, 0]) < boxes[-1][1][0] + 0.3) & (
            np.abs(camera[:, 2]) < boxes[-1][1][2] + AXLE_TO_CAMERA_M
        )
        assert not inside.any()
    for a, (_, T) in enumerate(others):
        for b in range(a):
            apart = np.einsum("nji,nj->ni", T[:, :3, :3], others[b][1][:, :3, 3] - T[:, :3, 3])
            aside = np.abs(apart[:, 0]) > 0.8 * (boxes[a][1][0] + boxes[b][1][0])
            along = np.abs(apart[:, 2]) > 0.8 * (boxes[a][1][2] + boxes[b][1][2])
            assert (aside | along).mean() > 0.95


def test_it_moves_and_fills_the_picture() -> None:
    shares = []
    for seed in range(6):
        drive = WorldSequence(seed, frames=8, kind="town", camera=SMALL, traffic="heavy")
        shares.append(drive.ground_truth(4).moving.mean())
    assert np.median(shares) > 0.08


def test_the_same_seed_gives_the_same_traffic() -> None:
    a, b = (WorldSequence(3, frames=4, kind="town", camera=SMALL, traffic="heavy") for _ in range(2))
    usual = WorldSequence(3, frames=4, kind="town", camera=SMALL)
    np.testing.assert_array_equal(a[2].image, b[2].image)
    np.testing.assert_array_equal(a.drive.T_street_mover, b.drive.T_street_mover)
    np.testing.assert_array_equal(a.trajectory.T_world_camera, usual.trajectory.T_world_camera)
    assert (a[2].image != usual[2].image).mean() > 0.02


def test_unknown_traffic_is_refused() -> None:
    with pytest.raises(WorldError, match="'jam': must be one of usual, heavy"):
        WorldSequence(3, frames=4, camera=SMALL, traffic="jam")


def test_a_folder_is_not_continued_with_other_traffic(tmp_path) -> None:
    options = {"out": tmp_path, "frames": 1, "height": 96, "width": 320, "workers": 1}
    simulate(SimulateConfig(traffic="heavy", **options), progress=False)
    with pytest.raises(WorldError, match="other options"):
        simulate(SimulateConfig(**options), progress=False)


def test_an_empty_road() -> None:
    drive = WorldSequence(3, frames=4, kind="town", camera=SMALL, traffic=lambda plan, drive: [])
    assert drive.drive.T_street_mover.shape == (4, 0, 4, 4)
    assert not drive.ground_truth(2).moving.any()


def test_lorries_are_as_large_as_lorries() -> None:
    for seed in range(20):
        corners = np.concatenate(lorry(generator(seed, 0)).quads).reshape(-1, 3)
        width, height, length = np.ptp(corners, axis=0)
        assert 2.2 < width < 2.75
        assert 2.2 < height < 4.1
        assert 6.0 <= length < 11.2
