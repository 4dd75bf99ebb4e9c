"""The whole way in minutes: built-in streets, a network trained on them, and a drive that it has never seen."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from convlstm_vo.evaluation.report import trajectory_picture
from convlstm_vo.evaluation.run import EvaluateOptions, run_evaluation
from convlstm_vo.geometry.trajectory import read_kitti
from convlstm_vo.training.config import TrainConfig, TrainError, preset_config
from convlstm_vo.training.run import run_training
from convlstm_vo.world import SimulateConfig, simulate


@dataclasses.dataclass(frozen=True)
class DemoOptions:
    """Simulate, train, evaluate. Started again, it goes on where it was stopped."""

    out: Path = Path("demo")
    """Folder for drives, checkpoints and the report."""
    drives: int = 14
    """Training drives; one more is validated on, and another one is kept unseen."""
    frames: int = 240
    """Frames a drive, at 10 Hz."""
    epochs: int = 16
    """Times that each frame is shown."""
    seed: int = 14
    """Of the streets and the network. With the default the unseen drive has a stop and several turns."""

    def __post_init__(self) -> None:
        if self.drives < 1:
            raise TrainError(f"--drives {self.drives}: needs at least one training drive")
        if self.epochs < 1:
            raise TrainError(f"--epochs {self.epochs}: must be at least 1")


def run_demo(options: DemoOptions) -> Path:
    """All three steps; the path of the report."""
    data, out = options.out / "data", options.out / "run"
    print(f"1/3  {options.drives + 2} drives through built-in streets")
    simulate(demo_drives(options))
    names = sorted(path.name for path in (data / "sequences").iterdir())
    *training, validation, unseen = names
    print(f"2/3  training `tiny` on {len(training)} of them")
    checkpoint = run_training(demo_training(options, tuple(training), validation))
    print(f"3/3  evaluating on {unseen}, which neither network has seen: `tiny`, then the one of the package")
    trained = EvaluateOptions(
        data=data, sequences=(unseen,), checkpoint=checkpoint, json=options.out / "tiny" / "results.json", save=out
    )
    run_evaluation(trained, "convlstm-vo demo (tiny)")
    shipped = EvaluateOptions(data=data, sequences=(unseen,), json=options.out / "results.json", save=options.out)
    report = run_evaluation(shipped, "convlstm-vo demo")
    paths = {
        "ground_truth": data / "poses" / f"{unseen}.txt",
        "network": options.out / f"{unseen}.txt",
        "tiny": out / f"{unseen}.txt",
    }
    trajectory_picture(options.out / "trajectory.png", {name: read_kitti(path) for name, path in paths.items()})
    return report


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
    return dataclasses.replace(
        preset_config("tiny"),
        data=options.out / "data",
        out=options.out / "run",
        sequences=names,
        validate=(validation,),
        batch_size=8,
        time_steps=4,
        epochs=options.epochs,
        curriculum_epochs=options.epochs // 2,
        keep_epochs=0,
        cache=options.out / "cache",
        resume=True,
        seed=options.seed,
    )
