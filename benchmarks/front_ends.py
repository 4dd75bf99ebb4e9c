"""What the learned flow is worth: the default network with other front ends, all after them unchanged.

python benchmarks/front_ends.py --json front_ends.json

Front ends: plain DIS (OpenCV, medium); plane-guided DIS, which in the road corridor starts at the finest scale from
the flow that the last motion and the road plane predict (`convlstm_vo/evaluation/dis.py`); the learned flow; both,
i.e. learned and guided flow averaged with their inverse variances. Guided, learned and both are given the same
prediction. What DIS lacks, a standard deviation of each cell, is fitted here by maximum likelihood on rendered
training streets: the logarithm of its scale is a sum of clues (photometric residual, contrast, roughness, the flow
there and back, road corridor). The average gets one factor from the same streets: errors are not independent.

The table has for each of them
- the end-point error in pixels at half size, mean / median, on the road, off it (static and in view, no sky), and
  off it where depth has no edges ("smooth": at one a cell has more than one true flow), on unseen streets seen by
  KITTI's camera and on streets of random camera, height, look and rate; exact flow from depth and poses, no change
  of light;
- the whole, closed loop, as in `zero_shot.py`: t_rel % / r_rel degrees / 100 m (scale bias %) on KITTI clips and on
  unseen streets (means over drives). The weights of network and solver were trained on the learned flow alone, so
  the others are at a disadvantage here beyond their errors;
- milliseconds of CPU a frame of the front end alone, median over all pairs, one thread; for DIS with its standard
  deviations, which need a second, backward DIS.

About 5 minutes on one core. `--rendered DIR` takes the random streets from the folder of unseen drives that
`convlstm-vo train-geometric` leaves; without it they are rendered in memory, with the same figures.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from zero_shot import CLIPS, FIRST_SEED, ROADS, measure, unseen_streets

from convlstm_vo.environment import bfloat16_pays
from convlstm_vo.evaluation.dis import Expected, at_cells, dis_flow, guided_dis_flow, road_corridor
from convlstm_vo.geometry.camera import Camera
from convlstm_vo.geometry.trajectory import Trajectory
from convlstm_vo.models.checkpoint import DEFAULT_CHECKPOINT, load_checkpoint
from convlstm_vo.models.flow import STRIDE, FlowField, normalise_contrast, warp, window
from convlstm_vo.models.geometric import Cells, GeometricNet, View, choose_cells, expected_flow
from convlstm_vo.models.mounting import Memory, looking_ahead, turned_points
from convlstm_vo.models.scene import cell_rays, road_slopes
from convlstm_vo.odometer import estimate_trajectory, working_size
from convlstm_vo.progress import progress
from convlstm_vo.sequences.base import Frame, Sequence
from convlstm_vo.sequences.kitti import KittiSequence
from convlstm_vo.training.flow_data import good_pair, of_cells
from convlstm_vo.training.rendered import RenderedDrive, in_memory, open_drive, random_sequence
from convlstm_vo.world import KITTI_CAMERA, WorldSequence

HALF = (192, 640)  # height, width of random streets
FIRST_TRAINING, FIRST_RANDOM = 2_000_000, 9_000_000  # seeds
SMOOTH_PX = (
    1.0  # range of the true flow (less the predicted one) in 12x12 pixels, of cells away from edges of depth
)
PARTS = ("road", "off", "smooth")
DRIVE_FRAMES = 80  # of rendered drives: the length is part of what a seed makes
FrontEnd = Callable[[View, Expected], FlowField]


class FrontEndNet(GeometricNet):
    """The default network with another front end; solver, weigher, priors and their weights are its own."""

    def __init__(self, net: GeometricNet, front_end: FrontEnd) -> None:
        super().__init__(net.config)
        self.load_state_dict(net.state_dict())
        self.front_end = front_end

    def look(self, view: View, memory: Memory) -> Cells:
        rays = cell_rays(view.intrinsics, view.prev.shape[-2] // STRIDE, view.prev.shape[-1] // STRIDE)
        predicted = expected_flow(rays, view.intrinsics, memory)
        corridor = road_corridor(turned_points(rays, looking_ahead(memory)), memory.mounting)
        expected = Expected(predicted.clamp(-1000.0, 1000.0), corridor)
        cells = choose_cells(rays, self.front_end(view, expected), view.intrinsics, view.prev)
        return cells.without(view.fixed).turned(looking_ahead(memory))


# --- front ends ---------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Dis:
    """DIS with the scale of its errors; ``weights`` of `clues`, (6,), from `fit_scale`."""

    guided: bool
    weights: Tensor = dataclasses.field(default_factory=lambda: torch.zeros(6))

    def __call__(self, view: View, expected: Expected) -> FlowField:
        flow, seen = self.flow_and_clues(view, expected)
        log_scale = torch.einsum("c,bcij->bij", self.weights, seen)[:, None]
        return FlowField(flow, log_scale.clamp(-5.0, 4.0), ())  # the range of the learned one

    def flow_and_clues(self, view: View, expected: Expected) -> tuple[Tensor, Tensor]:
        """Flow (1, 2, rows, columns) and what tells of its error, (1, 6, rows, columns)."""
        flow = dis_flow(view)
        if self.guided:
            flow = guided_dis_flow(view, expected, flow)
        back = dis_flow(View(view.curr, view.prev, view.intrinsics))
        return at_cells(flow), clues(view, expected, flow, back)


@dataclasses.dataclass(frozen=True)
class Both:
    """Two front ends, averaged with their inverse variances; ``log_factor``: their errors are not independent."""

    one: FrontEnd
    other: FrontEnd
    log_factor: float = 0.0

    def __call__(self, view: View, expected: Expected) -> FlowField:
        one, other = self.one(view, expected), self.other(view, expected)
        a, b = (-2 * one.log_scale).exp(), (-2 * other.log_scale).exp()
        return FlowField(
            (a * one.flow + b * other.flow) / (a + b), self.log_factor - 0.5 * (a + b).log(), one.stages
        )


def clues(view: View, expected: Expected, flow: Tensor, back: Tensor) -> Tensor:
    """What tells how wrong a flow may be, (1, 6, rows, columns): 1, four logarithms, and the road corridor.

    Args:
        flow, back: from the previous frame to the current one and the other way round, (1, 2, height, width).
    """
    here, there = normalise_contrast(torch.cat([view.prev, view.curr]).float()).chunk(2)
    error = warp(there, flow) - here
    gx = F.pad((here[..., 2:] - here[..., :-2]) / 2, (1, 1))
    gy = F.pad((here[..., 2:, :] - here[..., :-2, :]) / 2, (0, 0, 1, 1))
    xx, xy, yy, residual = window(torch.cat([gx * gx, gx * gy, gy * gy, error * error], 1)).split(1, 1)
    contrast = (xx + yy) / 2 - ((xx - yy).square() / 4 + xy * xy).sqrt()  # in the poorer direction
    cells = at_cells(flow)
    mean = F.avg_pool2d(F.pad(cells, (2, 2, 2, 2), mode="replicate"), 5, 1)
    rough = (cells - mean).square().sum(1, keepdim=True)
    around = at_cells((flow + warp(back, flow)).norm(dim=1, keepdim=True))
    logs = [
        (residual + 1e-4).log() / 2,
        -(contrast.clamp_min(0) + 1e-4).log() / 2,
        (rough + 1e-4).log() / 2,
        around.clamp(0.01, 30).log(),
    ]
    return torch.cat([torch.ones_like(residual), *logs, expected.corridor[None, None].float()], 1)


def fit_scale(seen: Tensor, errors: Tensor) -> Tensor:
    """Weights (clues,) whose sum is the logarithm of the errors' Laplace scale, by maximum likelihood (Newton).

    Args:
        seen: (clues, cells). errors: (cells,), |x| + |y| as in `flow_loss`.
    """
    seen, errors = seen.double(), errors.clamp_max(60).double()
    weights = seen.new_zeros(len(seen))
    for _ in range(100):
        z = errors * torch.exp(-(weights @ seen).clamp(-6.0, 6.0))
        hessian = (seen * z) @ seen.T / len(errors) + 1e-6 * torch.eye(len(seen), dtype=seen.dtype)
        step = torch.linalg.solve(hessian, (seen * (2 - z)).mean(1))
        weights = weights - step * min(1.0, 1.0 / (float(step.norm()) + 1e-9))
    return weights.float()


def front_ends(net: GeometricNet, training: list[Pair]) -> dict[str, FrontEnd]:
    """All that are compared, calibrated on pairs of training streets."""

    def learned(view: View, expected: Expected) -> FlowField:
        return net.measure(view.prev, view.curr, expected.flow)

    plain, guided = (calibrated(Dis(guided), training) for guided in (False, True))
    both, errors = Both(learned, guided), []
    for pair in training:
        field = both(pair.view, pair.expected)
        errors.append(((field.flow - pair.target).abs().sum(1) * (-field.log_scale[:, 0]).exp())[pair.known])
    factor = fit_scale(torch.ones(1, sum(map(len, errors))), torch.cat(errors))
    both = dataclasses.replace(both, log_factor=float(factor))
    return {"plain DIS": plain, "plane-guided DIS": guided, "learned": learned, "both": both}


def calibrated(dis: Dis, training: list[Pair]) -> Dis:
    """With the weights that fit training streets."""
    seen, errors = [], []
    for pair in training:
        flow, tells = dis.flow_and_clues(pair.view, pair.expected)
        seen.append(tells[0][:, pair.known[0]])
        errors.append((flow - pair.target).abs().sum(1)[pair.known])
    return dataclasses.replace(dis, weights=fit_scale(torch.cat(seen, 1), torch.cat(errors)))


# --- streets ------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Pair:
    """Two frames with the truth: target (1, 2, rows, columns) pixels; known and road (1, rows, columns) bool."""

    view: View
    expected: Expected
    target: Tensor
    known: Tensor
    road: Tensor


def pair_of(drive: RenderedDrive, index: int, number: int) -> Pair:
    """Frames index and index + 1, with a prediction as good as the last motion's; its noise follows from number."""
    batch = good_pair(drive, index, index + 1, number)
    intrinsics = torch.tensor(drive.intrinsics[None], dtype=torch.float32)
    rays = cell_rays(intrinsics, *batch.target.shape[-2:])
    slopes = road_slopes(torch.tensor(drive.road_plane[index : index + 1, :3], dtype=torch.float32))
    sky = torch.from_numpy(of_cells(drive.shares[index]) == 0)
    known = batch.valid & ~sky & (batch.target.norm(dim=1) > 0)
    expected = Expected(batch.predicted, road_corridor(rays, slopes))
    return Pair(View(batch.prev, batch.curr, intrinsics), expected, batch.target, known, batch.road)


def rendered_pairs(sequence: WorldSequence, count: int, advance: Callable[[int], None]) -> Iterator[Pair]:
    """Pairs spread over a drive, of which nothing else is rendered."""
    for index in spread(len(sequence), count):
        yield pair_of(in_memory(sequence, [index, index + 1]), 0, sequence.seed * 1000 + index)
        advance(1)


def spread(frames: int, count: int) -> list[int]:
    """First frames of count pairs."""
    return [int(index) for index in np.linspace(0, frames - 2, count + 2)[1:-1]]


def random_pairs(first: int, drives: int, count: int) -> list[Pair]:
    """Pairs of streets of random camera and look, by their seeds."""
    sequences = [random_sequence(first + k, DRIVE_FRAMES, height=HALF[0], width=HALF[1]) for k in range(drives)]
    with progress(f"Rendering {first}", drives * count, unit="pairs") as advance:
        return [pair for sequence in sequences for pair in rendered_pairs(sequence, count, advance)]


def opened_pairs(folder: Path, drives: int, count: int) -> list[Pair]:
    """Pairs of the first drives of a folder."""
    paths = sorted(folder.glob("[0-9]*"))[:drives]
    return [
        pair_of(drive, index, int(drive.name) * 1000 + index)
        for drive in map(open_drive, paths)
        for index in spread(len(drive), count)
    ]


def street_pairs(drives: int, count: int) -> list[Pair]:
    """Pairs of the streets of `zero_shot.py`, rendered at the size that the odometer works at."""
    height, width = working_size(KITTI_CAMERA)
    camera = KITTI_CAMERA.resized(height=height, width=width)
    sequences = [
        WorldSequence(FIRST_SEED + k, frames=DRIVE_FRAMES, kind=ROADS[(FIRST_SEED + k) % 3], camera=camera)
        for k in range(drives)
    ]
    with progress("Rendering streets", drives * count, unit="pairs") as advance:
        return [pair for sequence in sequences for pair in rendered_pairs(sequence, count, advance)]


@dataclasses.dataclass(frozen=True)
class Held:
    """A drive whose frames are rendered once, for all front ends."""

    name: str
    camera: Camera
    trajectory: Trajectory
    frames: list[Frame]

    def __iter__(self) -> Iterator[Frame]:
        return iter(self.frames)

    def __len__(self) -> int:
        return len(self.frames)

    def __getitem__(self, index: int) -> Frame:
        return self.frames[index]


def held_streets(count: int, frames: int) -> list[Sequence]:
    """The first unseen streets of `zero_shot.py`."""
    out: list[Sequence] = []
    with progress("Rendering drives", count * frames) as advance:
        for drive in unseen_streets(count, frames):
            kept = []
            for frame in drive:
                kept.append(frame)
                advance(1)
            assert drive.trajectory is not None
            out.append(Held(drive.name, drive.camera, drive.trajectory, kept))
    return out


# --- measures -----------------------------------------------------------------------------------------------------


def end_point_errors(
    ends: dict[str, FrontEnd], pairs: list[Pair], milliseconds: dict[str, list[float]], what: str, count: int
) -> dict[str, dict[str, Any]]:
    """Mean and median error in pixels on the road and off it, and the same of error over scale, by front end.

    Also the median off the road of each street, of which there are ``count`` pairs. Front ends take turns at each
    pair, and CPU time is counted: other jobs on the machine hit all of them alike.
    """
    names = ("road", "off", "smooth", "scaled")
    parts: dict[str, dict[str, list[Tensor]]] = {name: {part: [] for part in names} for name in ends}
    with progress(what, len(pairs), unit="pairs") as advance:
        for pair in pairs:
            off = pair.known & ~pair.road
            smooth = off & (variation(pair.target - pair.expected.flow) < SMOOTH_PX)
            for name, end in ends.items():
                started = time.process_time()
                field = end(pair.view, pair.expected)
                milliseconds[name].append(1000 * (time.process_time() - started))
                error = (field.flow - pair.target).norm(dim=1)
                parts[name]["road"].append(error[pair.known & pair.road])
                parts[name]["off"].append(error[off])
                parts[name]["smooth"].append(error[smooth])
                parts[name]["scaled"].append((error * (-field.log_scale[:, 0]).exp())[pair.known])
            advance(1)
    return {
        name: statistics({part: torch.cat(v) for part, v in of.items()}) | {"off_by_street": by_street(of, count)}
        for name, of in parts.items()
    }


def by_street(errors: dict[str, list[Tensor]], count: int) -> list[float]:
    """Median error off the road of each street, of its ``count`` pairs."""
    off = errors["off"]
    return [torch.cat(off[k : k + count]).median().item() for k in range(0, len(off), count)]


def variation(flow: Tensor) -> Tensor:
    """Range of a flow (batch, 2, rows, columns) in the 3x3 cells around each, in pixels: (batch, rows, columns)."""
    return (F.max_pool2d(flow, 3, 1, 1) + F.max_pool2d(-flow, 3, 1, 1)).norm(dim=1)


def statistics(values: dict[str, Tensor]) -> dict[str, float]:
    """Mean and median of each."""
    means = {f"{name}_mean": value.mean().item() for name, value in values.items()}
    return means | {f"{name}_median": value.median().item() for name, value in values.items()}


def whole(net: GeometricNet, sequences: list[Sequence], what: str) -> dict[str, list[float]]:
    """t_rel, r_rel and scale bias by sequence."""
    with progress(what, sum(map(len, sequences))) as advance:
        return measure(sequences, lambda s: estimate_trajectory(net, s, advance), CLIPS)


def line(name: str, result: dict) -> str:
    """One row of the table."""
    cells = [name]
    for where in ("streets", "random"):
        row = result[where]
        cells += [f"{row[f'{part}_mean']:.2f} / {row[f'{part}_median']:.3f}" for part in PARTS]
    cells += [f"{t:.2f} / {r:.2f} ({bias:+.1f})" for t, r, bias in result["whole"].values()]
    return "| " + " | ".join([*cells, f"{result['ms']:.1f}"]) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kitti", type=Path, default=Path(__file__).parents[2] / "shared" / "kitti")
    parser.add_argument("--checkpoint", type=Path, default=DEFAULT_CHECKPOINT)
    parser.add_argument("--rendered", type=Path, help="folder of random streets; rendered in memory without")
    parser.add_argument("--streets", type=int, default=12, help="streets of each set to measure flow on")
    parser.add_argument("--pairs", type=int, default=4, help="pairs of frames a street")
    parser.add_argument("--training", type=int, default=12, help="streets to calibrate on")
    parser.add_argument("--drives", type=int, default=3, help="unseen streets for the whole")
    parser.add_argument("--frames", type=int, default=80, help="of each of them")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    net = load_checkpoint(options.checkpoint)
    assert isinstance(net, GeometricNet)
    net.mixed = bfloat16_pays()  # as the odometer does
    net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    sets = {
        "streets": street_pairs(options.streets, options.pairs),
        "random": opened_pairs(options.rendered, options.streets, options.pairs)
        if options.rendered
        else random_pairs(FIRST_RANDOM, options.streets, options.pairs),
    }
    clips = [KittiSequence(options.kitti, name) for name in ("06", "01")] if options.kitti.is_dir() else []
    drives = held_streets(options.drives, options.frames)
    with torch.inference_mode():
        ends = front_ends(net, random_pairs(FIRST_TRAINING, options.training, options.pairs))
        milliseconds: dict[str, list[float]] = {name: [] for name in ends}
        errors = {
            key: end_point_errors(ends, pairs, milliseconds, f"Flow, {key}", options.pairs)
            for key, pairs in sets.items()
        }
        results: dict[str, dict] = {}
        for name, end in ends.items():
            rows = whole(FrontEndNet(net, end), [*clips, *drives], f"Drives, {name}")
            streets = [rows.pop(drive.name) for drive in drives]
            if streets:
                rows["unseen streets"] = np.mean(streets, 0).tolist()
            results[name] = {key: errors[key][name] for key in sets} | {
                "whole": rows,
                "each street": streets,
                "ms": float(np.median(milliseconds[name])),
            }
    columns = ["front end", *(f"{s}, {p}" for s in sets for p in PARTS), *rows, "ms"]
    print("| " + " | ".join(columns) + " |\n" + "|---" * len(columns) + "|")
    for name, result in results.items():
        print(line(name, result))
    guided, learned = (np.array(results[k]["streets"]["off_by_street"]) for k in ("plane-guided DIS", "learned"))
    low, middle, high = np.nanquantile(learned / guided, [0, 0.5, 1])
    print(f"off the road, street by street: learned / guided DIS {middle:.2f} (median), {low:.2f} to {high:.2f}")
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
