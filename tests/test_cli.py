"""The command line as a user meets it: every verb, the original's options, and one clear error for each mistake."""

from __future__ import annotations

import errno
import json
import shutil
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

from convlstm_vo import cli
from convlstm_vo.geometry.trajectory import Trajectory, read_kitti, read_tum
from convlstm_vo.models import checkpoint as checkpoints
from convlstm_vo.models.checkpoint import save_checkpoint
from convlstm_vo.models.config import preset
from convlstm_vo.models.network import OdometryNet
from convlstm_vo.training.losses import LossConfig
from tests.trees import HEIGHT, WIDTH, write_tree

SMALL = ["--preset", "tiny", "--model.image-height", "48", "--model.image-width", "160"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("net") / "checkpoint"
    save_checkpoint(folder, OdometryNet(preset("tiny", image_height=48, image_width=160), seed=0))
    return folder


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    return write_tree(tmp_path / "tree", {"00": 9, "01": 7})


def fails(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Run a command that must fail as users' mistakes do; its message."""
    with pytest.raises(SystemExit) as stopped:
        cli.main(arguments)
    assert stopped.value.code == 2
    captured = capsys.readouterr().err
    assert "Traceback" not in captured
    return " ".join(captured.split())


def train_arguments(tree: Path, out: Path, *more: str) -> list[str]:
    options = ["--data", tree, "--out", out, "--cache", out / "cache", "--batch-size", "1", "--epochs", "1"]
    return [
        "train",
        *map(str, options),
        *SMALL,
        "--time-steps",
        "3",
        "--device",
        "cpu",
        "--precision",
        "fp32",
        *more,
    ]


def test_help_is_quick_and_lists_every_verb(capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["--help"])
    shown = capsys.readouterr().out
    assert all(verb in shown for verb in cli.VERBS)
    code = "import sys, convlstm_vo, convlstm_vo.cli; sys.exit('torch' in sys.modules or 'cv2' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_score(shared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trajectories = shared / "trajectories"
    out = tmp_path / "score.json"
    files = [trajectories / "ground_truth" / "00.txt", trajectories / "estimates" / "00_orb.txt"]
    cli.main(["score", *map(str, files), "--json", str(out)])
    figures = json.loads(out.read_text())
    assert figures["segments"] == 3283
    assert figures["t_rel_percent"] == pytest.approx(0.699733, abs=1e-4)
    assert figures["r_rel_deg_per_100m"] == pytest.approx(0.253352, abs=1e-4)
    assert "KITTI" in capsys.readouterr().out


def test_train_evaluate_run(tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(train_arguments(tree, tmp_path / "run", "--validate", "01"))
    best = tmp_path / "run" / "checkpoints" / "best"
    assert str(best) in "".join(capsys.readouterr().out.split())
    results = tmp_path / "results.json"
    cli.main(
        [
            "evaluate",
            "--data",
            str(tree),
            "--sequences",
            "00",
            "01",
            "--checkpoint",
            str(best),
            "--json",
            str(results),
        ]
    )
    figures = json.loads(results.read_text())["sequences"]
    assert set(figures) == {"00", "01"} and figures["00"]["lengths_m"]
    assert figures["00"]["t_rel_percent"] is not None
    assert set(figures["00"]["baselines"]) == {"zero_motion", "constant_motion", "straight_ahead"}
    assert "<html" in (tmp_path / "report.html").read_text()
    cli.main(["run", str(tree / "sequences" / "00"), "--checkpoint", str(best), "--out", str(tmp_path / "out")])
    assert len(read_kitti(tmp_path / "out" / "trajectory.txt")) == 9
    assert cv2.imread(str(tmp_path / "out" / "trajectory.png")) is not None


def test_evaluate_can_measure_the_baselines_only(tree: Path, tmp_path: Path) -> None:
    results = tmp_path / "results.json"
    cli.main(["evaluate", "--data", str(tree), "--json", str(results), "--lengths", "2", "4", "--baselines-only"])
    figures = json.loads(results.read_text())["sequences"]["00"]
    assert figures["t_rel_percent"] is None
    assert figures["lengths_m"] == [2, 4]
    assert figures["baselines"]["zero_motion"]["t_rel_percent"] > 90


@pytest.mark.parametrize("source", ["folder", "video"])
@pytest.mark.parametrize("intrinsics", ["calib", "numbers", "fov"])
def test_run_on_anything(tree: Path, checkpoint: Path, tmp_path: Path, source: str, intrinsics: str) -> None:
    folder = tree / "sequences" / "00"
    given = {
        "calib": ["--calib", str(folder / "calib.txt")],
        "numbers": ["--intrinsics", "100", "100", "79.5", "23.5"],
        "fov": ["--fov", "77.3"],
    }[intrinsics]
    path = folder / "image_0"
    if source == "video":
        path = tmp_path / "drive.avi"
        writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"MJPG"), 10.0, (WIDTH, HEIGHT))
        for image in sorted((folder / "image_0").iterdir()):
            writer.write(cv2.imread(str(image)))
        writer.release()
    out = tmp_path / "out"
    cli.main(["run", str(path), "--checkpoint", str(checkpoint), *given, "--out", str(out), "--format", "tum"])
    trajectory = read_tum(out / "trajectory.txt")
    assert len(trajectory) == 9 and trajectory.timestamps_s[3] == pytest.approx(0.3)


def test_what_is_tracked_before_damaged_input_is_kept(
    tree: Path, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, out = tree / "sequences" / "00" / "image_0", tmp_path / "out"
    (tree / "sequences" / "00" / "times.txt").unlink()
    command = ["run", str(folder), "--checkpoint", str(checkpoint), "--fov", "80", "--out", str(out)]
    cli.main([*command, "--fps", "5", "--format", "tum"])
    assert read_tum(out / "trajectory.txt").timestamps_s[3] == pytest.approx(0.6)
    before = (out / "trajectory.txt").read_text(), (out / "trajectory.png").read_bytes()
    capsys.readouterr()
    (folder / "000004.png").write_bytes(b"no image")
    with pytest.raises(SystemExit):
        cli.main(command)
    told = capsys.readouterr()
    assert "4 frames before the error: " in told.out and "trajectory.partial.txt" in told.out
    assert "000004.png" in told.err and "trajectory.txt" not in told.out
    assert len(read_kitti(out / "trajectory.partial.txt")) == 4
    assert before == ((out / "trajectory.txt").read_text(), (out / "trajectory.png").read_bytes())


def test_a_video_that_breaks_off_is_told_of(
    tree: Path, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, cut = tmp_path / "whole.avi", tmp_path / "cut.avi"
    writer = cv2.VideoWriter(str(whole), cv2.VideoWriter.fourcc(*"MJPG"), 10.0, (WIDTH, HEIGHT))
    for _ in range(4):
        for image in sorted((tree / "sequences" / "00" / "image_0").iterdir()):
            writer.write(cv2.imread(str(image)))
    writer.release()
    cut.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    for path, expected in ((whole, False), (cut, True)):
        cli.main(
            ["run", str(path), "--checkpoint", str(checkpoint), "--fov", "80", "--out", str(tmp_path / path.stem)]
        )
        assert ("Warning: the file claims 36 frames" in capsys.readouterr().err) == expected


def test_mistakes_of_a_run(
    tree: Path, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = str(tree / "sequences" / "00" / "image_0")
    command = ["run", folder, "--checkpoint", str(checkpoint), "--out", str(tmp_path / "out")]
    message = fails([*command, "--fov", "80", "--device", "nonsense"], capsys)
    assert "device 'nonsense' cannot be used" in message and "cpu always can" in message
    lens = ["--intrinsics", "100", "100", "80", "24", "--distortion"]
    assert "must be finite numbers" in fails([*command, *lens, *["nan"] * 4], capsys)
    assert "3 coefficients, but plumb_bob has" in fails([*command, *lens, *["0"] * 3], capsys)
    (tmp_path / "out" / "trajectory.txt").mkdir(parents=True)
    assert "trajectory.txt: is a folder; name a file" in fails([*command, "--fov", "80"], capsys)
    (tmp_path / "out" / "trajectory.txt").rmdir()
    cli.main([*command, "--intrinsics", "100", "100", "155", "24"])
    assert "Warning: the principal point (155, 24) is far from the middle" in capsys.readouterr().err


def test_the_original_s_command_line(tree: Path, tmp_path: Path) -> None:
    """The very options of Truemain.py and its kin, in their spelling."""
    old = f"--datapath {tree} --outputpath {tmp_path} --bsize 32 --trajectory_length 4 --lr 1e-4 --train_iter 240"
    config = cli.parse_train([*old.split(), "--time_steps", "1"])
    assert (config.data, config.out, config.batch_size, config.max_sequences) == (tree, tmp_path, 32, 4)
    assert (config.lr, config.epochs, config.time_steps) == (1e-4, 240, 1)
    assert config.model == preset("ascend")
    assert (config.loss.error, config.loss.rotation_weight) == ("squared", 100.0)
    cli.main(
        train_arguments(tree, tmp_path / "run", "--time_steps", "1", "--trajectory_length", "1", "--bsize", "2")
    )
    assert (tmp_path / "run" / "checkpoints" / "last" / "model.safetensors").exists()


def test_recipes_and_presets_meet_the_command_line_in_order(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        'preset = "deepvo"\nlr = 0.5\nepochs = 7\n[model]\nimage_height = 192\n[loss]\nrotation_weight = 3\n'
    )
    config = cli.parse_train(["--config", str(recipe), "--epochs", "9", "--model.image-width", "640"])
    assert (config.lr, config.epochs, config.loss.rotation_weight) == (0.5, 9, 3.0)
    assert config.model == preset("deepvo", image_height=192, image_width=640)
    small = cli.parse_train(["--config", str(recipe), "--preset", "tiny", "--loss.drift-steps", "2"])
    assert small.model == preset("tiny", image_height=192)
    assert small.loss == LossConfig("norm", 3.0, drift_steps=(2,))  # of preset, recipe and command line
    assert cli.parse_train(["--preset", "tiny"]).loss.rotation_weight == 40.0


@pytest.mark.parametrize(
    "recipe", sorted((Path(__file__).parents[1] / "configs").glob("*.toml")), ids=lambda p: p.stem
)
def test_shipped_recipes_are_valid(recipe: Path) -> None:
    assert cli.parse_train(["--config", str(recipe)]).sequences


def test_mistakes_on_the_command_line(tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "unknown command 'evaluat'" in fails(["evaluat"], capsys)
    assert "unknown preset 'tinny'; the presets are" in fails(["train", "--preset", "tinny"], capsys)
    assert "builds no network; use --preset tiny" in fails(["train", "--model.preset", "tiny"], capsys)
    assert "--data DIR is missing" in fails(["train"], capsys)
    recipe = tmp_path / "recipe.toml"
    recipe.write_text("[model]\nhiden_channels = 3\n")
    message = fails(["train", "--config", str(recipe)], capsys)
    assert "unknown key 'model.hiden_channels'; did you mean 'hidden_channels'?" in message
    fails(["train", "--learning-speed", "3"], capsys)
    assert "--validate 00: also in" in fails(
        train_arguments(tree, tmp_path, "--sequences", "00", "--validate", "00"), capsys
    )
    assert "this tree has the sequences 00, 01" in fails(
        train_arguments(tree, tmp_path, "--sequences", "05"), capsys
    )
    assert "sequences/NAME" in fails(["evaluate", "--data", str(tmp_path / "nowhere")], capsys)
    (tree / "sequences" / "02" / "image_0").mkdir(parents=True)
    short = tree / "sequences" / "02"
    first = tree / "sequences" / "00"
    shutil.copy(first / "calib.txt", short)
    (short / "times.txt").write_text("0.0\n")
    (tree / "poses" / "02.txt").write_text("1 0 0 0 0 1 0 0 0 0 1 0\n")
    shutil.copy(first / "image_0" / "000000.png", short / "image_0")
    for options, message in (
        (["--world.drives", "2", "--sequences", "00"], "--sequences: not with --world.drives"),
        (["--world.drives", "2", "--world.fps", "0"], "--world.fps 0.0: must be positive"),
        (["--weight-decay", "nan"], "--weight-decay nan: must be a number of at least 0"),
        (["--validate", "02"], "--validate 02: has 1 frame, so no motion"),
        (["--model.cell", "lsmt"], "unknown cell 'lsmt'; did you mean 'lstm'"),
        (["--init", str(tmp_path / "nope")], "nope: no checkpoint there"),
    ):
        assert message in fails(train_arguments(tree, tmp_path, *options), capsys)
    assert not (tmp_path / "cache").exists()  # nothing was decoded before
    evaluate = ["evaluate", "--data", str(tree)]
    assert "--save: is of a network" in fails([*evaluate, "--baselines-only", "--save", "x"], capsys)
    assert "is a folder; name a file" in fails([*evaluate, "--json", str(tmp_path)], capsys)
    assert "--epochs 0: must be at least 1" in fails(["demo", "--epochs", "0"], capsys)
    assert "--frames 8: must be at least 20" in fails(["train-geometric", "--frames", "8"], capsys)


def test_a_run_is_not_overwritten(tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(train_arguments(tree, tmp_path / "run"))
    assert "a run is there already" in fails(train_arguments(tree, tmp_path / "run"), capsys)
    cli.main(train_arguments(tree, tmp_path / "run", "--resume"))


def test_mistakes_in_the_data(
    tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], checkpoint: Path
) -> None:
    image = tree / "sequences" / "00" / "image_0" / "000004.png"
    whole = image.read_bytes()
    image.write_bytes(whole[:-100])
    for command in (
        train_arguments(tree, tmp_path / "run"),
        ["evaluate", "--data", str(tree), "--checkpoint", str(checkpoint), "--json", str(tmp_path / "r.json")],
        ["run", str(tree / "sequences" / "00"), "--checkpoint", str(checkpoint), "--out", str(tmp_path / "out")],
    ):
        assert "000004.png: the PNG is truncated" in fails(command, capsys)
    written = [path.name for path in tmp_path.rglob("*") if path.is_file() and tree not in path.parents]
    assert written == ["trajectory.partial.txt"]  # of the frames before
    cv2.imwrite(str(image), np.zeros((20, 30), np.uint8))
    assert "000004.png: the image is 20x30" in fails(train_arguments(tree, tmp_path / "run2"), capsys)
    image.write_bytes(whole)
    (tree / "poses" / "00.txt").write_text("1 0 0 0 0 1 0 0 0 0 1\n")
    assert "00.txt, line 1: 11 values" in fails(train_arguments(tree, tmp_path / "run3"), capsys)
    poses = tree / "poses" / "00.txt"
    poses.write_text("1 0 0 0 0 1 0 0 0 0 1 0\n" * 8)
    assert "00.txt: 8 poses for 9 images" in fails(train_arguments(tree, tmp_path / "run4"), capsys)
    poses.write_text("1 0 0 0 0 1 0 0 0 0 1 nan\n" * 9)
    assert "00.txt, line 1: 'nan' is not a finite number" in fails(train_arguments(tree, tmp_path / "run5"), capsys)
    (tree / "sequences" / "00" / "calib.txt").write_text("P1: 1 0 0 0 0 1 0 0 0 0 1 0\n")
    assert "calib.txt: no line 'P0: …' (found P1)" in fails(train_arguments(tree, tmp_path / "run6"), capsys)


def test_mistakes_with_checkpoints(
    tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], checkpoint: Path
) -> None:
    run = ["run", str(tree / "sequences" / "00"), "--out", str(tmp_path / "out"), "--checkpoint"]
    assert "no checkpoint there" in fails([*run, str(tmp_path)], capsys)
    other = tmp_path / "other"
    save_checkpoint(other, OdometryNet(preset("tiny", hidden_channels=8), seed=0))
    message = fails(train_arguments(tree, tmp_path / "run", "--init", str(other)), capsys)
    assert "hidden_channels is 8 there, but 48 in this network" in message
    (other / "model.safetensors").write_bytes(b"damaged")
    assert "model.safetensors: damaged" in fails([*run, str(other)], capsys)
    folder = tree / "sequences" / "00" / "image_0"
    assert "carries no intrinsics" in fails(["run", str(folder), "--checkpoint", str(checkpoint)], capsys)


def test_a_full_disk_while_saving(
    tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoints, "save_file", full)
    message = fails(train_arguments(tree, tmp_path / "run"), capsys)
    assert "checkpoint cannot be written (No space left on device)" in message
    assert not any((tmp_path / "run" / "checkpoints").iterdir())


def test_estimates_can_be_saved_and_scored(tree: Path, tmp_path: Path, checkpoint: Path) -> None:
    arguments = ["--data", str(tree), "--checkpoint", str(checkpoint), "--save", str(tmp_path / "est")]
    cli.main(["evaluate", *arguments, "--report", str(tmp_path / "report.html")])
    estimate = tmp_path / "est" / "00.txt"
    assert isinstance(read_kitti(estimate), Trajectory)
    cli.main(["score", str(tree / "poses" / "00.txt"), str(estimate)])
