"""Draws how the default network was trained, from the logs of its training command.

python benchmarks/training_curves.py docs/training docs/images/training.png
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def rows(path: Path) -> list[dict[str, Any]]:
    """A log, one JSON object a line."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("logs", type=Path, help="folder with flow.jsonl and weights.jsonl")
    parser.add_argument("picture", type=Path)
    options = parser.parse_args()
    flow, weights = rows(options.logs / "flow.jsonl"), rows(options.logs / "weights.jsonl")
    figure, axes = plt.subplots(1, 4, figsize=(16, 3.4), layout="constrained")
    for axis, log, name in ((axes[0], flow, "flow: loss"), (axes[2], weights, "weights: loss")):
        some = [row for row in log if "loss" in row]
        axis.plot([row["step"] for row in some], [row["loss"] for row in some], lw=1)
        axis.set(title=name, xlabel="update")
    for key, label in (("road_median", "road"), ("other_median", "elsewhere")):
        some = [row for row in flow if key in row]
        axes[1].plot([row["step"] for row in some], [row[key] for row in some], "o-", label=label)
    axes[1].set(title="flow: median end-point error, px, unseen", xlabel="update", ylim=(0, None))
    axes[1].legend()
    some = [row for row in weights if "shift_percent" in row]
    axes[3].plot([row["step"] for row in some], [row["shift_percent"] for row in some], "o-", label="way, %")
    axes[3].plot([row["step"] for row in some], [100 * row["turn_deg"] for row in some], "o-", label="turn, 0.01°")
    axes[3].set(title="median errors of a frame, unseen", xlabel="update", ylim=(0, None))
    axes[3].legend()
    for axis in axes:
        axis.grid(alpha=0.3)
    figure.savefig(options.picture, dpi=90)


if __name__ == "__main__":
    main()
