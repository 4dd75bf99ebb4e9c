"""From a checkpoint and a KITTI tree to a table, a JSON file and an HTML report."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal

from rich.console import Console

from convlstm_vo.calibration import VehicleCalibration
from convlstm_vo.evaluation.evaluate import Estimator, evaluate_sequences, save_results
from convlstm_vo.evaluation.metrics import MetricError
from convlstm_vo.evaluation.report import results_table, write_report
from convlstm_vo.geometry.trajectory import Trajectory
from convlstm_vo.models.checkpoint import DEFAULT_CHECKPOINT, load_checkpoint
from convlstm_vo.odometer import COMPILING, compiles_first, estimate_trajectory
from convlstm_vo.progress import progress
from convlstm_vo.sequences.base import Sequence
from convlstm_vo.sequences.kitti import open_kitti


@dataclasses.dataclass(frozen=True)
class EvaluateOptions:
    """Measure a network, and trivial baselines beside it, on sequences with ground truth."""

    data: Path
    """KITTI odometry tree."""
    sequences: tuple[str, ...] = ()
    """Which of its sequences; none named: all with ground truth."""
    checkpoint: Path | None = None
    """Checkpoint folder; by default the weights that come with the package."""
    baselines_only: bool = False
    """Measure the trivial baselines and no network."""
    camera_height: float | None = None
    """Metres of the camera above the road, for the default network; by default 1.65 (KITTI)."""
    camera: Literal[0, 1, 2, 3] = 0
    """Which image folder."""
    lengths: tuple[float, ...] = ()
    """Segment lengths in metres; by default KITTI's 100 to 800, or shorter ones (named) for short sequences."""
    step: int | None = None
    """Frames between segment starts; by default KITTI's 10 (1 with short segments)."""
    align: Literal["none", "scale", "se3", "sim3"] = "none"
    """Alignment of the estimate before t_rel and r_rel are taken; the official protocol has none."""
    json: Path | None = None
    """Where to write all figures."""
    report: Path | None = None
    """Where to write the HTML report; by default report.html beside the JSON, or in runs/evaluate."""
    save: Path | None = None
    """Folder for the estimated trajectories, NAME.txt in KITTI format."""

    def __post_init__(self) -> None:
        if self.baselines_only:
            for name in ("checkpoint", "camera_height", "save"):
                if getattr(self, name) is not None:
                    option = name.replace("_", "-")
                    raise MetricError(f"--{option}: is of a network, and --baselines-only has none; leave one out")
        for path in (self.json, self.report):
            if path is not None and path.is_dir():
                raise MetricError(f"{path}: is a folder; name a file")


def run_evaluation(options: EvaluateOptions, command: str) -> Path:
    """Evaluate as told; the path of the report."""
    estimator = None if options.baselines_only else _estimator(options)
    sequences = open_kitti(options.data, options.sequences, camera=options.camera)
    evaluation = evaluate_sequences(
        sequences,
        estimator,
        lengths_m=options.lengths or None,
        step_frames=options.step,
        alignment=options.align,
    )
    beside = Path("runs/evaluate") if options.json is None else options.json.parent
    report = options.report or beside / "report.html"
    Console().print(results_table(evaluation))
    if options.json is not None:
        save_results(options.json, evaluation, command)
    write_report(report, evaluation, command)
    print(f"Report: {report.resolve()}")
    return report


def _estimator(options: EvaluateOptions) -> Estimator:
    """A function from a sequence to its estimated trajectory."""
    net = load_checkpoint(options.checkpoint or DEFAULT_CHECKPOINT)
    if compiles_first(net):
        print(COMPILING)
    vehicle = None if options.camera_height is None else VehicleCalibration(options.camera_height)

    def estimate(sequence: Sequence) -> Trajectory:
        with progress(f"Sequence {sequence.name}", len(sequence)) as advance:
            trajectory = estimate_trajectory(net, sequence, advance, vehicle)
        if options.save is not None:
            trajectory.write_kitti(options.save / f"{sequence.name}.txt")
        return trajectory

    return estimate
