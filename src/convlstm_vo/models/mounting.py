"""What the default network remembers beside the ConvLSTM's state, and where its camera looks.

A camera need not look where the car drives. What is measured is turned into the axes of one at the same place that
does (`looking_ahead`), in which a street lies where the network expects it; and the motion's direction, of which no
road is needed, says a little better with each frame where that is (`facing_ahead`).
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from convlstm_vo.geometry import se3
from convlstm_vo.models.scene import road_normal, road_slopes

# Where the camera looks on the car, radians: standard deviation of what is not known before the start, and of the
# direction of one frame's motion, of which ten are alike as those of the road are; how far off one may be, and all.
# A bend that tells half as much, radians for a camera height; a way that does.
_ASIDE, _WANDERING, _FRAMES_ALIKE = 0.1, 0.015, 10.0
_LARGEST_OFF, LARGEST_ASIDE = 0.15, 0.35
_CURVED, _CLEARLY_MOVING = 0.004, 0.3


@dataclasses.dataclass
class Memory:
    """What is remembered beside the ConvLSTM's state; all zero before the first frame.

    Attributes:
        known: (batch,) 0 before a motion has been seen, then 1; between after a search that found no road, which
            need not be repeated with each frame.
        motion: (batch, 6) the last one, in camera heights.
        slopes: (batch, 2) of the road in the newest frame. shape: (batch, 3), beyond a plane (`solver.py`).
        variance: (batch, 5, 5) of slopes and shape.
        mounting: (batch, 2) slopes of the road on average, i.e. roll and pitch of the camera on the car.
        mounting_precision: (batch, 2), their inverse variance beyond what is known before the start.
        height: (batch,) metres above the road; 0 stands for the configured one.
        aside: (batch, 2) by which the camera looks to the right of where the car drives, and above it, radians. All
            before it is in the axes of a camera that looks there (`looking_ahead`).
        aside_precision: (batch, 2), their inverse variance beyond what is known before the start.
        scale_variance: (batch,) of the last way's logarithm, which grows while no road gives its length.
    """

    known: Tensor
    motion: Tensor
    slopes: Tensor
    shape: Tensor
    variance: Tensor
    mounting: Tensor
    mounting_precision: Tensor
    height: Tensor
    aside: Tensor
    aside_precision: Tensor
    scale_variance: Tensor

    SIZE = 47

    @classmethod
    def unpack(cls, packed: Tensor) -> Memory:
        """From one tensor (batch, 47)."""
        known, motion, slopes, shape, variance, mounting, precision, height, aside, of_aside, scale = packed.split(
            [1, 6, 2, 3, 25, 2, 2, 1, 2, 2, 1], 1
        )
        variance = variance.unflatten(1, (5, 5))
        road = slopes, shape, variance, mounting, precision
        return cls(known[:, 0], motion, *road, height[:, 0], aside, of_aside, scale[:, 0])

    def pack(self) -> Tensor:
        """To one tensor (batch, 47)."""
        road = [self.slopes, self.shape, self.variance.flatten(1)]
        slow = [self.mounting, self.mounting_precision, self.height[:, None], self.aside, self.aside_precision]
        return torch.cat([self.known[:, None], self.motion, *road, *slow, self.scale_variance[:, None]], 1)


def looking_ahead(memory: Memory) -> Tensor:
    """(batch, 3, 3), from the camera's axes to those of one at the same place that looks where the car drives."""
    return se3.so3_from_yaw_pitch(memory.aside)


def turned_points(points: Tensor, rotation: Tensor) -> Tensor:
    """Points (batch, 3, rows, columns) in other axes, scaled to a depth of 1; none lies behind the camera."""
    there = (rotation @ points.flatten(2)).unflatten(2, points.shape[2:])
    return there / there[:, 2:].clamp_min(0.05)


def facing_ahead(memory: Memory, lost: Tensor) -> Memory:
    """Memory (of the newest frame) that knows a little better where the camera looks, beside where the car drives.

    Only straight driving tells where right is: in a bend a camera before the rear axle goes to the side.

    Args:
        lost: (batch,) whether this frame told nothing.
    """
    way = memory.motion[:, :3].norm(dim=1).clamp_min(1e-6)
    straight = 1 / (1 + (memory.motion[:, 4] / (_CURVED * way)).square())
    clear = way.square() / (way.square() + _CLEARLY_MOVING**2)
    gained = torch.stack([straight * clear, clear], 1) * ~lost[:, None] / (_FRAMES_ALIKE * _WANDERING**2)
    precision = memory.aside_precision * 0.998
    off = direction(memory.motion).clamp(-_LARGEST_OFF, _LARGEST_OFF)
    change = gained / (precision + gained + _ASIDE**-2) * off
    aside = (memory.aside + change).clamp(-LARGEST_ASIDE, LARGEST_ASIDE)
    return dataclasses.replace(turned_aside(memory, aside), aside_precision=precision + gained)


def direction(motion: Tensor) -> Tensor:
    """(batch, 2) by which a camera looks to the right of its motion (batch, 6), and above it, radians."""
    ahead = motion[:, 2].abs().clamp_min(1e-6)
    right, down = (torch.atan(motion[:, i] / ahead) * motion[:, 2].sign() for i in (0, 1))
    return torch.stack([motion[:, 4] / 2 - right, down + motion[:, 3] / 2], 1)


def turned_aside(memory: Memory, aside: Tensor) -> Memory:
    """The same memory, of a camera that is taken to look elsewhere, (batch, 2)."""
    new = dataclasses.replace(memory, aside=aside)
    turned = looking_ahead(new) @ looking_ahead(memory).transpose(1, 2)
    normals = torch.stack([road_normal(memory.slopes), road_normal(memory.mounting)], 2)
    slopes, mounting = (road_slopes(n) for n in (turned @ normals).unbind(2))
    motion = (turned @ memory.motion.unflatten(1, (2, 3)).transpose(1, 2)).transpose(1, 2).flatten(1)
    return dataclasses.replace(new, motion=motion, slopes=slopes, mounting=mounting)
