"""Classical optical flow, a yardstick of the learned one: DIS, plain and told what to expect of the road.

DIS is Kroeger et al. 2016 as OpenCV has it. `benchmarks/front_ends.py` puts it in the learned flow's place, the
tests hold the learned flow to it; nothing else uses it. The guided one needs OpenCV 4.13 (`setCoarsestScale`).
"""

from __future__ import annotations

import dataclasses

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from convlstm_vo.models.flow import STRIDE, upsample, warp
from convlstm_vo.models.geometric import View

_HALF_WIDTH = (
    6.0  # of the road corridor, camera heights: 10 m to both sides, the best of 2.4, 3.6 and 6 in training
)
_NEAREST_ROW = 0.06  # below the horizon, as in `GeometricNet.trusted_weights`
_MARGIN = 16  # pixels above the corridor that the guided DIS sees


@dataclasses.dataclass(frozen=True)
class Expected:
    """What is expected of a pair of frames, by the last motion and the road as it was.

    Attributes:
        flow: in pixels (x, y) at the cells, (1, 2, rows, columns). corridor: (rows, columns) bool, `road_corridor`.
    """

    flow: Tensor
    corridor: Tensor


def road_corridor(rays: Tensor, slopes: Tensor) -> Tensor:
    """Where a road should be: (rows, columns) bool, of rays (1, 3, rows, columns) and the road's slopes (1, 2)."""
    height = rays[0, 1] - slopes[0, 0] * rays[0, 0] - slopes[0, 1]
    return (height > _NEAREST_ROW) & (rays[0, 0].abs() < _HALF_WIDTH * height)


def dis_flow(view: View) -> Tensor:
    """Ordinary DIS (medium) of one pair: pixels, (1, 2, height, width)."""
    return _calculated(_dis(), view.prev, view.curr)


def guided_dis_flow(view: View, expected: Expected, ordinary: Tensor) -> Tensor:
    """DIS that starts, in the road corridor, at the finest scale from the flow expected: (1, 2, height, width).

    The current image is warped by the expected flow first: what deforms the road, its looming, is gone before DIS,
    whose patches only shift, sees it. As DIS's own first guess the same flow helps far less. Coarse scales, where
    asphalt has no contrast left, are not looked at.

    Args:
        view: of one pair. expected: of it. ordinary: its flow by `dis_flow`, which is kept elsewhere.
    """
    size = (view.prev.shape[-2], view.prev.shape[-1])
    rows = expected.corridor.any(1).nonzero()
    if not len(rows):
        return ordinary
    top = max(int(rows[0]) * STRIDE - _MARGIN, 0)
    ahead = upsample(expected.flow, size)
    dis = _dis()
    dis.setFinestScale(0)
    dis.setCoarsestScale(0)
    residual = _calculated(dis, view.prev[..., top:, :], warp(view.curr, ahead)[..., top:, :])
    residual = F.pad(residual, (0, 0, top, 0))
    guided = residual + warp(ahead, residual)  # the warped image shows at x what is seen at x + ahead(x)
    where = upsample(expected.corridor[None, None].float(), size) > 0.5
    return torch.where(where, guided, ordinary)


def at_cells(values: Tensor) -> Tensor:
    """Pixels (1, channels, height, width) at the middles of cells: (1, channels, height / 4, width / 4)."""
    return F.avg_pool2d(values, STRIDE)


def _dis() -> cv2.DISOpticalFlow:
    return cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)


def _calculated(dis: cv2.DISOpticalFlow, prev: Tensor, curr: Tensor) -> Tensor:
    here, there = (
        np.ascontiguousarray(image[0, 0].round().clamp(0, 255).byte().cpu().numpy()) for image in (prev, curr)
    )
    flow = dis.calc(here, there, None)  # type: ignore[call-overload]  # a field of zeros would count as a guess
    return torch.from_numpy(np.asarray(flow, np.float32)).permute(2, 0, 1)[None].contiguous()
