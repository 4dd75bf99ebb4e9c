"""Which pose of an estimate belongs to which pose of the ground truth."""

from __future__ import annotations

import dataclasses
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from convlstm_vo.evaluation.segments import MetricError, frame_period_s
from convlstm_vo.geometry.trajectory import Trajectory

MatchedBy = Literal["row", "frame", "time"]
_Rows = tuple[NDArray[np.int64], NDArray[np.int64]]


@dataclasses.dataclass(frozen=True)
class Match:
    """Ground truth and estimate of the same frames, row by row.

    Attributes:
        ground_truth, estimate: M poses each.
        by: what told which poses belong together.
        ground_truth_frames, estimate_frames: how many poses each had before.
    """

    ground_truth: Trajectory
    estimate: Trajectory
    by: MatchedBy
    ground_truth_frames: int
    estimate_frames: int

    def from_first_pose(self) -> Match:
        """The same with both paths laid on one another at the first common pose, which becomes the identity."""
        moved = (self.ground_truth.from_first_pose(), self.estimate.from_first_pose())
        return dataclasses.replace(self, ground_truth=moved[0], estimate=moved[1])

    @property
    def frames(self) -> int:
        """How many frames were matched (M)."""
        return len(self.ground_truth)


def match(
    ground_truth: Trajectory,
    estimate: Trajectory,
    *,
    both_timed: bool = False,
    names: tuple[str, str] = ("the ground truth", "the estimate"),
) -> Match:
    """Match poses by frame number where there are any, else by time, else row by row.

    Args:
        ground_truth: the true poses.
        estimate: the poses to be measured; it may cover only some of the frames.
        both_timed: whether the time stamps of both are real ones of the same clock; then each pose belongs to the
            nearest true one within half a frame period.
        names: what messages call the two.

    Raises:
        MetricError: different counts that neither frame numbers nor times explain, or fewer than two matches.
    """
    rows_and_rule = _by_frame(ground_truth, estimate) or (_by_time(ground_truth, estimate) if both_timed else None)
    if rows_and_rule is None:
        rows_and_rule = _by_row(ground_truth, estimate, names)
    (true_rows, estimated_rows), rule = rows_and_rule
    if len(true_rows) < 2:
        raise MetricError(
            f"{names[1]} ({len(estimate)} poses) and {names[0]} ({len(ground_truth)} poses) have "
            f"{len(true_rows)} poses of the same {rule} in common, where at least 2 are needed; "
            "do they belong to the same sequence?"
        )
    return Match(ground_truth[true_rows], estimate[estimated_rows], rule, len(ground_truth), len(estimate))


def _by_frame(ground_truth: Trajectory, estimate: Trajectory) -> tuple[_Rows, MatchedBy] | None:
    """Rows of equal frame numbers, where one has numbers and the other numbers or all frames from 0."""
    if ground_truth.frames is None and estimate.frames is None:
        return None
    if estimate.frames is None and len(estimate) <= int(ground_truth.frames[-1]):  # type: ignore[index]
        return None  # too short to hold every frame of the sequence
    true, estimated = (np.arange(len(t)) if t.frames is None else t.frames for t in (ground_truth, estimate))
    _, true_rows, estimated_rows = np.intersect1d(true, estimated, return_indices=True)
    return (true_rows, estimated_rows), "frame"


def _by_time(ground_truth: Trajectory, estimate: Trajectory) -> tuple[_Rows, MatchedBy]:
    """For each true pose the nearest estimate in time, and only where that is mutual and near enough."""
    nearest = _nearest(estimate.timestamps_s, ground_truth.timestamps_s)
    back = _nearest(ground_truth.timestamps_s, estimate.timestamps_s)
    rows = np.arange(len(ground_truth))
    # Of the two periods the shorter one: beyond it, a denser ground truth would have had a nearer pose.
    limit = 0.501 * min(frame_period_s(ground_truth), frame_period_s(estimate))
    near = np.abs(estimate.timestamps_s[nearest] - ground_truth.timestamps_s) <= limit
    keep = near & (back[nearest] == rows)
    return (rows[keep], nearest[keep]), "time"


def _nearest(times: NDArray[np.float64], wanted: NDArray[np.float64]) -> NDArray[np.int64]:
    """Index of the nearest of the increasing ``times`` for each wanted time."""
    right = np.clip(np.searchsorted(times, wanted), 1, max(len(times) - 1, 1))
    right = np.minimum(right, len(times) - 1)
    left = np.maximum(right - 1, 0)
    return np.where(wanted - times[left] <= times[right] - wanted, left, right)


def _by_row(ground_truth: Trajectory, estimate: Trajectory, names: tuple[str, str]) -> tuple[_Rows, MatchedBy]:
    if len(ground_truth) != len(estimate):
        raise MetricError(
            f"{names[0]} has {len(ground_truth)} poses, but {names[1]} has {len(estimate)}: they cannot be matched "
            "row by row. Give one pose a frame, or put the frame number (from 0) in front of each KITTI row "
            "(13 columns), or give both as TUM files with times (8 columns)"
        )
    rows = np.arange(len(ground_truth))
    return (rows, rows), "row"
