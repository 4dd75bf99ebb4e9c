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
        gamma: of the tone curve. blur_px: deviation of the lens's point spread, pixels.
        noise: deviation of grey levels in the lights, half of that in the darks. key: mean grey level that exposure
            aims at. vignetting: share of light lost at the left and right rims.
        drift_stops: deviation of exposure's wandering, in stops. shutter: share of the time between frames that the
            shutter is open (motion blur; labels are those of its middle). jpeg: quality 1 to 100, or 0 for none.
    """

    gamma: float = 1.35
    blur_px: float = 0.4
    noise: float = 2.2
    key: float = 95.0
    vignetting: float = 0.0
    drift_stops: float = 0.0
    shutter: float = 0.0
    jpeg: int = 0

    @classmethod
    def random(cls, rng: np.random.Generator) -> Sensor:
        """Any look between a good camera by day and a poor one at dusk; half have no motion blur or JPEG."""
        dusk = rng.random() < 0.12
        u = rng.random(9)
        return cls(
            gamma=0.9 + 0.9 * float(u[0]),
            blur_px=0.2 + 0.7 * float(u[1]) ** 2,
            noise=(1.0 + 3.0 * float(u[2]) ** 2) * (2.0 if dusk else 1.0),
            key=(35.0 if dusk else 70.0) + 45.0 * float(u[3]),
            vignetting=max(0.0, 0.8 * float(u[4]) - 0.4),
            drift_stops=max(0.0, 0.8 * float(u[5]) - 0.4),
            shutter=(0.4 if dusk else 0.25) * max(0.0, 2 * float(u[6]) - 1),
            jpeg=0 if u[7] < 0.5 else 40 + int(55 * u[8]),
        )


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
        size = 3 if sensor.blur_px < 0.5 else 5
        light = cv2.GaussianBlur(light, (size, size), sensor.blur_px)  # type: ignore[assignment]
    y, x = np.random.Generator(np.random.PCG64([seed, 99])).integers(0, 1 << 20, 2)
    h, w = light.shape
    out: NDArray[np.uint8] = np.empty((h, w), np.uint8)
    expose(light, gain, _curve(sensor.gamma), sensor.vignetting, w / 2, h / 2, _noise_tile(), int(y), int(x),
           sensor.noise / 2, sensor.noise / 2 / 255, out)  # fmt: skip
    if sensor.jpeg:
        _, data = cv2.imencode(".jpg", out, [cv2.IMWRITE_JPEG_QUALITY, sensor.jpeg])
        out = cv2.imdecode(data, cv2.IMREAD_GRAYSCALE)  # type: ignore[assignment]
    return out


def smeared(light: Light, flow: NDArray[np.float32], sensor: Sensor) -> Light:
    """Motion blur: light averaged along each pixel's way while the shutter is open, symmetric about now."""
    from convlstm_vo.world.film import smear

    out = np.empty_like(light)
    smear(light, flow, sensor.shutter, out)
    return out
