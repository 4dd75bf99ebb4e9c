"""A car's own bonnet in view: painted, dirty, or polished, so that it mirrors the street over it."""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray

_POLISHED = 0.65  # share of bonnets that mirror the street
_ROWS = 192  # of an image, on which a spot of dirt or the bright edge is so many pixels wide


class Bonnet:
    """One bonnet: it stays where it is, whatever the street does.

    Args:
        height, width: of the images. rng: its shape, paint and dirt.

    Attributes:
        under: (height, width) whether it hides the street.
    """

    def __init__(self, height: int, width: int, rng: np.random.Generator) -> None:
        y, self._x = np.mgrid[:height, :width].astype(np.float32)
        across = 2 * self._x / width - 1 - rng.uniform(-0.3, 0.3)
        edge = (height * (rng.uniform(0.78, 0.94) + rng.uniform(0.03, 0.15) * across**2)).astype(np.float32)
        self.under: NDArray[np.bool_] = y > edge
        polished = rng.random() < _POLISHED
        self._shine = np.float32(rng.uniform(0.3, 0.8) if polished else 0.0)
        # It is curved, so more of the street than lies so high over its edge is seen in it.
        self._above = (edge - np.float32(rng.uniform(1, 4)) * (y - edge)).clip(0)
        size = height / _ROWS
        dirt = cv2.GaussianBlur(rng.normal(0, size, (height, width)).astype(np.float32), (0, 0), 1.5 * size)
        rim, shade = np.exp(-(((y - edge) / size / 2) ** 2)), (y - edge) / size
        paint = rng.uniform(10, 70) + rng.uniform(0, 36 if polished else 120) * dirt
        paint = paint + rng.uniform(0, 90) * rim + rng.uniform(0, 0.8) * shade
        self._paint = paint.astype(np.float32)

    def over(self, image: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """A frame, uint8 (height, width), with the bonnet in view."""
        paint = self._paint
        if self._shine:
            paint = paint + self._shine * cv2.remap(image, self._x, self._above, cv2.INTER_LINEAR)
        return np.where(self.under, paint.clip(0, 255), image).astype(np.uint8)
