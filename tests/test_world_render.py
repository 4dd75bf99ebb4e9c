"""The renderer's geometry: where a surface's texture, edges, depth and flow come out, against plain projection."""

from __future__ import annotations

import dataclasses
import functools

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from convlstm_vo.geometry.camera import Camera
from convlstm_vo.world import KITTI_CAMERA, WorldError, WorldSequence
from convlstm_vo.world.drives import Drive
from convlstm_vo.world.lens import Distortion, Lens
from convlstm_vo.world.meshes import Light, Mesh
from convlstm_vo.world.plan import StreetKind, make_plan
from convlstm_vo.world.render import Renderer
from convlstm_vo.world.scene import SceneBuilder
from convlstm_vo.world.streets import Street, make_street

CAMERA = KITTI_CAMERA.resized(height=94, width=310)


@pytest.fixture(scope="module", params=["town", "country", "motorway"])
def world(request: pytest.FixtureRequest) -> WorldSequence:
    return WorldSequence(11, frames=24, kind=request.param, camera=CAMERA)


@functools.cache
def any_street() -> Street:
    return make_street(0, make_plan(0, "country", 30.0), driven_m=5.0)


def plane_street(quad: NDArray, material: str, uvs: NDArray | None = None) -> Street:
    """A street that is a single quad before a black sky."""
    template = any_street()
    builder = SceneBuilder(Light(np.array([0.0, 0.0, -1.0]), 0.0, 1.0))
    builder.put(Mesh().add(quad, material, 1.0, uvs=uvs, normals=np.array([0.0, -1.0, 0.0])))
    weather = dataclasses.replace(template.weather, sky=np.zeros(4), haze=np.zeros(2))
    return dataclasses.replace(template, scene=builder.finished(1), weather=weather)


def standing(poses: NDArray) -> Drive:
    """A drive through given camera poses (n, 4, 4), with nobody else."""
    n = len(poses)
    return Drive(np.arange(n) * 0.1, poses, np.zeros(n), np.zeros(n), np.zeros((n, 0, 4, 4)), np.zeros((n, 4)))


def light_from(street: Street, poses: NDArray, camera: Camera) -> list[NDArray]:
    renderer = Renderer(street, standing(poses), Lens.of(camera, Distortion()))
    return [renderer.light(i).copy() for i in range(len(poses))]


def measured_shift(a: NDArray, b: NDArray) -> float:
    """How far b lies to the right of a, px: least squares on the gradient, repeated around the last answer."""
    inner, shift = np.s_[8:-8, 12:-12], 0.0
    for _ in range(8):
        M = np.array([[1, 0, shift], [0, 1, 0]])
        size = (b.shape[1], b.shape[0])
        back = cv2.warpAffine(b, M, size, flags=cv2.INTER_LANCZOS4 | cv2.WARP_INVERSE_MAP)
        slope = np.gradient(back, axis=1)[inner]
        shift += float(((a - back)[inner] * slope).sum() / (slope**2).sum())
    return shift


def test_texture_moves_as_far_as_the_camera_does() -> None:
    # A wall 10 m away with texture coarser than a pixel; the camera slides so that it moves 0.1 px at a time.
    camera = Camera(400.0, 400.0, 159.5, 59.5, height=120, width=320)
    wall = np.array([[[-20.0, 15, 10], [20, 15, 10], [20, -15, 10], [-20, -15, 10]]])
    uvs = np.array([[0.0, 0], [1, 0], [1, 0.75]])
    poses = np.tile(np.eye(4), (9, 1, 1))
    asked = np.arange(9) * 0.1
    poses[:, 0, 3] = -asked * 10 / 400
    images = light_from(plane_street(wall, "hedge", uvs * 1.5), poses, camera)
    found = np.array([measured_shift(images[0], image) for image in images])
    np.testing.assert_allclose(found, asked, atol=0.02)


@pytest.mark.parametrize("slope", [0.0, 0.13, -0.6])
def test_an_edge_lies_where_its_corners_project(slope: float) -> None:
    camera = Camera(300.0, 300.0, 99.5, 49.5, height=100, width=200)
    errors = []
    for offset in np.linspace(0, 0.03, 7):
        x0, x1 = 0.2 + offset - slope, 0.2 + offset + slope
        quad = np.array([[[-50.0, 10, 10], [x0 * 3, 10, 10], [x1 * 3, -10, 10], [-50, -10, 10]]])
        image = light_from(plane_street(quad, "white"), np.eye(4)[None], camera)[0]
        rows = np.arange(100)
        edge = 300 * np.interp((rows - 49.5) / 300 * 10, [-10, 10], [x1 * 3, x0 * 3]) / 10 + 99.5
        measured = (image / image.max()).sum(1) - 0.5
        errors.append(measured - edge)
    assert np.abs(np.mean(errors)) < 0.03
    assert np.abs(errors).max() <= 0.125 + 0.2 * abs(slope) + 1e-3  # four samples a pixel: an eighth of a pixel


def test_flow_is_what_depth_and_poses_say(world: WorldSequence) -> None:
    camera, poses = world.camera, world.trajectory.T_world_camera
    ys, xs = np.mgrid[: camera.height, : camera.width].astype(float)
    pixels = np.stack([xs, ys], -1)
    for i in (0, 9, 20):
        truth = world.ground_truth(i)
        near = np.isfinite(truth.depth) & ~truth.moving
        points = camera.rays(pixels[near]) * truth.depth[near][:, None]
        T = np.linalg.inv(poses[i + 1]) @ poses[i]
        moved = points @ T[:3, :3].T + T[:3, 3]
        ahead = moved[:, 2] > 0.5
        expected = camera.project(moved[ahead]) - pixels[near][ahead]
        np.testing.assert_allclose(truth.flow[near][ahead], expected, atol=0.01, rtol=1e-4)


def test_depth_of_the_next_frame_lies_where_flow_leads(world: WorldSequence) -> None:
    camera, poses = world.camera, world.trajectory.T_world_camera
    ys, xs = np.mgrid[: camera.height, : camera.width].astype(np.float32)
    for i in (0, 12):
        now, after = world.ground_truth(i), world.ground_truth(i + 1)
        T = np.linalg.inv(poses[i + 1]) @ poses[i]
        rays = camera.rays(np.stack([xs, ys], -1).astype(float))
        expected = (rays * np.where(np.isfinite(now.depth), now.depth, 1e6)[..., None] @ T[:3, :3].T + T[:3, 3])[
            ..., 2
        ]
        target = np.stack([xs, ys], -1) + now.flow
        inverse = cv2.remap(
            (1 / after.depth).astype(np.float32), target[..., 0], target[..., 1], cv2.INTER_LINEAR, borderValue=-1
        )
        visible = (inverse > 0) & ~now.moving & np.isfinite(now.depth)
        # An error of 0.1 px in a road's flow is an error in depth; bushes hide one another, so most must agree.
        agreement = np.abs(inverse * expected - 1)[visible]
        assert np.median(agreement) < 2e-3
        assert (agreement < 0.02).mean() > 0.7


def test_warping_the_next_frame_back_gives_this_one(world: WorldSequence) -> None:
    ys, xs = np.mgrid[: CAMERA.height, : CAMERA.width].astype(np.float32)
    for i in (3, 16):
        truth = world.ground_truth(i)
        a, b = (world._renderer.light(k).copy() for k in (i, i + 1))
        back = cv2.remap(b, xs + truth.flow[..., 0], ys + truth.flow[..., 1], cv2.INTER_CUBIC, borderValue=-1)
        use = (back >= 0) & ~truth.moving & np.isfinite(truth.depth)
        assert use.sum() > 3000
        warped, still = np.abs(a - back)[use], np.abs(a - b)[use]
        if world.drive.speed_m_s[i] > 3:
            assert np.median(warped) < 0.5 * np.median(still)


def test_movers_are_masked_and_flow_follows_them() -> None:
    world = WorldSequence(4, frames=40, kind="town", camera=CAMERA)
    seen = [world.ground_truth(i) for i in range(0, 39, 4)]
    assert any(truth.moving.sum() > 60 for truth in seen)
    assert all(not truth.moving[~np.isfinite(truth.depth)].any() for truth in seen)


def test_road_plane_agrees_with_depth() -> None:
    kinds: list[StreetKind] = ["town", "motorway"]
    for kind in kinds:
        world = WorldSequence(2, frames=12, kind=kind, camera=CAMERA)
        rays = CAMERA.rays(np.array([[155.0, 90.0], [150.0, 85.0]]))
        for i in (0, 8):
            truth, plane = world.ground_truth(i), world.road_plane[i]
            depth = truth.depth[[90, 85], [155, 150]]
            expected = -plane[3] / (rays @ plane[:3])
            if not truth.moving[[90, 85], [155, 150]].any():
                np.testing.assert_allclose(depth, expected, rtol=0.03)


def test_a_distorted_camera_sees_points_where_the_lens_bends_them() -> None:
    camera = KITTI_CAMERA.resized(height=94, width=310)
    straight = WorldSequence(3, frames=6, kind="town", camera=camera)
    bent = WorldSequence(3, frames=6, kind="town", camera=camera, distortion=Distortion(-0.25, 0.08))
    depth, flow = bent.ground_truth(2).depth, bent.ground_truth(2).flow
    poses = straight.trajectory.T_world_camera
    ys, xs = np.mgrid[10:84:7, 10:300:11].astype(float)
    pixels = np.stack([xs, ys], -1).reshape(-1, 2)
    truth = depth[pixels[:, 1].astype(int), pixels[:, 0].astype(int)]
    near = np.isfinite(truth) & ~bent.ground_truth(2).moving[pixels[:, 1].astype(int), pixels[:, 0].astype(int)]
    K, k = camera.matrix(), np.array([-0.25, 0.08, 0, 0, 0])
    rays = cv2.undistortPoints(pixels[near][:, None], K, k)[:, 0]  # OpenCV as the oracle
    points = np.c_[rays, np.ones(len(rays))] * truth[near][:, None]
    T = np.linalg.inv(poses[3]) @ poses[2]
    expected, _ = cv2.projectPoints(points @ T[:3, :3].T + T[:3, 3], np.zeros(3), np.zeros(3), K, k)
    got = flow[pixels[near][:, 1].astype(int), pixels[near][:, 0].astype(int)]
    np.testing.assert_allclose(got, expected[:, 0] - pixels[near], atol=0.02)
    # And its picture is the straight one, bent.
    grid = np.stack(np.meshgrid(np.arange(310.0), np.arange(94.0)), -1)
    places = camera.project(
        np.concatenate([Distortion(-0.25, 0.08).straighten(camera.rays(grid)[..., :2]), np.ones((94, 310, 1))], -1)
    )
    again = cv2.remap(
        straight._renderer.light(2), *places.astype(np.float32).transpose(2, 0, 1), cv2.INTER_CUBIC, borderValue=-1
    )
    inside = (places > 3).all(-1) & (places < [306, 90]).all(-1)
    assert np.median(np.abs(again - bent._renderer.light(2))[inside]) < 0.01


def test_a_lens_that_folds_the_image_is_refused() -> None:
    with pytest.raises(WorldError, match="folds"):
        WorldSequence(0, distortion=Distortion(-2.0, 0.0))
