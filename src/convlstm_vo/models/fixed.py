"""The car's own bonnet in view: it shows no flow, and taken for road it says that the car stands.

It is told by the images themselves, not by a flow that is measured on top of what a driving car would see: what
stays where it is while the road has to move there by pixels, from the image's lower edge up, is no road. A lorry
ahead that drives along stays too, but before it the road moves.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from convlstm_vo.models import kernels

BLOCK = 8  # pixels, as the cells that the solver sees
_UNMOVED, _MOVED = 0.35, 1.0  # pixels of the images at half size
_TEXTURE = 1.5  # root mean square slope along the way, grey levels a pixel, to tell the two apart
_ALONG = 0.25  # share of all slope that lies along the way: the edge of a lane slides along itself
_CLEAR = 2.0  # pixels of flow of the road, from which on what stays is no road
# Of a frame that says so, or the contrary. (The bars of a crossing may move by one of them a frame, for a while.)
_GAINED, _LOST = 0.1, 0.5
_FROM = 0.5
TOLD = 2.0  # share of what a user's mask says: it is never forgotten
_WIDE = 0.3  # share of the image's width
_LEAST = 8  # blocks, of what is no chance
BELOW_HORIZON = 0.05  # inverse depth of the road, in camera heights: within 20 of them
_MOST = 0.85  # of what is told below the horizon: if more of it stays, it is the motion that is wrong


def unmoved(prev: Tensor, curr: Tensor, flow: Tensor) -> tuple[Tensor, Tensor]:
    """Which blocks stay where they are, and which move, if their texture tells: twice (batch, rows, columns).

    Args:
        prev, curr: grey levels, (batch, 1, height, width), sides divisible by 8.
        flow: whose direction is asked for, (batch, 2, rows, columns).
    """
    xx, xy, yy, changed = slopes_and_change(prev, curr).unbind(1)
    x, y = (flow / flow.norm(dim=1, keepdim=True).clamp_min(1e-6)).unbind(1)
    along = x * x * xx + 2 * x * y * xy + y * y * yy
    tells = (along > _TEXTURE**2) & (along > _ALONG * (xx + yy))
    return tells & (changed < _UNMOVED**2 * along), tells & (changed > _MOVED**2 * along)


def slopes_and_change(prev: Tensor, curr: Tensor) -> Tensor:
    """Means over each block, at half size, of the products of slopes (xx, xy, yy) and of the squared change."""
    if kernels.usable(prev, curr):
        return kernels.slopes_and_change(prev, curr, BLOCK // 2)
    a, b = F.avg_pool2d(prev, 2), F.avg_pool2d(curr, 2)
    gx = F.pad((a[..., 2:] - a[..., :-2]) / 2, (1, 1))
    gy = F.pad((a[..., 2:, :] - a[..., :-2, :]) / 2, (0, 0, 1, 1))
    change = b - a
    return F.avg_pool2d(torch.cat([gx * gx, gx * gy, gy * gy, change * change], 1), BLOCK // 2)


def at_the_edge(stays: Tensor, moves: Tensor) -> Tensor:
    """What may be a bonnet: something moves over it.

    If most of the rest stays too, it is the car that stands.
    """
    bonnet = from_the_edge(stays, moves) & (moves.cumsum(1) > 0)
    others = (stays & ~bonnet).flatten(1).sum(1)
    return bonnet & (moves.flatten(1).sum(1) > others)[:, None, None]


def from_the_edge(stays: Tensor, moves: Tensor) -> Tensor:
    """What stays, down to the lower edge: at least half of what is there does, and nothing moves.

    That is a bonnet, if it is wide; but no lorry ahead, before which is road, nothing far off over a road that
    shows nothing, and no car beside that goes as we do.
    """
    beneath = [blocks.flip(1).cumsum(1).flip(1) for blocks in (stays, moves, torch.ones_like(stays))]
    bonnet = stays & (2 * beneath[0] >= beneath[2]) & (beneath[1] == 0)
    return bonnet & (bonnet.any(1).float().mean(1) >= _WIDE)[:, None, None]


def suspected(share: Tensor, bonnet: Tensor) -> Tensor:
    """The share after a frame of which only `at_the_edge` is known; one more is enough if the car drives."""
    return torch.maximum(share, bonnet * (_FROM - _GAINED))


def learned(share: Tensor, stays: Tensor, moves: Tensor, road_flow: Tensor) -> Tensor:
    """How sure it is of each block, (batch, rows, columns), that it is fixed, 0 to 1 or `TOLD`.

    Args:
        share: of before. road_flow: pixels that the road moves there, 0 where there is none.
    """
    clear = road_flow > _CLEAR
    stays, moves = from_the_edge(stays, moves) & clear, moves & clear
    told = (stays | moves).flatten(1).sum(1).clamp_min(1)
    plausible = (stays.flatten(1).sum(1) < _MOST * told)[:, None, None]
    found = (share + (stays & plausible) * _GAINED - moves * _LOST).clamp(0.0, 1.0)
    return torch.where(share == TOLD, share, found)


def worth_learning(share: Tensor, stays: Tensor, rays: Tensor) -> bool:
    """Whether something is known to be fixed, or enough stays under the horizon to be."""
    return bool(((stays & (rays[:, 1] > BELOW_HORIZON)).flatten(1).sum(1) >= _LEAST).any()) or bool(share.any())


def told(mask: Tensor) -> Tensor:
    """The share, (rows, columns), by a user's mask (height, width), true where hidden."""
    return TOLD * F.max_pool2d(mask[None, None].float(), BLOCK)[0, 0]


def hidden(share: Tensor) -> Tensor:
    """The blocks that are taken to be fixed, and those beside them, whose flow is measured from both."""
    blocks = share >= _FROM
    return beside(blocks) if bool(blocks.any()) else blocks


def beside(blocks: Tensor) -> Tensor:
    """Blocks, (batch, rows, columns), and those around them."""
    return F.max_pool2d(blocks.float(), 3, 1, 1) > 0
