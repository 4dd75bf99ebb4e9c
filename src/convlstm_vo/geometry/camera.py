"""Pinhole intrinsics, and what resizing, cropping and mirroring do to them.

Pixel centres lie at integer coordinates, as in OpenCV and KITTI: the centre of the top-left pixel is (0, 0),
and an image of width W spans x from -0.5 to W - 0.5.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np
from numpy.typing import NDArray

from convlstm_vo.errors import ConvlstmVoError


class CameraError(ConvlstmVoError):
    """Intrinsics that no camera has."""


@dataclasses.dataclass(frozen=True)
class Camera:
    """A pinhole camera: focal lengths and principal point in pixels of an image of the given size.

    Intrinsics belong to an image size: use `resized` and `cropped` whenever the image is.

    Raises:
        CameraError: focal lengths that are not positive, numbers that are not finite, or an empty image.
    """

    fx: float
    fy: float
    cx: float
    cy: float
    height: int
    width: int

    def __post_init__(self) -> None:
        if self.height < 1 or self.width < 1:
            raise CameraError(f"image size {self.height}x{self.width}: both must be at least 1 pixel")
        if not all(math.isfinite(value) for value in (self.fx, self.fy, self.cx, self.cy)):
            raise CameraError(f"intrinsics {self.intrinsics.tolist()} (fx, fy, cx, cy) must be finite numbers")
        if self.fx <= 0 or self.fy <= 0:
            raise CameraError(f"focal lengths fx={self.fx}, fy={self.fy} must be positive (pixels)")

    @classmethod
    def from_fov(cls, horizontal_fov_deg: float, *, height: int, width: int) -> Camera:
        """A camera with square pixels and its principal point in the middle, from a field of view in degrees."""
        if not 1 <= horizontal_fov_deg <= 170:
            raise CameraError(
                f"field of view {horizontal_fov_deg} must lie between 1 and 170 degrees, as a pinhole's does"
            )
        focal = width / 2 / math.tan(math.radians(horizontal_fov_deg) / 2)
        return cls(focal, focal, (width - 1) / 2, (height - 1) / 2, height=height, width=width)

    def doubt(self) -> str | None:
        """What speaks against these intrinsics being those of this image, in words; None where nothing does."""
        x, y = (self.cx + 0.5) / self.width, (self.cy + 0.5) / self.height
        if 0.25 < x < 0.75 and 0.1 < y < 0.9:
            return None
        return (
            f"the principal point ({self.cx:.0f}, {self.cy:.0f}) is far from the middle of the {self.width}x"
            f"{self.height} image; if these are intrinsics of another image size, give those of this one"
        )

    @property
    def intrinsics(self) -> NDArray[np.float64]:
        """(fx, fy, cx, cy) in pixels: (4,), as networks take them."""
        return np.array([self.fx, self.fy, self.cx, self.cy])

    def matrix(self) -> NDArray[np.float64]:
        """The 3x3 matrix K that projects camera coordinates to pixels."""
        return np.array([[self.fx, 0, self.cx], [0, self.fy, self.cy], [0, 0, 1.0]])

    def resized(self, *, height: int, width: int) -> Camera:
        """The same camera after its image is resized to the given size (both ratios may differ)."""
        sy, sx = height / self.height, width / self.width
        # Half a pixel is added and removed because the outer border of the image scales, not its pixel centres.
        cx, cy = (self.cx + 0.5) * sx - 0.5, (self.cy + 0.5) * sy - 0.5
        return Camera(self.fx * sx, self.fy * sy, cx, cy, height=height, width=width)

    def cropped(self, *, top: int, left: int, height: int, width: int) -> Camera:
        """The same camera when only a window of its image is kept, its corner at row ``top``, column ``left``."""
        if top < 0 or left < 0 or top + height > self.height or left + width > self.width:
            raise CameraError(
                f"a {height}x{width} window at row {top}, column {left} leaves the image "
                f"of {self.height}x{self.width}"
            )
        return Camera(self.fx, self.fy, self.cx - left, self.cy - top, height=height, width=width)

    def mirrored(self) -> Camera:
        """The same camera when its image is flipped left to right."""
        return dataclasses.replace(self, cx=self.width - 1 - self.cx)

    def turned(self, quarters: int) -> Camera:
        """The same camera when its image is turned clockwise by so many right angles."""
        camera = self
        for _ in range(quarters % 4):
            cx, cy = camera.height - 1 - camera.cy, camera.cx
            camera = Camera(camera.fy, camera.fx, cx, cy, height=camera.width, width=camera.height)
        return camera

    def project(self, points_xyz: NDArray[np.float64]) -> NDArray[np.float64]:
        """Pixel coordinates (..., 2) of points (..., 3) in the camera frame (z > 0)."""
        x, y, z = np.moveaxis(points_xyz, -1, 0)
        return np.stack([self.fx * x / z + self.cx, self.fy * y / z + self.cy], axis=-1)

    def rays(self, pixels_xy: NDArray[np.float64]) -> NDArray[np.float64]:
        """Points (..., 3) at depth z = 1 on the rays through pixels (..., 2), the inverse of `project`."""
        x = (pixels_xy[..., 0] - self.cx) / self.fx
        y = (pixels_xy[..., 1] - self.cy) / self.fy
        return np.stack([x, y, np.ones_like(x)], axis=-1)
