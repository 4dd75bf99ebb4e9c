"""The command line: one function a verb. Heavy imports stand inside the verbs, so that help comes at once."""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
import shlex
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeVar

import tyro

from convlstm_vo import environment
from convlstm_vo.errors import ConvlstmVoError

if TYPE_CHECKING:
    from rich.console import Console

    from convlstm_vo.calibration import VehicleCalibration
    from convlstm_vo.geometry.camera import Camera
    from convlstm_vo.geometry.trajectory import Trajectory
    from convlstm_vo.odometer import VisualOdometry
    from convlstm_vo.recorder import Tally
    from convlstm_vo.sequences.base import Image, Stream
    from convlstm_vo.sequences.lens import Lens
    from convlstm_vo.training.config import TrainConfig

Options = TypeVar("Options")
_TRAIN = ("train", "train-geometric", "demo")  # verbs for which `environment.restart_for_training` is


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
    if argv is None:  # a process of its own, not a program that calls
        if verb in _TRAIN:
            environment.restart_for_training()
        # A cluster's notice that time is up, or a service's end, is treated as Ctrl-C: save, and stop.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
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
    lines = [f"  {verb:15} {(function.__doc__ or '').splitlines()[0]}" for verb, function in VERBS.items()]
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
    config = parse_train(argv)
    from convlstm_vo.training.config import TrainError
    from convlstm_vo.training.dry_run import describe_run
    from convlstm_vo.training.run import run_training

    if config.model.encoder == "flow":
        raise TrainError("preset geometric is trained in stages of its own: use `convlstm-vo train-geometric`")
    first = os.environ.get("RANK", "0") == "0"  # of several processes, one speaks
    if config.dry_run:
        plan = describe_run(config)
        if first:
            print(plan)
        return
    path = run_training(config)
    if first:
        print(f"{'Curve' if config.find_lr else 'Best checkpoint'}: {path}")


def parse_train(argv: list[str]) -> TrainConfig:
    """The configuration of `train`: defaults, then the preset, then the recipe, then the command line."""
    from convlstm_vo.config import read_toml, update
    from convlstm_vo.training.config import TrainConfig, TrainError, preset_config

    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--preset")
    parser.add_argument("--config", type=Path)
    first, rest = parser.parse_known_args(argv)
    default = TrainConfig()
    recipe = {} if first.config is None else read_toml(first.config)
    name = first.preset or recipe.get("preset")
    recipe.pop("preset", None)
    if name is not None:
        default = preset_config(name)
    config = _parse(TrainConfig, "train", rest, update(default, recipe, str(first.config)))
    if (named := config.model.preset) != default.model.preset:  # it would name the network without changing it
        raise TrainError(f"model.preset '{named}' is a name only and builds no network; use --preset {named}")
    return config


def shard(argv: list[str]) -> None:
    """pack a KITTI-layout tree into shards, for `train --shards` on collections too large for one disk"""
    from convlstm_vo.training.packing import ShardOptions, pack

    print(f"Shards: {pack(_parse(ShardOptions, 'shard', argv)).parent}")


def train_geometric(argv: list[str]) -> None:
    """train the default network from nothing: render streets, flow, weights; or --finetune it on your own frames"""
    from convlstm_vo.training.pipeline import GeometricOptions, run_geometric

    print(f"Checkpoint: {run_geometric(_parse(GeometricOptions, 'train-geometric', argv))}")


# --- evaluate, score --------------------------------------------------------------------------------------------


def evaluate(argv: list[str]) -> None:
    """measure a checkpoint and trivial baselines on sequences with ground truth; table, JSON, HTML report"""
    environment.set_for_streaming()
    from convlstm_vo.evaluation.run import EvaluateOptions, run_evaluation

    run_evaluation(_parse(EvaluateOptions, "evaluate", argv), f"convlstm-vo evaluate {shlex.join(argv)}")


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
class InputOptions:
    """Frames, and the camera that took them."""

    input: tyro.conf.Positional[str]
    """Video file or URL, ROS bag, folder of images, KITTI folder sequences/NAME, or the number of a camera."""
    mask: Path | None = None
    """Image of the frames' size, black where they show the car (bonnet, dashboard). Without it, a bonnet that shows
    texture is found out while driving."""
    calib: Path | None = None
    """Intrinsics from a KITTI calib.txt, a ROS camera_info YAML, or one that OpenCV's calibration wrote."""
    intrinsics: tuple[float, float, float, float] | None = None
    """Intrinsics as fx fy cx cy in pixels."""
    fov: float | None = None
    """Intrinsics from the horizontal field of view in degrees (square pixels, centred)."""
    distortion: tuple[float, ...] = ()
    """Distortion of the lens that --intrinsics describe: OpenCV's k1 k2 p1 p2 [k3 [k4 k5 k6]]. Frames are
    undistorted first; so they are with a YAML, or a bag's camera_info, that has coefficients."""
    find_distortion: bool = False
    """Find the lens's distortion from the first seconds of driving, for a camera that nobody has calibrated: with
    --fov, that of the image as it comes, or --intrinsics. Written as a camera.yaml, for --calib."""
    rotate: Literal[0, 90, 180, 270] = 0
    """Degrees by which frames are turned clockwise first: 180 for a camera that hangs upside down. Intrinsics,
    distortion and mask are those of the frames as they come; a video that knows how it was held needs none."""
    topic: str | None = None
    """Images of a ROS bag; may be left out where there is only one topic of them."""
    camera: Literal[0, 1, 2, 3] = 0
    """Which camera of a KITTI sequence or calib.txt."""
    fps: float | None = None
    """Frames a second of a folder of images that has no times.txt; by default 10."""


@dataclasses.dataclass(frozen=True)
class RunOptions(InputOptions):
    """Turn a video, a ROS bag, a folder of images, a KITTI sequence folder or a live camera into a trajectory."""

    checkpoint: Path | None = None
    """Checkpoint folder; by default the weights that come with the package."""
    camera_height: float | None = None
    """Metres of the camera above the road, which give the scale; by default 1.65 (KITTI)."""
    calibration: Path | None = None
    """Vehicle calibration that an earlier run or `convlstm-vo calibrate` wrote, instead of --camera-height."""
    out: Path | None = None
    """Folder for trajectory.txt and trajectory.png; by default runs/NAME."""
    format: Literal["kitti", "tum"] = "kitti"
    """Format of the trajectory file."""
    device: str = "cpu"
    """torch device."""


def run(argv: list[str]) -> None:
    """turn a video, ROS bag, folder of images, KITTI sequence or live camera into a trajectory and a picture"""
    environment.set_for_streaming()
    from convlstm_vo.models.checkpoint import DEFAULT_CHECKPOINT
    from convlstm_vo.odometer import VisualOdometry
    from convlstm_vo.progress import progress
    from convlstm_vo.recorder import Tally, TrajectoryFile
    from convlstm_vo.sequences.base import Sequence

    options = _parse(RunOptions, "run", argv)
    stream = _open(options)
    odometer = VisualOdometry.from_checkpoint(
        options.checkpoint or DEFAULT_CHECKPOINT,
        stream.camera,
        device=options.device,
        calibration=_vehicle(options.camera_height, options.calibration),
        mask=_mask(options.mask, stream),
    )
    _compile_first(odometer)
    out = options.out or Path("runs") / stream.name
    total = len(stream) if isinstance(stream, Sequence) else getattr(stream, "approximate_length", None)
    tally, file, whole = Tally(), TrajectoryFile(out / "trajectory.txt", options.format), False
    try:
        with file, progress(stream.name, total) as advance:
            for tracked in odometer.stream(stream):
                file.add(tracked)
                tally.add(tracked)
                advance(1)
        whole = True
    finally:
        if tally.count and file.written == file.partial:
            print(f"{tally.count} frames before the error: {file.partial}")
        elif tally.count and file.written:
            _conclude(out, stream, odometer, tally)
            _write_found_lens(out / "camera.yaml", stream, options)
            if whole and total and tally.count < 0.95 * total - 1:
                print(f"Warning: the file claims {total} frames; it may be damaged from there on", file=sys.stderr)


def _conclude(out: Path, stream: Stream, odometer: VisualOdometry, tally: Tally) -> None:
    """Beside the trajectory: picture, calibration, and what a user should know of it."""
    from convlstm_vo.evaluation.report import trajectory_picture

    truth = getattr(stream, "trajectory", None)
    paths = {"ground_truth": truth.from_first_pose()} if truth else {}
    trajectory_picture(out / "trajectory.png", paths | {"network": tally.sketch.trajectory()})
    rate = f"{1000 * tally.seconds / tally.count:.1f} ms a frame (decoding excluded)"
    print(f"{tally.count} frame{'s' * (tally.count != 1)}, {rate}: {out / 'trajectory.txt'}")
    if restamped := getattr(stream, "restamped", 0):
        print(f"{restamped} images had stamps that did not follow the one before; they got later ones")
    if dropped := getattr(stream, "dropped", 0):
        print(f"{dropped} frames of the live source came meanwhile and were left out")
    if tally.lost:
        print(f"lost in {tally.lost} frames: the motion there is a guess")
    if tally.guessed:
        print(f"no road in view in {tally.guessed} frames: rotation and direction hold, the scale there is a guess")
    if odometer.calibration is not None:
        odometer.calibration.write(out / "calibration.json")


def _compile_first(odometer: VisualOdometry) -> None:
    """Before a camera's first frame, not at it."""
    from convlstm_vo.odometer import COMPILING, compiles_first

    if compiles_first(odometer.net):
        print(COMPILING, file=sys.stderr, flush=True)
        odometer.warm_up()


def _vehicle(camera_height: float | None, calibration: Path | None) -> VehicleCalibration | None:
    from convlstm_vo.calibration import CalibrationError, VehicleCalibration

    if calibration is not None and camera_height is not None:
        raise CalibrationError(
            "--camera-height and --calibration: give one of them; the calibration has the height"
        )
    if calibration is not None:
        return VehicleCalibration.read(calibration)
    return None if camera_height is None else VehicleCalibration(camera_height)


def _mask(path: Path | None, stream: Stream) -> Image | None:
    """As the stream's frames are, which may have been turned, or of which a lens may have been removed."""
    from convlstm_vo.odometer import read_mask
    from convlstm_vo.sequences.changed import Turned

    if path is None:
        return None
    if isinstance(stream, Turned):
        mask = _mask(path, stream.stream)
        return None if mask is None else stream.turn(mask)
    mask, lens = read_mask(path, stream.camera), getattr(stream, "lens", None)
    return mask if lens is None else lens.undistort(mask)


@dataclasses.dataclass(frozen=True)
class CalibrateOptions(InputOptions):
    """Fix the camera's height and mounting on a vehicle once, from a drive of 100 m or more, mostly straight, whose
    length is known."""

    distance: float | None = None
    """Metres that the car drove from the first to the last frame (odometer, map)."""
    track: Path | None = None
    """Or its true trajectory (GPS): a TUM file, with times of any clock, or a KITTI file, a pose for each frame."""
    out: Path = Path("calibration.json")
    """File to write, for --calibration."""
    camera_height: float = 1.65
    """Metres, roughly."""

    def __post_init__(self) -> None:
        if (self.distance is None) == (self.track is None):
            raise ConvlstmVoError("calibrate needs one of --distance METRES and --track FILE")
        if self.distance is not None and not 0 < self.distance < math.inf:
            raise ConvlstmVoError(f"--distance {self.distance}: must be positive metres")


def calibrate(argv: list[str]) -> None:
    """find a vehicle's camera height and mounting from a drive of known length"""
    environment.set_for_streaming()
    from convlstm_vo.calibration import CalibrationError, VehicleCalibration, check_track, true_height
    from convlstm_vo.geometry.trajectory import has_own_times, read_trajectory
    from convlstm_vo.odometer import VisualOdometry
    from convlstm_vo.recorder import Tally

    options = _parse(CalibrateOptions, "calibrate", argv)
    track = None if options.track is None else read_trajectory(options.track)
    if options.out.is_dir():
        raise CalibrationError(f"--out {options.out}: is a folder; name a file")
    stream = _open(options)
    start = VehicleCalibration(options.camera_height)
    mask = _mask(options.mask, stream)
    odometer = VisualOdometry.from_checkpoint(camera=stream.camera, calibration=start, mask=mask)
    _compile_first(odometer)
    tally = Tally(limit=None)
    for tracked in odometer.stream(stream):
        tally.add(tracked)
    driven, path = tally.way_m, tally.sketch.trajectory()
    if track is not None and options.track is not None:
        check_track(track, has_own_times(options.track), path.timestamps_s, str(options.track))
    if driven < 10 or tally.lost or tally.guessed > 0.05 * tally.count:
        raise CalibrationError(
            f"{options.input}: {driven:.1f} m driven, {tally.lost} frames lost, {tally.guessed} without a road; a "
            "calibration needs a drive of 10 m at least (better 100) with the road in view, but for 5 % of its "
            "frames at most"
        )
    true = options.distance if track is None else float(track.distances_m[-1])
    height = true_height(start.camera_height_m, driven, true, str(options.track or "--distance"))
    found = odometer.calibration
    assert found is not None
    done = dataclasses.replace(found, camera_height_m=height)
    done.write(options.out)
    print(
        f"camera {done.camera_height_m:.3f} m above the road, pitch {done.pitch_rad:+.4f} rad, "
        f"roll {done.roll_rad:+.4f} rad, yaw {done.yaw_rad:+.4f} rad: {options.out}"
    )
    _write_found_lens(options.out.with_name(f"{options.out.stem}-camera.yaml"), stream, options)
    if track is not None and len(track) == len(path):  # of the same frames: its turns can be compared
        _tell_turns(track, path, stream.camera)


def _tell_turns(track: Trajectory, found: Trajectory, camera: Camera) -> None:
    """Whether the camera seems to turn as it did, or the focal length is wrong."""
    from convlstm_vo.calibration import turn_gain

    gain = turn_gain(track, found)
    if gain is not None:
        print(
            f"turns are {100 * abs(gain):.1f} % {'larger' if gain > 0 else 'smaller'} than the track's: "
            f"fx {camera.fx * (1 + gain):.2f}, fy {camera.fy * (1 + gain):.2f} would fit better than "
            f"{camera.fx:.2f}, {camera.fy:.2f} (the height above is for the latter; calibrate again with the "
            "new ones)"
        )


def _open(options: InputOptions) -> Stream:
    """The input, with the distortion that the options tell of removed, and turned."""
    from convlstm_vo.sequences import open_stream
    from convlstm_vo.sequences.base import SequenceError
    from convlstm_vo.sequences.calibration import camera_from, lens_from_ros
    from convlstm_vo.sequences.changed import Turned
    from convlstm_vo.sequences.lens import Lens, Undistorted, bends

    calib = options.calib
    ros = None if calib is None or calib.suffix.lower() not in (".yaml", ".yml") else lens_from_ros(calib)
    if options.distortion and options.intrinsics is None:
        raise SequenceError("--distortion: belongs to --intrinsics FX FY CX CY; give both")

    def camera_for(height: int, width: int) -> Camera:
        if ros is not None and options.intrinsics is None and options.fov is None:
            return ros.camera
        return camera_from(
            height=height,
            width=width,
            calibration=calib,
            intrinsics=options.intrinsics,
            fov_deg=options.fov,
            camera=options.camera,
        )

    given = not (calib is None and options.intrinsics is None and options.fov is None)

    def opened() -> Stream:
        wanted = camera_for if given else None
        return open_stream(options.input, wanted, camera=options.camera, topic=options.topic, fps=options.fps)

    stream = opened()
    own = Lens(stream.camera, options.distortion) if options.distortion else None
    lens = own if bends(options.distortion) else ros
    if options.find_distortion:
        if lens is not None or getattr(stream, "lens", None) is not None:
            raise SequenceError("--find-distortion: the distortion is given already; leave one of the two out")
        lens = _found_lens(stream, options)
        stream = opened()  # a video can be read but once
    stream = stream if lens is None else Undistorted(stream, lens)
    if doubt := stream.camera.doubt():
        print(f"Warning: {doubt}", file=sys.stderr)
    return Turned(stream, options.rotate) if options.rotate else stream


def _found_lens(stream: Stream, options: InputOptions) -> Lens | None:
    """The lens as the first seconds of a stream tell of it; None where it bends nothing."""
    from convlstm_vo.models.checkpoint import load_checkpoint
    from convlstm_vo.models.geometric import GeometricNet
    from convlstm_vo.odometer import COMPILING, compiles_first
    from convlstm_vo.progress import progress
    from convlstm_vo.self_calibration import ENOUGH, SelfCalibrationError, find_bend
    from convlstm_vo.sequences.changed import Turned

    if getattr(stream, "live", False):
        raise SelfCalibrationError(
            f"{options.input}: --find-distortion has to see the first frames twice, which a live source does not "
            "show again; record a minute, find it there, and give the camera.yaml that is written (--calib)"
        )
    net = load_checkpoint()
    assert isinstance(net, GeometricNet)
    if compiles_first(net):
        print(COMPILING, file=sys.stderr, flush=True)
    upright = Turned(stream, options.rotate) if options.rotate else stream
    try:
        with progress("Finding distortion", ENOUGH, unit="pairs") as advance:
            found = find_bend(net, upright, upright.camera, advance)
    except SelfCalibrationError as error:
        raise SelfCalibrationError(f"{options.input}: {error}") from None
    told = f"{found.bend:+.3f} +- {found.sd:.3f}, by the division model"
    if not found.clear:
        print(f"no distortion found ({told}): the frames are used as they are")
        return None
    lens = found.lens(stream.camera, fov_deg=options.fov)
    _ = lens.rectified
    focal = f"; focal length {lens.camera.fx:.1f} px" if options.fov is not None else ""
    print(f"distortion found ({told}){focal}: the frames are undistorted")
    return lens


def _write_found_lens(path: Path, stream: Stream, options: InputOptions) -> None:
    """What `--find-distortion` found, for `--calib`."""
    from convlstm_vo.sequences.calibration import write_ros
    from convlstm_vo.sequences.changed import Turned

    lens = getattr(stream.stream if isinstance(stream, Turned) else stream, "lens", None)
    if options.find_distortion and lens is not None:
        write_ros(path, lens)
        print(f"the camera with its distortion, for --calib: {path}")


# --- simulate, demo ---------------------------------------------------------------------------------------------


def simulate(argv: list[str]) -> None:
    """render drives through built-in streets, with exact poses, in KITTI layout"""
    from convlstm_vo.world import SimulateConfig
    from convlstm_vo.world import simulate as write

    write(_parse(SimulateConfig, "simulate", argv))


def demo(argv: list[str]) -> None:
    """simulate drives, train `tiny` on them, evaluate on an unseen one, all in minutes; ends with a report"""
    from convlstm_vo.demo import DemoOptions, run_demo

    run_demo(_parse(DemoOptions, "demo", argv))


# --- export -----------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class ExportOptions:
    """Write the default network's learned flow as ONNX; the solver and the search stay in Python."""

    out: Path
    """File to write, such as flow.onnx."""
    checkpoint: Path | None = None
    """Checkpoint folder; by default the weights that come with the package."""
    height: int = 192
    """Rows of a frame, divisible by 8."""
    width: int = 640
    """Columns of a frame, divisible by 8."""


def export(argv: list[str]) -> None:
    """write the default network's learned flow as ONNX, compared with torch"""
    options = _parse(ExportOptions, "export", argv)
    from convlstm_vo.export import export_flow
    from convlstm_vo.models.checkpoint import DEFAULT_CHECKPOINT, load_checkpoint

    net = load_checkpoint(options.checkpoint or DEFAULT_CHECKPOINT)
    difference = export_flow(net, options.out, height=options.height, width=options.width)
    if difference is None:
        print("not compared with torch: onnxruntime is missing (pip install 'convlstm-vo[onnx]')")
    else:
        print(f"onnxruntime agrees with torch to {difference:.1g} px on a random pair")
    print(f"Flow at {options.height}x{options.width}: {options.out}")


VERBS: dict[str, Callable[[list[str]], None]] = {
    "demo": demo,
    "train": train,
    "train-geometric": train_geometric,
    "evaluate": evaluate,
    "score": score,
    "run": run,
    "calibrate": calibrate,
    "simulate": simulate,
    "shard": shard,
    "export": export,
}

if __name__ == "__main__":
    main()
