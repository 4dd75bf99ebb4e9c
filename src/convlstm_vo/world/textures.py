"""Pictures of which streets are made: asphalt, leaves, walls, windows. Drawn once a process from a fixed seed.

Streets differ by which pictures they use, at what scale, strength and tone; drawing them anew for every street
would cost more than rendering it. 128 is neutral: a tone is multiplied by 1 + strength * (value - 128) / 128.
"""

from __future__ import annotations

from collections.abc import Callable

import cv2
import numpy as np
from numpy.typing import NDArray

Picture = NDArray[np.uint8]


def noise(rng: np.random.Generator, h: int, w: int, slope: float, *, aspect: float = 1.0) -> NDArray[np.float32]:
    """Noise (h, w) that repeats without a seam, amplitude falling as frequency^-slope; mean 0, deviation 1."""
    fy, fx = np.fft.fftfreq(h)[:, None] * h, np.fft.rfftfreq(w)[None] * w * aspect
    radius = np.hypot(fy, fx)
    radius[0, 0] = 1
    spectrum = np.fft.rfft2(rng.random((h, w)) - 0.5) * radius**-slope
    spectrum[0, 0] = 0
    field = np.fft.irfft2(spectrum, s=(h, w))
    return (field / field.std()).astype(np.float32)


def to_picture(field: NDArray[np.floating], deviation: float = 1.0, middle: float = 128.0) -> Picture:
    """A field as a picture around a middle value."""
    return np.clip(middle + deviation * field, 0, 255).astype(np.uint8)


def wrapped(draw: Callable[[int, int], None], x: float, y: float, h: int, w: int, reach: int) -> None:
    """Call ``draw`` at a place and, where it crosses the border, again on the opposite side."""
    for dy in (-h, 0, h):
        for dx in (-w, 0, w):
            if -reach < x + dx < w + reach and -reach < y + dy < h + reach:
                draw(int(x + dx), int(y + dy))


# --- grounds ---------------------------------------------------------------------------------------------------


def asphalt_grain(rng: np.random.Generator) -> Picture:
    """Stones of 1 to 3 texels and slightly larger blotches."""
    return to_picture(22 * noise(rng, 512, 512, 0.35) + 12 * noise(rng, 512, 512, 1.0))


def road_surface(rng: np.random.Generator, *, patches: int, cracks: int, stains: int) -> Picture:
    """A lane-wide map, 64 m along (w) by 8 m across (h): wheel tracks, patches, seams, cracks, covers, leaves."""
    h, w = 256, 2048
    field = 5 * noise(rng, h, w, 1.1, aspect=0.4) + 3 * noise(rng, h, w, 1.6, aspect=0.15)
    across = np.linspace(0, 4 * np.pi, h, dtype=np.float32)[:, None]
    image = (128 + field - 5 * np.cos(across)).astype(np.float32)
    for _ in range(patches):
        x, y = rng.integers(w), rng.integers(h)
        length, depth = rng.integers(30, 300), rng.integers(20, 110)
        tone = float(rng.uniform(-26, 22))
        image[y : y + depth, x : x + length] += tone
        cv2.rectangle(image, (int(x), int(y)), (int(x + length), int(y + depth)), 128 - 34.0, 1)
    for _ in range(cracks):
        _crack(rng, image)
    for _ in range(stains):
        at, size = (int(rng.integers(w)), int(rng.integers(h))), int(rng.integers(1, 10))
        turn, tone = float(rng.uniform(0, 180)), float(rng.uniform(70, 160))
        cv2.ellipse(image, at, (size, max(1, size // 2)), turn, 0, 360, tone, -1)
    for _ in range(3):
        at = int(rng.integers(w)), int(rng.integers(40, h - 40))
        cv2.ellipse(image, at, (11, 9), 0, 0, 360, 84, -1)
        cv2.ellipse(image, at, (8, 6), 0, 0, 360, 106, 1)
    return np.clip(image, 0, 255).astype(np.uint8)


def _crack(rng: np.random.Generator, image: NDArray[np.float32]) -> None:
    h, w = image.shape
    start = np.array([rng.uniform(0, w), rng.uniform(0, h)])
    steps = np.cumsum(rng.uniform(-1, 1, (60, 2)) * [9, 4] + rng.uniform(-1, 1, 2) * [8, 4], axis=0)
    points = (start + steps).astype(np.int32)
    cv2.polylines(image, [points.reshape(-1, 1, 2)], False, float(rng.uniform(70, 108)), int(rng.integers(1, 3)))


def grass(rng: np.random.Generator) -> Picture:
    """Blades in tufts."""
    field = 26 * noise(rng, 512, 512, 0.1) + 44 * noise(rng, 512, 512, 0.8) + 14 * noise(rng, 512, 512, 1.8)
    return to_picture(field)


def slabs(rng: np.random.Generator, *, across: int, along: int, joint: int) -> Picture:
    """Paving stones, bricks, blocks: a regular bond with joints and a tone of its own for each stone."""
    size = 512
    image = 14 * noise(rng, size, size, 0.6) + 128
    h, w = size // across, size // along
    for row in range(across):
        shift = (w // 2) * (row % 2)
        for column in range(along):
            x = np.arange(column * w + shift, (column + 1) * w + shift) % size
            image[row * h : (row + 1) * h, x] += float(rng.uniform(-24, 24))
            image[row * h : (row + 1) * h, x[:joint]] = 84
        image[row * h : row * h + joint] = 84
    return np.clip(image, 0, 255).astype(np.uint8)


# --- plants ----------------------------------------------------------------------------------------------------


def leaves(rng: np.random.Generator, *, count: int, size: float, round_card: bool) -> tuple[Picture, Picture]:
    """Leaf clusters (256, 256): tone and mask; a round card thins out to its rim, else leaves fill it all."""
    n = 256
    tone, mask = np.full((n, n), 60, np.uint8), np.zeros((n, n), np.uint8)
    clump = noise(rng, n, n, 1.6)
    for i in range(count):
        x, y = rng.uniform(0, n, 2)
        if round_card:
            angle, radius = rng.uniform(0, 2 * np.pi), np.sqrt(rng.uniform(0, 1)) * n * 0.47
            x, y = n / 2 + radius * np.cos(angle), n / 2 + radius * np.sin(angle)
            edge = radius / (n * 0.47)
            if clump[int(y) % n, int(x) % n] < 2.6 * edge**2 - 1.5:
                continue
        bright = 25 + 120 * i / count + 30 * clump[int(y) % n, int(x) % n] + rng.uniform(-60, 95)
        axes = (int(max(1, size * rng.uniform(0.7, 1.5))), int(max(1, size * rng.uniform(0.3, 0.8))))
        turn = float(rng.uniform(0, 180))
        value = int(np.clip(bright, 15, 250))

        def leaf(px: int, py: int, axes=axes, turn=turn, value=value) -> None:  # type: ignore[no-untyped-def]
            cv2.ellipse(tone, (px, py), axes, turn, 0, 360, value, -1)
            cv2.ellipse(mask, (px, py), axes, turn, 0, 360, 255, -1)

        if round_card:
            leaf(int(x), int(y))
        else:
            wrapped(leaf, x, y, n, n, 2 * axes[0])
    return tone, mask


def bare_branches(rng: np.random.Generator) -> tuple[Picture, Picture]:
    """Twigs (256, 256), for thin crowns and dry bushes."""
    tone, mask = np.full((256, 256), 110, np.uint8), np.zeros((256, 256), np.uint8)
    for _ in range(46):
        p = np.array([128.0, 128.0]) + rng.uniform(-30, 30, 2)
        angle = rng.uniform(0, 2 * np.pi)
        for _ in range(9):
            angle += rng.uniform(-0.5, 0.5)
            q = p + rng.uniform(8, 18) * np.array([np.cos(angle), np.sin(angle)])
            ends = (tuple(p.astype(int).tolist()), tuple(q.astype(int).tolist()))
            cv2.line(mask, *ends, 255, int(rng.integers(1, 4)))
            cv2.line(tone, *ends, int(rng.integers(70, 170)), int(rng.integers(1, 3)))
            p = q
    return tone, mask


def treeline(rng: np.random.Generator) -> tuple[Picture, Picture]:
    """A far edge of a wood (256, 1024): tone and mask; the sky is at the bottom rows (v grows upwards)."""
    h, w = 256, 1024
    tone, mask = np.full((h, w), 70, np.uint8), np.zeros((h, w), np.uint8)
    for i in range(1500):
        x = float(rng.uniform(0, w))
        crest = 110 + 50 * np.sin(x / w * 2 * np.pi * 3 + 1) + 30 * np.sin(x / w * 2 * np.pi * 11)
        y = float(rng.uniform(0, crest))
        size, value = int(rng.integers(3, 15)), int(np.clip(50 + 90 * rng.random() * (0.4 + y / 250), 0, 255))

        def blob(px: int, py: int, size=size, value=value) -> None:  # type: ignore[no-untyped-def]
            cv2.ellipse(tone, (px, py), (size, int(size * 0.8)), 0, 0, 360, value, -1)
            cv2.ellipse(mask, (px, py), (size, int(size * 0.8)), 0, 0, 360, 255, -1)

        wrapped(blob, x, y, 4 * h, w, 16)
        if i % 2 == 0:
            mask[: int(max(0, crest - 30)), int(x)] = 255
    mask[:60], mask[-8:] = 255, 0
    return to_picture(tone.astype(np.float32) - 128 + 14 * noise(rng, h, w, 0.4)), mask


# --- walls and things ------------------------------------------------------------------------------------------


def facade(rng: np.random.Generator, *, shutters: bool, arched: bool, plinth: bool) -> Picture:
    """One bay of one floor, 256 x 256, with a window: sill, frame, panes that mirror the sky, and stains."""
    n = 256
    image = 128 + 9 * noise(rng, n, n, 1.2) + 12 * noise(rng, n, n, 0.3)
    x0, x1 = 78, 178
    y0, y1 = 70, 205  # v grows upwards
    cv2.rectangle(image, (x0 - 9, y0 - 9), (x1 + 9, y1 + 9), 165, -1)
    cv2.rectangle(image, (x0, y0), (x1, y1), 40, -1)
    if arched:
        cv2.ellipse(image, ((x0 + x1) // 2, y1), ((x1 - x0) // 2, 22), 0, 0, 180, 40, -1)
    pane = (
        np.linspace(20, 90, y1 - y0 - 8, dtype=np.float32)[:, None]
        + 14 * noise(rng, 128, 128, 1.4)[: y1 - y0 - 8, :92]
    )
    image[y0 + 4 : y1 - 4, x0 + 4 : x0 + 96] = pane
    for x in (x0 + 2, (x0 + x1) // 2, x1 - 2):
        cv2.line(image, (x, y0), (x, y1), 205, 4)
    cv2.line(image, (x0, y0 + 90), (x1, y0 + 90), 205, 4)
    cv2.rectangle(image, (x0 - 14, y0 - 18), (x1 + 14, y0 - 9), 190, -1)
    cv2.line(image, (x0 - 14, y0 - 20), (x1 + 14, y0 - 20), 62, 3)
    if shutters:
        for x in (x0 - 52, x1 + 8):
            cv2.rectangle(image, (x, y0), (x + 44, y1), 92, -1)
            for y in range(y0 + 4, y1, 9):
                cv2.line(image, (x + 4, y), (x + 40, y), 66, 2)
    if plinth:
        cv2.line(image, (0, 4), (n, 4), 176, 10)
        cv2.line(image, (0, 13), (n, 13), 84, 3)
    return np.clip(image, 0, 255).astype(np.uint8)


def _letter(rng: np.random.Generator, image: NDArray, x: int, y: int, w: int, h: int) -> None:
    """A few strokes that pass for a letter (OpenCV's own letters differ between its versions)."""
    corners = [(x, y), (x + w, y), (x, y + h // 2), (x + w, y + h // 2), (x, y + h), (x + w, y + h)]
    for _ in range(4):
        a, b = rng.integers(0, 6, 2)
        cv2.line(image, corners[a], corners[b], 40, 2)


def shop(rng: np.random.Generator) -> Picture:
    """A ground floor with a display window and a door, 256 x 256."""
    n = 256
    image = 118 + 6 * noise(rng, n, n, 1.0)
    cv2.rectangle(image, (14, 40), (170, 190), 46, -1)
    for _ in range(26):
        x, y = int(rng.integers(18, 150)), int(rng.integers(42, 150))
        cv2.rectangle(
            image,
            (x, y),
            (x + int(rng.integers(4, 18)), y + int(rng.integers(5, 30))),
            float(rng.uniform(30, 210)),
            -1,
        )
    cv2.rectangle(image, (14, 40), (170, 190), 190, 3)
    cv2.rectangle(image, (188, 4), (240, 190), 66, -1)
    cv2.rectangle(image, (194, 70), (234, 184), 36, -1)
    cv2.rectangle(image, (6, 200), (250, 240), 172, -1)
    for i in range(int(rng.integers(5, 12))):
        _letter(rng, image, 14 + 19 * i, 212, 14, 18)
    return np.clip(image, 0, 255).astype(np.uint8)


def roof(rng: np.random.Generator) -> Picture:
    """Rows of tiles."""
    image = 128 + 14 * noise(rng, 256, 256, 0.7)
    image += 22 * ((np.arange(256)[:, None] % 16) / 16 - 0.5) + 7 * np.cos(np.arange(256)[None] * (2 * np.pi / 16))
    return np.clip(image, 0, 255).astype(np.uint8)


def planks(rng: np.random.Generator, *, gap: int, period: int) -> tuple[Picture, Picture]:
    """Vertical boards with two rails: tone and mask, 128 x 256."""
    h, w = 128, 256
    tone = 128 + 16 * noise(rng, h, w, 0.8, aspect=4)
    mask = np.zeros((h, w), np.uint8)
    for x in range(0, w, period):
        mask[: h - 6, x : x + period - gap] = 255
        tone[:, x : x + period] += float(rng.uniform(-22, 22))
    mask[24:36] = mask[92:104] = 255
    return np.clip(tone, 0, 255).astype(np.uint8), mask


def lattice(_: np.random.Generator) -> tuple[Picture, Picture]:
    """Wire mesh with posts: tone and mask, 256 x 256."""
    mask = np.zeros((256, 256), np.uint8)
    mask[:, ::16] = mask[:, 1::16] = 255
    mask[::32] = mask[1::32] = 255
    mask[:, :8] = 255
    return np.full((256, 256), 96, np.uint8), mask


def signboard(rng: np.random.Generator) -> Picture:
    """A white board with a dark rim and lines of print."""
    image = np.full((128, 128), 200, np.uint8)
    cv2.rectangle(image, (4, 4), (123, 123), 50, 3)
    for y in (34, 62, 90, 114):
        for x in range(12, 112, 16):
            _letter(rng, image, x, y - 16, 11, 15)
    return image[::-1].copy()


def car_side(rng: np.random.Generator) -> Picture:
    """Body panels: doors, handles, a bright shoulder and a dark sill (v upwards), 64 x 256."""
    profile = np.interp(np.arange(64), [0, 6, 30, 44, 52, 63], [60, 95, 120, 135, 190, 150]).astype(np.float32)
    image = np.repeat(profile[:, None], 256, axis=1) + 4 * noise(rng, 64, 256, 1.2)
    for x in (66, 128, 190):
        cv2.line(image, (x, 4), (x, 63), 60, 2)
    for x in (112, 172):
        cv2.line(image, (x, 44), (x + 10, 44), 60, 2)
    return np.clip(image, 0, 255).astype(np.uint8)
