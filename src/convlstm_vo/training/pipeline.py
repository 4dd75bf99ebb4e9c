"""Training the default network from nothing but seeds: streets, flow, cached cells, weights, one checkpoint."""

from __future__ import annotations

import dataclasses
import functools
import os
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro

from convlstm_vo.models.checkpoint import build, save_checkpoint
from convlstm_vo.models.config import preset
from convlstm_vo.models.geometric import GeometricNet
from convlstm_vo.progress import progress
from convlstm_vo.training.cell_drives import cache_cells
from convlstm_vo.training.config import TrainError
from convlstm_vo.training.finetune import FinetuneOptions, run_finetune
from convlstm_vo.training.flow import FlowConfig, train_flow
from convlstm_vo.training.geometric import WeighConfig, train_weights
from convlstm_vo.training.rendered import RenderedDrive, open_drive, render_drives

# Far from the streets of `simulate` and from each other.
_UNSEEN_SEED, _SEED = 9_000_000, 2_000_000
_HEAVY_SEED, _LEANING_SEED, _HILLY_SEED, _NARROW_SEED = 2_500_000, 2_700_000, 2_800_000, 2_900_000
_LEAST_FRAMES = 20  # of a drive, for clips of 8 motions
_MAY_BE_ZERO = ("seed", "heavy_drives", "leaning_drives", "hilly_drives", "narrow_drives", "bonnet_drives")
_OF_BOTH = ("out", "seed", "threads", "finetune")  # options; the others are for training from nothing


@dataclasses.dataclass(frozen=True)
class GeometricOptions:
    """Train the default network from nothing, or fine-tune it on your own frames (--finetune DATA); started again,
    it goes on where it was stopped."""

    out: Path = Path("runs/geometric")
    """Folder for drives (10 GB), their cells (1.4 GB), logs and the checkpoint."""
    drives: int = 180
    """Rendered drives to learn from, flow and weights alike."""
    unseen: int = 24
    """Rendered drives to measure on."""
    frames: int = 80
    """Frames of each drive."""
    flow_steps: int = 28000
    """Updates of the flow network."""
    flow_batch: int = 4
    """Crops in each of these updates; a GPU takes 48 as fast."""
    heavy_drives: int = 40
    """More of them, in heavy traffic: what moves with the camera must not be taken for the horizon."""
    heavy_views: int = 2
    """How often the weights see those, each time with other frames dropped and spoilt. What learns of bonnets to
    doubt the lower edge of the image doubts the road before a lorry too, unless it sees enough lorries."""
    leaning_drives: int = 100
    """More of them, on roads that are not level across: their two sides are not one plane."""
    hilly_drives: int = 0
    """More of them, on roads that rise and fall as KITTI's do and are not level across either. The shipped weights
    had none; with 100 they are better on such roads and worse in heavy traffic (docs/history.md)."""
    narrow_drives: int = 0
    """More of them, for the weights alone, in lanes between kerbs and not level across. The shipped weights had
    none; with 60 they are better there and worse in heavy traffic (docs/history.md)."""
    bonnet_drives: int = 40
    """So many of the usual ones are seen once more, by the weights alone, over the car's own bonnet, dirty or
    polished: one that mirrors the street must not be taken for road."""
    weigh_steps: int = 2200
    """Updates of the weights."""
    seed: int = 0
    """Of the networks; the streets are always the same."""
    height: int = 192
    """Rows of a frame."""
    width: int = 640
    """Columns of a frame."""
    device: Literal["auto", "cpu"] = "auto"
    """Where the flow is trained; auto: on a GPU where there is one. The rest is small and runs on the CPU."""
    threads: int = 2
    """Where there are as many cores: threads for the flow, of which two are 1.7 times as fast as one, and processes
    for the weights (1.4 times). Weights depend on it as on a seed, so go on with as many as were begun with."""
    finetune: Annotated[FinetuneOptions, tyro.conf.arg(name="")] = dataclasses.field(
        default_factory=FinetuneOptions
    )

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if self.finetune.data and field.name not in _OF_BOTH and value != field.default:
                raise TrainError(
                    f"--{field.name.replace('_', '-')}: is for training from nothing; leave it out with --finetune"
                )
            least = 0 if field.name in _MAY_BE_ZERO else 1
            if isinstance(value, int) and value < least:
                raise TrainError(f"--{field.name.replace('_', '-')} {value}: must be at least {least}")
        if self.frames < _LEAST_FRAMES:
            raise TrainError(f"--frames {self.frames}: must be at least {_LEAST_FRAMES}, of which some are dropped")
        if self.height % 8 or self.width % 8:
            raise TrainError(f"--height {self.height} --width {self.width}: must be divisible by 8")


def run_geometric(options: GeometricOptions) -> Path:
    """All stages; the folder of the checkpoint."""
    torch.set_num_threads(min(options.threads, os.cpu_count() or 1))
    if options.finetune.data is not None:
        return run_finetune(options.finetune, options.out, options.seed, processes=torch.get_num_threads())
    drives = _drives(options, "train", _SEED, options.drives)
    unseen = _drives(options, "unseen", _UNSEEN_SEED, options.unseen)
    heavy = _drives(options, "heavy", _HEAVY_SEED, options.heavy_drives, traffic="heavy")
    leaning = _drives(options, "leaning", _LEANING_SEED, options.leaning_drives, cross_slope=True)
    hilly = _drives(options, "hilly", _HILLY_SEED, options.hilly_drives, cross_slope=True, hilly=True)
    narrow = _drives(options, "narrow", _NARROW_SEED, options.narrow_drives, cross_slope=True, narrow=True)
    flow_config = FlowConfig(steps=options.flow_steps, batch_size=options.flow_batch, seed=options.seed)
    device = "cuda" if options.device == "auto" and torch.cuda.is_available() else "cpu"
    chosen = [*drives, *heavy, *leaning, *hilly]
    flow = train_flow(flow_config, chosen, unseen, options.out, device)
    flow.eval()
    net = build(preset("geometric", image_height=options.height, image_width=options.width), seed=options.seed)
    assert isinstance(net, GeometricNet)
    net.flow.load_state_dict(flow.state_dict())
    net.flow.requires_grad_(False)
    folder = options.out / "cells"
    count = min(options.bonnet_drives, len(drives))
    # Spread over all of them, which come in the order of their seeds.
    behind = [drives[k * len(drives) // count] for k in range(count)]
    again = range(1, options.heavy_views)
    total = len(chosen) + len(again) * len(heavy) + len(narrow) + count + len(unseen)
    with progress("Flow of drives", total) as advance:
        cache = functools.partial(cache_cells, flow, workers=os.cpu_count() or 1, advance=advance)
        cells = cache(chosen, folder / "train", 0)
        for view in again:
            cells += cache(heavy, folder / f"heavy-{view}", view)
        cells += cache(narrow, folder / "narrow", 0)
        cells += cache(behind, folder / "bonnet", 0, bonnet=True)
        apart = cache(unseen, folder / "unseen", 0, plain=True)
    config = WeighConfig(steps=options.weigh_steps, seed=options.seed)
    train_weights(net, cells, apart, config, options.out, processes=torch.get_num_threads())
    save_checkpoint(options.out / "checkpoint", net)
    return options.out / "checkpoint"


def _drives(options: GeometricOptions, name: str, first: int, count: int, **world: Any) -> list[RenderedDrive]:
    if not count:
        return []
    with progress(f"Streets ({name})", count, unit="") as advance:  # minutes each: a rate would be 0
        paths = render_drives(
            options.out / "drives" / name,
            range(first, first + count),
            frames=options.frames,
            height=options.height,
            width=options.width,
            workers=os.cpu_count() or 1,
            advance=advance,
            **world,
        )
    return [open_drive(path) for path in paths]
