"""The networks of the field and `tiny`, trained on two real clips and measured on two others.

Needs the KITTI clips in ../shared/kitti (or --data). Two clips of 300 frames in all teach no network to generalise:
the point is that real frames train, and how far so little data takes each of them.

    python benchmarks/real_input.py --json real_input.json            # everything, an hour or so on 2 cores
    python benchmarks/real_input.py --only tiny
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

CASES = {
    "ascend": "--preset ascend --model.image-height 192 --model.image-width 640 --batch-size 2 --time-steps 4 "
    "--epochs 40 --lr 1e-4 --warmup-steps 50 --ema 0.99 --augment.reverse 0.1",
    "ascend-full-size": "--preset ascend --batch-size 2 --time-steps 4 --epochs 1 --lr 1e-4 --warmup-steps 10 "
    "--ema 0.9",
    "tiny": "--preset tiny --batch-size 4 --time-steps 4 --epochs 60 --lr 1.5e-3 --warmup-steps 50 --ema 0.99 "
    "--loss.error squared --loss.rotation-weight 1000",
}
DATA = Path(__file__).resolve().parents[2] / "shared" / "kitti"


def run(name: str, options: str, data: Path, out: Path) -> dict[str, object]:
    """Train (or go on with) one network and measure its last weights."""
    command = [sys.executable, "-m", "convlstm_vo.cli"]
    training = ["train", "--data", str(data), "--sequences", "0005", "0013", "--validate", "06", "01", "--resume"]
    subprocess.run([*command, *training, *options.split(), "--out", str(out / name)], check=True)
    results = out / name / "results.json"
    checkpoint = str(out / name / "checkpoints" / "last")
    measuring = ["evaluate", "--data", str(data), "--sequences", "06", "01", "--checkpoint", checkpoint]
    subprocess.run([*command, *measuring, "--json", str(results)], check=True)
    return {"losses": losses(out / name), "sequences": json.loads(results.read_text())["sequences"]}


def losses(folder: Path) -> dict[str, float]:
    """Training loss at the first step, and its mean over the first and the last epoch."""
    rows = [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]
    train = [row for row in rows if row["kind"] == "train"]
    last = max(row["epoch"] for row in train)
    means = {
        epoch: sum(row["loss"] for row in train if row["epoch"] == epoch)
        / sum(row["epoch"] == epoch for row in train)
        for epoch in (0, last)
    }
    return {
        "first_step": train[0]["loss"],
        "last_step": train[-1]["loss"],
        "first_epoch": means[0],
        "last_epoch": means[last],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--out", type=Path, default=Path("runs/real_input"))
    parser.add_argument("--only", choices=CASES)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if not options.data.is_dir():
        print(f"{options.data} is missing: nothing measured")
        return
    chosen = {options.only: CASES[options.only]} if options.only else CASES
    results = {name: run(name, case, options.data, options.out) for name, case in chosen.items()}
    for name, result in results.items():
        print(f"{name:18}", {key: round(value, 4) for key, value in result["losses"].items()})  # type: ignore[attr-defined]
    if options.json:
        options.json.write_text(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
