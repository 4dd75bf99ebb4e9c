"""The recipes in configs/ run unchanged on full KITTI: a dry run of each on a small tree of the same shape."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from convlstm_vo import cli
from tests.trees import write_tree

CONFIGS = Path(__file__).parents[1] / "configs"
FRAMES = {f"{number:02d}": 9 + number for number in range(11)}


@pytest.fixture
def kitti(tmp_path: Path) -> Path:
    """Sequences 00 to 10 with poses, few small frames each."""
    return write_tree(tmp_path / "kitti", FRAMES)


def dry_run(recipe: str, kitti: Path, *more: str) -> None:
    cli.main(
        ["train", "--config", str(CONFIGS / recipe), "--data", str(kitti)]
        + ["--out", str(kitti.parent / "run"), "--cache", str(kitti.parent / "cache"), "--dry-run", *more]
    )


@pytest.mark.parametrize(
    ("recipe", "steps"),
    # 00, 02, 08 and 09 have 8 + 10 + 16 + 17 motions, so 51 clips of one, 1 + 1 + 2 + 2 of six.
    [("ascend.toml", "1 an epoch of 32 clips of 1 motions"), ("deepvo.toml", "1 an epoch of 8 clips of 6 motions")],
)
def test_recipes_fit_full_kitti(recipe: str, steps: str, kitti: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dry_run(recipe, kitti)
    shown = capsys.readouterr().out
    assert "Learn from 4 sequences with 55 frames: 00 (9), 02 (11), 08 (17), 09 (18)" in shown
    assert ("Validate on 1 sequences with 13 frames: 04 (13)" in shown) == (recipe == "ascend.toml")
    assert steps in shown
    assert "Memory: about " in shown and "GiB" in shown
    assert [path.name for path in kitti.parent.iterdir()] == ["kitti"]  # neither a checkpoint nor a cache


@pytest.mark.parametrize("recipe", ["ascend.toml", "deepvo.toml"])
def test_a_missing_sequence_is_named(recipe: str, kitti: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(kitti / "sequences" / "08")
    with pytest.raises(SystemExit) as stopped:
        dry_run(recipe, kitti)
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert "sequences/08: no such folder; this tree has the sequences 00, 01" in error and "Traceback" not in error


def test_missing_poses_are_named(kitti: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (kitti / "poses" / "08.txt").unlink()
    with pytest.raises(SystemExit):
        dry_run("ascend.toml", kitti)
    assert "sequence 08: has no ground-truth poses (poses/08.txt)" in capsys.readouterr().err


def test_streets_without_end_are_planned(kitti: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--world.drives", "3", "--world.frames", "20", "--batch-size", "2", "--epochs", "4"]
    cli.main(["train", "--preset", "tiny", *options, "--out", str(kitti.parent / "run"), "--dry-run"])
    shown = capsys.readouterr().out
    assert "3 sequences with 60 frames in the first epoch" in shown
    assert "13 an epoch of 2 clips of 8 motions, 52 in 4 epochs" in shown
