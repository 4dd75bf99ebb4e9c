"""The command line: one function a verb. Heavy imports stand inside the verbs, so that help comes at once."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import tyro

from convlstm_vo.errors import ConvlstmVoError

if TYPE_CHECKING:
    from rich.console import Console

    from convlstm_vo.geometry.camera import Camera
    from convlstm_vo.training.cache import DecodedSequence
    from convlstm_vo.training.config import TrainConfig

Options = TypeVar("Options")

# glibc gives large blocks back to the kernel after each step and faults them in again for the next; keeping them
# makes CPU training up to 1.4 times faster. It is read when a process starts, so the process starts again.
# Threads that sleep while they wait, instead of spinning, do not stall when anything else runs on the machine.
_ENVIRONMENT = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "100000000000",
    "MALLOC_TOP_PAD_": "500000000",
    "OMP_WAIT_POLICY": "PASSIVE",
}


def main(argv: list[str] | None = None) -> None:
    """Run a verb. Users' mistakes end with one message and exit code 2, Ctrl-C with 130."""
    arguments = sys.argv[1:] if argv is None else argv
    verb = arguments[0] if arguments else "--help"
    if verb in ("-h", "--help"):
        print(_usage())
        return
    if verb == "--version":
        from convlstm_vo import __version__

        print(__version__)
        return
    try:
        if verb not in VERBS:
            raise ConvlstmVoError(f"unknown command '{verb}'; the commands are {', '.join(VERBS)}")
        VERBS[verb](arguments[1:])
    except ConvlstmVoError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def _usage() -> str:
    lines = [f"  {verb:10} {(function.__doc__ or '').splitlines()[0]}" for verb, function in VERBS.items()]
    return "\n".join(
        [
            "usage: convlstm-vo COMMAND [options]      (convlstm-vo COMMAND --help lists the options)",
            "",
            "Learned monocular visual odometry: the video of one moving camera in, a metric trajectory out.",
            "",
            *lines,
        ]
    )


def _parse(options: type[Options], verb: str, argv: list[str], default: Options | None = None) -> Options:
    """Options of a verb from the command line; their fields, types and help are those of the dataclass."""
    start = tyro.MISSING_NONPROP if default is None else default
    return tyro.cli(options, args=argv, prog=f"convlstm-vo {verb}", default=start)


def _console() -> Console:
    from rich.console import Console

    return Console()


# --- train ------------------------------------------------------------------------------------------------------


def train(argv: list[str]) -> None:
    """train a network on a KITTI-layout tree (--preset NAME, --config RECIPE.toml, --resume)"""
    _keep_memory()
    config = parse_train(argv)
    print(f"Best checkpoint: {run_training(config)}")


def parse_train(argv: list[str]) -> TrainConfig:
    """The configuration of `train`: defaults, then the preset, then the recipe, then the command line."""
    from convlstm_vo.config import read_toml, update
    from convlstm_vo.models.config import preset
    from convlstm_vo.training.config import TrainConfig

    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--preset")
    parser.add_argument("--config", type=Path)
    first, rest = parser.parse_known_args(argv)
    default = TrainConfig()
    recipe = {} if first.config is None else read_toml(first.config)
    name = first.preset or recipe.get("preset")
    recipe.pop("preset", None)
    if name is not None:
        default = dataclasses.replace(default, model=preset(name))
    return _parse(TrainConfig, "train", rest, update(default, recipe, str(first.config)))


def run_training(config: TrainConfig) -> Path:
    """Load the sequences that a configuration names and train on them; the best checkpoint's folder."""
    from convlstm_vo.config import to_dict
    from convlstm_vo.evaluation.evaluate import save_json
    from convlstm_vo.training.log import TrainingLog
    from convlstm_vo.training.loop import train as run

    training, validation = load_training_data(config)
    last = config.out / "checkpoints" / "last"
    if last.exists() and not config.resume:
        raise ConvlstmVoError(f"{last}: a run is there already; go on with --resume or choose another --out")
    save_json(config.out / "train.json", to_dict(config))
    return run(config, training, validation, TrainingLog(config.out))


def load_training_data(config: TrainConfig) -> tuple[list[DecodedSequence], list[DecodedSequence]]:
    """Decoded training and validation sequences."""
    from convlstm_vo.sequences.kitti import open_kitti, sequence_names
    from convlstm_vo.training.cache import decode_sequence, default_cache_folder

    if config.data is None:
        raise ConvlstmVoError("--data DIR is missing: a KITTI odometry tree (`convlstm-vo simulate` makes one)")
    names = config.sequences or tuple(
        name
        for name in sequence_names(config.data)
        if name not in config.validate and (config.data / "poses" / f"{name}.txt").exists()
    )
    names = names[: config.max_sequences or None]
    sequences = open_kitti(config.data, names, camera=config.camera)
    validation = open_kitti(config.data, config.validate, camera=config.camera) if config.validate else []
    model = config.model
    size = {"height": model.image_height, "width": model.image_width, "channels": model.image_channels}
    folder = config.cache or default_cache_folder()
    with _progress("Decoding frames", sum(map(len, [*sequences, *validation]))) as advance:
        decoded = [decode_sequence(s, **size, folder=folder, advance=advance) for s in [*sequences, *validation]]
    return decoded[: len(sequences)], decoded[len(sequences) :]


def _keep_memory() -> None:
    """Start this process again with an allocator that keeps its memory (Linux with glibc)."""
    if sys.platform != "linux" or "MALLOC_TRIM_THRESHOLD_" in os.environ or "PYTEST_VERSION" in os.environ:
        return
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, **_ENVIRONMENT})


@contextlib.contextmanager
def _progress(what: str, total: int | None) -> Iterator[Callable[[int], None]]:
    """A progress bar with rate and time left; yields the function that advances it."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    rate = TextColumn("{task.fields[rate]}")
    bar = Progress(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), rate, TimeRemainingColumn())
    started = time.perf_counter()
    with bar:
        task = bar.add_task(what, total=total, rate="")

        def advance(count: int) -> None:
            done = bar.tasks[task].completed + count
            bar.update(task, advance=count, rate=f"{done / (time.perf_counter() - started):.0f} frames/s")

        yield advance


# --- evaluate, score --------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class EvaluateOptions:
    """Measure a network, and trivial baselines beside it, on sequences with ground truth."""

    data: Path
    """KITTI odometry tree."""
    sequences: tuple[str, ...] = ()
    """Which of its sequences; none named: all with ground truth."""
    checkpoint: Path | None = None
    """Checkpoint folder; without one only the baselines are measured."""
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


def evaluate(argv: list[str]) -> None:
    """measure a checkpoint and trivial baselines on sequences with ground truth; table, JSON, HTML report"""
    run_evaluation(_parse(EvaluateOptions, "evaluate", argv), f"convlstm-vo evaluate {shlex.join(argv)}")


def run_evaluation(options: EvaluateOptions, command: str) -> Path:
    """Evaluate as told; the path of the report."""
    from convlstm_vo.evaluation.evaluate import evaluate_sequences, save_results
    from convlstm_vo.evaluation.report import results_table, write_report
    from convlstm_vo.sequences.kitti import open_kitti

    estimator = None if options.checkpoint is None else _estimator(options.checkpoint, options.save)
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
    _console().print(results_table(evaluation))
    if options.json is not None:
        save_results(options.json, evaluation, command)
    write_report(report, evaluation, command)
    print(f"Report: {report.resolve()}")
    return report


def _estimator(checkpoint: Path, save: Path | None) -> Callable[[Any], Any]:
    """A function from a sequence to its estimated trajectory."""
    from convlstm_vo.models.checkpoint import load_checkpoint
    from convlstm_vo.odometer import estimate_trajectory

    net = load_checkpoint(checkpoint)

    def estimate(sequence: Any) -> Any:
        with _progress(f"Sequence {sequence.name}", len(sequence)) as advance:
            trajectory = estimate_trajectory(net, sequence, advance)
        if save is not None:
            trajectory.write_kitti(save / f"{sequence.name}.txt")
        return trajectory

    return estimate


@dataclasses.dataclass(frozen=True)
class ScoreOptions:
    """Measure one trajectory file against another: KITTI (12 or 13 columns) or TUM (8 or 7 columns)."""

    ground_truth: tyro.conf.Positional[Path]
    """The true trajectory."""
    estimate: tyro.conf.Positional[Path]
    """The estimated trajectory."""
    json: Path | None = None
    """Where to write all figures."""
    lengths: tuple[float, ...] = ()
    """Segment lengths in metres; by default KITTI's 100 to 800, or shorter ones (named) for short paths."""
    step: int | None = None
    """Frames between segment starts; by default KITTI's 10 (1 with short segments)."""
    align: Literal["none", "scale", "se3", "sim3"] = "none"
    """Alignment of the estimate before t_rel and r_rel are taken; the official protocol has none."""


def score(argv: list[str]) -> None:
    """measure an estimated trajectory file against a true one, as KITTI's devkit does; no checkpoint needed"""
    from convlstm_vo.evaluation.evaluate import save_json
    from convlstm_vo.evaluation.metrics import score_files
    from convlstm_vo.evaluation.report import score_table

    options = _parse(ScoreOptions, "score", argv)
    result = score_files(
        options.ground_truth,
        options.estimate,
        lengths_m=options.lengths or None,
        step_frames=options.step,
        alignment=options.align,
    )
    _console().print(score_table(result))
    if options.json is not None:
        save_json(options.json, result.as_dict())


# --- run --------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class RunOptions:
    """Turn a video, a folder of images, a KITTI sequence folder or a live camera into a trajectory."""

    input: tyro.conf.Positional[str]
    """Video file or URL, folder of images, KITTI folder sequences/NAME, or the number of a camera."""
    checkpoint: Path
    """Checkpoint folder."""
    calib: Path | None = None
    """Intrinsics from a KITTI calib.txt or a ROS camera_info YAML."""
    intrinsics: tuple[float, float, float, float] | None = None
    """Intrinsics as fx fy cx cy in pixels."""
    fov: float | None = None
    """Intrinsics from the horizontal field of view in degrees (square pixels, centred)."""
    camera: Literal[0, 1, 2, 3] = 0
    """Which camera of a KITTI sequence or calib.txt."""
    out: Path | None = None
    """Folder for trajectory.txt and trajectory.png; by default runs/NAME."""
    format: Literal["kitti", "tum"] = "kitti"
    """Format of the trajectory file."""
    device: str = "cpu"
    """torch device."""


def run(argv: list[str]) -> None:
    """turn a video, a folder of images, a KITTI sequence or a live camera into a trajectory and a picture"""
    from convlstm_vo.evaluation.report import trajectory_picture
    from convlstm_vo.odometer import VisualOdometry
    from convlstm_vo.recorder import PathSketch, TrajectoryFile
    from convlstm_vo.sequences import open_stream
    from convlstm_vo.sequences.base import Sequence

    options = _parse(RunOptions, "run", argv)
    stream = open_stream(options.input, _camera_for(options), camera=options.camera)
    odometer = VisualOdometry.from_checkpoint(options.checkpoint, stream.camera, device=options.device)
    out = options.out or Path("runs") / stream.name
    total = len(stream) if isinstance(stream, Sequence) else getattr(stream, "approximate_length", None)
    sketch, seconds, count = PathSketch(), 0.0, 0
    try:
        with (
            TrajectoryFile(out / "trajectory.txt", options.format) as file,
            _progress(stream.name, total) as advance,
        ):
            for tracked in odometer.stream(stream):
                file.add(tracked)
                sketch.add(tracked)
                seconds, count = seconds + tracked.seconds, count + 1
                advance(1)
    finally:
        if count and (out / "trajectory.txt").exists():
            paths = {"estimate": sketch.trajectory()}
            truth = getattr(stream, "trajectory", None)
            trajectory_picture(out / "trajectory.png", paths | ({"ground truth": truth} if truth else {}))
            rate = f"{1000 * seconds / count:.1f} ms a frame (decoding excluded)"
            print(f"{count} frames, {rate}: {out / 'trajectory.txt'}")


def _camera_for(options: RunOptions) -> Callable[[int, int], Camera] | None:
    from convlstm_vo.sequences.calibration import camera_from

    if options.calib is None and options.intrinsics is None and options.fov is None:
        return None
    return lambda height, width: camera_from(
        height=height,
        width=width,
        calibration=options.calib,
        intrinsics=options.intrinsics,
        fov_deg=options.fov,
        camera=options.camera,
    )


# --- simulate, demo ---------------------------------------------------------------------------------------------


def simulate(argv: list[str]) -> None:
    """render drives through built-in streets, with exact poses, in KITTI layout"""
    from convlstm_vo.world.simulate import SimulateConfig
    from convlstm_vo.world.simulate import simulate as write

    write(_parse(SimulateConfig, "simulate", argv))


VERBS: dict[str, Callable[[list[str]], None]] = {
    "train": train,
    "evaluate": evaluate,
    "score": score,
    "run": run,
    "simulate": simulate,
}

if __name__ == "__main__":
    main()
