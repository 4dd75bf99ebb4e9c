"""Fine-tuning on frames of one's own, and a training of the weights that goes on where it was killed."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from convlstm_vo import cli
from convlstm_vo.geometry import se3
from convlstm_vo.geometry.camera import Camera
from convlstm_vo.models.checkpoint import DEFAULT_CHECKPOINT, build, load_checkpoint, save_checkpoint
from convlstm_vo.models.config import preset
from convlstm_vo.models.geometric import GeometricNet
from convlstm_vo.models.network import OdometryNet
from convlstm_vo.training import finetune, geometric
from convlstm_vo.training.cell_clips import CellClip, Clips
from convlstm_vo.training.cell_drives import CellDrive, bent
from convlstm_vo.training.config import TrainError
from convlstm_vo.training.finetune import (
    FinetuneOptions,
    OwnDrive,
    cells_of_frames,
    looking_as_driven,
    motion_figures,
    moves,
    open_drives,
    overall,
    worsened,
)
from convlstm_vo.training.geometric import (
    Outcome,
    WeighConfig,
    WeighRun,
    measure,
    train_weights,
    weigh_loss,
)
from convlstm_vo.training.stage_state import forget_rows_after
from convlstm_vo.world import Mount, WorldSequence
from tests.small_runs import killed_at

SIZES = {"00": (26, 64, 256), "01": (12, 64, 192), "02": (10, 64, 256)}  # frames, height, width
SHORT = WeighConfig(steps=5, lanes=2, frames=3, warmup=2, save_steps=2)


def write_drive(root: Path, name: str, seed: int, mount: Mount | None = None) -> None:
    """A rendered street as a KITTI sequence, at the focal length at which the network sees: nothing is resized."""
    frames, height, width = SIZES[name]
    camera = Camera(363.6, 363.6, (width - 1) / 2, 20.0, height=height, width=width)
    drive = WorldSequence(seed, frames=frames, kind="town", camera=camera, mount=mount)
    images = root / "sequences" / name / "image_0"
    images.mkdir(parents=True)
    for frame in drive:
        cv2.imwrite(str(images / f"{frame.index:06d}.png"), frame.image)
    row = f"{camera.fx} 0 {camera.cx} 0 0 {camera.fy} {camera.cy} 0 0 0 1 0"
    (images.parent / "calib.txt").write_text(f"P0: {row}\n")
    (images.parent / "times.txt").write_text("".join(f"{i / 10}\n" for i in range(frames)))
    drive.trajectory.write_kitti(root / "poses" / f"{name}.txt")


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("own")
    for seed, name in enumerate(SIZES, start=31):
        write_drive(root, name, seed)
    return root


@pytest.fixture(scope="module")
def drives(tree: Path) -> list[CellDrive]:
    """Cells of two sequences of different sizes, the road of the second one known."""
    found, _ = open_drives(FinetuneOptions(tree, validate=("02",)), 1.65)
    own, other = (cells_of_frames(loaded(), drive, 0) for drive in found)
    return [own, dataclasses.replace(other, slopes=np.zeros_like(other.slopes))]


def loaded() -> GeometricNet:
    net = load_checkpoint()
    assert isinstance(net, GeometricNet)
    net.flow.requires_grad_(False)
    return net


def run(tree: Path, out: Path, *more: str) -> None:
    cli.main(["train-geometric", "--finetune", str(tree), "--out", str(out), "--threads", "1", *more])


# --- fine-tuning ----------------------------------------------------------------------------------------------


def test_fine_tunes_on_sequences_of_two_sizes(tree, tmp_path, capsys):
    run(tree, tmp_path, "--validate", "02", "--steps", "3", "--lr", "1e-5", "--camera-height", "1.5")
    shown = capsys.readouterr().out
    assert "02 (0 to 9)" in shown and "bias of the scale, %" in shown
    before, after = load_checkpoint().state_dict(), load_checkpoint(tmp_path / "finetuned").state_dict()
    changed = {name.split(".")[0] for name, value in before.items() if not torch.equal(after[name], value)}
    assert "weigher" in changed and "log_motion" in changed and "flow" not in changed
    assert load_checkpoint(tmp_path / "finetuned").config.camera_height == 1.5
    assert "must not be shipped" in (tmp_path / "finetuned" / "NOTICE.txt").read_text()
    figures = json.loads((tmp_path / "validation.json").read_text())["figures"]
    assert list(figures) == ["02 (0 to 9)", "mean size"]
    assert set(figures["mean size"]["after"]) == {"shift_percent", "turn_deg", "scale_bias_percent"}


def test_learns_in_the_axes_of_where_the_car_drives(tmp_path):
    """As the odometer will use what was learned, wherever the camera looks: turned by 0.15, pitched by -0.1 rad."""
    for name, seed in (("00", 32), ("02", 33)):
        write_drive(tmp_path, name, seed, Mount(yaw=0.15, pitch=-0.1))
    [drive], _ = open_drives(FinetuneOptions(tmp_path, validate=("02",)), 1.65)
    assert looking_as_driven(drive).aside.tolist()[0] == pytest.approx([0.15, -0.1], abs=0.02)
    cells = cells_of_frames(loaded(), drive, 0)
    moving = cells.motions[:, 2] > 0.1
    assert moving.sum() > 5
    assert np.abs(cells.motions[moving, :2] / cells.motions[moving, 2:3]).max() < 0.05
    rays = cells.cells[:, :3]
    assert rays[:, 0].mean() == pytest.approx(np.tan(0.15), abs=0.03)  # to the right of the road


def test_a_worse_validation_is_a_warning(tree, tmp_path, capsys, monkeypatch):
    """Whether a few wild steps spoil the shipped weights is a matter of luck; here the flow is lost after two."""
    cells = []
    monkeypatch.setattr(finetune, "cached", lambda path, make: cells.append(make()) or cells[-1])

    def spoil(net, *arguments, **options):
        train_weights(net, *arguments, **options)
        for weight in net.flow.parameters():
            weight.data.zero_()

    monkeypatch.setattr(finetune, "train_weights", spoil)
    run(tree, tmp_path, "--sequences", "00", "--steps", "2")
    shown = capsys.readouterr()
    assert "00 (21 to 25)" in shown.out
    assert "Warning: validation got worse (error of the" in shown.err and str(DEFAULT_CHECKPOINT) in shown.err
    assert json.loads((tmp_path / "validation.json").read_text())["worse"]
    load_checkpoint(tmp_path / "finetuned")
    (learned,) = cells
    assert len(learned) <= 20
    assert np.isfinite(learned.cells).all() and np.isnan(learned.slopes).all()


def test_what_counts_as_worse():
    good = {"shift_percent": 1.0, "turn_deg": 0.02, "scale_bias_percent": 1.0}
    assert worsened(good, good | {"scale_bias_percent": 0.9}) == []
    assert worsened(good, good | {"turn_deg": 0.03}) == ["error of the turn 0.0200 -> 0.0300 degrees"]
    assert len(worsened(good, dict.fromkeys(good, float("nan")))) == 3
    assert worsened(good | {"shift_percent": float("nan")}, good) == []  # nothing moves there
    biased = {"a": good | {"scale_bias_percent": 2.0}, "b": good | {"scale_bias_percent": -1.0}}
    assert overall(biased) == good | {"scale_bias_percent": 1.5}


def test_figures_of_motions():
    true = np.tile(se3.matrix_from_motion(np.array([0, 0, 2.0, 0, 0, 0])), (4, 1, 1))
    found = np.tile(se3.matrix_from_motion(np.array([0, 0, 2.1, 0, np.radians(0.5), 0])), (4, 1, 1))
    figures = motion_figures(found, true)
    assert figures == pytest.approx({"shift_percent": 5, "turn_deg": 0.5, "scale_bias_percent": 5})
    still = motion_figures(found, np.tile(np.eye(4), (4, 1, 1)))
    assert np.isnan(still["shift_percent"]) and still["turn_deg"] == pytest.approx(0.5)


def test_real_frames_before_and_after(shared, tmp_path, capsys):
    run(shared / "kitti", tmp_path, "--sequences", "06", "--steps", "2")
    assert "06 (41 to 50)" in capsys.readouterr().out
    figures = json.loads((tmp_path / "validation.json").read_text())["figures"]["mean size"]
    assert figures["before"]["shift_percent"] < 4
    for name, value in figures["before"].items():
        assert figures["after"][name] == pytest.approx(value, rel=0.5, abs=0.5), name


def test_changed_truth_is_measured_anew(tree):
    (drive, *_), _ = open_drives(FinetuneOptions(tree, sequences=("00",)), 1.65)
    moved = drive.truth.copy()
    moved[3, 0, 3] += 0.1
    others = [dataclasses.replace(drive, height_m=1.7), dataclasses.replace(drive, truth=moved)]
    assert len({drive.checksum(0), drive.checksum(1), *(other.checksum(0) for other in others)}) == 4


@pytest.mark.parametrize("frames", [9, 80, 121, 400])
def test_pieces_lose_no_motion(frames):
    pieces = finetune._pieces(frames)
    assert [i for start, stop in pieces for i in range(start, stop - 1)] == list(range(frames - 1))
    assert min(stop - start for start, stop in pieces) > min(frames - 1, 50)


# --- mistakes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, match",
    [
        (["--sequences", "00", "02", "--validate", "02"], "--validate 02: also in --sequences"),
        (["--camera-height", "0"], "--camera-height 0.0: must lie between 0.1 and 20 m; measure it"),
        (["--camera-height", "-1.65"], "--camera-height -1.65: must lie between"),
        (["--steps", "0"], "--steps 0: must be at least 1"),
        (["--lr", "-1"], "--lr -1.0: must be positive"),
        (["--drives", "3"], "--drives: is for training from nothing; leave it out with --finetune"),
        (["--sequences", "02"], r"sequences/02: 8 frames to learn from when the last 2 are kept .* takes 9; leave"),
        (["--sequences", "nowhere"], "nowhere: no such folder; this tree has the sequences 00, 01, 02"),
        (["--validate", "00", "01", "02"], "no sequences with ground truth to learn from.*besides those of --vali"),
    ],
)
def test_mistakes_in_options(tree, tmp_path, capsys, options, match):
    with pytest.raises(SystemExit) as stopped:
        run(tree, tmp_path / "out", *options)
    assert stopped.value.code == 2
    assert_matches(match, capsys)


def test_options_that_need_frames(tmp_path, capsys):
    with pytest.raises(SystemExit):
        cli.main(["train-geometric", "--out", str(tmp_path / "out"), "--validate", "10"])
    assert_matches("--validate: is for your own frames; name them with --finetune DATA", capsys)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "poses, match",
    [
        (None, r"poses/02.txt: no such file; .* add them, or leave 02 out of --sequences"),
        (9, r"poses/02.txt: 9 poses for 10 images in .*: was one of the two cut short"),
    ],
)
def test_mistakes_in_poses(tree, tmp_path, capsys, poses, match):
    shutil.copytree(tree, tmp_path / "tree")
    path = tmp_path / "tree/poses/02.txt"
    rows = path.read_text().splitlines(keepends=True)
    path.unlink()
    if poses is not None:
        path.write_text("".join(rows[:poses]))
    with pytest.raises(SystemExit):
        run(tmp_path / "tree", tmp_path / "out", "--sequences", "00", "02")
    assert_matches(match, capsys)


def test_checkpoints_that_cannot_be_fine_tuned(tree, tmp_path, capsys):
    save_checkpoint(tmp_path / "tiny", OdometryNet(preset("tiny", image_height=48, image_width=160), seed=0))
    shutil.copytree(DEFAULT_CHECKPOINT, tmp_path / "finetuned")
    for name, match in {"tiny": "is of preset tiny", "finetuned": "would be replaced by the new weights"}.items():
        with pytest.raises(SystemExit):
            run(tree, tmp_path, "--checkpoint", str(tmp_path / name))
        assert_matches(f"--checkpoint .*/{name}: {match}", capsys)


def assert_matches(pattern: str, capsys: pytest.CaptureFixture[str]) -> None:
    import re

    message = " ".join(capsys.readouterr().err.split())
    assert message.startswith("error: ") and "Traceback" not in message
    assert re.search(pattern, message), message


# --- roads that nobody knows ----------------------------------------------------------------------------------


def test_an_unknown_road_is_left_out_of_the_loss():
    random = torch.Generator().manual_seed(0)
    motions, found = (torch.randn(2, 8, 6, generator=random) * 0.1 for _ in range(2))
    slopes = (torch.randn(2, 8, 2, generator=random) * 0.01).requires_grad_()
    outcome = Outcome(found.requires_grad_(), torch.eye(6).expand(2, 8, 6, 6), slopes, torch.zeros(()))
    first, fresh = torch.zeros(2, 6), torch.zeros(2, dtype=torch.bool)
    clip = CellClip(torch.zeros(0), motions, torch.full((2, 8, 2), torch.nan), first, fresh)
    loss = weigh_loss(outcome, clip, SHORT, 1.65)
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(outcome.motions.grad).all()
    assert slopes.grad is None  # as far as the loss is concerned, the road is free
    known = weigh_loss(outcome, dataclasses.replace(clip, slopes=torch.zeros(2, 8, 2)), SHORT, 1.65)
    term = 0.2 * torch.log1p((slopes / 0.003).square().sum(-1)).mean()
    torch.testing.assert_close(known, loss + term)


def test_an_unknown_road_is_not_bent(drives):
    own, other = drives
    np.testing.assert_array_equal(bent(own, 0.05).cells, own.cells)
    assert (bent(other, 0.05).cells != other.cells).any()
    assert np.isfinite(bent(other, 0.05).cells).all()


def test_an_unknown_road_and_a_single_drive_are_measured(drives):
    figures = measure(loaded(), drives[:1], SHORT)
    assert np.isnan(figures["tilt_deg"]) and np.isnan(figures["scale_spread_percent"])
    assert np.isfinite([figures["shift_percent"], figures["turn_deg"], figures["scale_bias_percent"]]).all()


def test_lanes_of_a_clip_have_one_size(drives):
    clips = Clips(drives, lanes=2, frames=3, bend=0.03, seed=0)
    assert clips.groups == [[0], [1]]
    shown = [next(clips) for _ in range(20)]
    assert {(clip.group, clip.cells.shape[-1]) for clip in shown} == {(0, 32), (1, 24)}
    assert all(clip.fresh.all() for clip in shown[:1]) and not all(clip.fresh.all() for clip in shown)


# --- killed and started again ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(drives, tmp_path_factory) -> tuple[Path, GeometricNet]:
    """A run that nobody kills."""
    out, net = tmp_path_factory.mktemp("whole"), loaded()
    train_weights(net, drives, drives, SHORT, out)
    return out, net


@pytest.mark.parametrize("step", [1, 3, 4])
def test_a_killed_run_ends_with_the_same_weights(drives, whole, tmp_path, step):
    with killed_at(WeighRun, step):
        train_weights(loaded(), drives, drives, SHORT, tmp_path)
    assert (tmp_path / "weights-last.pt").exists() == (step >= SHORT.save_steps)
    net = loaded()
    train_weights(net, drives, drives, SHORT, tmp_path)
    torch.testing.assert_close(net.state_dict(), whole[1].state_dict(), rtol=0, atol=0)
    states = [torch.load(folder / "weights-last.pt", weights_only=True) for folder in (tmp_path, whole[0])]
    for key in ("settings", "clips"):
        assert states[0].pop(key) == states[1].pop(key)
    torch.testing.assert_close(states[0], states[1], rtol=0, atol=0)


def test_lanes_shared_by_two_processes(drives, tmp_path):
    """The same learning as in one, killed and continued to the very same weights."""
    config = dataclasses.replace(SHORT, cell_loss=0.0)  # whose mean over a batch is not that of its halves' means
    nets, losses = [loaded() for _ in range(3)], []
    threads = torch.get_num_threads()
    for net, processes in zip(nets, (1, 2), strict=False):
        train_weights(net, drives, [], config, tmp_path / str(processes), processes=processes)
        losses.append(torch.load(tmp_path / str(processes) / "weights-last.pt", weights_only=True)["losses"])
    # Sums in another order: on the last clip, which fits badly, they are worth 0.2 % of the loss. So what
    # was learned is compared, too.
    np.testing.assert_allclose(losses[1][:4], losses[0][:4], atol=1e-3)
    np.testing.assert_allclose(losses[1][4], losses[0][4], rtol=4e-3)
    started = (loaded(), *nets[:2])
    start, *ends = (torch.cat([p.detach().flatten() for p in net.weigher.parameters()]) for net in started)
    one, two = (end - start for end in ends)
    assert float((two - one).norm()) < 0.05 * float(one.norm()) and float(one.norm()) > 0
    with killed_at(WeighRun, 3):
        train_weights(loaded(), drives, [], config, tmp_path / "3", processes=2)
    assert torch.get_num_threads() == threads
    train_weights(nets[2], drives, [], config, tmp_path / "3", processes=2)
    torch.testing.assert_close(nets[2].state_dict(), nets[1].state_dict(), rtol=0, atol=0)


def test_a_finished_run_is_not_repeated(drives, whole, monkeypatch):
    monkeypatch.delattr(geometric.WeighRun, "update")
    net = loaded()
    train_weights(net, drives, drives, SHORT, whole[0])
    torch.testing.assert_close(net.state_dict(), whole[1].state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize(
    "changes, match",
    [
        ({"steps": 6}, "a run with steps 5, but now it is 6; go on with the same settings, name another --out, or"),
        ({"seed": 1}, "seed 0, but now it is 1"),
        ({"memory": "none"}, "memory 'carried', but now it is 'none'"),
        ({"cell": "convgru"}, "cell 'convlstm', but now it is 'convgru'"),
    ],
)
def test_other_settings_do_not_go_on(drives, whole, changes, match):
    net = loaded()
    if "cell" in changes:
        net = build(preset("geometric", **changes), seed=0)
    config = SHORT if "cell" in changes else dataclasses.replace(SHORT, **changes)
    with pytest.raises(TrainError, match=match) as caught:
        train_weights(net, drives, drives, config, whole[0])
    assert str(whole[0] / "weights-last.pt") in str(caught.value)


def test_other_weights_drives_and_damaged_states_do_not_go_on(drives, whole, tmp_path):
    net = loaded()
    with torch.no_grad():
        net.log_motion += 1
    with pytest.raises(TrainError, match="a run with other first weights; go on with"):
        train_weights(net, drives, drives, SHORT, whole[0])
    with pytest.raises(TrainError, match="a run with other drives"):
        train_weights(loaded(), drives[:1], drives, SHORT, whole[0])
    (tmp_path / "weights-last.pt").write_bytes((whole[0] / "weights-last.pt").read_bytes()[:5000])
    with pytest.raises(TrainError, match=r"is damaged .*; remove weights-last.pt to train this stage"):
        train_weights(loaded(), drives, drives, SHORT, tmp_path)


def test_a_camera_that_stands_cannot_be_measured():
    poses = np.tile(np.eye(4), (9, 1, 1))
    poses[:, 2, 3] = [0, 0, 0, 0, 0, 0, 0, 1, 2]
    standing, moving = (OwnDrive(None, range(*part), poses, 1.65) for part in ((0, 7), (5, 9)))
    assert moves(moving) and not moves(standing)


def test_a_log_holds_no_row_twice(tmp_path):
    path = tmp_path / "weights.jsonl"
    path.write_text('{"step": 50}\n{"step": 100}\n{"ste')  # the disk was full
    forget_rows_after(path, step=75)
    assert path.read_text() == '{"step": 50}\n'
