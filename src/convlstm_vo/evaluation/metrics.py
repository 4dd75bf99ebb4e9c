"""How far an estimated trajectory is from the ground truth: one `Score`, in which alignment and protocol are named.

- t_rel and r_rel (`segments.py`): the errors of KITTI's benchmark, over segments of fixed lengths;
- ATE: distance of the estimated positions from the true ones, after a named alignment;
- RPE: error of each motion from one frame to the next, after a named alignment
  (both of Sturm et al., A benchmark for the evaluation of RGB-D SLAM systems, IROS 2012);
- end drift: how far off the last pose is, seen from the first.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from convlstm_vo.evaluation.matching import Match, MatchedBy, match
from convlstm_vo.evaluation.segments import (
    MetricError,
    SegmentErrors,
    SegmentProtocol,
    SegmentSummary,
    choose_protocol,
    float32_distances,
    segment_errors,
)
from convlstm_vo.geometry import se3
from convlstm_vo.geometry.trajectory import (
    ALIGNMENTS,
    Alignment,
    Trajectory,
    TrajectoryError,
    has_own_times,
    read_trajectory,
)

_T = TypeVar("_T")


@dataclasses.dataclass(frozen=True)
class PositionError:
    """Absolute trajectory error (ATE): distances between estimated and true positions, metres."""

    rmse_m: float
    mean_m: float
    median_m: float
    max_m: float


@dataclasses.dataclass(frozen=True)
class MotionError:
    """Relative pose error (RPE) of the motions from one frame to the next, root mean square."""

    translation_rmse_m: float
    rotation_rmse_deg: float
    delta_frames: int = 1


@dataclasses.dataclass(frozen=True)
class Score:
    """Every measure of one estimate against one ground truth.

    Attributes:
        frames: how many poses were compared (those that both have).
        ground_truth_frames, estimate_frames: how many each has.
        matched_by: ``frame`` number, ``time``, or ``row``.
        path_length_m: length of the true path over the compared frames.
        alignment: what was done to the estimate before t_rel, r_rel and the end drift were taken.
        protocol: which segments t_rel and r_rel are taken over.
        overall, by_length, by_speed: t_rel and r_rel; keys are lengths in metres and speeds in m/s.
        ate, rpe: by alignment, each of the estimate as given; None where that alignment is not defined.
        end_drift_m, end_drift_percent: distance between the last positions when both paths start at one pose, in
            metres and in percent of the path length (None where the camera stood still).
        notes: why a figure is missing.
    """

    frames: int
    ground_truth_frames: int
    estimate_frames: int
    matched_by: MatchedBy
    path_length_m: float
    alignment: Alignment
    protocol: SegmentProtocol
    overall: SegmentSummary
    by_length: dict[float, SegmentSummary]
    by_speed: dict[float, SegmentSummary]
    ate: dict[Alignment, PositionError | None]
    rpe: dict[Alignment, MotionError | None]
    end_drift_m: float
    end_drift_percent: float | None
    notes: tuple[str, ...] = ()

    @property
    def t_rel_percent(self) -> float | None:
        """Mean translation error over all segments, percent of their length."""
        return self.overall.t_rel_percent

    @property
    def r_rel_deg_per_100m(self) -> float | None:
        """Mean rotation error over all segments, degrees per 100 m."""
        return self.overall.r_rel_deg_per_100m

    def as_dict(self) -> dict[str, Any]:
        """The score for JSON: numbers, strings and None only, with the three figures of `overall` at the top."""
        fields = dataclasses.asdict(self)
        overall, protocol = fields.pop("overall"), fields.pop("protocol")
        for key in ("by_length", "by_speed"):
            fields[key] = {f"{value:g}": summary for value, summary in fields[key].items()}
        fields["notes"] = list(fields["notes"])
        lengths = {"lengths_m": list(protocol["lengths_m"]), "step_frames": protocol["step_frames"]}
        return {**overall, "protocol": protocol["name"], **lengths, **fields}


def score(
    ground_truth: Trajectory,
    estimate: Trajectory,
    *,
    lengths_m: Iterable[float] | None = None,
    step_frames: int | None = None,
    alignment: Alignment = "none",
    same_start: bool = False,
    both_timed: bool = False,
    names: tuple[str, str] = ("the ground truth", "the estimate"),
) -> Score:
    """Measure an estimate against the ground truth.

    Args:
        ground_truth: the true poses.
        estimate: estimated poses, of all frames or of some (see `match`).
        lengths_m: segment lengths in metres; without them, those that suit the path (see `choose_protocol`).
        step_frames: a segment starts at every so many frames.
        alignment: what may be done to the estimate first; named in the result. ATE and RPE are given for every
            alignment in any case.
        same_start: lay both on one another at the first common pose before anything else, for estimates that know
            no absolute pose; ATE of alignment ``none`` depends on it, t_rel, r_rel, RPE and drift do not.
        both_timed: whether both have real times of one clock, by which poses can be matched.
        names: what messages call the two, such as their files.

    Raises:
        MetricError: poses that cannot be matched, an alignment that is not defined, or a bad protocol.
    """
    if alignment not in ALIGNMENTS:
        raise MetricError(f"alignment {alignment!r} is not one of {', '.join(ALIGNMENTS)}")
    matched = match(ground_truth, estimate, both_timed=both_timed, names=names)
    matched = matched.from_first_pose() if same_start else matched
    aligned = _aligned(matched, alignment)
    path_length = float(float32_distances(matched.ground_truth)[-1])
    protocol = choose_protocol(path_length, lengths_m, step_frames)
    errors = segment_errors(matched.ground_truth, aligned, protocol)
    drift = end_drift_m(matched.ground_truth, aligned)
    return Score(
        frames=matched.frames,
        ground_truth_frames=matched.ground_truth_frames,
        estimate_frames=matched.estimate_frames,
        matched_by=matched.by,
        path_length_m=path_length,
        alignment=alignment,
        protocol=protocol,
        overall=errors.summary(),
        by_length=errors.by_length(protocol.lengths_m),
        by_speed=errors.by_speed(),
        ate=_for_each_alignment(matched, position_error),
        rpe=_for_each_alignment(matched, motion_error),
        end_drift_m=drift,
        end_drift_percent=100 * drift / path_length if path_length else None,
        notes=tuple(_notes(errors, protocol, path_length, matched)),
    )


def score_files(
    ground_truth: Path | str,
    estimate: Path | str,
    *,
    lengths_m: Iterable[float] | None = None,
    step_frames: int | None = None,
    alignment: Alignment = "none",
) -> Score:
    """Measure one trajectory file against another; KITTI (12, 13 columns) or TUM (8, 7 columns) each.

    Raises:
        TrajectoryError: a file that cannot be read, with its line and the rule.
        MetricError: see `score`.
    """
    return score(
        read_trajectory(ground_truth),
        read_trajectory(estimate),
        lengths_m=lengths_m,
        step_frames=step_frames,
        alignment=alignment,
        both_timed=has_own_times(ground_truth) and has_own_times(estimate),
        names=(str(ground_truth), str(estimate)),
    )


def position_error(ground_truth: Trajectory, estimate: Trajectory) -> PositionError:
    """ATE of an aligned estimate; row by row the same N frames."""
    distance = np.linalg.norm(estimate.positions_xyz - ground_truth.positions_xyz, axis=1)
    return PositionError(_rms(distance), float(distance.mean()), float(np.median(distance)), float(distance.max()))


def motion_error(ground_truth: Trajectory, estimate: Trajectory) -> MotionError:
    """RPE over steps of one row; row by row the same N frames."""
    translation_m, rotation_deg = frame_errors(ground_truth, estimate)
    return MotionError(_rms(translation_m), _rms(rotation_deg))


def frame_errors(ground_truth: Trajectory, estimate: Trajectory) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Errors of each motion ``T_prev_curr``: metres (N-1,) and degrees (N-1,); row by row the same N frames."""
    true, estimated = (se3.relative(t.T_world_camera[:-1], t.T_world_camera[1:]) for t in (ground_truth, estimate))
    error = se3.relative(true, estimated)
    return np.linalg.norm(error[:, :3, 3], axis=1), np.degrees(se3.rotation_angle(error[:, :3, :3]))


def end_drift_m(ground_truth: Trajectory, estimate: Trajectory) -> float:
    """Distance in metres between the last positions when both paths are laid on one another at the first pose."""
    ends = (t.from_first_pose().positions_xyz[-1] for t in (ground_truth, estimate))
    return float(np.linalg.norm(np.subtract(*ends)))


def _aligned(matched: Match, alignment: Alignment) -> Trajectory:
    """The estimate after alignment; MetricError where that is not defined."""
    # Checked here too: the mean of equal positions may be off by a rounding, which a scale would blow up.
    if alignment != "none" and _stands_still(matched.estimate):
        raise MetricError(f"alignment {alignment} is not defined for an estimate that stands still; use none")
    try:
        return matched.estimate.align(matched.ground_truth, alignment)
    except TrajectoryError as error:
        raise MetricError(f"alignment {alignment} is not defined: {error}; use none") from None


def _for_each_alignment(
    matched: Match, measure: Callable[[Trajectory, Trajectory], _T]
) -> dict[Alignment, _T | None]:
    """A measure of the estimate after each alignment; None where that is not defined."""
    results: dict[Alignment, _T | None] = {}
    for alignment in ALIGNMENTS:
        try:
            results[alignment] = measure(matched.ground_truth, _aligned(matched, alignment))
        except MetricError:
            results[alignment] = None
    return results


def _stands_still(trajectory: Trajectory) -> bool:
    return not np.ptp(trajectory.positions_xyz, axis=0).any()


def _notes(errors: SegmentErrors, protocol: SegmentProtocol, path_length_m: float, matched: Match) -> Iterable[str]:
    if not len(errors.length_m):
        shortest = min(protocol.lengths_m)
        yield f"no t_rel and r_rel: the path of {path_length_m:.3g} m holds no segment of {shortest:g} m"
    if _stands_still(matched.estimate):
        yield "no ATE and RPE with scale, se3 or sim3: the estimate stands still"
    if path_length_m == 0:
        yield "no drift in percent: the camera stood still"


def _rms(values: NDArray[np.float64]) -> float:
    return float(np.sqrt(np.mean(values**2)))
