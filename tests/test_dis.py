"""Classical flow with the road plane's help: exact where the truth is, and a bar for the learned flow."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
import torch
from torch import Tensor

from convlstm_vo.evaluation.dis import Expected, at_cells, dis_flow, guided_dis_flow, road_corridor
from convlstm_vo.models.checkpoint import load_checkpoint
from convlstm_vo.models.geometric import GeometricNet, View
from convlstm_vo.models.scene import cell_rays, flow_of, road_inverse_depth, road_slopes
from convlstm_vo.training.flow_data import good_pair
from convlstm_vo.training.rendered import in_memory
from convlstm_vo.world import KITTI_CAMERA, WorldSequence

WORSE = 1.3  # than guided DIS the learned flow may be, in the median on the road; 1.06 when this was written
SIZE = (192, 624)
K = torch.tensor([[363.0, 363.0, 311.5, 80.0]])


def plane_flow(motion: list[float], slopes: Tensor) -> Tensor:
    rays = cell_rays(K, SIZE[0] // 4, SIZE[1] // 4)
    return flow_of(rays, road_inverse_depth(rays, slopes), torch.tensor([motion]), K)


def road_pair(motion: list[float], slopes: Tensor) -> View:
    """Noise on a plane, and the same plane after a motion: what a plane does to an image is a homography."""
    noise = np.random.default_rng(0).normal(size=SIZE).astype(np.float32)
    image = np.clip(100 + 25 * cv2.GaussianBlur(noise, (0, 0), 1.2) / 0.24, 0, 255).astype(np.float32)
    flow, corners = plane_flow(motion, slopes)[0], [(30, 60), (30, 90), (46, 60), (46, 90)]
    before = np.array([(4 * x + 1.5, 4 * y + 1.5) for y, x in corners], np.float32)
    after = before + np.array([flow[:, y, x].tolist() for y, x in corners], np.float32)
    moved = cv2.warpPerspective(
        image, cv2.getPerspectiveTransform(before, after), SIZE[::-1], flags=cv2.INTER_CUBIC, borderValue=100
    )
    return View(torch.from_numpy(image)[None, None], torch.from_numpy(moved)[None, None], K)


def test_guided_dis_is_exact_on_a_plane():
    motion, slopes = [0.02, 0.0, 0.6, 0.002, 0.01, 0.0], torch.tensor([[0.01, -0.01]])
    view, truth = road_pair(motion, slopes), plane_flow(motion, slopes)
    corridor = road_corridor(cell_rays(K, *truth.shape[-2:]), slopes)
    guess = plane_flow([0.0, 0.0, 0.57, 0.0, 0.011, 0.0], slopes)  # some pixels off
    ordinary = dis_flow(view)
    guided = at_cells(guided_dis_flow(view, Expected(guess, corridor), ordinary))
    inner = corridor.clone()
    inner[:26], inner[-8:], inner[:, :20], inner[:, -20:] = False, False, False, False
    assert float((guess - truth).norm(dim=1)[0, inner].median()) > 0.5
    assert float((guided - truth).norm(dim=1)[0, inner].median()) < 0.05
    outside = ~corridor
    torch.testing.assert_close(guided[0][:, outside], at_cells(ordinary)[0][:, outside], atol=1.0, rtol=0.05)


def test_no_road_in_view_is_ordinary_dis():
    view = road_pair([0.0, 0.0, 0.3, 0.0, 0.0, 0.0], torch.zeros(1, 2))
    nowhere = torch.zeros(SIZE[0] // 4, SIZE[1] // 4, dtype=torch.bool)
    ordinary = dis_flow(view)
    assert torch.equal(
        guided_dis_flow(view, Expected(torch.zeros(1, 2, *nowhere.shape), nowhere), ordinary), ordinary
    )


@pytest.fixture(scope="module")
def road_medians() -> dict[str, float]:
    """Median end-point errors in pixels on the road of unseen streets, where flow is 10 to 20 pixels."""
    net = load_checkpoint()
    assert isinstance(net, GeometricNet)
    camera = KITTI_CAMERA.resized(height=SIZE[0], width=SIZE[1])
    errors: dict[str, list[Tensor]] = {"plain": [], "guided": [], "learned": []}
    for seed, kind in ((5_000_000, "town"), (5_000_001, "country")):
        sequence = WorldSequence(seed, frames=60, kind=kind, camera=camera)  # type: ignore[arg-type]
        for index in (15, 30, 45):
            drive = in_memory(sequence, [index, index + 1])
            batch = good_pair(drive, 0, 1, seed=index)
            intrinsics = torch.tensor(drive.intrinsics[None], dtype=torch.float32)
            view = View(batch.prev, batch.curr, intrinsics)
            slopes = road_slopes(torch.tensor(drive.road_plane[:1, :3], dtype=torch.float32))
            corridor = road_corridor(cell_rays(intrinsics, *batch.target.shape[-2:]), slopes)
            plain = dis_flow(view)
            with torch.inference_mode():
                learned = net.measure(batch.prev, batch.curr, batch.predicted).flow
            guided = guided_dis_flow(view, Expected(batch.predicted, corridor), plain)
            road = batch.valid & batch.road & (batch.target.norm(dim=1) > 0)
            for name, flow in (("plain", at_cells(plain)), ("guided", at_cells(guided)), ("learned", learned)):
                errors[name].append((flow - batch.target).norm(dim=1)[road])
    return {name: torch.cat(values).median().item() for name, values in errors.items()}


def test_guided_dis_is_right_on_rendered_road(road_medians: dict[str, float]):
    assert road_medians["guided"] < 0.3
    assert road_medians["guided"] < 0.4 * road_medians["plain"]


def test_learned_flow_is_as_good_as_guided_dis_on_unseen_road(road_medians: dict[str, float]):
    assert road_medians["learned"] < WORSE * road_medians["guided"]
