"""The default network on rendered and on real frames: metric, causal, and honest about what it does not see."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from convlstm_vo.calibration import CalibrationError, VehicleCalibration
from convlstm_vo.evaluation.metrics import score
from convlstm_vo.geometry import se3
from convlstm_vo.geometry.camera import Camera
from convlstm_vo.geometry.trajectory import Trajectory
from convlstm_vo.models.checkpoint import build, load_checkpoint
from convlstm_vo.models.config import ModelError, preset
from convlstm_vo.models.geometric import (
    LEAST_EVIDENCE,
    Cells,
    Estimate,
    GeometricNet,
    View,
    implausible_share,
    leaps,
    reach_at_rest,
    scale_variance,
    share_heard,
    vagueness,
)
from convlstm_vo.models.mounting import Memory
from convlstm_vo.models.scene import cell_rays
from convlstm_vo.models.solver import STILL, Solution, residuals
from convlstm_vo.odometer import OdometryError, VisualOdometry, estimate_trajectory, working_size
from convlstm_vo.sequences.base import Frame
from convlstm_vo.sequences.kitti import KittiSequence
from convlstm_vo.training.pipeline import GeometricOptions, run_geometric
from convlstm_vo.world import Drive, Mount, Plan, WorldSequence
from convlstm_vo.world.drives import on_path
from convlstm_vo.world.meshes import Mesh, car, lorry
from convlstm_vo.world.plan import generator

KITTI = Path(__file__).parents[2] / "shared" / "kitti"
real = pytest.mark.skipif(not KITTI.exists(), reason="../shared/kitti is missing")
NET = load_checkpoint()
CAMERA = Camera(363.6, 363.6, 309.5, 93.5, height=192, width=624)


def street(seed: int = 31, frames: int = 16, **options) -> WorldSequence:
    return WorldSequence(seed, frames=frames, kind="town", camera=CAMERA, **options)


def errors(sequence: WorldSequence, odometer: VisualOdometry) -> tuple[float, float]:
    """Length found over true length, and the largest rotation error in degrees."""
    tracked = [odometer.track(frame) for frame in sequence]
    poses = sequence.trajectory.T_world_camera
    true = se3.relative(poses[:-1], poses[1:])
    found = np.stack([t.T_prev_curr for t in tracked[1:]])
    turn = np.degrees(se3.rotation_angle(np.swapaxes(found[:, :3, :3], 1, 2) @ true[:, :3, :3]))
    lengths = [np.linalg.norm(T[:, :3, 3], axis=1).sum() for T in (found, true)]
    return lengths[0] / lengths[1], float(turn.max())


@pytest.mark.parametrize("height", [1.3, 2.4])
def test_metric_for_any_camera_height(height):
    sequence = street(seed=34, mount=Mount(height))
    assert float(np.linalg.norm(sequence.trajectory.motions[:, :3], axis=1).sum()) > 5
    ratio, turn = errors(sequence, VisualOdometry(NET, CAMERA, VehicleCalibration(height)))
    assert ratio == pytest.approx(1, abs=0.08)
    assert turn < 0.2


def with_us(plan: Plan, drive: Drive) -> list[tuple[Mesh, np.ndarray]]:
    """A lorry 11 m ahead and a column to the left, all exactly as fast as we are."""
    rng = generator(5, 0)
    column = [(car(rng), on_path(plan.path, drive.road_s + ahead, -3.5, False)) for ahead in (4.0, 11.0, 18.0)]
    return [(lorry(rng), on_path(plan.path, drive.road_s + 14.0, 0.0, False)), *column]


@pytest.mark.parametrize("seed", [30, 31, 36])
def test_what_moves_with_us_does_not_pass_for_the_world(seed):
    sequence = street(seed=seed, frames=6, traffic=with_us)
    assert sequence.trajectory.distances_m[-1] > 2
    assert np.mean([sequence.ground_truth(i).moving.mean() for i in range(6)]) > 0.1
    ratio, turn = errors(sequence, VisualOdometry(NET, CAMERA))
    assert ratio == pytest.approx(1, abs=0.1)
    assert turn < 0.2


def test_standing_is_asked_for_again_where_the_houses_go():
    """Taken for standing by mistake, in traffic that goes along: found out within ten frames."""
    sequence = street(seed=34, frames=14, traffic=with_us)
    odometer = VisualOdometry(NET, CAMERA)
    odometer.track(sequence[0])
    odometer.track(sequence[1])
    memory = Memory.unpack(odometer._state[-1])
    odometer._state = (*odometer._state[:-1], dataclasses.replace(memory, motion=0 * memory.motion).pack())
    ways = [float(np.linalg.norm(odometer.track(sequence[k]).T_prev_curr[:3, 3])) for k in range(2, 14)]
    true = np.linalg.norm(sequence.trajectory.motions[:, :3], axis=1)
    np.testing.assert_allclose(ways[10:], true[11:13], rtol=0.15)


def test_no_flow_where_the_road_must_flow_is_no_road():
    """The road, a lorry's back that goes along, and houses, in cells that were measured well or not at all."""
    assert isinstance(NET, GeometricNet)
    ys = torch.tensor([0.1, 0.2, 0.4])
    rays = torch.stack([torch.full((3,), 0.1), ys, torch.ones(3)])[None, :, None]  # (1, 3, 1, 3)
    motion, slopes = torch.tensor([[0.0, 0.0, 0.5, 0.0, 0.0, 0.0]]), torch.zeros(1, 2)
    points = rays / ys  # on the road
    moved = points - torch.tensor([0.0, 0.0, 0.5])[None, :, None, None]
    road = (moved[:, :2] / moved[:, 2:]).contiguous()

    def gated(seen: torch.Tensor, sigma: float) -> list[bool]:
        cells = Cells(rays, seen, torch.full((1, 1, 3), sigma), torch.ones(1, 1, 3))
        r = residuals(rays.flatten(2), seen.flatten(2), motion, slopes)
        return NET.moves_with_us(cells, r)[0].tolist()

    along = rays[:, :2].contiguous()
    assert gated(along, 5e-4) == [True] * 3
    assert gated(along, 0.5) == [False] * 3  # blank asphalt, of which nothing is known
    assert gated(road, 5e-4) == [False] * 3
    half = (along + road) / 2  # braking to half the speed from one frame to the next
    assert gated(half, 5e-4) == [False] * 3
    up = rays * torch.tensor([1.0, -1.0, 1.0])[None, :, None, None]  # above the horizon there is no road
    cells = Cells(up, up[:, :2].contiguous(), torch.full((1, 1, 3), 5e-4), torch.ones(1, 1, 3))
    r = residuals(up.flatten(2), cells.seen.flatten(2), motion, slopes)
    assert NET.moves_with_us(cells, r)[0].tolist() == [False] * 3


def test_above_what_is_no_road_nothing_is_asked_unless_all_would_be():
    """Four columns of cells, five above the horizon and four below: on two of them a lorry, which goes along."""
    assert isinstance(NET, GeometricNet)
    ys = torch.linspace(-0.4, 0.4, 9)
    x, y = torch.meshgrid(torch.tensor([-0.3, -0.1, 0.1, 0.3]), ys, indexing="xy")
    rays = torch.stack([x, y, torch.ones_like(x)])[None]
    packed = torch.zeros(1, Memory.SIZE)
    packed[:, 3] = 1.0
    memory = dataclasses.replace(
        Memory.unpack(packed), known=torch.ones(1), variance=torch.eye(5).expand(1, 5, 5) * 1e-4
    )
    depth = 1 / y.clamp_min(0.05)
    seen = torch.stack([x, y]) * depth / (depth - 1.0)
    lorry_back = torch.tensor([False, True, True, False])[None].expand(9, 4)

    def asked(moves: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        flow = torch.where(moves, rays[:, :2], seen[None])
        cells = Cells(rays, flow, torch.full((1, 9, 4), 5e-4), torch.ones(1, 9, 4))
        road, stand = NET.open_road(cells, memory, NET.priors(memory))
        return road.unflatten(1, (9, 4))[0], stand.unflatten(1, (9, 4))[0]

    road, stand = asked(lorry_back)
    assert (road == ~(lorry_back & (y > 0.05))).all()
    assert (stand[:7] == ~lorry_back[:7]).all() and stand[8].all()  # of one cell alone nothing is concluded
    road, stand = asked(torch.ones_like(lorry_back))
    assert stand.all() and not road[y > 0.05].any()  # then it is we who stand


def test_round_a_bend_between_lorries_the_car_turns():
    """They turn with us: that they do not move says nothing of whether we do, however large they are."""
    sequence = WorldSequence(5_000_003, frames=120, kind="motorway", traffic="heavy", camera=CAMERA)
    odometer, off = VisualOdometry(NET, CAMERA), []
    for k in range(40, 96):
        found = odometer.track(sequence[k]).T_prev_curr
        if k > 80:
            true = se3.relative(*sequence.trajectory.T_world_camera[k - 1 : k + 1])
            off.append(np.degrees(se3.rotation_angle(true[:3, :3].T @ found[:3, :3])))
    assert np.mean(off) < 0.1


def believed(way: float, road_sd: float = 0.001) -> Estimate:
    """Of a camera that moves straight ahead on a level road, by so many of its heights."""
    motion = torch.tensor([[0, 0, way, 0, 0, 0]], dtype=torch.float32)
    solution = Solution(motion, torch.zeros(1, 2), torch.zeros(1, 3), torch.eye(11)[None])
    fits, trust = torch.tensor([0.3]), torch.zeros(1, 2, 1, 1)
    points = torch.ones(1, 4, 1)
    return Estimate(motion, torch.eye(6)[None], solution, fits, torch.tensor([road_sd]), trust, points)


@pytest.mark.parametrize(
    "before, way, road_sd, lost",
    [
        (0.34, 1.6, 0.01, True),  # a jump in the video
        (0.34, 1.6, 0.0001, False),  # the road says so
        (0.34, 0.68, 0.01, False),  # a frame left out
        (1.6, 0.34, 0.01, False),
        (0.0, 0.2, 0.01, False),
    ],
)
def test_a_leap_that_no_road_confirms_is_no_motion(before, way, road_sd, lost):
    memory = dataclasses.replace(Memory.unpack(torch.zeros(1, Memory.SIZE)), known=torch.ones(1))
    memory.motion[:, 2] = before
    assert bool(leaps(memory, believed(way, road_sd))) == lost
    assert not leaps(dataclasses.replace(memory, known=torch.zeros(1)), believed(way, road_sd))  # a first motion


def test_after_a_leap_the_car_is_taken_to_move_on_and_all_is_lost():
    assert isinstance(NET, GeometricNet)
    memory = dataclasses.replace(Memory.unpack(torch.zeros(1, Memory.SIZE)), known=torch.ones(1))
    memory.motion[:, 2] = 0.34
    found = believed(1.6, 0.01)
    estimate, (packed,) = NET._dead_reckoning(leaps(memory, found), found, (memory.pack(),), memory)
    assert float(estimate.motion[0, 2]) == pytest.approx(0.34 * 1.65)
    assert float(estimate.evidence) < LEAST_EVIDENCE <= float(found.evidence)
    assert not estimate.points[:, 3].any() and found.points[:, 3].all()  # of how far away all is, nothing is known
    assert float(Memory.unpack(packed).known) == 0  # so the next frame is searched from nothing


def test_a_start_climbs_by_a_share_of_the_way_that_was_found():
    """A slow start says as much about the road's tilt as slow driving does, nearly."""
    assert isinstance(NET, GeometricNet)
    memory = dataclasses.replace(Memory.unpack(torch.zeros(3, Memory.SIZE)), known=torch.tensor([0.0, 0.0, 1.0]))
    memory.motion[:, 2] = torch.tensor([0.2, 2.0, 0.2])
    with torch.inference_mode():
        slow, fast, driving = NET.priors(memory).climb_sd.tolist()
    assert driving < slow < 2 * driving < fast


def test_a_search_goes_back_to_its_first_round_where_later_ones_say_less(monkeypatch):
    """And only there: a guess that was short goes on to the way that is."""
    assert isinstance(NET, GeometricNet)
    memory = Memory.unpack(torch.zeros(1, Memory.SIZE))
    for first, then, last, kept in ((1.0, 0.9, 0.8, 1.0), (1.0, 1.3, 1.5, 1.5)):
        after = {first: then, then: last}  # of any other guess: the first

        def found(motion, view, memory, after=after, first=first):
            way = torch.zeros_like(motion)
            way[:, 2] = after.get(round(float(motion[0, 2]), 3), first)
            return way, torch.ones(1), torch.zeros(1, dtype=torch.bool)  # without scale

        monkeypatch.setattr(NET, "_from", found)
        motion, _ = NET.search(View(torch.zeros(0), torch.zeros(0), torch.zeros(0)), memory)
        assert float(motion[0, 2]) == pytest.approx(kept)


def test_houses_an_arms_length_away_speak_against_a_motion():
    """A fifth of the true motion fits across as well, if all is a fifth as far away."""
    assert isinstance(NET, GeometricNet)
    x, y = torch.meshgrid(torch.linspace(-0.8, 0.8, 18), torch.linspace(-0.3, -0.02, 8), indexing="xy")
    rays = torch.stack([x, y, torch.ones_like(x)])[None]
    points = rays * (4.0 / x.abs())  # houses 4 camera heights to both sides
    moved = points - torch.tensor([0.0, 0.0, 0.5])[None, :, None, None]
    seen = (moved[:, :2] / moved[:, 2:]).contiguous()
    cells = Cells(rays, seen, torch.full((1, *x.shape), 2e-4), torch.ones(1, *x.shape))
    right, fifth, tenth = (float(NET.agreement(cells, believed(way))) for way in (0.5, 0.1, 0.05))
    assert right > 0.97
    assert fifth < 0.85
    assert tenth < 0.4  # most of them would be inside the car


def asked_again(monkeypatch, known: Estimate, searched: Estimate, agrees: float) -> float:
    """The way that is believed after a search, against a known motion with which 0.72 of all agrees."""
    assert isinstance(NET, GeometricNet)
    found, other = ((e, (e.motion,)) for e in (known, searched))
    memory = dataclasses.replace(Memory.unpack(torch.zeros(1, Memory.SIZE)), known=torch.ones(1))
    memory.motion[:, 2] = 0.7
    cells = Cells(torch.zeros(1, 3, 1, 1), torch.zeros(1, 2, 1, 1), torch.ones(1, 1, 1), torch.ones(1, 1, 1))
    monkeypatch.setattr(NET, "search", lambda view, memory: (searched.solution.motion, torch.ones(1)))
    monkeypatch.setattr(NET, "look", lambda view, memory: cells)
    monkeypatch.setattr(NET, "conclude", lambda cells, memory, hidden: other)
    monkeypatch.setattr(NET, "plausibility", lambda cells, e, among: torch.full((1,), float(e is searched)))
    monkeypatch.setattr(NET, "agreement", lambda cells, e, among: torch.tensor([agrees if e is searched else 0.72]))
    yes, view = torch.ones(1, dtype=torch.bool), View(torch.zeros(0), torch.zeros(0), torch.zeros(1, 4))
    estimate, _ = NET._asked_again(yes, ~yes, view, cells, found, memory, None)
    return float(estimate.solution.motion[0, 2])


@pytest.mark.parametrize(
    "way, agrees, taken",
    [
        (0.01, 0.71, False),  # between lorries, which fit standing still
        (0.03, 0.785, False),
        (0.01, 0.86, False),  # between cars on blank asphalt
        (0.01, 0.95, True),  # it stood all along
        (0.6, 0.71, True),
    ],
)
def test_a_motion_is_given_up_for_standing_only_if_that_is_plain(monkeypatch, way, agrees, taken):
    """A search that brings the road back, against a motion of 0.7 camera heights with which 0.72 of all agrees."""
    believes = asked_again(monkeypatch, believed(0.7, 0.0027), believed(way, 0.0009), agrees)
    assert believes == pytest.approx(way if taken else 0.7)


@pytest.mark.parametrize("road_sd, taken", [(0.0005, True), (0.0013, False)])
def test_a_motion_with_which_the_road_is_seen_is_not_given_up_for_a_guess(monkeypatch, road_sd, taken):
    """A lorry that drives off agrees with driving backwards, but under that the road is vague."""
    known, searched = believed(0.7, 0.0009), believed(-0.6, road_sd)
    assert bool(known.metric) and bool(searched.metric) == taken
    believes = asked_again(monkeypatch, known, searched, 0.95)
    assert believes == pytest.approx(-0.6 if taken else 0.7)


def test_only_what_is_remembered_to_stand_is_held_at_rest():
    packed = torch.zeros(3, Memory.SIZE)
    packed[:, 3] = torch.tensor([0.0, 0.05, 0.5])
    fresh = Memory.unpack(packed)
    known = dataclasses.replace(fresh, known=torch.ones(3))
    assert reach_at_rest(fresh).tolist() == pytest.approx([STILL] * 3)
    assert reach_at_rest(known).tolist() == pytest.approx([0.01, 0.01, STILL])


def test_what_creeps_may_stop_and_what_drives_may_not():
    assert isinstance(NET, GeometricNet)
    packed = torch.zeros(4, Memory.SIZE)
    packed[:, 3] = torch.tensor([0.0, 0.2, 0.6, 2.0])  # z, camera heights a frame
    fresh = Memory.unpack(packed)
    assert (implausible_share(fresh) == 0.3).all()  # each guess of a search is taken at its word
    known = dataclasses.replace(fresh, known=torch.ones(4), variance=torch.eye(5).expand(4, 5, 5) * 1e-4)
    share = implausible_share(known)[:, 0].detach()
    assert share[0] < 0 and share[1] < 0
    assert 0.2 < share[2] <= 0.4 and float(share[3]) == pytest.approx(0.4)


def test_a_vague_road_is_not_heard_against_yesterdays_speed():
    assert isinstance(NET, GeometricNet)
    sds = torch.tensor([2e-4, 5e-4, 2e-3, 1e-2, 1e-1])
    memory = Memory.unpack(torch.zeros(5, Memory.SIZE))
    assert share_heard(vagueness(sds, memory))[:4].min() > 0.9  # a fresh start has no yesterday
    known = dataclasses.replace(memory, known=torch.ones(5), variance=torch.eye(5).expand(5, 5, 5) * 1e-4)
    heard = share_heard(vagueness(sds, known))[:, 0]
    assert heard[0] > 0.99 and heard[1] > 0.9
    assert (heard.diff() < 0).all()
    assert heard[-1] < 0.006
    unsure = dataclasses.replace(known, known=torch.full((5,), 0.1))  # a search that found no clear road
    assert (share_heard(vagueness(sds, unsure))[1:, 0] > heard[1:]).all()


def test_on_blank_asphalt_behind_a_car_the_speed_is_kept():
    """A car ahead and a column beside go as we do, and are all that shows anything where the road is."""
    sequence = WorldSequence(5_000_001, frames=120, kind="town", traffic="heavy")
    odometer = VisualOdometry(NET, sequence.camera)
    ways = [float(np.linalg.norm(odometer.track(sequence[k]).T_prev_curr[:3, 3])) for k in range(18)]
    true = np.linalg.norm(sequence.trajectory.motions[:17, :3], axis=1)
    assert true.min() > 0.8
    np.testing.assert_allclose(ways[1:], true, rtol=0.2)


@pytest.mark.parametrize("seed", [32, 33, 38])
def test_without_a_road_in_sight_the_way_follows_what_stands_beside_it(seed):
    """Depth that is carried along says how much longer each way is than the one before."""
    sequence = street(seed, frames=22)
    odometer, ways = VisualOdometry(NET, CAMERA), []
    for index, frame in enumerate(sequence):
        if index == 8:  # from here on all under the horizon is hidden
            mask = np.full((CAMERA.height, CAMERA.width), 255, np.uint8)
            mask[round(CAMERA.cy) + 6 :] = 0
            odometer.hide(mask)
        tracked = odometer.track(frame)
        step = tracked.T_prev_curr[:3, 3]
        way = float(np.linalg.norm(step))
        variance = 0.0 if tracked.covariance is None else step @ tracked.covariance[:3, :3] @ step
        ways.append((way, variance**0.5 / max(way, 1e-6)))
        assert index < 9 or not tracked.metric
    true = np.linalg.norm(sequence.trajectory.motions[:, :3], axis=1)[8:]
    found, sds = np.array(ways[9:]).T
    assert found.sum() == pytest.approx(true.sum(), rel=0.05)  # 0.84 to 0.89 of it without
    assert (np.abs(found - true) < 3 * sds).all()
    assert 1.5 * sds[0] < sds[-1] < 0.25 * found[-1]  # what is known of the scale fades


def test_how_sure_a_way_is_by_the_road_or_by_the_last_one():
    memory = Memory.unpack(torch.zeros(4, Memory.SIZE))
    memory.known[:] = torch.tensor([1.0, 1.0, 0.0, 1.0])
    memory.scale_variance[:] = torch.tensor([0.01, 0.01, 0.01, torch.inf])
    motion = torch.zeros(4, 6)
    motion[:, 2] = 2.0
    covariance = torch.diag_embed(torch.full((4, 11), 0.01))  # 5 % of the way
    by_road = torch.tensor([0.002, 0.2, 0.2, 0.2])
    found = scale_variance(by_road, motion, covariance, memory).sqrt()
    assert found[0] == pytest.approx(15 * 0.002 / 2)
    assert found[1] == pytest.approx((0.01 + 0.0025) ** 0.5)
    assert found[2] == found[3] == pytest.approx(1.5)  # 3 camera heights, more than any way changes


def half_width(net: GeometricNet, rows: slice, sd: float = 1e-3) -> float:
    """Camera heights to the side at which a cell of the road counts 1/e, if only some of the rows are seen."""
    rays = cell_rays(torch.tensor([[363.6, 363.6, 319.5, 60.0]]), 48, 160)[..., ::2, ::2]
    sigma = torch.full((1, 24, 80), 10.0)
    sigma[:, rows] = sd
    cells = Cells(rays, rays[:, :2], sigma, torch.zeros_like(sigma))
    _, along = net.trusted_weights(cells, Memory.unpack(torch.zeros(1, Memory.SIZE)), torch.zeros(1, 2, 24, 80))
    row = along.unflatten(1, (24, 80))[0, rows][-1]
    beside = (rays[0, 0, -1] / rays[0, 1, rows][-1]).square()
    inside, aside = 40, 44
    return float(((beside[aside] - beside[inside]) / (row[inside] / row[aside]).log()).sqrt().detach())


def test_the_corridor_is_narrow_where_the_lane_is_seen_near():
    net = load_checkpoint()
    found = float(net.log_corridor.detach().exp())
    near, far = half_width(net, slice(8, 24)), half_width(net, slice(8, 14))
    assert near == pytest.approx(0.65 * found, rel=1e-3)  # or kerbs and verges, which rise, add up
    assert far == pytest.approx(found, rel=1e-3)  # a bonnet, a camera that looks up: all is needed
    assert half_width(net, slice(8, 24), sd=0.1) == pytest.approx(found, rel=1e-3)  # blank asphalt: what is beside
    between = half_width(net, slice(8, 20))
    assert 1.05 * near < between < 0.95 * far
    assert half_width(net.train(), slice(8, 24)) == pytest.approx(found, rel=1e-3)


def test_scale_follows_the_camera_height():
    sequence = street(seed=32, frames=6)
    paths = [
        estimate_trajectory(NET, sequence, calibration=VehicleCalibration(h)).positions_xyz for h in (1.0, 2.0)
    ]
    np.testing.assert_allclose(paths[1], 2 * paths[0], rtol=1e-4, atol=1e-5)


def test_the_state_is_all_there_is():
    """Two streams through one network do not disturb each other, and a stream can be taken up again."""
    sequence = street(seed=32, frames=6)
    alone = [t.T_prev_curr for t in VisualOdometry(NET, CAMERA).stream(sequence)]
    a, b = VisualOdometry(NET, CAMERA), VisualOdometry(NET, CAMERA)
    for index, frame in enumerate(sequence):
        np.testing.assert_array_equal(a.track(frame).T_prev_curr, alone[index])
        b.track(Frame(255 - frame.image, frame.timestamp_s, index))


def test_a_fresh_state_is_all_zero():
    assert isinstance(NET, GeometricNet)
    pair = torch.stack([torch.from_numpy(street(seed=32, frames=2)[i].image) for i in (0, 1)])[None, :, None]
    K = torch.tensor(CAMERA.intrinsics[None], dtype=torch.float32)
    _, state = NET.step(pair, K)
    zero = tuple(torch.zeros_like(part) for part in state)
    with torch.inference_mode():
        torch.testing.assert_close(NET.step(pair, K, zero)[0], NET.step(pair, K)[0])
    memory = Memory.unpack(torch.arange(float(Memory.SIZE))[None])
    torch.testing.assert_close(memory.pack(), torch.arange(float(Memory.SIZE))[None])


def test_covered_lens_is_flagged_and_forgotten():
    sequence = street(seed=32, frames=10)
    odometer = VisualOdometry(NET, CAMERA)
    tracked = []
    for index, frame in enumerate(sequence):
        image = np.zeros_like(frame.image) if index in (4, 5) else frame.image
        tracked.append(odometer.track(Frame(image, frame.timestamp_s, index)))
    assert [t.status for t in tracked[4:7]] == ["lost", "lost", "lost"]
    assert {t.status for t in tracked[7:]} == {"ok"}
    assert all(np.isfinite(t.T_world_camera).all() for t in tracked)
    assert not tracked[4].metric


@pytest.mark.parametrize("value", [0, 255])
def test_even_frames_are_lost_never_nan(value):
    odometer = VisualOdometry(NET, CAMERA)
    image = np.full((192, 624), value, np.uint8)
    tracked = [odometer.track(Frame(image, float(i), i)) for i in range(3)]
    assert {t.status for t in tracked[1:]} == {"lost"}
    assert np.isfinite(tracked[-1].T_world_camera).all()


def test_the_same_frame_again_is_frozen():
    frame = street(seed=32, frames=2)[0]
    odometer = VisualOdometry(NET, CAMERA)
    odometer.track(frame)
    again = odometer.track(frame)
    assert again.status == "frozen"
    np.testing.assert_array_equal(again.T_prev_curr, np.eye(4))


def test_covariance_is_positive_and_wide_where_lost():
    sequence = street(seed=32, frames=4)
    odometer = VisualOdometry(NET, CAMERA)
    tracked = [odometer.track(frame) for frame in sequence]
    black = odometer.track(Frame(np.zeros((192, 624), np.uint8), 9.0, 4))
    assert tracked[2].covariance is not None and black.covariance is not None
    assert (np.linalg.eigvalsh(tracked[2].covariance) > 0).all()
    assert np.trace(black.covariance) > 100 * np.trace(tracked[2].covariance)


def test_covariance_stays_positive_where_all_but_the_way_is_well_known():
    assert isinstance(NET, GeometricNet)
    sequence = street(seed=32, frames=2)
    pair = torch.stack([torch.from_numpy(frame.image)[None].float() for frame in sequence])[None]
    memory = Memory.unpack(torch.zeros(1, Memory.SIZE))
    memory.known[:], memory.motion[:, 0], memory.motion[:, 2] = 1.0, 0.05, 0.6
    memory.scale_variance[:] = torch.inf  # that motion was a guess
    K = torch.tensor([[CAMERA.fx, CAMERA.fy, CAMERA.cx, CAMERA.cy]])
    with torch.inference_mode():
        cells = NET.look(View(pair[:, 0], pair[:, 1], K), memory)
        estimate, _ = NET.conclude(cells.without(cells.rays[:, 1] > -0.02), memory, None)
    assert not bool(estimate.metric)
    values = torch.linalg.eigvalsh(estimate.covariance[0].double())
    assert values[0] > 0
    assert 1.0 < values[-1].sqrt() < 6.0  # metres: any way there is, and no more


def test_mounting_is_found_and_saved(tmp_path):
    mounted = street(seed=33, frames=30, mount=Mount(1.65, pitch=-0.03, roll=0.04))
    odometer = VisualOdometry(NET, CAMERA)
    for frame in mounted:
        odometer.track(frame)
    found = odometer.calibration
    assert found is not None
    assert found.pitch_rad == pytest.approx(float(mounted.road_plane[:, 2].mean()), abs=0.01)
    assert found.roll_rad == pytest.approx(0.04, abs=0.01)
    assert found.pitch_precision > 1000 and found.roll_precision > 1000
    again = VisualOdometry(NET, CAMERA, found)
    again.track(mounted[0])
    again.track(mounted[1])
    known = again.calibration  # hardly changed by a frame, and not taken for better known than it is
    assert [known.pitch_rad, known.roll_rad] == pytest.approx([found.pitch_rad, found.roll_rad], abs=0.003)
    assert known.pitch_precision < found.pitch_precision and known.roll_precision < 1.1 * found.roll_precision
    found.write(tmp_path / "car.json")
    assert VehicleCalibration.read(tmp_path / "car.json") == found


@pytest.mark.parametrize(
    "values, match",
    [
        ({"camera_height_m": 0}, "between 0.1 and 20 m"),
        ({"camera_height_m": -1.0}, "between 0.1 and 20 m"),
        ({"camera_height_m": float("nan")}, "finite number"),
        ({"pitch_rad": 1.0}, "under 0.3"),
        ({"tilt": 1.0}, "tilt is not part of a calibration"),
        ({"pitch_precision": -1}, "pitch_precision -1: must not be negative"),
        ({"yaw_precision": 1e13}, "must be a finite number, 1e.12 at most"),
        ({"camera_height_m": True}, "camera_height_m is True"),
        ({}, "has no camera_height_m"),
    ],
)
def test_impossible_calibrations(tmp_path, values, match):
    path = tmp_path / "car.json"
    path.write_text(json.dumps({"camera_height_m": 1.65} | values if values else {}))
    with pytest.raises(CalibrationError, match=match) as caught:
        VehicleCalibration.read(path)
    assert str(path) in str(caught.value)


def test_impossible_camera_height_of_a_network():
    with pytest.raises(ModelError, match="camera_height is -1"):
        preset("geometric", camera_height=-1.0)


@pytest.mark.parametrize("fov", [40, 60, 82, 110])
def test_any_camera_is_seen_in_whole_cells(fov):
    camera = Camera.from_fov(fov, height=480, width=1280)
    height, width = working_size(camera)
    assert height % 8 == 0 and width % 8 == 0 and width <= 1024 and height <= 448
    scaled = camera.resized(height=height, width=width)
    assert scaled.fx <= 400


def test_another_cell_is_one_option():
    net = build(preset("geometric", cell="convgru", hidden_channels=8), seed=0)
    assert isinstance(net, GeometricNet)
    pair = torch.zeros(1, 2, 1, 64, 128)
    motion, state = net.step(pair, torch.tensor([[100.0, 100, 63.5, 31.5]]))
    assert motion.shape == (1, 6)
    assert len(state) == 4


@pytest.mark.parametrize("option, value", [("cell", "lstm"), ("peepholes", True), ("image_channels", 3)])
def test_options_that_it_does_not_have_are_refused(option, value):
    with pytest.raises(ModelError, match=f"{option}=.*: the default network sees gray frames"):
        build(preset("geometric", **{option: value}), seed=0)


@pytest.mark.parametrize("shape", [(1, 2, 3, 64, 128), (1, 2, 1, 65, 128), (1, 2, 1, 64, 132), (2, 1, 64, 128)])
def test_pairs_of_another_shape_are_refused(shape):
    with pytest.raises(ModelError, match="two gray frames with sides divisible by 8"):
        NET.step(torch.zeros(shape), torch.tensor([[100.0, 100, 63.5, 31.5]]))


def test_trains_from_nothing_and_continues(tmp_path):
    options = GeometricOptions(
        out=tmp_path,
        drives=1,
        unseen=1,
        frames=26,
        flow_steps=1,
        heavy_drives=1,
        heavy_views=2,
        leaning_drives=1,
        hilly_drives=1,
        narrow_drives=1,
        bonnet_drives=1,
        weigh_steps=2,
        height=64,
        width=320,
        threads=1,
    )
    checkpoint = run_geometric(options)
    first = load_checkpoint(checkpoint)
    made = {folder.name: sorted(folder.iterdir()) for folder in (tmp_path / "cells").iterdir()}
    assert {name: len(files) for name, files in made.items()} == {
        "train": 4,
        "heavy-1": 1,
        "narrow": 1,
        "bonnet": 1,
        "unseen": 1,
    }
    (second,) = made["heavy-1"]
    (once,) = (file for file in made["train"] if file.name[:8] == second.name[:8])
    with np.load(once) as a, np.load(second) as b:  # the same drive, spoilt in another way
        assert a["cells"].shape != b["cells"].shape or not np.allclose(a["cells"], b["cells"])
    again = load_checkpoint(run_geometric(dataclasses.replace(options)))
    for name, value in first.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], value, msg=name)


@real
def test_real_frames_zero_shot():
    """The shipped weights have seen rendered streets only."""
    sequence = KittiSequence(KITTI, "06")
    estimate = estimate_trajectory(NET, sequence)
    result = score(sequence.trajectory, Trajectory(sequence.trajectory.timestamps_s, estimate.T_world_camera))
    assert result.t_rel_percent is not None and result.t_rel_percent < 3.0
    assert result.r_rel_deg_per_100m is not None and result.r_rel_deg_per_100m < 1.5


@real
@pytest.mark.parametrize("what", ["jump", "noise"])
def test_real_frames_jump_and_noise_are_flagged_and_survived(what):
    sequence = KittiSequence(KITTI, "06")
    order = [0, 1, 2, 3, 4, 30, 31, 32] if what == "jump" else list(range(8))
    odometer, tracked = VisualOdometry(NET, sequence.camera), []
    for k, index in enumerate(order):
        image = sequence[index].image
        if what == "noise" and k == 5:
            image = np.random.default_rng(0).integers(0, 255, image.shape, dtype=np.uint8)
        tracked.append(odometer.track(Frame(image, float(k), k)))
    assert tracked[5].status == "lost"
    assert tracked[7].status == "ok"
    assert np.linalg.norm(tracked[7].T_prev_curr[:3, 3]) == pytest.approx(1.2, abs=0.2)


@real
def test_real_frames_without_a_road_are_not_metric():
    sequence = KittiSequence(KITTI, "06")
    odometer, tracked = VisualOdometry(NET, sequence.camera), []
    for i in range(8):
        image = sequence[i].image.copy()
        image[200:] = 0
        tracked.append(odometer.track(Frame(image, float(i), i)))
    truth = sequence.trajectory.T_world_camera[:8]
    turn = se3.rotation_angle(
        se3.relative(truth[:-1], truth[1:])[:, :3, :3].swapaxes(1, 2)
        @ np.stack([t.T_prev_curr[:3, :3] for t in tracked[1:]])
    )
    assert not any(t.metric for t in tracked[1:])
    assert np.degrees(turn).max() < 0.2


def test_a_height_for_a_network_that_knows_none_is_refused():
    with pytest.raises(OdometryError, match="knows no camera height"):
        VisualOdometry(build(preset("tiny"), seed=0), CAMERA, VehicleCalibration(1.4))


@real
@pytest.mark.parametrize("hop", [-1, 2, 3])
def test_real_frames_dropped_or_backwards(hop):
    sequence = KittiSequence(KITTI, "06")
    order = list(range(0, 30, hop)) if hop > 0 else list(range(10, -1, -1))
    odometer = VisualOdometry(NET, sequence.camera)
    tracked = [odometer.track(sequence[i]) for i in order]
    truth = sequence.trajectory.T_world_camera[order]
    true = np.linalg.norm(se3.relative(truth[:-1], truth[1:])[:, :3, 3], axis=1)
    found = np.array([t.T_prev_curr[2, 3] for t in tracked[1:]])
    assert np.sign(found).tolist() == [np.sign(hop)] * len(found)
    assert np.abs(found).sum() == pytest.approx(true.sum(), rel=0.06)
    assert {t.status for t in tracked} == {"ok"}


@real
@pytest.mark.parametrize("start", [0, 1, 2])
def test_real_frames_of_a_bend_at_a_third_of_the_rate(start):
    """8 degrees and 3 m a frame, from the first pair on: what a search has to find."""
    sequence = KittiSequence(KITTI, "01")
    order = list(range(start, start + 30, 3))
    odometer = VisualOdometry(NET, sequence.camera)
    poses = np.stack([odometer.track(sequence[i]).T_world_camera for i in order])
    times = sequence.trajectory.timestamps_s[order]
    found = Trajectory(times, poses).motions
    true = Trajectory(times, sequence.trajectory.T_world_camera[order]).motions
    ways = np.linalg.norm(found[:, :3], axis=1) / np.linalg.norm(true[:, :3], axis=1)
    assert ways == pytest.approx(1.0, abs=0.15)
    assert np.abs(found[:, 3:] - true[:, 3:]).max() < np.radians(0.5)


def test_a_thousand_cells_do_not_average_out_what_they_share():
    net = load_checkpoint()
    assert isinstance(net, GeometricNet)
    weights = torch.rand(2, 1000, generator=torch.Generator().manual_seed(0)) + 0.5
    bounds = (-2 * net.log_alike.detach()).exp()
    for own in (weights, 1e6 * weights):
        for shared, bound in zip(net.shared(own, own), bounds, strict=True):
            assert (shared <= own).all()
            assert (shared.sum(1) < bound * own.mean(1) * 1.2).all()  # that of so many equal cells, at most
