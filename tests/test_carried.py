"""Depth that goes from frame to frame."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from convlstm_vo.geometry import se3
from convlstm_vo.models import carried
from convlstm_vo.models.scene import canyon_inverse_depth, cell_rays, flow_of, flow_to_rays, seen_after
from convlstm_vo.models.solver import Solution, residuals

K = torch.tensor([[363.6, 360.0, 319.5, 95.5]])
GRID = cell_rays(K, 48, 160)


def plane(rays: torch.Tensor) -> torch.Tensor:
    """Inverse depth of one that leans to the right and rises ahead."""
    return 0.2 + 0.1 * rays[:, 0] + 0.3 * rays[:, 1]


def test_depths_are_those_of_the_newer_frame():
    rays, slopes = GRID[:, :, ::2, ::2], torch.tensor([[0.01, -0.02]])
    motion = torch.tensor([[0.02, -0.01, 0.9, 0.002, 0.03, -0.004]])
    inverse_depth = canyon_inverse_depth(rays, slopes)
    seen = flow_to_rays(flow_of(rays, inverse_depth, motion, K), rays, K).flatten(2)
    solution = Solution(motion, slopes, torch.zeros(1, 3), torch.eye(11)[None])
    r = residuals(rays.flatten(2), seen, motion, slopes)
    told = torch.full((1, seen.shape[2]), 1e6)
    told[:, ::7] = 0  # what was not measured is not known
    points = carried.passed_on(rays.flatten(2), seen, solution, r, told)
    depth = seen_after(rays, inverse_depth, se3.matrix_from_motion(motion))[:, 2].flatten(1)
    expected = inverse_depth.flatten(1) / depth
    assert (points[:, 3, ::7] == 0).all()
    clear = (points[:, 3] * expected.square() > 100) & (seen[:, 0].abs() < 1)  # a tenth of it
    assert clear.float().mean() > 0.5
    torch.testing.assert_close(points[:, 2][clear], expected[clear], rtol=0.01, atol=0)
    assert (points[:, :2] == seen).all()


@given(st.floats(-0.2, 0.2), st.floats(-0.2, 0.2), st.floats(-0.1, 0.1))
def test_in_other_axes_points_are_where_they_were(x, y, z):
    rotation = se3.matrix_from_motion(torch.tensor([[0, 0, 0, x, y, z]]))[:, :3, :3]
    rays = GRID[:, :, ::8, ::8].flatten(2)
    points = torch.cat([rays[:, :2], plane(rays)[:, None], torch.full_like(rays[:, :1], 400.0)], 1)
    there = carried.turned(points, rotation)
    solid = rotation @ (rays / points[:, 2:3])
    found = torch.cat([there[:, :2], torch.ones_like(rays[:, :1])], 1) / there[:, 2:3]
    torch.testing.assert_close(found, solid, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(carried.turned(there, rotation.mT), points, rtol=1e-3, atol=1e-4)
    relative = points[:, 3] * points[:, 2].square()  # information on the depth's logarithm
    torch.testing.assert_close(there[:, 3] * there[:, 2].square(), relative, rtol=1e-3, atol=1e-3)


def scattered(count: int) -> torch.Tensor:
    """Points (1, 4, count) all over the image and beyond its edges, without depth."""
    generator = torch.Generator().manual_seed(0)
    at = torch.rand(1, 2, count, generator=generator) * 1.2 - 0.1
    at = (at * torch.tensor([640.0, 192.0])[:, None] - K[:, 2:, None]) / K[:, :2, None]
    return torch.cat([at, torch.zeros(1, 1, count), torch.full((1, 1, count), 1e4)], 1)


def test_a_map_of_a_plane_is_the_plane():
    points = scattered(3000)
    points[:, 2] = plane(points[:, :2])
    depth = carried.spread(points, K, 48, 160)
    found = carried.at_cells(depth, GRID, K)
    assert (found == depth).all()  # cells are the map's nodes
    known = found[:, 1] > 1000
    assert known.float().mean() > 0.9
    torch.testing.assert_close(found[:, 0][known], plane(GRID)[known], rtol=0, atol=0.01)
    off = (found[:, 0] / plane(GRID) - 1)[known]
    assert off.abs().mean() < 0.01 and off.mean().abs() < 1e-3


def test_nothing_is_known_between_near_and_far():
    points = scattered(3000)
    near = points[:, 0] < 0
    points[:, 2] = torch.where(near, 0.5, 0.1)
    depth = carried.spread(points, K, 48, 160)
    column = 79  # the principal point's
    assert (depth[0, 1, :, column] < 100).float().mean() > 0.7
    for side, value in ((slice(0, column - 4), 0.5), (slice(column + 5, 160), 0.1)):
        known = depth[0, 1, :, side] > 1000
        assert known.float().mean() > 0.9
        torch.testing.assert_close(depth[0, 0, :, side][known], torch.full((int(known.sum()),), value))


def test_where_no_point_is_nothing_is_known():
    points = scattered(10)
    depth = carried.spread(points, K, 48, 160)
    assert torch.isfinite(depth).all() and (depth[:, 1] == 0).float().mean() > 0.9
    assert (carried.spread(points * torch.tensor([1, 1, 1, 0])[:, None], K, 48, 160)[:, 1] == 0).all()


def test_the_fused_loop_draws_the_same_map(by_torch):
    points = torch.cat([scattered(2000), scattered(2000).flip(2)])
    points[:, 2] = plane(points[:, :2]) + 0.1 * (points[:, 0] > 0.1)
    points[:, 3, ::3] = 0
    points[:, 3, 1::3] = 30
    rotation = se3.matrix_from_motion(torch.tensor([[0, 0, 0, 0.02, -0.05, 0.01]] * 2))[:, :3, :3]
    found = carried.mapped(points, rotation, K.expand(2, 4), 48, 160)
    expected = by_torch(lambda: carried.mapped(points, rotation, K.expand(2, 4), 48, 160))
    known = expected[:, 1] > 1
    assert known.float().mean() > 0.7
    torch.testing.assert_close(found[:, 0][known], expected[:, 0][known], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found[:, 1][known], expected[:, 1][known], rtol=0.02, atol=1)
