"""The whole way in minutes: built-in streets, a network trained on them, and a drive that it has never seen."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from convlstm_vo.evaluation.run import EvaluateOptions, run_evaluation
from convlstm_vo.models.config import preset
from convlstm_vo.training.config import TrainConfig
from convlstm_vo.training.losses import LossConfig
from convlstm_vo.training.run import run_training
from convlstm_vo.world import SimulateConfig, simulate


@dataclasses.dataclass(frozen=True)
class DemoOptions:
    """Simulate, train, evaluate. Started again, it goes on where it was stopped."""

    out: Path = Path("demo")
    """Folder for drives, checkpoints and the report."""
    drives: int = 16
    """Training drives; one more is validated on, and another one is kept unseen."""
    frames: int = 160
    """Frames a drive, at 10 Hz."""
    epochs: int = 12
    """Times that each frame is shown."""
    seed: int = 0
    """Of the streets and the network."""


def run_demo(options: DemoOptions) -> Path:
    """All three steps; the path of the report."""
    data, out = options.out / "data", options.out / "run"
    print(f"1/3  {options.drives + 2} drives through built-in streets")
    simulate(demo_drives(options))
    names = sorted(path.name for path in (data / "sequences").iterdir())
    *training, validation, unseen = names
    print(f"2/3  training `tiny` on {len(training)} of them")
    checkpoint = run_training(demo_training(options, tuple(training), validation))
    print(f"3/3  evaluating on {unseen}, which it has never seen")
    measured = EvaluateOptions(
        data=data, sequences=(unseen,), checkpoint=checkpoint, json=options.out / "results.json", save=out
    )
    return run_evaluation(measured, "convlstm-vo demo")


def demo_drives(options: DemoOptions) -> SimulateConfig:
    """Town drives in KITTI's camera at half its size."""
    return SimulateConfig(
        out=options.out / "data",
        frames=options.frames,
        sequences=options.drives + 2,
        seed=options.seed,
        height=188,
        width=620,
        road="town",
    )


def demo_training(options: DemoOptions, names: tuple[str, ...], validation: str) -> TrainConfig:
    """A short, steep training of the smallest preset."""
    return TrainConfig(
        data=options.out / "data",
        out=options.out / "run",
        sequences=names,
        validate=(validation,),
        model=preset("tiny"),
        batch_size=8,
        time_steps=5,
        epochs=options.epochs,
        lr=1e-3,
        warmup_steps=50,
        ema=0.99,
        loss=LossConfig(rotation_weight=2000.0),  # so that half a degree weighs as much as 40 cm
        keep_epochs=0,
        cache=options.out / "cache",
        resume=True,
        seed=options.seed,
    )
