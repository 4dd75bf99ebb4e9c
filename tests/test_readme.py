"""What the README shows must work: its Python, its options, its files."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

from convlstm_vo import cli
from convlstm_vo.models.checkpoint import save_checkpoint
from convlstm_vo.models.config import PRESETS, preset
from convlstm_vo.models.network import OdometryNet

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def write_video(path: Path, frames: int = 4) -> None:
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"MJPG"), 10.0, (160, 48))
    for image in np.random.default_rng(0).integers(0, 255, (frames, 48, 160, 3), dtype=np.uint8):
        writer.write(image)
    writer.release()


@pytest.fixture
def workplace(tmp_path: Path) -> Path:
    """A folder with the video and the checkpoint that the README speaks of."""
    save_checkpoint(
        tmp_path / "demo/run/checkpoints/best", OdometryNet(preset("tiny", image_height=48, image_width=160))
    )
    write_video(tmp_path / "drive.avi")
    (tmp_path / "drive.avi").rename(tmp_path / "drive.mp4")
    return tmp_path


def run(code: list[str], folder: Path) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *code], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_example_runs(workplace: Path) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    shown = run(["-c", example + "\nprint(tracked.index, tracked.T_world_camera.shape)"], workplace)
    assert shown.strip().endswith("3 (4, 4)")


def test_the_example_scripts_run(workplace: Path) -> None:
    examples = ROOT / "examples"
    shown = run([str(examples / "stream_video.py"), "drive.mp4", "demo/run/checkpoints/best"], workplace)
    assert len(shown.splitlines()) == 4
    assert "torch.Size([1, 2, 6])" in run([str(examples / "add_a_cell.py")], workplace)
    for script in examples.glob("*.py"):
        if script.name != "nowcasting.py":  # which is an experiment: test_examples.py
            assert len(script.read_text().splitlines()) <= 40, script


def test_every_option_that_it_names_exists(capsys: pytest.CaptureFixture[str]) -> None:
    known = "--preset --config --nproc-per-node"  # the last one is torchrun's
    for verb in cli.VERBS:
        with pytest.raises(SystemExit) as stopped:
            cli.main([verb, "--help"])
        assert stopped.value.code == 0
        known += capsys.readouterr().out.replace("_", "-")
    for name in set(re.findall(r"python (benchmarks/\w+\.py) [^`]*--", README)):
        known += run([str(ROOT / name), "--help"], ROOT)
    for option in set(re.findall(r"(?<![\w-])--[a-z][a-z_-]+", README)):
        assert option.replace("_", "-") in known, option


def test_files_presets_and_commands_that_it_names_exist() -> None:
    for name in re.findall(r"!\[.*?\]\((.*?)\)", README) + re.findall(r"configs/\w+\.toml", README):
        assert (ROOT / name).is_file(), name
    tree = re.search(r"```\nsrc/convlstm_vo/\n(.*?)```", README, flags=re.DOTALL)
    assert tree is not None
    for name in re.findall(r"^  (\w+[./]\w*)", tree[1], flags=re.MULTILINE):
        assert (ROOT / "src/convlstm_vo" / name).exists(), name
    assert set(re.findall(r"convlstm-vo ([a-z]+)", README)) <= set(cli.VERBS)
    for name in PRESETS:
        assert f"`{name}`" in README
