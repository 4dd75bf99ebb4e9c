"""The whole way on real KITTI frames: train, evaluate, run, each as a user does it."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from convlstm_vo import cli
from convlstm_vo.geometry.trajectory import read_kitti
from convlstm_vo.models.checkpoint import load_checkpoint
from convlstm_vo.training.loop import read_training_state
from tests.trees import write_tree


def test_real_frames_from_training_to_report(shared: Path, tmp_path: Path) -> None:
    data, run = shared / "kitti", tmp_path / "run"
    small = ["--preset", "tiny", "--model.image-height", "48", "--model.image-width", "160", "--time-steps", "4"]
    options = ["--data", str(data), "--sequences", "0013", "--validate", "01", "--out", str(run), "--lr", "2e-3"]
    rest = ["--epochs", "4", "--batch-size", "4", "--cache", str(tmp_path / "cache"), "--warmup-steps", "5"]
    cli.main(["train", *options, *rest, *small, "--ema", "0.9", "--precision", "fp32", "--device", "cpu"])
    rows = [json.loads(line) for line in (run / "history.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if row["kind"] == "train"]
    assert np.mean(losses[-5:]) < 0.5 * np.mean(losses[:2])

    results = tmp_path / "results.json"
    best = str(run / "checkpoints" / "best")
    sequences = ["--sequences", "06", "01"]
    cli.main(["evaluate", "--data", str(data), *sequences, "--checkpoint", best, "--json", str(results)])
    figures = json.loads(results.read_text())["sequences"]
    assert figures["06"]["lengths_m"] == [20, 40] and figures["06"]["alignment"] == "none"
    # The published feasibility study measured the same baseline with code of its own.
    straight = figures["06"]["baselines"]["straight_ahead"]
    assert straight["t_rel_percent"] == pytest.approx(2.19, abs=0.01)
    assert straight["r_rel_deg_per_100m"] == pytest.approx(3.16, abs=0.01)
    report = (tmp_path / "report.html").read_text()
    assert "06" in report and "01" in report and not re.search(r'(src|href)="https?:', report)

    cli.main(["run", str(data / "sequences" / "06"), "--checkpoint", best, "--out", str(tmp_path / "out")])
    estimate = read_kitti(tmp_path / "out" / "trajectory.txt")
    assert len(estimate) == 51 and figures["06"]["frames"] == 51


def test_ctrl_c_leaves_a_usable_checkpoint(tmp_path: Path) -> None:
    tree, run = write_tree(tmp_path / "tree", {"00": 30}), tmp_path / "run"
    command = [sys.executable, "-m", "convlstm_vo.cli", "train", "--data", str(tree), "--out", str(run)]
    command += ["--preset", "tiny", "--model.image-height", "48", "--model.image-width", "160"]
    command += ["--batch-size", "2", "--epochs", "100000", "--cache", str(tmp_path / "cache")]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    deadline = time.monotonic() + 120
    history = run / "history.jsonl"
    while not (history.exists() and len(history.read_text().splitlines()) > 3) and process.poll() is None:
        assert time.monotonic() < deadline, "training did not start"
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130, output
    assert "Interrupted" in output and "Traceback" not in output
    load_checkpoint(run / "checkpoints" / "last")
    assert read_training_state(run / "checkpoints" / "last")["progress"]["updates"] > 0


def test_training_on_endless_streets(tmp_path: Path) -> None:
    """Rendered while the network learns; an interrupted run resumes on the streets that it would have seen."""
    small = ["--preset", "tiny", "--model.image-height", "48", "--model.image-width", "160", "--time-steps", "3"]
    world = [
        "--world.drives",
        "2",
        "--world.frames",
        "8",
        "--batch-size",
        "2",
        "--device",
        "cpu",
        "--precision",
        "fp32",
    ]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    options = ["train", *small, *world, "--schedule", "constant", "--out"]
    cli.main([*options, str(whole), "--epochs", "2"])
    cli.main([*options, str(parts), "--epochs", "1"])
    cli.main([*options, str(parts), "--epochs", "2", "--resume"])
    first, second = (load_checkpoint(out / "checkpoints" / "last").state_dict() for out in (whole, parts))
    for name, value in first.items():
        np.testing.assert_array_equal(value.numpy(), second[name].numpy())
    assert not (tmp_path / "whole" / "sequences").exists()
