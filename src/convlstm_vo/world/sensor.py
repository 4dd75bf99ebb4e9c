"""What a camera makes of the light: exposure, tone curve, noise. None of it moves a point, so labels stay exact."""

from __future__ import annotations

import dataclasses
import functools

import cv2
import numpy as np
from numpy.typing import NDArray

Light = NDArray[np.float32]


@dataclasses.dataclass(frozen=True)
class Sensor:
    """A camera's look.

    Attributes:
        gamma: of the tone curve. blur_px: deviation of the lens's point spread, pixels of a 1241-wide image.
        noise: deviation of grey levels in the darks; it grows with light. key: grey level that exposure aims at.
        vignetting: share of light lost at the left and right rims.
    """

    gamma: float = 1.35
    blur_px: float = 0.4
    noise: float = 1.0
    key: float = 95.0
    vignetting: float = 0.0


@functools.lru_cache(maxsize=1)
def _noise_tile() -> NDArray[np.float32]:
    rng = np.random.Generator(np.random.PCG64(7))
    return (rng.random((4, 1024, 2048), dtype=np.float32).sum(0) - 2.0) * np.float32(3**0.5)


def exposure_for(light: Light, sensor: Sensor) -> float:
    """The gain at which a picture's mean comes out at the sensor's key."""
    low, high = 0.05, 20.0
    for _ in range(14):
        gain = (low * high) ** 0.5
        mean = float(np.mean(255 * np.clip(gain * light, 0, 1) ** (1 / sensor.gamma)))
        low, high = (gain, high) if mean < sensor.key else (low, gain)
    return (low * high) ** 0.5


@functools.lru_cache(maxsize=8)
def _curve(gamma: float) -> Light:
    return (255 * np.linspace(0, 1, 4096) ** (1 / gamma)).astype(np.float32)


def develop(light: Light, gain: float, sensor: Sensor, seed: int) -> NDArray[np.uint8]:
    """Turn light (height, width) into grey levels; the seed picks the noise."""
    from convlstm_vo.world.film import expose

    if sensor.blur_px > 0:
        light = cv2.GaussianBlur(light, (5, 5), sensor.blur_px)  # type: ignore[assignment]
    y, x = np.random.Generator(np.random.PCG64([seed, 99])).integers(0, 1 << 20, 2)
    h, w = light.shape
    out = np.empty((h, w), np.uint8)
    expose(light, gain, _curve(sensor.gamma), sensor.vignetting, w / 2, h / 2, _noise_tile(), int(y), int(x),
           sensor.noise * 0.6, sensor.noise * 0.6 / 255, out)  # fmt: skip
    return out
