"""What the weights learn from, on cells that are made up."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from convlstm_vo.models.geometric import Cells
from convlstm_vo.models.scene import cell_rays, flow_of, flow_to_rays, road_inverse_depth
from convlstm_vo.training.cell_drives import CellDrive, bent, mistaken
from convlstm_vo.training.geometric import cell_misfit

K = torch.tensor([[363.6, 363.6, 311.5, 95.5]])
MOTION, SLOPES = torch.tensor([[0.0, 0.0, 0.6, 0.0, 0.01, 0.0]]), torch.tensor([[0.002, -0.004]])
SIGMA = 5e-4


def road_cells(*, noise: float = SIGMA, higher: float = 0.0) -> Cells:
    """A road without end, whose right half is nearer by a share of its distance: a pavement."""
    rays = cell_rays(K, 48, 156)
    inverse = road_inverse_depth(rays, SLOPES).clamp_min(0.0) * (1 + higher * (rays[:, 0] > 0))
    seen = flow_to_rays(flow_of(rays, inverse, MOTION, K), rays, K)
    random = torch.Generator().manual_seed(0)
    seen = seen + noise * torch.randn(seen.shape, generator=random)
    return Cells(rays, seen, torch.full(seen.shape[:1] + seen.shape[2:], SIGMA), torch.ones_like(seen[:, 0]))


def misfit(cells: Cells, along: Tensor, *, bend: Tensor | None = None, motion: Tensor = MOTION) -> float:
    across = torch.full_like(along, SIGMA**-2)
    return cell_misfit(cells, (across, along), motion, SLOPES, bend).item()


@pytest.mark.parametrize("factor", [0.2, 5.0])
def test_cells_are_worth_their_variance(factor):
    cells = road_cells()
    right = torch.full((1, cells.sigma[0].numel()), SIGMA**-2)
    assert misfit(cells, right) < misfit(cells, right * factor) - 0.2


def test_a_pavement_is_worth_less_than_the_road():
    cells = road_cells(higher=0.08)
    both = torch.full((1, cells.sigma[0].numel()), SIGMA**-2)
    side = cells.rays[:, 0].flatten(1) > 0
    left_out = [misfit(cells, torch.where(side == which, both / 100, both)) for which in (True, False)]
    assert left_out[0] < misfit(cells, both) < left_out[1]


def test_no_cell_is_to_blame_for_a_bend():
    cells = road_cells(noise=0.0)
    packed = torch.cat([cells.rays, cells.seen, cells.sigma[:, None], cells.texture[:, None]], 1)
    drive = CellDrive(packed.numpy(), MOTION.numpy(), SLOPES.numpy(), MOTION[0].numpy())
    shown = torch.from_numpy(bent(drive, 0.05).cells)
    cells.seen = shown[:, 3:5]
    weights = torch.full((1, cells.sigma[0].numel()), SIGMA**-2)
    straight = misfit(road_cells(noise=0.0), weights)
    assert misfit(cells, weights) > straight + 0.3
    assert misfit(cells, weights, bend=torch.tensor([0.05])) == pytest.approx(straight, abs=0.1)


def test_where_nothing_moves_or_no_road_is_known_only_the_rotation_counts():
    cells = road_cells(higher=0.08)
    weights = torch.full((1, cells.sigma[0].numel()), SIGMA**-2)
    still = torch.zeros(1, 6)
    assert misfit(cells, weights, motion=still) == misfit(cells, weights * 9, motion=still)
    unknown = cell_misfit(cells, (weights, weights), MOTION, torch.full((1, 2), torch.nan), None)
    assert torch.isfinite(unknown)


def test_mistakes_last_and_are_as_large_as_told():
    errors = np.concatenate([mistaken(400, np.random.default_rng(seed)) for seed in range(40)])
    assert errors.std(0) == pytest.approx([0.03, 0.004, 0.004], rel=0.15)
    assert np.corrcoef(errors[:-1, 0], errors[1:, 0])[0, 1] > 0.85
