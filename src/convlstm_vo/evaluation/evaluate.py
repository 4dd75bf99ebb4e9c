"""Estimates of whole sequences measured beside the trivial baselines, and the results as JSON."""

from __future__ import annotations

import dataclasses
import datetime
import json
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import convlstm_vo
from convlstm_vo.evaluation.baselines import BASELINES
from convlstm_vo.evaluation.matching import match
from convlstm_vo.evaluation.metrics import Score, frame_errors, score
from convlstm_vo.evaluation.segments import MetricError
from convlstm_vo.geometry.files import write_atomically
from convlstm_vo.geometry.trajectory import Alignment, Trajectory
from convlstm_vo.sequences.base import Frame, Sequence

Estimator = Callable[[Sequence], Trajectory]
NETWORK = "network"  # what the estimate is called beside the baselines
_MEAN_KEYS = ("t_rel_percent", "r_rel_deg_per_100m", "end_drift_percent")
_SAMPLE_FRAMES = 6


@dataclasses.dataclass(frozen=True)
class FrameErrors:
    """Errors of the motions from each frame to the next (M-1 of them).

    Attributes:
        time_s: (M-1,) seconds since the first frame.
        translation_m: (M-1,) metres.
        rotation_deg: (M-1,) degrees.
    """

    time_s: NDArray[np.float64]
    translation_m: NDArray[np.float64]
    rotation_deg: NDArray[np.float64]


@dataclasses.dataclass(frozen=True)
class SequenceResult:
    """What was measured on one sequence.

    Attributes:
        name: of the sequence.
        ground_truth: the true path from its first pose, which is the identity.
        estimate: the estimated path likewise, as it came (no alignment), or None if only baselines were asked for.
        score: of the estimate; None if there is none.
        baselines: name to path and its score; always unaligned.
        ms_per_frame: wall time a frame, reading it included; None if it was not measured.
        samples: a few frames spread over the sequence.
    """

    name: str
    ground_truth: Trajectory
    estimate: Trajectory | None
    score: Score | None
    baselines: dict[str, tuple[Trajectory, Score]]
    ms_per_frame: float | None = None
    samples: tuple[Frame, ...] = ()

    @property
    def scores(self) -> dict[str, Score]:
        """Every score of the sequence by what was measured; the network, if any, comes first."""
        network = {} if self.score is None else {NETWORK: self.score}
        return network | {name: baseline for name, (_, baseline) in self.baselines.items()}

    @property
    def any_score(self) -> Score:
        """A score whose protocol and path are those of the whole sequence."""
        return next(iter(self.scores.values()))

    @property
    def paths(self) -> dict[str, Trajectory]:
        """Every estimated path by what was measured, as in `scores`."""
        network = {} if self.estimate is None else {NETWORK: self.estimate}
        return network | {name: path for name, (path, _) in self.baselines.items()}

    def errors_over_time(self, name: str) -> FrameErrors:
        """Error of each single motion of one of `paths`."""
        both = match(self.ground_truth, self.paths[name], both_timed=self.scores[name].matched_by == "time")
        translation_m, rotation_deg = frame_errors(both.ground_truth, both.estimate)
        times = both.ground_truth.timestamps_s[1:] - self.ground_truth.timestamps_s[0]
        return FrameErrors(times, translation_m, rotation_deg)

    def as_dict(self) -> dict[str, Any]:
        """For JSON: the keys of `Score.as_dict`, then ``ms_per_frame`` and ``baselines``."""
        own = _empty_score(self.any_score) if self.score is None else self.score.as_dict()
        baselines = {name: baseline.as_dict() for name, (_, baseline) in self.baselines.items()}
        return own | {"ms_per_frame": self.ms_per_frame, "baselines": baselines}


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Results of several sequences.

    Attributes:
        results: one for each sequence with ground truth.
        skipped: name of each sequence that could not be measured, and why.
    """

    results: tuple[SequenceResult, ...]
    skipped: dict[str, str] = dataclasses.field(default_factory=dict)

    def mean(self) -> dict[str, dict[str, float | None]]:
        """Unweighted means over the sequences by what was measured; None where a sequence lacks the figure."""
        names = self.results[0].scores if self.results else ()
        return {name: _mean([result.scores[name] for result in self.results]) for name in names}

    def protocols(self) -> list[str]:
        """Every protocol that was used, in words."""
        return list(dict.fromkeys(str(result.any_score.protocol) for result in self.results))

    def as_dict(self, command: str = "") -> dict[str, Any]:
        """For JSON: version, date and command; ``sequences`` by name; ``mean``; ``skipped``."""
        return {
            "version": convlstm_vo.__version__,
            "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
            "command": command,
            "sequences": {result.name: result.as_dict() for result in self.results},
            "mean": {"over_sequences": len(self.results), "protocols": self.protocols(), **self.mean()},
            "skipped": self.skipped,
        }


def evaluate_sequence(
    sequence: Sequence,
    estimate: Estimator | Trajectory | None,
    *,
    lengths_m: Iterable[float] | None = None,
    step_frames: int | None = None,
    alignment: Alignment = "none",
    ms_per_frame: float | None = None,
) -> SequenceResult:
    """Measure an estimate of a sequence, and the trivial baselines beside it.

    Odometry knows no absolute pose, so both paths are first laid on one another at their first pose.

    Args:
        sequence: frames with their true trajectory.
        estimate: a function that runs over the sequence (it is timed), a finished trajectory (with frame numbers,
            if it does not cover all frames), or None for the baselines only.
        lengths_m, step_frames: segments of t_rel and r_rel; by default those that suit the path.
        alignment: what may be done to the estimate, not to the baselines.
        ms_per_frame: wall time a frame, if it was measured elsewhere.

    Raises:
        MetricError: no ground truth, or poses that cannot be matched with it.
    """
    if sequence.trajectory is None:
        raise MetricError(
            f"sequence {sequence.name} has no ground truth to measure against (KITTI: poses/{sequence.name}.txt); "
            "`convlstm-vo run` gives its trajectory without measuring it"
        )
    true = sequence.trajectory.from_first_pose()
    options: dict[str, Any] = {"lengths_m": lengths_m, "step_frames": step_frames, "same_start": True}
    names = (f"the ground truth of {sequence.name}", f"the estimate of {sequence.name}")
    estimated, measured = None, None
    if estimate is not None:
        estimated, ms_per_frame = _estimated(sequence, estimate, ms_per_frame)
        # Only a run over these very frames is sure to carry their times.
        options["both_timed"] = callable(estimate) and len(estimated) != len(true)
        measured = score(true, estimated, alignment=alignment, names=names, **options)
    baselines = {name: path_of(true) for name, path_of in BASELINES.items()}
    scored = {name: (path, score(true, path, **options)) for name, path in baselines.items()}
    return SequenceResult(
        sequence.name, true, estimated, measured, scored, ms_per_frame, sample_frames(sequence, _SAMPLE_FRAMES)
    )


def evaluate_sequences(sequences: Iterable[Sequence], estimate: Estimator | None, **options: Any) -> Evaluation:
    """`evaluate_sequence` over many; those without ground truth are skipped, with the reason in the result.

    Raises:
        MetricError: none of the sequences has ground truth, or one cannot be measured.
    """
    results, skipped = [], {}
    for sequence in sequences:
        if sequence.trajectory is None:
            skipped[sequence.name] = "no ground truth"
        else:
            results.append(evaluate_sequence(sequence, estimate, **options))
    if not results:
        raise MetricError(
            f"nothing to measure: no ground truth (poses/NAME.txt) for {', '.join(skipped) or 'any sequence'}"
        )
    return Evaluation(tuple(results), skipped)


def save_results(path: Path | str, evaluation: Evaluation, command: str = "") -> None:
    """Write an evaluation as JSON; a figure that does not exist is null, never NaN or zero."""
    save_json(path, evaluation.as_dict(command))


def save_json(path: Path | str, content: dict[str, Any]) -> None:
    """Write JSON at once or not at all; refuses NaN and infinity."""
    write_atomically(Path(path), json.dumps(content, indent=2, allow_nan=False) + "\n")


def sample_frames(sequence: Sequence, count: int) -> tuple[Frame, ...]:
    """A few frames spread evenly from the first to the last."""
    indices = np.unique(np.linspace(0, len(sequence) - 1, count).round().astype(int)) if len(sequence) else ()
    return tuple(sequence[int(index)] for index in indices)


def _estimated(
    sequence: Sequence, estimate: Estimator | Trajectory, ms_per_frame: float | None
) -> tuple[Trajectory, float | None]:
    """The estimate from its first pose, and the wall time a frame in ms if it was run here or given."""
    if isinstance(estimate, Trajectory):
        return estimate.from_first_pose(), ms_per_frame
    start = time.perf_counter()
    estimated = estimate(sequence).from_first_pose()
    measured_ms = 1000 * (time.perf_counter() - start) / max(len(sequence), 1)
    return estimated, measured_ms if ms_per_frame is None else ms_per_frame


def _mean(scores: list[Score]) -> dict[str, float | None]:
    """Mean of each figure over the sequences; None unless all of them have it."""
    columns = {key: [getattr(one, key) for one in scores] for key in _MEAN_KEYS}
    return {key: None if None in values else float(np.mean(values)) for key, values in columns.items()}


def _empty_score(like: Score) -> dict[str, Any]:
    """The keys of a score that nobody achieved, with the path and the protocol of the sequence."""
    kept = ("protocol", "lengths_m", "step_frames", "frames", "ground_truth_frames", "path_length_m")
    empty = dict.fromkeys(like.as_dict())
    empty.update({key: like.as_dict()[key] for key in kept})
    return empty | {"segments": 0, "notes": ["no network: baselines only"]}
