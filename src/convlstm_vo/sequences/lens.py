"""Lenses that bend straight lines: frames as a pinhole would have taken them."""

from __future__ import annotations

import dataclasses
from functools import cached_property
from typing import Literal

import cv2
import numpy as np
from numpy.typing import NDArray

from convlstm_vo.geometry.camera import Camera
from convlstm_vo.sequences.base import Image, SequenceError, Stream
from convlstm_vo.sequences.changed import Changed

LensModel = Literal["plumb_bob", "equidistant"]
_WIDEST = 1.43  # tangent of half of the widest field of view of a pinhole's frame
_STRAIGHT = 1e-6  # coefficients under which a lens bends nothing
# As ROS calls them (sensor_msgs/CameraInfo): rational_polynomial is plumb_bob with more terms.
LENS_MODELS: dict[str, LensModel] = {
    "": "plumb_bob",
    "plumb_bob": "plumb_bob",
    "rational_polynomial": "plumb_bob",
    "radial-tangential": "plumb_bob",
    "radtan": "plumb_bob",
    "equidistant": "equidistant",
    "fisheye": "equidistant",
}


@dataclasses.dataclass(frozen=True)
class Lens:
    """A camera with distortion, as OpenCV defines it.

    Args:
        camera: K of the image as it comes.
        coefficients: k1 k2 p1 p2 [k3 [k4 k5 k6 ...]] (4, 5, 8, 12 or 14 numbers) of ``plumb_bob``, k1 k2 k3 k4 of
            ``equidistant`` (Kannala and Brandt 2006, OpenCV's fisheye).
        model: which of them.

    Raises:
        SequenceError: a number of coefficients that the model does not have, or one that is not finite.
    """

    camera: Camera
    coefficients: tuple[float, ...]
    model: LensModel = "plumb_bob"

    def __post_init__(self) -> None:
        counts = (4,) if self.model == "equidistant" else (4, 5, 8, 12, 14)
        if len(self.coefficients) not in counts:
            raise SequenceError(
                f"distortion {list(self.coefficients)}: {len(self.coefficients)} coefficients, but {self.model} "
                f"has {' or '.join(map(str, counts))}"
            )
        if not np.isfinite(self.coefficients).all():
            raise SequenceError(f"distortion {list(self.coefficients)}: the coefficients must be finite numbers")

    @cached_property
    def rectified(self) -> Camera:
        """The pinhole of the frames that `undistort` gives: same size, no border without image.

        It sees the largest rectangle in the image, or 110 degrees of it to each axis where a fisheye has more.

        Raises:
            SequenceError: the distortion folds the image over.
        """
        height, width = self.camera.height, self.camera.width
        x, y = np.arange(width, dtype=np.float64), np.arange(height, dtype=np.float64)
        left, right = (self._rays(np.full(height, at), y)[:, 0] for at in (0.0, width - 1.0))
        top, bottom = (self._rays(x, np.full(width, at))[:, 1] for at in (0.0, height - 1.0))
        if any(np.isfinite(edge).mean() < 0.3 for edge in (left, right, top, bottom)):
            raise self._folded()
        low = np.array([np.nanmax(left), np.nanmax(top)]).clip(-_WIDEST)
        high = np.array([np.nanmin(right), np.nanmin(bottom)]).clip(None, _WIDEST)
        for _ in range(20):  # corners that no ray reaches are left out
            if (low < 0).all() and (high > 0).all() and self._is_one_to_one(low, high):
                fx, fy = (width - 1) / (high[0] - low[0]), (height - 1) / (high[1] - low[1])
                return Camera(float(fx), float(fy), -low[0] * fx, -low[1] * fy, height=height, width=width)
            low, high = 0.97 * low, 0.97 * high
        raise self._folded()

    def _is_one_to_one(self, low: NDArray[np.float64], high: NDArray[np.float64]) -> bool:
        """Whether rays of the rectangle are seen in the same order as they lie."""
        x, y = np.meshgrid(*(np.linspace(a, b, 41) for a, b in zip(low, high, strict=True)))
        seen = self._seen(np.stack([x, y], -1).reshape(-1, 2)).reshape(41, 41, 2)
        by_x, by_y = np.diff(seen[:-1], axis=1), np.diff(seen[:, :-1], axis=0)
        return bool((by_x[..., 0] * by_y[..., 1] - by_x[..., 1] * by_y[..., 0] > 0).all())

    def _seen(self, rays: NDArray[np.float64]) -> NDArray[np.float64]:
        """Pixels (n, 2) of rays (n, 2)."""
        K, D, still = self.camera.matrix(), np.array(self.coefficients), np.zeros(3)
        if self.model == "equidistant":
            return np.asarray(cv2.fisheye.distortPoints(rays[:, None], K, D)[:, 0])
        solid = np.concatenate([rays, np.ones((len(rays), 1))], 1)
        return np.asarray(cv2.projectPoints(solid, still, still, K, D)[0][:, 0])

    def _rays(self, x: NDArray[np.float64], y: NDArray[np.float64]) -> NDArray[np.float64]:
        """Rays (n, 2) of pixels. Far out, with the pixel's sign, where a fisheye looks to the side or back; NaN
        where none leads to the pixel."""
        K, D = self.camera.matrix(), np.array(self.coefficients)
        pixels, focal = np.stack([x, y], -1), K[[0, 1], [0, 1]]
        straight: NDArray[np.float64] = (pixels - K[:2, 2]) / focal
        if self.model == "equidistant":
            found = cv2.fisheye.undistortPoints(pixels[:, None], K, D)[:, 0]
            off = ~(np.abs(found).max(-1, keepdims=True) < 10 * _WIDEST)
            return np.where(off, np.sign(straight) * 10 * _WIDEST, found)
        # By OpenCV's exact forward model; its own inverse stops after a few steps, and says nothing of it.
        rays = straight
        for _ in range(100):
            rays = np.clip(rays - (self._seen(rays) - pixels) / focal, -10.0, 10.0).astype(np.float64)
        there = np.abs(self._seen(rays) - pixels).max(-1, keepdims=True) < 0.01
        return np.where(there, rays, np.nan)

    def _folded(self) -> SequenceError:
        camera = self.camera
        return SequenceError(
            f"distortion {list(self.coefficients)}: folds the image of this camera over "
            f"(fx {camera.fx:g}, {camera.height}x{camera.width}); the coefficients belong to another one"
        )

    @cached_property
    def _maps(self) -> tuple[NDArray[np.int16], NDArray[np.uint16]]:
        K, D, new = self.camera.matrix(), np.array(self.coefficients), self.rectified.matrix()
        size = (self.camera.width, self.camera.height)
        make = cv2.fisheye.initUndistortRectifyMap if self.model == "equidistant" else cv2.initUndistortRectifyMap
        return make(K, D, np.eye(3), new, size, cv2.CV_16SC2)  # type: ignore[return-value]

    def undistort(self, image: Image) -> Image:
        """The image as `rectified` would have taken it."""
        return cv2.remap(image, *self._maps, cv2.INTER_LINEAR)  # type: ignore[return-value]


def bends(coefficients: tuple[float, ...]) -> bool:
    """Whether a ``plumb_bob`` lens with these coefficients does anything."""
    return not all(abs(value) <= _STRAIGHT for value in coefficients)  # one that is no number bends, and is refused


def lens_of(camera: Camera, coefficients: tuple[float, ...], model: str, source: str) -> Lens | None:
    """The lens that a ROS ``camera_info`` tells of; None where it is a pinhole.

    Args:
        camera: K of the image as it comes. model: ``distortion_model``. source: for messages.

    Raises:
        SequenceError: a distortion model that is not known, coefficients that it does not have, or that fold the
            image over.
    """
    known = LENS_MODELS.get(model)
    # A fisheye is no pinhole even if all of its coefficients are 0.
    if not coefficients or (known != "equidistant" and not bends(coefficients)):
        return None
    if known is None:
        names = ", ".join(name for name in LENS_MODELS if name)
        raise SequenceError(
            f"{source}: distortion_model '{model}' is not known; it may be {names}; rectify the images "
            "(image_proc) first, and give the rectified camera"
        )
    try:
        lens = Lens(camera, coefficients, known)
        _ = lens.rectified
    except SequenceError as error:
        raise SequenceError(f"{source}: {error}") from None
    return lens


class Undistorted(Changed):
    """A stream whose frames come through `Lens.undistort`.

    Args:
        stream: frames of the distorted camera.
        lens: of images of the stream's size.

    Raises:
        SequenceError: a lens of another image size.
    """

    def __init__(self, stream: Stream, lens: Lens) -> None:
        have, want = (stream.camera.height, stream.camera.width), (lens.camera.height, lens.camera.width)
        if have != want:
            raise SequenceError(
                f"{stream.name}: its images are {have[0]}x{have[1]}, the lens's {want[0]}x{want[1]}"
            )
        super().__init__(stream, lens.rectified, lens.undistort)
        self.lens = lens
