"""Radial distortion: frames are rendered by a wider pinhole and resampled; labels are computed on the bent rays."""

from __future__ import annotations

import dataclasses

import numpy as np
from numpy.typing import NDArray

from convlstm_vo.errors import ConvlstmVoError
from convlstm_vo.geometry.camera import Camera

Array = NDArray[np.float64]


class WorldError(ConvlstmVoError):
    """A world that cannot be: an impossible camera, an unknown road, no frames."""


@dataclasses.dataclass(frozen=True)
class Distortion:
    """OpenCV's first two radial terms: a ray at radius r (z = 1) is seen at r (1 + k1 r^2 + k2 r^4)."""

    k1: float = 0.0
    k2: float = 0.0

    def bend(self, rays_xy: Array) -> Array:
        """Where rays (..., 2) at z = 1 are seen, also at z = 1."""
        r2 = (rays_xy * rays_xy).sum(-1, keepdims=True)
        return rays_xy * (1 + self.k1 * r2 + self.k2 * r2 * r2)

    def straighten(self, seen_xy: Array) -> Array:
        """The inverse of `bend`, by Newton's method on the radius.

        Raises:
            WorldError: part of the image lies beyond what this lens can show.
        """
        target = np.sqrt((seen_xy * seen_xy).sum(-1, keepdims=True))
        r = target.copy()
        for _ in range(20):
            slope = 1 + 3 * self.k1 * r**2 + 5 * self.k2 * r**4
            r = r - (r * (1 + self.k1 * r**2 + self.k2 * r**4) - target) / np.where(
                np.abs(slope) < 1e-3, 1e-3, slope
            )
        off = np.abs(r * (1 + self.k1 * r**2 + self.k2 * r**4) - target).max()
        if not (off < 1e-9 and (1 + 3 * self.k1 * r**2 + 5 * self.k2 * r**4 > 0.05).all() and r.max() < 4.0):
            raise WorldError(
                f"distortion k1={self.k1}, k2={self.k2} folds this camera's image over; take weaker ones"
            )
        return seen_xy * (r / np.maximum(target, 1e-12))


@dataclasses.dataclass(frozen=True)
class Lens:
    """What renders a distorted image: a pinhole that sees all of it, and where in its image each pixel lies.

    Attributes:
        pinhole: the wider camera. places_xy: (height, width, 2) float64 pixels of its image.
    """

    camera: Camera
    distortion: Distortion
    pinhole: Camera
    places_xy: Array

    @classmethod
    def of(cls, camera: Camera, distortion: Distortion) -> Lens:
        """The lens of a camera; without distortion the pinhole is the camera itself."""
        ys, xs = np.mgrid[: camera.height, : camera.width].astype(np.float64)
        pixels = np.stack([xs, ys], -1)
        if distortion == Distortion():
            return cls(camera, distortion, camera, pixels)
        rays = distortion.straighten(camera.rays(pixels)[..., :2])
        places = rays * [camera.fx, camera.fy]
        low = places.min((0, 1)) - 3.0
        size = np.ceil(places.max((0, 1)) + 3.0 - low).astype(int) + 1
        pinhole = Camera(
            camera.fx, camera.fy, -float(low[0]), -float(low[1]), height=int(size[1]), width=int(size[0])
        )
        return cls(camera, distortion, pinhole, places - low)

    @property
    def bends(self) -> bool:
        """Whether there is any distortion."""
        return self.distortion != Distortion()

    def seen_at(self, pinhole_xy: Array) -> Array:
        """Pixels (..., 2) of the distorted image of points (..., 2) of the pinhole's."""
        rays = (pinhole_xy - [self.pinhole.cx, self.pinhole.cy]) / [self.pinhole.fx, self.pinhole.fy]
        result: Array = self.distortion.bend(rays) * [self.camera.fx, self.camera.fy] + [
            self.camera.cx,
            self.camera.cy,
        ]
        return result
