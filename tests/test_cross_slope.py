"""Roads that are not level across: where their surface lies, and that everything else lies on it."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from convlstm_vo.geometry.camera import Camera
from convlstm_vo.world import SimulateConfig, WorldError, WorldSequence, make_plan, simulate
from convlstm_vo.world.plan import Section

SMALL = Camera(181.8, 181.8, 159.5, 47.5, height=96, width=320)
KINDS = ("town", "country", "motorway")
slopes = st.floats(-0.07, 0.07)


@given(slopes, st.floats(0, 0.04), st.floats(0, 1.8), st.floats(-2, 0), st.floats(2.9, 6.4), st.floats(-25, 25))
def test_the_surface_has_no_steps_and_its_slope_is_its_tilt(lean, crown, bank, middle, half, d) -> None:
    section = Section(np.zeros(1), np.zeros(1), np.zeros((2, 1)), middle, half)
    assert section.drop(lean, crown, bank, 0.0) == 0.0
    step = 1e-4
    rise = (section.drop(lean, crown, bank, d + step) - section.drop(lean, crown, bank, d)) / step
    assert abs(rise) < 0.25 + 0.55 * bank
    if middle + step < d < middle + half - step or middle - half + step < d < middle - step:
        assert rise == pytest.approx(section.tilt(lean, crown, d), abs=1e-9)
    # Far out, the ground is level with the lower edge on both sides.
    assert section.drop(lean, crown, bank, 25.0) == pytest.approx(section.drop(lean, crown, bank, -25.0), abs=1e-12)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(4))
def test_the_path_is_the_same_and_slopes_are_those_of_roads(kind, seed) -> None:
    level, plan = make_plan(seed, kind, 600), make_plan(seed, kind, 600, cross_slope=True)
    for name in ("s", "x", "y", "z", "psi", "kappa"):
        np.testing.assert_array_equal(getattr(level.path, name), getattr(plan.path, name))
    section = plan.path.section
    assert section is not None
    assert np.abs(section.lean).max() < 0.1 and section.crown.min() >= 0 and section.crown.max() <= 0.035
    assert max(np.abs(section.lean).max(), section.crown.max()) > 0.01
    for change in (np.diff(section.lean), np.diff(section.crown)):
        assert np.abs(change).max() < 0.004  # in half a metre
    for begin, end in plan.turns:
        junction = (plan.path.s > begin) & (plan.path.s < end)
        assert not section.lean[junction].any() and not section.crown[junction].any()
    # A leg's surface, where the car drives, is the path's.
    for leg in plan.legs:
        s = np.arange(leg.start_s + 1, leg.end_s - 1, 5.0)
        s = s[s < plan.path.s[-1]]
        under = leg.line.at(s)[1] + leg.line.across(s, plan.lane_m)[0]
        np.testing.assert_allclose(under, plan.path.at(s)[1], atol=2e-3)


def test_banks_rise_beside_the_lane_and_nowhere_on_it() -> None:
    highest, kerbs = [], []
    for seed in range(30):
        kind = KINDS[seed % 3]
        plan = make_plan(seed, kind, 300, cross_slope=True)
        for leg in plan.legs:
            section, line = leg.line.section, leg.line
            assert section is not None and section.banks.min() >= 0
            flat = dataclasses.replace(line, section=dataclasses.replace(section, banks=0 * section.banks))
            for d in (-leg.half_width_m, 0.0, leg.half_width_m):
                np.testing.assert_array_equal(line.across(line.s, d)[0], flat.across(line.s, d)[0])
            for side, sign in enumerate((-1, 1)):
                d = section.middle_m + sign * (leg.half_width_m + 3.0)
                rise = flat.across(line.s, d)[0] - line.across(line.s, d)[0]
                highest.append(float(rise.max()))
                assert highest[-1] == pytest.approx(section.banks[side].max(), abs=1e-9)
                kerbs.append(section.kerbs_m[side])
            assert kind != "town" or not (section.banks.any() or any(section.kerbs_m))
    assert max(highest) > 1.0 and min(highest) == 0.0
    assert max(kerbs) > 0.06 and min(kerbs) == 0.0


def test_a_tree_stands_on_the_bank() -> None:
    for seed in range(40):
        line = make_plan(seed, "country", 200, cross_slope=True).legs[0].line
        assert line.section is not None
        right = line.section.banks[1]
        if right.max() > 0.8:
            at, d = float(line.s[right.argmax()]), line.section.middle_m + line.section.half_width_m + 3.0
            rise = -line.place(at, d)[1] + line.place(at, d + 10)[1]
            assert rise == pytest.approx(float(right.max()), abs=0.35)
            return
    pytest.fail("no bank")


def test_bends_lean_inwards() -> None:
    for seed in range(6):
        plan = make_plan(seed, "country", 800, cross_slope=True)
        section, kappa = plan.path.section, plan.path.kappa
        assert section is not None
        sharp = np.abs(kappa) > 0.7 * np.abs(kappa).max()
        assert (section.lean[sharp] * np.sign(kappa[sharp]) > 0).mean() > 0.8


@pytest.mark.parametrize("kind", KINDS)
def test_the_surface_that_is_seen_is_the_one_that_is_told(kind) -> None:
    drive = WorldSequence(5_000_000 + KINDS.index(kind), frames=30, kind=kind, camera=SMALL, cross_slope=True)
    section, tilted = drive.plan.path.section, 0
    assert section is not None
    for i in (5, 25):
        truth, plane, K = drive.ground_truth(i), drive.road_plane[i], SMALL
        rows, columns = np.mgrid[88:96, 150:200:5]
        rays = np.stack([(columns - K.cx) / K.fx, (rows - K.cy) / K.fy, np.ones_like(rows)], -1)
        expected = plane[3] / -(rays @ plane[:3])
        near = (expected < 9) & ~truth.moving[88:96, 150:200:5]
        assert near.sum() > 20
        off = np.abs(truth.depth[88:96, 150:200:5] / expected - 1)[near]
        assert np.median(off) < 0.03
        tilted += abs(plane[0]) > 0.008
    assert tilted or kind == "town"


def test_others_stand_on_the_road() -> None:
    checked = 0
    for seed in range(4):
        drive = WorldSequence(seed, frames=60, kind="country", cross_slope=True)
        poses = drive.drive.T_street_mover.reshape(-1, 4, 4)
        poses = poses[poses[:, 1, 3] < 5e3]
        line = drive.plan.legs[0].line
        for T in poses[::7]:
            for wheel in ([-0.8, 0.0, 0.0], [0.8, 0.0, 0.0]):
                x, y, z = T[:3, :3] @ wheel + T[:3, 3]
                nearest = int(((line.x - x) ** 2 + (line.z - z) ** 2).argmin())
                s, psi = float(line.s[nearest]), float(line.psi[nearest])
                d = (x - line.x[nearest]) * np.cos(psi) - (z - line.z[nearest]) * np.sin(psi)
                if abs(d) < drive.plan.legs[0].half_width_m:
                    assert y == pytest.approx(line.place(s, float(d))[1], abs=0.06)
                    checked += 1
    assert checked > 50


def test_the_option_changes_what_is_seen_and_not_where_the_car_is() -> None:
    level = WorldSequence(3, frames=4, kind="country", camera=SMALL)
    leaning = WorldSequence(3, frames=4, kind="country", camera=SMALL, cross_slope=True)
    np.testing.assert_array_equal(level.drive.road_s, leaning.drive.road_s)
    assert (level[2].image != leaning[2].image).mean() > 0.02


@pytest.mark.parametrize("option", ["cross_slope", "hilly"])
def test_simulate_has_the_option(tmp_path, option) -> None:
    config = SimulateConfig(out=tmp_path / "a", frames=2, seed=3, road="country", height=96, width=320, workers=1)
    config = dataclasses.replace(config, **{option: True})
    simulate(config, progress=False)
    drawn, usual = (
        WorldSequence(3, frames=2, kind="country", camera=config.camera, **{option: value})
        for value in (True, False)
    )
    poses = np.loadtxt(tmp_path / "a" / "poses" / "00.txt").reshape(-1, 3, 4)
    np.testing.assert_allclose(poses, drawn.trajectory.T_world_camera[:, :3], atol=1e-6)
    assert np.abs(poses - usual.trajectory.T_world_camera[:, :3]).max() > 1e-5
    with pytest.raises(WorldError, match="other options"):  # a folder holds one kind of street
        simulate(dataclasses.replace(config, **{option: False}), progress=False)
