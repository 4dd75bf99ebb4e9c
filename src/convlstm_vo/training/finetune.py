"""Fine-tuning the default network on frames of one's own with known poses: weights and priors; the flow stays."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json
import math
import statistics
import sys
import zlib
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
import tyro
from numpy.typing import NDArray

from convlstm_vo.calibration import VehicleCalibration
from convlstm_vo.environment import bfloat16_pays
from convlstm_vo.geometry import se3
from convlstm_vo.geometry.camera import Camera
from convlstm_vo.geometry.files import write_atomically
from convlstm_vo.models.checkpoint import DEFAULT_CHECKPOINT, load_checkpoint, save_checkpoint
from convlstm_vo.models.geometric import LEAST_EVIDENCE, GeometricNet, View
from convlstm_vo.models.mounting import Memory, facing_ahead, looking_ahead
from convlstm_vo.odometer import VisualOdometry, working_size
from convlstm_vo.progress import progress
from convlstm_vo.sequences.base import fit_image
from convlstm_vo.sequences.kitti import KittiSequence, sequence_names
from convlstm_vo.training.cell_drives import CellDrive, cached, packed_cells, pick_frames, predicted_motion, spoil
from convlstm_vo.training.config import TrainError
from convlstm_vo.training.flow_data import change_lights
from convlstm_vo.training.geometric import WeighConfig, first_memory, train_weights
from convlstm_vo.training.stage_state import weights_checksum

_PIECE = 80  # frames of a drive to learn from, as of the rendered ones
_HELD_OUT = 0.2  # of each sequence, where none is named to validate on
_CLIP = WeighConfig.frames
_MOVING_M = 0.1  # a frame; of less nobody knows the scale
_FIGURES = {  # of `measure_frames`: what it is called, its unit, digits, and what is no change
    "shift_percent": ("error of the way", "%", 2, 0.02),
    "turn_deg": ("error of the turn", "degrees", 4, 0.0002),
    "scale_bias_percent": ("bias of the scale", "%", 2, 0.05),
}
Figures = dict[str, dict[str, float]]  # by sequence
_NOTICE = """Fine-tuned by `convlstm-vo train-geometric --finetune` on {data}.
These weights fall under the licence of those frames. KITTI's is CC BY-NC-SA 3.0: not for commercial use, and
weights learned from it must not be shipped with the package, which is Apache-2.0.
"""


@dataclasses.dataclass(frozen=True)
class FinetuneOptions:
    """Fine-tune the default network on frames of one's own; the checkpoint is the folder `finetuned` of --out."""

    data: Annotated[Path | None, tyro.conf.arg(name="finetune")] = None
    """Instead of all that: fine-tune the weights (not the flow) on your own frames, a KITTI odometry tree with
    sequences/NAME/image_0, calib.txt, times.txt, poses/NAME.txt. Writes OUT/finetuned, measures before and after,
    and warns where it got worse; the weights before stay. Weights fine-tuned on KITTI fall under its licence
    (CC BY-NC-SA 3.0) and must not be shipped with this package. The options below go with it."""
    sequences: tuple[str, ...] = ()
    """Sequences to learn from; none named: all with ground truth that are not validated on."""
    validate: tuple[str, ...] = ()
    """Sequences to measure on, before and after; none named: the last 20 % of each, which are then not learned."""
    checkpoint: Path | None = None
    """Checkpoint folder to start from; by default the weights that come with the package."""
    camera_height: float | None = None
    """Metres of the camera above the road; by default that of the checkpoint, 1.65 (KITTI)."""
    camera: Literal[0, 1, 2, 3] = 0
    """Which image folder."""
    steps: int = 200
    """Updates, of 64 frames each."""
    lr: float = 1e-4
    """Peak learning rate; the package's weights were learned with 2e-3."""

    def __post_init__(self) -> None:
        if self.data is None:
            for field in dataclasses.fields(self):
                if getattr(self, field.name) != field.default:
                    option = field.name.replace("_", "-")
                    raise TrainError(f"--{option}: is for your own frames; name them with --finetune DATA")
            return
        if self.steps < 1:
            raise TrainError(f"--steps {self.steps}: must be at least 1")
        if not 0 < self.lr < math.inf:
            raise TrainError(f"--lr {self.lr}: must be positive")
        if self.camera_height is not None and not 0.1 <= self.camera_height <= 20:
            raise TrainError(
                f"--camera-height {self.camera_height}: must lie between 0.1 and 20 m; measure it from the road to "
                "the lens"
            )
        if overlap := set(self.sequences) & set(self.validate):
            raise TrainError(f"--validate {' '.join(sorted(overlap))}: also in --sequences; keep them apart")


# --- frames -------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class OwnDrive:
    """Frames of a sequence in their order.

    Attributes:
        truth: (frames of the sequence, 4, 4), its ``T_world_camera``. height_m: of the camera.
    """

    sequence: KittiSequence
    frames: range
    truth: NDArray[np.float64]
    height_m: float

    @property
    def name(self) -> str:
        return f"{self.sequence.name}-{self.frames.start:06d}-{self.frames.stop:06d}"

    @property
    def label(self) -> str:
        """As a report names it."""
        return f"{self.sequence.name} ({self.frames.start} to {self.frames.stop - 1})"

    @property
    def camera(self) -> Camera:
        """As the odometer sees the sequence."""
        height, width = working_size(self.sequence.camera)
        return self.sequence.camera.resized(height=height, width=width)

    def image(self, index: int) -> NDArray[np.uint8]:
        """(height, width) grey levels, as the odometer sees them."""
        size = self.camera
        image = fit_image(self.sequence[index].image, height=size.height, width=size.width, channels=1)
        return image[..., 0]

    def checksum(self, *more: object) -> int:
        """Of all that its cells follow from, images by their names and sizes."""
        images = [(path.name, path.stat().st_size) for path in (self.sequence.images[i] for i in self.frames)]
        values = repr((images, self.camera, self.height_m, *more)).encode()
        return zlib.crc32(values + self.truth[self.frames.start : self.frames.stop].tobytes())


def open_drives(options: FinetuneOptions, height_m: float) -> tuple[list[OwnDrive], list[OwnDrive]]:
    """What to learn from, in pieces, and what to measure on.

    Raises:
        SequenceError, TrajectoryError: see `KittiSequence`.
        TrainError: no poses, too few frames, or nothing to learn from.
    """
    assert options.data is not None
    poses = options.data / "poses"
    names = list(dict.fromkeys(options.sequences)) or [
        name
        for name in sequence_names(options.data)
        if (poses / f"{name}.txt").exists() and name not in options.validate
    ]
    if not names:
        raise TrainError(
            f"--finetune {options.data}: no sequences with ground truth to learn from; it needs sequences/NAME and "
            "poses/NAME.txt" + (" besides those of --validate" if options.validate else "")
        )
    training, unseen = [], []
    for name in names:
        sequence, truth = _with_truth(options, name)
        held_out = 0 if options.validate else max(2, round(_HELD_OUT * len(sequence)))
        learned = len(sequence) - held_out
        _check_length(sequence, learned, held_out)
        for start, stop in _pieces(learned):
            training.append(OwnDrive(sequence, range(start, stop), truth, height_m))
        if held_out:
            unseen.append(OwnDrive(sequence, range(learned, len(sequence)), truth, height_m))
    for name in dict.fromkeys(options.validate):
        sequence, truth = _with_truth(options, name)
        if len(sequence) < 2:
            raise TrainError(f"{sequence.root}/sequences/{name}: one frame; --validate needs 2 at least")
        unseen.append(OwnDrive(sequence, range(len(sequence)), truth, height_m))
    return training, unseen


def _with_truth(options: FinetuneOptions, name: str) -> tuple[KittiSequence, NDArray[np.float64]]:
    assert options.data is not None
    sequence = KittiSequence(options.data, name, camera=options.camera)
    if sequence.trajectory is None:
        role = "--validate" if name in options.validate else "--sequences"
        raise TrainError(
            f"{options.data / 'poses' / name}.txt: no such file; fine-tuning needs the poses of each sequence: add "
            f"them, or leave {name} out of {role}"
        )
    return sequence, sequence.trajectory.T_world_camera


def _check_length(sequence: KittiSequence, learned: int, held_out: int) -> None:
    if learned > _CLIP:
        return
    kept = f" when the last {held_out} are kept to validate on" if held_out else ""
    raise TrainError(
        f"{sequence.root}/sequences/{sequence.name}: {learned} frames to learn from{kept}, but a clip takes "
        f"{_CLIP + 1}; leave it out of --sequences{', or name others to --validate' if held_out else ''}"
    )


def _pieces(frames: int) -> list[tuple[int, int]]:
    """Nearly equal parts of a sequence that share the frame between them, so that no motion is lost."""
    edges = np.linspace(0, frames - 1, max(1, round((frames - 1) / _PIECE)) + 1).round().astype(int).tolist()
    return [(start, stop + 1) for start, stop in itertools.pairwise(edges)]


@torch.inference_mode()
def cells_of_frames(net: GeometricNet, drive: OwnDrive, seed: int) -> CellDrive:
    """Measure the flow of frames as the odometer would: on top of the last true motion, and of the mounting as the
    network has found it by then, but for where the camera looks, which the truth tells. Some are dropped, spoilt
    and dimmed, as of rendered drives. Nobody knows slopes of the road here, so they are not a number."""
    rng = np.random.Generator(np.random.PCG64([seed, zlib.crc32(drive.name.encode())]))
    frames = list(drive.frames)
    if len(picked := pick_frames(len(frames), rng)) > _CLIP:
        frames = [frames[i] for i in picked]
    intrinsics = torch.tensor(drive.camera.intrinsics[None], dtype=torch.float32)
    motions: list[NDArray[np.float32]] = []
    rows, first = [], None
    start = looking_as_driven(drive)
    packed, hidden = start.pack(), None
    turned = looking_ahead(start)[0].double().numpy()
    light = torch.Generator().manual_seed(int(rng.integers(2**62)))
    for (a, prev), (b, curr) in itertools.pairwise(_shown(drive, frames, rng)):
        T = se3.relative(drive.truth[a], drive.truth[b])
        T[:3, 3] /= drive.height_m
        T[:3] = turned @ T[:3]
        T[:3, :3] = T[:3, :3] @ turned.T
        motions.append(se3.motion_from_matrix(T).astype(np.float32))
        guess = predicted_motion(motions, rng)
        first = guess if first is None else first
        memory = dataclasses.replace(Memory.unpack(packed), motion=torch.from_numpy(guess)[None])
        grey = [torch.from_numpy(image.astype(np.float32))[None, None] for image in (prev, curr)]
        cells = net.look(View(*change_lights(grey[0], grey[1], light), intrinsics), memory)
        rows.append(packed_cells(cells))
        estimate, state = net.conclude(cells, memory, hidden)
        if float(estimate.evidence) >= LEAST_EVIDENCE:  # a covered frame tells nothing about the mounting
            hidden, packed = state[:-1], state[-1]
    assert first is not None
    slopes = np.full((len(rows), 2), np.nan, np.float32)
    return CellDrive(np.stack(rows), np.stack(motions), slopes, first)


def looking_as_driven(drive: OwnDrive) -> Memory:
    """A first memory that knows where the camera looks beside where the car drives, by the truth of all frames."""
    truth = drive.truth[drive.frames.start : drive.frames.stop]
    motions = torch.from_numpy(se3.motion_from_matrix(se3.relative(truth[:-1], truth[1:]))).float()
    motions[:, :3] /= drive.height_m
    known, seen = Memory.unpack(first_memory(torch.zeros(1, 6))), torch.zeros(1, dtype=torch.bool)
    for motion in motions:
        ahead = (motion.view(2, 3) @ looking_ahead(known)[0].T).view(1, 6)
        known = facing_ahead(dataclasses.replace(known, motion=ahead), seen)
    first = Memory.unpack(first_memory(torch.zeros(1, 6)))
    return dataclasses.replace(first, aside=known.aside, aside_precision=known.aside_precision)


def _shown(
    drive: OwnDrive, frames: Iterable[int], rng: np.random.Generator
) -> Iterable[tuple[int, NDArray[np.uint8]]]:
    """Frames with their numbers, some spoilt, one at a time: a sequence may be too long for memory."""
    for index in frames:
        image = drive.image(index)
        yield index, spoil(image, rng) if rng.random() < 0.04 else image


def cache_frames(net: GeometricNet, drives: list[OwnDrive], folder: Path, seed: int) -> list[CellDrive]:
    """`cells_of_frames` of all drives, from files where an earlier run has left them.

    Their names tell by a checksum what they were made from, so changed poses or weights make others.
    """
    weights = weights_checksum(net.state_dict())
    out = []
    with progress("Flow of frames", sum(len(drive.frames) for drive in drives)) as advance:
        for drive in drives:
            path = folder / f"{drive.name}-{drive.checksum(seed, weights):08x}.npz"
            out.append(cached(path, partial(cells_of_frames, net, drive, seed)))
            advance(len(drive.frames))
    return out


# --- validation ---------------------------------------------------------------------------------------------------


def measure_frames(net: GeometricNet, drives: list[OwnDrive], what: str) -> Figures:
    """What the odometer makes of frames, from a fresh state: error of the way as a share of it, mean error of the
    turn, and how much too long the way is. Not a number where nothing moves."""
    net = copy.deepcopy(net)  # an odometer arranges its weights in another order
    out = {}
    with progress(f"Validation {what}", sum(len(drive.frames) for drive in drives)) as advance:
        for drive in drives:
            odometer = VisualOdometry(net, drive.sequence.camera, VehicleCalibration(drive.height_m))
            found = []
            for index in drive.frames:
                found.append(odometer.track(drive.sequence[index]).T_prev_curr)
                advance(1)
            truth = drive.truth[drive.frames.start : drive.frames.stop]
            out[drive.label] = motion_figures(np.stack(found[1:]), se3.relative(truth[:-1], truth[1:]))
    return out


def motion_figures(found: NDArray[np.float64], true: NDArray[np.float64]) -> dict[str, float]:
    """Figures of motions (frames, 4, 4) in metres."""
    turn = se3.rotation_angle(np.swapaxes(found[:, :3, :3], 1, 2) @ true[:, :3, :3])
    error, length, way = (np.linalg.norm(T[:, :3, 3], axis=1) for T in (found - true, found, true))
    moving = way > _MOVING_M
    whole = float(way[moving].sum()) or math.nan
    return {
        "shift_percent": 100 * float(error[moving].sum()) / whole,
        "turn_deg": float(np.degrees(turn).mean()),
        "scale_bias_percent": 100 * (float(length[moving].sum()) / whole - 1),
    }


def overall(figures: Figures) -> dict[str, float]:
    """Mean size of each figure over sequences: biases of two signs do not cancel."""
    out = {}
    for key in _FIGURES:
        known = [abs(values[key]) for values in figures.values() if not math.isnan(values[key])]
        out[key] = statistics.fmean(known) if known else math.nan
    return out


def worsened(before: Mapping[str, float], after: Mapping[str, float]) -> list[str]:
    """Which figures got worse, in words; a difference that rounding hides is none."""
    out = []
    for key, (what, unit, digits, least) in _FIGURES.items():
        old, new = before[key], after[key]
        if math.isfinite(old) and not new <= old + least:
            out.append(f"{what} {old:.{digits}f} -> {new:.{digits}f} {unit}")
    return out


# --- the run ------------------------------------------------------------------------------------------------------


def run_finetune(options: FinetuneOptions, out: Path, seed: int, *, processes: int = 1) -> Path:
    """Fine-tune, measure before and after, warn where it got worse; the folder of the new checkpoint.

    Args:
        processes: as `train_weights` has.

    Raises:
        TrainError, SequenceError, CheckpointError, ...: what is missing or wrong with data, checkpoint or ``out``.
    """
    before, after = (options.checkpoint or DEFAULT_CHECKPOINT).resolve(), (out / "finetuned").resolve()
    if before == after:
        raise TrainError(f"--checkpoint {before}: would be replaced by the new weights; name another --out")
    net = _load(before, options.camera_height)
    training, unseen = open_drives(options, net.config.camera_height)
    if not any(moves(drive) for drive in unseen):
        names = ", ".join(drive.label for drive in unseen)
        raise TrainError(
            f"{names}: the camera moves less than {_MOVING_M} m a frame in all of these, so neither way nor scale "
            "can be measured; --validate on others"
        )
    cells = cache_frames(net, training, out / "cells" / "own", seed)
    figures = [measure_frames(net, unseen, "before")]
    config = WeighConfig(steps=options.steps, lr=options.lr, warmup=min(20, options.steps), seed=seed)
    train_weights(net, cells, [], config, out, processes=processes)
    figures.append(measure_frames(net, unseen, "after"))
    notice = _NOTICE.format(data=options.data)
    save_checkpoint(after, net, extra_files={"NOTICE.txt": lambda path: write_atomically(path, notice)})
    _report(figures[0], figures[1], (before, after), out)
    return after


def moves(drive: OwnDrive) -> bool:
    """Whether there is a motion long enough to be measured."""
    positions_xyz = drive.truth[drive.frames.start : drive.frames.stop, :3, 3]
    return bool((np.linalg.norm(np.diff(positions_xyz, axis=0), axis=1) > _MOVING_M).any())


def _load(folder: Path, camera_height: float | None) -> GeometricNet:
    net = load_checkpoint(folder)
    if not isinstance(net, GeometricNet):
        raise TrainError(
            f"--checkpoint {folder}: is of preset {net.config.preset}, but --finetune is for the default network; "
            "go on with others by `convlstm-vo train --init`"
        )
    if camera_height is not None:
        net.config = dataclasses.replace(net.config, camera_height=camera_height)
    net.flow.requires_grad_(False)
    net.mixed = bfloat16_pays()
    return net


def _report(before: Figures, after: Figures, folders: tuple[Path, Path], out: Path) -> None:
    """Figures before and after on the terminal and in ``out/validation.json``; a warning where they are worse."""
    means = overall(before), overall(after)
    rows = {**{name: (before[name], after[name]) for name in before}, "mean size": means}
    print(f"{'Validation':24}" + "".join(f"{f'{what}, {unit}':>28}" for what, unit, _, _ in _FIGURES.values()))
    for name, (old, new) in rows.items():
        pairs = [f"{old[key]:.{digits}f} -> {new[key]:.{digits}f}" for key, (_, _, digits, _) in _FIGURES.items()]
        print(f"{name:24}" + "".join(f"{pair:>28}" for pair in pairs))
    worse = worsened(*means)
    content = {name: {"before": _finite(old), "after": _finite(new)} for name, (old, new) in rows.items()}
    checkpoints = dict(zip(("before", "after"), map(str, folders), strict=True))
    report = {"figures": content, "worse": worse, "checkpoints": checkpoints}
    write_atomically(out / "validation.json", json.dumps(report, indent=2) + "\n")
    if worse:
        print(
            f"Warning: validation got worse ({'; '.join(worse)}). The weights before are in {folders[0]}, the new "
            f"ones in {folders[1]}; try a smaller --lr, fewer --steps or more --sequences, in another --out",
            file=sys.stderr,
        )


def _finite(values: Mapping[str, float]) -> dict[str, float]:
    return {key: value for key, value in values.items() if math.isfinite(value)}
