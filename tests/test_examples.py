"""The long example; the short ones run in test_readme.py."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import cv2

ROOT = Path(__file__).parents[1]
TINY = "--updates 40 --widths 8 4 4 --batch-size 4 --test-sequences 10 --lr 0.01 --lstm-lr 0.01"


def forecast_digits(out: Path) -> dict[str, dict[str, float]]:
    """The figures of a training of seconds, by network."""
    command = [sys.executable, str(ROOT / "examples/nowcasting.py"), "--out", str(out), *TINY.split()]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "copy the last frame" in done.stdout
    return {result["name"]: result for result in json.loads((out / "results.json").read_text())["networks"]}


def test_both_networks_learn_to_forecast_digits(tmp_path: Path) -> None:
    results = forecast_digits(tmp_path)
    assert set(results) == {"ConvLSTM", "FC-LSTM"}
    for result in results.values():
        assert result["updates"] == 40
        assert result["cross_entropy"] < 0.95 * result["untrained"]
    assert results["FC-LSTM"]["parameters"] >= results["ConvLSTM"]["parameters"]
    picture = cv2.imread(str(tmp_path / "nowcasting.png"))
    assert picture is not None and picture.std() > 20
