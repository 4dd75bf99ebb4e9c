"""The estimate of memory that `convlstm-vo train` prints, against the peak that the kernel counts.

python benchmarks/memory.py --json memory.json

Peaks are resident memory of whole processes. A dry run of the same command tells what Python and libraries take
without any training.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from training import write_tree

KIB_IN_GIB = 2**20
ASCEND = ["--preset", "ascend", "--model.image-height", "192", "--model.image-width", "640", "--batch-size", "8"]
ASCEND += ["--epochs", "1"]
CASES = {
    "tiny, batch 32": ["--preset", "tiny", "--batch-size", "32", "--epochs", "4"],
    "ascend, batch 8": ASCEND,
    "ascend, batch 8, --checkpoint-activations": [*ASCEND, "--checkpoint-activations"],
}


def peak_gib(command: list[str]) -> tuple[float, str]:
    """Peak resident memory of a process, and what it printed."""
    with tempfile.TemporaryFile("w+") as shown:
        process = subprocess.Popen(command, stdout=shown)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            raise subprocess.CalledProcessError(process.returncode, command)
        shown.seek(0)
        return usage.ru_maxrss / KIB_IN_GIB, shown.read()


def measure(case: list[str], options: argparse.Namespace, tree: Path, out: Path) -> dict[str, float]:
    """Estimate, peaks in GiB and seconds a step of one network."""
    where = ["--data", tree, "--out", out, "--cache", tree / "cache", "--device", "cpu"]
    work = ["--time-steps", options.time_steps, "--precision", options.precision]
    command = [sys.executable, "-m", "convlstm_vo.cli", "train", *case, *map(str, [*where, *work])]
    idle, shown = peak_gib([*command, "--dry-run"])
    found = re.search(r"Memory: about ([\d.]+) GiB", shown)
    assert found, shown
    peak, _ = peak_gib(command)
    rows = [json.loads(line) for line in (out / "history.jsonl").read_text().splitlines()]
    steps = [row["seconds_per_step"] for row in rows if row["kind"] == "train"]
    return {
        "estimate": float(found[1]),
        "peak": peak,
        "without_training": idle,
        "training": peak - idle,
        "steps": len(steps),
        "seconds_per_step": statistics.median(steps[1:]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--time-steps", type=int, default=1)
    parser.add_argument("--frames", type=int, default=33, help="of the sequence: 32 pairs, so 4 steps of each case")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    results: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        tree = write_tree(Path(folder) / "tree", options.frames)
        for number, (name, case) in enumerate(CASES.items()):
            results[name] = measure(case, options, tree, Path(folder) / f"run-{number}")
            print(name, *(f"{key} {value:.2f}" for key, value in results[name].items()), sep="\n  ")
    load = os.getloadavg()[0]
    print(f"GiB; {options.precision}; load of the machine in the last minute: {load:.1f}")
    if options.json:
        options.json.write_text(
            json.dumps({**results, "precision": options.precision, "load": load}, indent=2) + "\n"
        )


if __name__ == "__main__":
    main()
