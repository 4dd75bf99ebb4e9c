"""The solver finds the motion and the road that made the flow, and its derivatives are right."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from convlstm_vo.geometry import se3
from convlstm_vo.models.scene import (
    canyon_inverse_depth,
    cell_rays,
    flow_of,
    flow_to_rays,
    road_inverse_depth,
    road_normal,
    road_slopes,
)
from convlstm_vo.models.solver import (
    STILL,
    Carried,
    Priors,
    Solution,
    _moved,
    depth_derivatives,
    residuals,
    shape_derivatives,
    solve,
)

K = torch.tensor([[363.6, 363.6, 319.5, 95.5]], dtype=torch.float64)
RAYS = cell_rays(K, 48, 160)[:, :, ::2, ::2]
small = st.floats(-1, 1)


def scene(motion: list[float], slopes: list[float]) -> tuple[torch.Tensor, ...]:
    """Rays, where they are seen, and which lie on the road, of a street canyon."""
    m, s = torch.tensor([motion], dtype=torch.float64), torch.tensor([slopes], dtype=torch.float64)
    rho = canyon_inverse_depth(RAYS, s)
    seen = flow_to_rays(flow_of(RAYS, rho, m, K), RAYS, K)
    road = (rho - road_inverse_depth(RAYS, s)).abs() < 1e-9
    inside = (seen[:, 0].abs() < 0.9) & (seen[:, 1].abs() < 0.27)
    return RAYS.flatten(2), seen.flatten(2), m, s, road.flatten(1).double(), inside.flatten(1).double()


def vague() -> Priors:
    road = torch.diag(torch.tensor([1.0, 1.0, 1e8, 1e8, 1e8], dtype=torch.float64))[None]  # a plane
    zero = torch.zeros(1, 6, dtype=torch.float64)
    climb_sd = torch.full((1,), 5.0, dtype=torch.float64)
    return Priors(zero, zero + 1e-3, zero[:, :2], zero[:, :3], road, climb_sd, torch.full((1,), STILL))


def find(motion: list[float], slopes: list[float], steps: int = 10) -> tuple[Solution, torch.Tensor, torch.Tensor]:
    rays, seen, m, s, road, inside = scene(motion, slopes)
    certain = inside * (363.6 / 0.1) ** 2
    start = m.clone()
    start[:, :3] *= 0.8
    start[:, 3:] = 0
    return solve(rays, seen, certain, certain * road, vague(), (start, s * 0, m[:, :3] * 0), steps=steps)[0], m, s


@settings(max_examples=15)
@given(small, small, small, small, small, st.floats(0.4, 2.0), small, small)
def test_finds_the_motion_and_the_road(x, y, wx, wy, wz, z, a, b):
    found, motion, slopes = find([0.03 * x, 0.02 * y, z, 0.01 * wx, 0.04 * wy, 0.01 * wz], [0.02 * a, 0.02 * b])
    torch.testing.assert_close(found.motion, motion, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(found.slopes, slopes, atol=2e-3, rtol=0)


def test_standing_still_is_a_solution():
    found, motion, _ = find([0.0, 0.0, 1e-4, 0.0, 0.01, 0.0], [0.0, 0.01])
    torch.testing.assert_close(found.motion, motion, atol=2e-4, rtol=0)


def test_driving_backwards_is_found():
    found, motion, _ = find([0.0, 0.0, -0.7, 0.0, 0.01, 0.0], [0.0, 0.01])
    torch.testing.assert_close(found.motion, motion, atol=1e-3, rtol=0)


def test_no_misfit_at_the_truth():
    rays, seen, motion, slopes, road, inside = scene([0.02, -0.01, 0.8, 0.002, 0.02, -0.003], [0.01, -0.02])
    r = residuals(rays, seen, motion, slopes)
    assert float((r.across * inside).abs().max()) < 1e-8
    assert float((r.along * inside * road).abs().max()) < 1e-5


@pytest.mark.parametrize("which", [0, 1, 2, 3, 4, 5, 6, 7])
def test_derivatives_along_the_line_on_the_road(which):
    rays, seen, motion, slopes, road, inside = scene([0.02, -0.01, 0.8, 0.002, 0.02, -0.003], [0.01, -0.02])
    before = residuals(rays, seen, motion, slopes)
    step = 1e-6
    delta = torch.zeros(1, 9, dtype=torch.float64)
    delta[:, which] = step
    moved = _moved(Solution(motion, slopes, motion[:, :3] * 0, delta), delta, delta)
    after = residuals(rays, seen, moved.motion, moved.slopes)
    kept = (road * inside)[0] > 0
    numeric = ((after.along - before.along) / step)[0][kept]
    analytic = before.J_along[0, which][kept]
    torch.testing.assert_close(numeric, analytic, atol=1e-4, rtol=1e-2)


def test_outliers_are_left_out():
    rays, seen, motion, slopes, road, inside = scene([0.0, 0.0, 0.9, 0.0, 0.01, 0.0], [0.0, 0.0])
    generator = torch.Generator().manual_seed(0)
    wrong = torch.rand(seen.shape[2], generator=generator) < 0.2
    seen = torch.where(wrong, seen + 0.03, seen)
    certain = inside * (363.6 / 0.1) ** 2
    found, _ = solve(
        rays, seen, certain, certain * road, vague(), (motion * 0.95, slopes, motion[:, :3] * 0), steps=10
    )
    torch.testing.assert_close(found.motion, motion, atol=2e-3, rtol=0)


def test_gradient_of_weights_is_that_of_differences():
    rays, seen, motion, slopes, road, inside = scene([0.0, 0.0, 0.9, 0.0, 0.01, 0.0], [0.0, 0.0])
    seen = seen + 2e-4 * torch.sin(torch.arange(seen.shape[2], dtype=torch.float64) * 1.7)
    seen[:, 0] += 2e-4 * (rays[:, 0] < 0)  # one half says that we turn more
    certain = inside * (363.6 / 0.3) ** 2
    factor = torch.ones(1, requires_grad=True, dtype=torch.float64)

    def length(factor):
        left = (rays[:, 0] < 0).double()
        weight = certain * (1 + (factor - 1) * left)
        return solve(rays, seen, weight, certain * road, vague(), (motion, slopes, motion[:, :3] * 0), steps=12)[
            0
        ].motion[0, 4]

    (gradient,) = torch.autograd.grad(length(factor), factor)
    with torch.no_grad():
        numeric = (length(factor + 1e-3) - length(factor - 1e-3)) / 2e-3
    torch.testing.assert_close(gradient[0], numeric, rtol=0.1, atol=0)


@given(small, small)
def test_normals_and_slopes_are_inverse(a, b):
    slopes = torch.tensor([[a * 0.2, b * 0.2]], dtype=torch.float64)
    torch.testing.assert_close(road_slopes(road_normal(slopes)), slopes)


def test_a_bend_of_the_flow_changes_neither_tilt_nor_length():
    """Near road too fast by 3 %, far road too slow: absorbed where the tilt is known from elsewhere."""
    rays, seen, motion, slopes, road, inside = scene([0.0, -0.015 * 0.9, 0.9, 0.0, 0.0, 0.0], [0.0, -0.015])
    certain = inside * (363.6 / 0.1) ** 2
    r = residuals(rays, seen, motion, slopes)
    wrong = seen + 0.03 * (shape_derivatives(rays, r, certain * road)[:, 0] * road)[:, None] * (
        torch.nn.functional.normalize(seen - rays[:, :2], dim=1)
    )
    stiff = vague()
    stiff.climb_sd[:] = 1e-4  # the car follows its road
    information = torch.diag(torch.tensor([1.0, 1, 1, 1e8, 1e8], dtype=torch.float64))
    free = dataclasses.replace(stiff, road_information=information[None])
    start = (motion, slopes, motion[:, :3] * 0)
    found, _ = solve(rays, wrong, certain, certain * road, free, start, steps=10)
    plane, _ = solve(rays, wrong, certain, certain * road, stiff, start, steps=10)
    loose, _ = solve(rays, wrong, certain, certain * road, vague(), start, steps=10)
    torch.testing.assert_close(found.motion, motion, atol=3e-4, rtol=0)
    torch.testing.assert_close(found.slopes, slopes, atol=2e-4, rtol=0)
    assert abs(float(found.shape[0, 0]) - 0.03) < 0.003
    assert float((loose.slopes - slopes).abs().max()) > 5 * float((found.slopes - slopes).abs().max())
    assert float(plane.shape.abs().max()) < 1e-3


def on_two_sides(motion: torch.Tensor, slopes: torch.Tensor, left: float, right: float) -> tuple[torch.Tensor, ...]:
    """Rays on a road that rises beside the car's lane, and where they are seen: exactly, surface by surface."""
    flat = road_inverse_depth(RAYS, slopes)
    aside = RAYS[:, 0] / flat.clamp_min(1e-6)  # X on the plane, camera heights
    # Where the ray meets a surface that is 1 - rise (|X| - 1) under the camera: a linear equation in depth.
    rise = torch.where(aside < 0, left, right)
    tilted = (flat + rise * RAYS[:, 0].abs()) / (1 + rise)
    rho = torch.where((aside.abs() > 1) & (flat > 0), tilted, flat)
    seen = flow_to_rays(flow_of(RAYS, rho, motion, K), RAYS, K)
    road = (flat > 0.06) & (aside.abs() < 2.5) & (seen[:, 0].abs() < 0.9) & (seen[:, 1].abs() < 0.27)
    return RAYS.flatten(2), seen.flatten(2), road.flatten(1).double()


@pytest.mark.parametrize("left, right", [(-0.05, 0.0), (0.0, -0.05), (-0.06, 0.02)])
def test_a_crown_does_not_turn_the_car(left, right):
    """Half the road falls away beside the lane: left and right find it; one plane alone turns the car."""
    motion = torch.tensor([[0.0, 0.0, 0.6, 0.0, 0.0, 0.0]], dtype=torch.float64)
    slopes = torch.zeros(1, 2, dtype=torch.float64)
    rays, seen, road = on_two_sides(motion, slopes, left, right)
    certain = (363.6 / 0.1) ** 2 * road
    free = dataclasses.replace(
        vague(), road_information=torch.diag(torch.tensor([1.0, 1, 1e8, 1, 1])).double()[None]
    )
    start = (motion, slopes, motion[:, :3] * 0)
    # Houses far off hold the rotation a little, as in a real street.
    found, _ = solve(rays, seen, certain * 0.05, certain, free, start, steps=10)
    plane, _ = solve(rays, seen, certain * 0.05, certain, vague(), start, steps=10)
    torch.testing.assert_close(
        found.shape[0, 1:], torch.tensor([left, right], dtype=torch.float64), atol=0.006, rtol=0
    )
    wrong = [float((x.motion - motion)[0, 3:].norm()) for x in (found, plane)]
    assert wrong[0] < 0.3 * wrong[1]
    assert abs(float(found.motion[0, 2]) / 0.6 - 1) < 0.002


@pytest.mark.parametrize("way", [0.15, 0.4, 1.0])
def test_what_is_no_road_does_not_tilt_it(way):
    """Houses near the point that we drive at count along their line as well, but for the motion alone."""
    rays, seen, m, s, road, inside = scene([0.0, 0.0, way, 0.0, 0.01, 0.0], [0.01, -0.015])
    m[:, 1] = (s[:, 0] * m[:, 0] + s[:, 1] * m[:, 2]).detach()  # along the road
    seen = flow_to_rays(flow_of(RAYS, canyon_inverse_depth(RAYS, s), m, K), RAYS, K).flatten(2)
    certain = inside * (363.6 / 0.1) ** 2
    heard = certain * road * 0.002  # hundreds of cells that are wrong alike count as a few
    priors = dataclasses.replace(vague(), climb_sd=torch.full((1,), 5e-3 * way, dtype=torch.float64))
    found, _ = solve(rays, seen, certain, heard, priors, (m, s, m[:, :3] * 0), steps=10)
    assert torch.linalg.norm(found.slopes - s) < 1e-5  # 0.05 at 0.4 camera heights, if they are taken for road
    torch.testing.assert_close(found.motion[:, 2], m[:, 2], atol=0, rtol=1e-4)


def test_a_way_does_not_become_shorter_because_it_climbs():
    """Where no road says how long it is: the direction of a motion that climbs is no reason for another length."""
    rays, seen, motion, slopes, _, inside = scene([0.0, 0.0, 1.0, 0.0, 0.0, 0.0], [0.0, 0.02])
    certain = inside * (363.6 / 0.1) ** 2
    road = torch.diag(torch.tensor([1e8, 1e8, 1e8, 1e8, 1e8], dtype=torch.float64))[None]
    priors = dataclasses.replace(
        vague(),
        motion=motion,
        motion_information=torch.full_like(motion, 100.0),
        slopes=slopes,
        road_information=road,
        climb_sd=torch.full((1,), 0.004, dtype=torch.float64),
    )
    found, _ = solve(rays, seen, certain, certain * 0, priors, (motion, slopes, motion[:, :3] * 0), steps=10)
    climb = (road_normal(found.slopes) * found.motion[:, :3]).sum()
    assert abs(float(climb)) > 0.015  # what is seen does not let it drive along the road
    assert float(found.motion[:, :3].norm()) == pytest.approx(1.0, abs=2e-3)


BEFORE, NOW = [0.01, -0.01, 0.8, 0.001, 0.02, 0.002], [0.02, 0.01, 0.9, 0.002, 0.03, -0.004]


def after_another(scale: float, held: float, noise: float = 0.0, seed: int = 0) -> float:
    """The way, of 0.9, that is found without a road from depths which a motion before has told.

    Args:
        scale: by which that motion, and so all depths, are too long. held: information on that.
        noise: share of each inverse depth that is wrong.
    """
    rays, seen, _, slopes, _, inside = scene(NOW, [0.0, 0.01])
    inverse_depth = canyon_inverse_depth(RAYS, slopes).flatten(1) / scale
    generator = torch.Generator().manual_seed(seed)
    wrong = 1 + noise * torch.randn(inverse_depth.shape, generator=generator, dtype=torch.float64)
    known = 1 / (inverse_depth * max(noise, 0.003)).square()
    before = torch.tensor([BEFORE], dtype=torch.float64)
    before[:, :3] *= scale
    ahead = torch.nn.functional.pad(torch.nn.functional.normalize(before[:, :3], dim=1), (0, 3))
    of_motion = held * ahead[:, :, None] * ahead[:, None] + 1e-3 * torch.eye(6, dtype=torch.float64)
    certain = inside * (363.6 / 0.1) ** 2
    carried = Carried((inverse_depth * wrong).clamp_min(0.0), known, certain, before, of_motion)
    start = torch.tensor([[0, 0, 0.7, 0, 0, 0]], dtype=torch.float64)
    priors = dataclasses.replace(vague(), motion=start, motion_information=torch.full_like(start, 1.0))
    start = start, slopes, start[:, :3] * 0
    found, _ = solve(rays, seen, certain, certain * 0, priors, start, steps=12, carried=carried)
    return float(found.motion[:, :3].norm())


@pytest.mark.parametrize("scale", [0.8, 1.0, 1.25])
def test_depths_from_before_carry_the_scale_of_their_motion(scale):
    way = float(torch.tensor(NOW[:3]).norm())
    assert after_another(scale, 1e8) == pytest.approx(scale * way, rel=2e-3)


def test_of_depths_whose_motion_may_have_any_length_the_way_is_the_priors():
    assert after_another(1.0, 0.0) < 0.75


def test_unsure_depths_do_not_make_ways_shorter():
    """An error in variables: with derivatives at the depths as they come, a fifth of noise is 4 % of the way."""
    way = float(torch.tensor(NOW[:3]).norm())
    found = [after_another(1.0, 1e8, noise=0.2, seed=seed) / way for seed in range(8)]
    assert sum(found) / len(found) == pytest.approx(1.0, abs=0.01)


@pytest.mark.parametrize("which", range(6))
def test_derivatives_of_depths_by_the_motion_that_told_them(which):
    """Of the place in the next frame: depths are found again by a motion that is a little off."""
    T = torch.tensor([BEFORE], dtype=torch.float64)
    rho = canyon_inverse_depth(RAYS, T[:, :2] * 0)
    between = flow_to_rays(flow_of(RAYS, rho, T, K), RAYS, K).flatten(2)
    kept = (between[:, 0].abs() > 0.2) & (between[:, 0].abs() < 0.8) & (between[:, 1].abs() < 0.25)
    between, first = between[:, :, kept[0]], RAYS.flatten(2)[:, :, kept[0]]

    def depths(motion):  # in the newer frame, of what lies on these rays of both
        r = residuals(first, between, motion, motion[:, :2] * 0)
        back = se3.matrix_from_motion(motion)[:, :3, :3].mT
        point = back @ (first - r.inverse_depth[:, None] * motion[:, :3, None])
        return r.inverse_depth / point[:, 2]

    step = 1e-5
    delta = torch.zeros(1, 11, dtype=torch.float64)
    delta[:, which] = step
    off = _moved(Solution(T, T[:, :2] * 0, T[:, :3] * 0, delta), delta, delta).motion
    numeric = (depths(off) - depths(T)) / step
    rays = torch.cat([between, torch.ones_like(between[:, :1])], 1)
    rows = depth_derivatives(rays, depths(T), T)
    torch.testing.assert_close(rows[:, which], numeric, atol=2e-3, rtol=2e-2)
