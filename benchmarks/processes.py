"""Pairs a second of `convlstm-vo train` by two gloo processes against one, through torchrun, preset tiny.

python benchmarks/processes.py --json processes.json

One thread a process, and for comparison one process of two threads. The ways take turns, so that they share the
machine's moods; each is taken by the median of all its steps.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from training import write_tree

TIME_STEPS = 5
WAYS = {"1 process, 1 thread": (1, 1), "1 process, 2 threads": (1, 2), "2 processes, 1 thread each": (2, 1)}


def train(tree: Path, out: Path, options: argparse.Namespace, processes: int, threads: int) -> list[float]:
    """Seconds of each step, the first of each epoch excluded."""
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    where = ["--data", tree, "--out", out, "--cache", tree / "cache", "--device", "cpu", "--precision", "fp32"]
    work = ["--batch-size", options.batch_size, "--time-steps", TIME_STEPS, "--epochs", options.epochs]
    command = [*launch, "-m", "convlstm_vo.cli", "train", "--preset", "tiny", *map(str, [*where, *work])]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    subprocess.run([sys.executable, *command], check=True, env=environment, stdout=subprocess.DEVNULL)
    rows = [json.loads(line) for line in (out / "history.jsonl").read_text().splitlines()]
    steps = [row["seconds_per_step"] for row in rows if row["kind"] == "train"]
    return [seconds for number, seconds in enumerate(steps) if number % options.steps]


def measure(options: argparse.Namespace) -> dict[str, float]:
    """Pairs a second of each way, and how the processes compare."""
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    with tempfile.TemporaryDirectory() as folder:
        frames = options.steps * options.batch_size * TIME_STEPS + 1
        tree = write_tree(Path(folder) / "tree", frames)
        for turn in range(options.rounds):
            for number, (way, (processes, threads)) in enumerate(WAYS.items()):
                out = Path(folder) / f"run-{turn}-{number}"
                seconds[way] += train(tree, out, options, processes, threads)
    pairs = options.batch_size * TIME_STEPS
    rates = {way: pairs / statistics.median(steps) for way, steps in seconds.items()}
    one, wide, two = rates.values()
    best = {f"{way} (best step)": pairs / min(steps) for way, steps in seconds.items()}
    return {**rates, **best, "2 processes against 1": two / one, "2 processes against 2 threads": two / wide}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--steps", type=int, default=10, help="in an epoch")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    results = measure(options)
    load = os.getloadavg()[0]
    for name, value in results.items():
        print(f"{name:44} {value:.2f}")
    print(f"load of the machine in the last minute: {load:.1f}")
    if options.json:
        options.json.write_text(json.dumps({**results, "load": load}, indent=2) + "\n")


if __name__ == "__main__":
    main()
