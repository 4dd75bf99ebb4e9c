"""What each learning option is worth: networks that differ in one option, trained equally long on built-in streets.

python benchmarks/ablation.py --json ablation.json                           # all, 20 minutes each
python benchmarks/ablation.py --json ablation.json --minutes 4 --only baseline norm --seed 1

Every network is one `convlstm-vo train` command on the same drives. How many epochs fit into the minutes is
measured for each variant in a short pilot, so that the learning rate's cosine ends with them; from then on a run is
the same wherever it is repeated. The last weights are measured on drives of other streets, by which nothing was
chosen. Started again, it skips what the JSON file has.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from convlstm_vo.evaluation.evaluate import save_json
from convlstm_vo.geometry.trajectory import read_kitti
from convlstm_vo.training.losses import LossConfig, motion_loss

BASELINE = "--preset tiny --batch-size 4 --time-steps 8 --lr 1.5e-3 --warmup-steps 50 --ema 0.99 --keep-epochs 0"
# What `tiny` would take by default was found here, so a variant spells out the plain way where it does not differ.
PLAIN = {
    "--loss.error": "--loss.error squared --loss.rotation-weight 100",
    "--carry-clips": "--carry-clips 4",
    "--curriculum-epochs": "--curriculum-epochs 0",
}
VARIANTS = {  # {half}: half the epochs
    "baseline": "",
    "norm": "--loss.error norm --loss.rotation-weight 40",
    "learned weights": "--loss.learned-weights",
    "geodesic": "--loss.rotation geodesic",
    "drift": "--loss.drift-steps 2 4 8",
    "rotation matrix": "--model.rotation matrix",
    "curriculum": "--curriculum-epochs {half}",
    "no carried state": "--carry-clips 1",
    "norm, no carried state": "--loss.error norm --loss.rotation-weight 40 --carry-clips 1",
    "norm, curriculum": "--loss.error norm --loss.rotation-weight 40 --curriculum-epochs {half}",
    "all three (tiny)": "--loss.error norm --loss.rotation-weight 40 --carry-clips 1 --curriculum-epochs {half}",
}
PILOT_DRIVES, PILOT_EPOCHS = 2, 4
LENGTHS_M = (50, 100)  # segments of t_rel and r_rel: drives of 24 s are too short for KITTI's 100 to 800 m
SETTINGS = ("minutes", "drives", "held_out", "frames", "world_seed", "threads")


def cli(*words: str) -> None:
    """One command of convlstm-vo, shown before it runs."""
    print("convlstm-vo", *words, flush=True)
    subprocess.run([sys.executable, "-m", "convlstm_vo.cli", *words], check=True)


def render(options: argparse.Namespace) -> tuple[list[str], list[str]]:
    """Names of the training drives and of those held out, rendered if they are not there yet."""
    count = options.drives + options.held_out
    size = f"--frames {options.frames} --sequences {count} --height 188 --width 620 --road mixed"
    cli("simulate", "--out", str(options.out / "data"), *size.split(), "--seed", str(options.world_seed))
    names = [f"{number:02d}" for number in range(count)]
    return names[: options.drives], names[options.drives :]


def train(
    out: Path, variant: str, drives: list[str], epochs: int, options: argparse.Namespace
) -> list[dict[str, Any]]:
    """Train, or go on, for so many epochs; what history.jsonl has of each step."""
    what = f"{BASELINE} {variant_options(variant, epochs)} --epochs {epochs} --seed {options.seed} --resume"
    where = ["--data", str(options.out / "data"), "--out", str(out), "--cache", str(options.out / "cache")]
    cli("train", *where, *what.split(), "--sequences", *drives)
    rows = [json.loads(line) for line in (out / "history.jsonl").read_text().splitlines()]
    return [row for row in rows if row["kind"] == "train"]


def variant_options(variant: str, epochs: int) -> str:
    """Options of a variant, and the plain ones where it says nothing."""
    own = VARIANTS[variant].format(half=epochs // 2)
    return " ".join([own, *(plain for name, plain in PLAIN.items() if name not in own)]).strip()


def pilot(variant: str, drives: list[str], options: argparse.Namespace) -> float:
    """Seconds that an epoch of all drives takes, from a short run on a few, by the fastest step of each epoch."""
    steps = train(options.out / "pilots" / variant, variant, drives[:PILOT_DRIVES], PILOT_EPOCHS, options)
    epochs = [list(rows) for _, rows in itertools.groupby(steps, key=lambda row: row["epoch"])]
    total = sum(len(rows) * min(row["seconds_per_step"] for row in rows) for rows in epochs)
    return total / len(epochs) * len(drives) / PILOT_DRIVES


def folder(options: argparse.Namespace, variant: str) -> Path:
    """Where a variant's runs live."""
    return options.out / f"{variant.replace(' ', '-')}-{options.seed}"


def measure(
    variant: str, epochs: int, drives: list[str], held_out: list[str], options: argparse.Namespace
) -> dict[str, Any]:
    """Train one variant and measure its last weights on the drives held out."""
    out = folder(options, variant)
    steps = train(out, variant, drives, epochs, options)
    paths = ["--data", str(options.out / "data"), "--checkpoint", str(out / "checkpoints" / "last")]
    shown = ["--json", str(out / "results.json"), "--save", str(out), "--lengths", *map(str, LENGTHS_M)]
    cli("evaluate", *paths, *shown, "--sequences", *held_out)
    mean = json.loads((out / "results.json").read_text())["mean"]
    return {
        "variant": variant,
        "seed": options.seed,
        "options": variant_options(variant, epochs),
        "epochs": epochs,
        "updates": len(steps),
        "minutes": sum(row["seconds_per_step"] for row in steps) / 60,
        **{key: mean["network"][key] for key in ("t_rel_percent", "r_rel_deg_per_100m")},
        "loss": held_out_loss(out, held_out, options.out / "data"),
        "baselines": {
            name: values for name, values in mean.items() if isinstance(values, dict) and name != "network"
        },
    }


def held_out_loss(estimates: Path, names: list[str], data: Path) -> float:
    """DeepVO's loss (squared errors of single motions, weight 100), the same for all, whatever they minimised."""
    motions = [[read_kitti(root / f"{name}.txt").motions for name in names] for root in (estimates, data / "poses")]
    estimated, true = (torch.from_numpy(np.concatenate(part)) for part in motions)
    return motion_loss(estimated, true, LossConfig()).item()


def table(runs: list[dict[str, Any]]) -> Table:
    """One row a run, in the order of the variants, and the trivial baselines."""
    shown = Table()
    for heading in ("variant", "seed", "epochs", "updates", "minutes", "t_rel %", "r_rel °/100 m", "loss"):
        shown.add_column(heading, justify="left" if heading == "variant" else "right")
    order = list(VARIANTS)
    for run in sorted(runs, key=lambda run: (order.index(run["variant"]), run["seed"])):
        counts = (str(run[key]) for key in ("seed", "epochs", "updates"))
        figures = (run["t_rel_percent"], run["r_rel_deg_per_100m"])
        shown.add_row(
            run["variant"], *counts, f"{run['minutes']:.1f}", *(f"{x:.2f}" for x in figures), f"{run['loss']:.4f}"
        )
    for name, mean in runs[0]["baselines"].items():
        shown.add_row(
            name.replace("_", " "),
            "",
            "",
            "",
            "",
            f"{mean['t_rel_percent']:.2f}",
            f"{mean['r_rel_deg_per_100m']:.2f}",
        )
    return shown


def finished(options: argparse.Namespace, settings: dict[str, Any]) -> dict[str, Any]:
    """What an earlier call has measured."""
    if not options.json.exists():
        return {"settings": settings, "baseline": BASELINE, "seconds_per_epoch": {}, "runs": []}
    found: dict[str, Any] = json.loads(options.json.read_text())
    if found["settings"] != settings:
        sys.exit(f"{options.json}: made with {found['settings']}, not {settings}; choose another --json and --out")
    return found


def run_pilots(results: dict[str, Any], drives: list[str], options: argparse.Namespace) -> None:
    """Fill in ``seconds_per_epoch``: one variant after the other, so that all meet the machine in the same mood."""
    seconds: dict[str, float] = results["seconds_per_epoch"]
    for variant in (name for name in VARIANTS if name not in seconds):
        seconds[variant] = pilot(variant, drives, options)
        save_json(options.json, results)
    print("Seconds an epoch:", seconds, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=20, help="training time of each network")
    parser.add_argument(
        "--epochs", type=int, help="of each network; measured in a pilot and equally long if left out"
    )
    parser.add_argument("--only", nargs="*", choices=VARIANTS, default=list(VARIANTS), metavar="VARIANT")
    parser.add_argument("--seed", type=int, default=0, help="of weights, order and augmentation")
    parser.add_argument("--drives", type=int, default=14)
    parser.add_argument("--held-out", type=int, default=6)
    parser.add_argument("--frames", type=int, default=240, help="of each drive, at 10 Hz")
    parser.add_argument("--world-seed", type=int, default=300)
    parser.add_argument("--out", type=Path, default=Path("runs/ablation"))
    parser.add_argument("--json", type=Path, default=Path("runs/ablation/ablation.json"))
    options = parser.parse_args()
    options.threads = int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads()))
    results = finished(options, {key: getattr(options, key) for key in SETTINGS})
    drives, held_out = render(options)
    if options.epochs is None:
        run_pilots(results, drives, options)
    for variant in options.only:
        if not any((run["variant"], run["seed"]) == (variant, options.seed) for run in results["runs"]):
            epochs = options.epochs or max(1, round(60 * options.minutes / results["seconds_per_epoch"][variant]))
            results["runs"].append(measure(variant, epochs, drives, held_out, options))
            save_json(options.json, results)
    if results["runs"]:
        Console().print(table(results["runs"]))


if __name__ == "__main__":
    main()
