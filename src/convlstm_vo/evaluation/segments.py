"""Segment errors t_rel and r_rel, exactly as the odometry devkit of KITTI computes them.

The estimate is compared with the ground truth over all segments of given path lengths, each from its own first
frame, so that an early error does not count for the rest of the path. The source is ``evaluate_odometry.cpp``
of the devkit (Geiger et al., Are we ready for autonomous driving?, CVPR 2012), of which the quirks are kept:
float32 distances, a last frame that lies beyond the length, and speed bins that overlap.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from convlstm_vo.errors import ConvlstmVoError
from convlstm_vo.geometry import se3
from convlstm_vo.geometry.trajectory import FRAME_PERIOD_S, Trajectory

SPEED_BINS_M_PER_S = tuple(float(speed) for speed in range(2, 25, 2))
_SPEED_BIN_HALF_WIDTH = 2.0
_PERIOD_TOLERANCE = 0.05  # KITTI's real times are 0.1037 s apart, where the devkit counts 0.1 s


class MetricError(ConvlstmVoError):
    """Trajectories or options from which no measure can be taken."""


@dataclasses.dataclass(frozen=True)
class SegmentProtocol:
    """Which segments are measured; figures of different protocols cannot be compared.

    Attributes:
        name: how results call it.
        lengths_m: path lengths of the segments, metres.
        step_frames: a segment starts at every so many frames.

    Raises:
        MetricError: no lengths, a length that is not positive, or a step below 1.
    """

    name: str
    lengths_m: tuple[float, ...]
    step_frames: int

    def __post_init__(self) -> None:
        if not self.lengths_m or not all(math.isfinite(m) and m > 0 for m in self.lengths_m):
            raise MetricError(f"segment lengths {list(self.lengths_m)} must be positive numbers of metres")
        if len(set(self.lengths_m)) != len(self.lengths_m):
            raise MetricError(f"segment lengths {list(self.lengths_m)} name one length twice")
        if self.step_frames < 1:
            raise MetricError(f"a segment cannot start at every {self.step_frames} frames: at least 1")

    def __str__(self) -> str:
        lengths = ", ".join(f"{length:g}" for length in self.lengths_m)
        step = "frame" if self.step_frames == 1 else f"{self.step_frames} frames"
        return f"{self.name}: segments of {lengths} m, starting every {step}"


KITTI = SegmentProtocol("KITTI", tuple(float(m) for m in range(100, 801, 100)), 10)
SHORT = SegmentProtocol("short", (20.0, 40.0), 1)
TINY = SegmentProtocol("tiny", (2.0, 5.0), 1)


def choose_protocol(
    path_length_m: float, lengths_m: Iterable[float] | None = None, step_frames: int | None = None
) -> SegmentProtocol:
    """The protocol that a user asked for or, without lengths, the longest one that fits a path of this length.

    KITTI's is taken above 100 m, `SHORT` above 20 m, `TINY` below. A protocol with lengths or a step of one's own
    is named ``custom``.
    """
    automatic = next((p for p in (KITTI, SHORT) if path_length_m > p.lengths_m[0]), TINY)
    lengths = automatic.lengths_m if lengths_m is None else tuple(sorted(float(m) for m in lengths_m))
    if step_frames is None:
        step_frames = KITTI.step_frames if lengths and lengths[0] >= KITTI.lengths_m[0] else 1
    protocol = SegmentProtocol("custom", lengths, step_frames)
    named = (p for p in (KITTI, SHORT, TINY) if dataclasses.replace(p, name="custom") == protocol)
    return next(named, protocol)


@dataclasses.dataclass(frozen=True)
class SegmentErrors:
    """One entry per segment, S of them, in float32 as in the devkit.

    Attributes:
        first_frame: (S,) row of the trajectory at which the segment starts.
        length_m: (S,) nominal length of the segment.
        speed_m_per_s: (S,) mean speed over it.
        translation: (S,) translation error, as a fraction of the length.
        rotation_rad_per_m: (S,) rotation error.
    """

    first_frame: NDArray[np.int64]
    length_m: NDArray[np.float32]
    speed_m_per_s: NDArray[np.float32]
    translation: NDArray[np.float32]
    rotation_rad_per_m: NDArray[np.float32]

    def summary(self, chosen: NDArray[np.bool_] | slice = slice(None)) -> SegmentSummary:
        """Averages over the chosen segments (a mask of shape (S,)), or over all of them."""
        translation, rotation = self.translation[chosen], self.rotation_rad_per_m[chosen]
        if not len(translation):
            return SegmentSummary(0, None, None)
        t_rel = 100 * translation.mean(dtype=np.float64)
        r_rel = 100 * np.degrees(rotation.mean(dtype=np.float64))
        return SegmentSummary(len(translation), float(t_rel), float(r_rel))

    def by_length(self, lengths_m: Iterable[float]) -> dict[float, SegmentSummary]:
        """Averages for each length, metres; lengths of which no segment fits the path are included."""
        return {length: self.summary(self.length_m == np.float32(length)) for length in lengths_m}

    def by_speed(self) -> dict[float, SegmentSummary]:
        """Averages for each speed bin of the devkit, m/s: bins are 2 m/s apart and reach 2 m/s to both sides."""
        near = {bin_: np.abs(self.speed_m_per_s - bin_) < _SPEED_BIN_HALF_WIDTH for bin_ in SPEED_BINS_M_PER_S}
        return {bin_: self.summary(mask) for bin_, mask in near.items() if mask.any()}


@dataclasses.dataclass(frozen=True)
class SegmentSummary:
    """Averages over segments; None where there is no segment (never zero)."""

    segments: int
    t_rel_percent: float | None
    r_rel_deg_per_100m: float | None


def segment_errors(ground_truth: Trajectory, estimate: Trajectory, protocol: SegmentProtocol) -> SegmentErrors:
    """Errors of all segments of the protocol's lengths.

    Args:
        ground_truth: N poses.
        estimate: N poses, row by row those of the same frames; any world frame.
        protocol: lengths and step.
    """
    first, last, length = _segments(float32_distances(ground_truth), protocol)
    error = np.linalg.inv(_motion(estimate, first, last)) @ _motion(ground_truth, first, last)
    # The devkit's angle loses what is below 3e-4 rad, too much for segments shorter than its own.
    is_short = length < KITTI.lengths_m[0]
    angle = np.where(is_short, se3.rotation_angle(error[:, :3, :3]), _devkit_angle(error[:, :3, :3]))
    # A segment of k+1 frames lasts k+1 periods in the devkit.
    duration_s = frame_period_s(ground_truth) * (last - first + 1)
    return SegmentErrors(
        first_frame=first,
        length_m=length,
        speed_m_per_s=(length / duration_s).astype(np.float32),
        translation=_norm(error[:, :3, 3]) / length,
        rotation_rad_per_m=angle.astype(np.float32) / length,
    )


def _segments(
    distance_m: NDArray[np.float32], protocol: SegmentProtocol
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]:
    """First row, last row and nominal length of each segment, in the devkit's order: (S,) each."""
    starts = np.arange(0, len(distance_m), protocol.step_frames)
    lengths = np.array(protocol.lengths_m, dtype=np.float32)
    first, length = np.repeat(starts, len(lengths)), np.tile(lengths, len(starts))
    # Distances never decrease, so the first row beyond a length is a binary search.
    last = np.searchsorted(distance_m, distance_m[first] + length, side="right")
    fits = last < len(distance_m)
    return first[fits], last[fits], length[fits]


def float32_distances(trajectory: Trajectory) -> NDArray[np.float32]:
    """Path length up to each pose, metres, summed up in float32 as the devkit does: (N,)."""
    steps = _norm(np.diff(trajectory.positions_xyz, axis=0))
    return np.concatenate([np.zeros(1, np.float32), np.cumsum(steps, dtype=np.float32)])


def frame_period_s(trajectory: Trajectory) -> float:
    """Seconds a row; exactly the devkit's 0.1 s for a camera of about 10 Hz, whose real times it ignores."""
    if len(trajectory) < 2:
        return FRAME_PERIOD_S
    period = float(np.median(np.diff(trajectory.timestamps_s)))
    close = abs(period - FRAME_PERIOD_S) < _PERIOD_TOLERANCE * FRAME_PERIOD_S
    return FRAME_PERIOD_S if close else period


def _motion(trajectory: Trajectory, first: NDArray[np.int64], last: NDArray[np.int64]) -> NDArray[np.float64]:
    """``T_first_last`` of each segment: (S, 4, 4).

    With a general inverse, as in the devkit: files hold rotations to 7 digits only, and the transpose of such a
    matrix would leave an angle of some 1e-4 rad in the arc cosine, even of a path with itself.
    """
    return np.linalg.inv(trajectory.T_world_camera[first]) @ trajectory.T_world_camera[last]


def _norm(vectors: NDArray[np.float64]) -> NDArray[np.float32]:
    """Lengths in float32 arithmetic: (S, 3) to (S,)."""
    x, y, z = vectors.astype(np.float32).T
    length: NDArray[np.float32] = np.sqrt(x * x + y * y + z * z)
    return length


def _devkit_angle(rotation: NDArray[np.float64]) -> NDArray[np.float32]:
    """Rotation angle in radians from the trace in float32 arithmetic: (S, 3, 3) to (S,)."""
    a, b, c = np.diagonal(rotation, axis1=1, axis2=2).astype(np.float32).T
    angle: NDArray[np.float32] = np.arccos(np.clip((a + b + c - np.float32(1)) / np.float32(2), -1, 1))
    return angle
