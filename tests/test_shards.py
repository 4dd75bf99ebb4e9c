"""Shards: what goes in comes out, in order; windows, passes, resumed runs; memory; everything that can be wrong."""

from __future__ import annotations

import dataclasses
import functools
import http.server
import io
import json
import sys
import tarfile
import threading
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from convlstm_vo import cli
from convlstm_vo.sequences.base import Sequence
from convlstm_vo.sequences.kitti import KittiSequence, open_kitti
from convlstm_vo.training import packing
from convlstm_vo.training.cache import decode_sequence
from convlstm_vo.training.clips import ClipError
from convlstm_vo.training.config import TrainConfig, TrainError, WorldConfig
from convlstm_vo.training.loop import Trainer
from convlstm_vo.training.packing import Encoding, plan_shards, write_shards
from convlstm_vo.training.run import run_training
from convlstm_vo.training.shards import Piece, ShardError, find_shards, read_shard
from convlstm_vo.training.state import read_training_state
from convlstm_vo.training.stream import ShardStream
from tests.small_runs import small_config
from tests.trees import write_tree

NO_NUMBERS = json.dumps({"T_world_camera": [float("nan")] * 12, "intrinsics": [9.0] * 4}).encode()
SIZE = {"height": 48, "width": 160, "channels": 1}


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tree(tmp_path_factory.mktemp("tree"), {"00": 31, "01": 7, "02": 12, "03": 9})


@pytest.fixture(scope="module")
def packed(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five shards of at most twelve frames."""
    out = tmp_path_factory.mktemp("packed")
    write_shards(list(open_kitti(tree, ("00", "01", "02"))), out, frames=12)
    return out


@pytest.fixture
def copy(packed: Path, tmp_path: Path) -> Path:
    """Shards that a test may damage."""
    for path in packed.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def stream(folder: Path, window: int = 2, seed: int = 0) -> ShardStream:
    return ShardStream(*find_shards(str(folder)), window, seed=seed, **SIZE, workers=1)


@pytest.mark.parametrize("encoding", ["png", "npy", "jpg"])
def test_what_goes_in_comes_out(tree: Path, tmp_path: Path, encoding: Encoding) -> None:
    sequences: list[Sequence] = list(open_kitti(tree, ("00", "01", "02")))
    write_shards(sequences, tmp_path, frames=12, encoding=encoding)
    folder, shards = find_shards(str(tmp_path))
    expected = {s.name: decode_sequence(s, **SIZE) for s in sequences}
    for shard in shards:
        for piece, found in zip(shard.pieces, read_shard(folder, shard, **SIZE), strict=True):
            whole, part = expected[piece.sequence], slice(piece.start, piece.stop)
            difference = found.images.astype(float) - whole.images[part]
            assert np.abs(difference).max() <= (12 if encoding == "jpg" else 0)
            np.testing.assert_array_equal(found.T_world_camera, whole.T_world_camera[part])
            np.testing.assert_array_equal(found.intrinsics, whole.intrinsics)


def test_every_motion_is_packed_once(tree: Path) -> None:
    sequences: list[Sequence] = list(open_kitti(tree))
    for frames in (2, 3, 12, 500):
        shards = plan_shards(sequences, frames)
        assert max(sum(shard.lengths) for shard in shards) <= frames
        motions = [(p.sequence, i) for shard in shards for p in shard.pieces for i in range(p.start, p.stop - 1)]
        assert motions == [(s.name, i) for s in sequences for i in range(len(s) - 1)]
    assert plan_shards(sequences, 500)[0].pieces[1] == Piece("01", 0, 7)
    assert [shard.lengths for shard in plan_shards(sequences[:2], 12)] == [(11,), (11,), (11,), (7,)]


def test_smaller_frames_have_their_intrinsics(tree: Path, tmp_path: Path) -> None:
    write_shards([KittiSequence(tree, "01")], tmp_path, size=(24, 80))
    (found,) = read_shard(*_first(tmp_path), height=24, width=80, channels=1)
    expected = decode_sequence(KittiSequence(tree, "01"), height=24, width=80, channels=1)
    np.testing.assert_array_equal(found.images, expected.images)
    np.testing.assert_allclose(found.intrinsics, expected.intrinsics)


def _first(folder: Path) -> tuple[str, Any]:
    where, shards = find_shards(str(folder))
    return where, shards[0]


def test_the_same_frames_give_the_same_bytes(tree: Path, packed: Path, tmp_path: Path) -> None:
    write_shards(list(open_kitti(tree, ("00", "01", "02"))), tmp_path, frames=12, threads=3)
    for path in packed.iterdir():
        assert (tmp_path / path.name).read_bytes() == path.read_bytes()


def test_packing_goes_on_where_it_stopped(
    tree: Path, packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sequences, written = list(open_kitti(tree, ("00", "01", "02"))), []
    original = packing._write_shard

    def interrupted(path: Path, *rest: Any) -> None:
        if path.name == "000003.tar":
            raise KeyboardInterrupt
        written.append(path.name)
        original(path, *rest)

    monkeypatch.setattr(packing, "_write_shard", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_shards(sequences, tmp_path, frames=12, threads=1)
    with pytest.raises(ShardError, match=r"000003\.tar: is missing; was packing interrupted"):
        find_shards(str(tmp_path))
    monkeypatch.setattr(packing, "_write_shard", lambda *a: (written.append(a[0].name), original(*a)))
    write_shards(sequences, tmp_path, frames=12)
    assert sorted(written) == sorted(set(written)) == [f"{i:06d}.tar" for i in range(len(written))]
    for path in packed.iterdir():
        assert (tmp_path / path.name).read_bytes() == path.read_bytes()


def test_windows_follow_a_seed_and_show_every_shard_once_a_pass(packed: Path) -> None:
    count = len(find_shards(str(packed))[1])
    shown = stream(packed, window=1)
    epochs = [range(turn * count, (turn + 1) * count) for turn in (0, 1)]
    passes = [[shard.name for epoch in numbers for shard in shown.shards(epoch)] for numbers in epochs]
    assert passes[0] != passes[1]
    assert set(passes[0]) == set(passes[1]) and len(passes[0]) == len(set(passes[0])) == count
    assert stream(packed).shards(4) == shown.shards(8) + shown.shards(9)
    assert any(stream(packed, 1, seed=1).shards(e) != shown.shards(e) for e in range(3))
    assert stream(packed, window=100).window == count


def test_frames_of_a_window_are_in_order(packed: Path) -> None:
    shown = stream(packed)
    try:
        for epoch in (0, 1, 5):
            sequences = shown(epoch)
            assert tuple(map(len, sequences)) == shown.lengths(epoch)
            for sequence in sequences:  # 1 m forward a frame
                steps = np.linalg.norm(np.diff(sequence.T_world_camera[:, :3, 3], axis=0), axis=1)
                np.testing.assert_allclose(steps, 1, atol=1e-3)
    finally:
        shown.close()


def test_memory_is_that_of_two_windows(tree: Path, tmp_path: Path) -> None:
    size = {"height": 384, "width": 640, "channels": 1}
    write_shards([KittiSequence(tree, "00")], tmp_path, frames=3)
    shown = ShardStream(*find_shards(str(tmp_path)), 1, seed=0, **size, workers=1)
    one, total = 3 * 384 * 640, 15 * 3 * 384 * 640
    tracemalloc.start()
    try:
        for epoch in range(15):
            shown(epoch)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
        shown.close()
    assert peak < 3.5 * one < total / 3  # two windows, and the one that is being replaced


# --- training -----------------------------------------------------------------------------------------------------


def sharded(out: Path, packed: Path, tree: Path, **changes: Any) -> TrainConfig:
    options = {"epochs": 7, "save_steps": 1, "seed": 3, "curriculum_epochs": 3} | changes
    data = {"data": tree, "validate": ("03",), "cache": out / "cache", "shards": str(packed), "shard_window": 2}
    return small_config(out, **data, **options)


def test_an_interrupted_run_resumes_to_the_same_weights(
    tree: Path, packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within an epoch of the second pass over the shards; equal bit for bit."""
    whole = sharded(tmp_path / "whole", packed, tree)
    run_training(whole)
    original = Trainer.train_step

    def interrupt(self: Trainer, batch: Any) -> float:
        if (self.progress.epoch, self.progress.step) == (4, 1):
            raise KeyboardInterrupt
        return original(self, batch)

    cut = dataclasses.replace(whole, out=tmp_path / "cut")
    monkeypatch.setattr(Trainer, "train_step", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run_training(cut)
    monkeypatch.setattr(Trainer, "train_step", original)
    run_training(dataclasses.replace(cut, resume=True))
    states = [read_training_state(config.out / "checkpoints" / "last") for config in (whole, cut)]
    assert states[0].pop("run") == states[1].pop("run")
    torch.testing.assert_close(states[1], states[0], rtol=0, atol=0)


def test_resuming_with_other_shards_is_refused(tree: Path, packed: Path, tmp_path: Path) -> None:
    config = sharded(tmp_path, packed, tree, epochs=1)
    run_training(config)
    with pytest.raises(TrainError, match="shard_window was 2, now 3"):
        run_training(dataclasses.replace(config, resume=True, shard_window=3))
    with pytest.raises(TrainError, match=r"other sequences or options: shards was \w+, now \w+"):
        run_training(dataclasses.replace(config, resume=True, shards=f"{packed}/00000[0-3].tar"))


def test_the_commands(tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "shards"
    cli.main(["shard", "--data", str(tree), "--out", str(out), "--frames", "20", "--size", "48", "160"])
    assert str(out) in "".join(capsys.readouterr().out.split())
    model = ["--preset", "tiny", "--model.image-height", "48", "--model.image-width", "160"]
    run = ["--out", str(tmp_path / "run"), "--epochs", "2", "--batch-size", "2", "--device", "cpu"]
    cli.main(["train", "--shards", str(out), "--shard-window", "1", *model, *run, "--precision", "fp32"])
    assert "an epoch shows 1 of them" in " ".join(capsys.readouterr().out.split())
    assert (tmp_path / "run" / "checkpoints" / "last" / "model.safetensors").is_file()


@pytest.fixture
def server(packed: Path) -> Iterator[str]:
    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=packed)) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()


@pytest.mark.parametrize("scheme", ["http", "pipe"])
def test_shards_come_from_elsewhere_too(packed: Path, server: str, scheme: str) -> None:
    folder, shards = find_shards(server if scheme == "http" else f"pipe:cat {packed}/{{}}")
    for expected, found in zip(
        read_shard(str(packed), shards[1], **SIZE), read_shard(folder, shards[1], **SIZE), strict=True
    ):
        np.testing.assert_array_equal(found.images, expected.images)
        np.testing.assert_array_equal(found.T_world_camera, expected.T_world_camera)


# --- what can be wrong --------------------------------------------------------------------------------------------


def rewrite(path: Path, *, without: str = "", content: dict[str, bytes] | None = None) -> None:
    """A shard again, without one of its files or with other content in some."""
    with tarfile.open(path) as old:
        files = {member.name: old.extractfile(member).read() for member in old}  # type: ignore[union-attr]
    with tarfile.open(path, "w") as new:
        for name, data in ({n: d for n, d in files.items() if n != without} | (content or {})).items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            new.addfile(info, io.BytesIO(data))


def test_a_missing_pose_is_named(copy: Path) -> None:
    rewrite(copy / "000000.tar", without="00/000004.json")
    with pytest.raises(ShardError, match=r"000000\.tar, frame 00/000004: has no pose .*pack it again"):
        read_shard(*_first(copy), **SIZE)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"00/000004.json": b"{}"}, r"frame 00/000004: no pose that can be read \(KeyError"),
        ({"00/000004.json": b'{"T_world_camera": [1, 2], "intrinsics": [1, 1, 1, 1]}'}, "no pose that can be read"),
        (
            {
                "00/000004.json": json.dumps(
                    {"T_world_camera": [float("nan")] * 12, "intrinsics": [9.0] * 4}
                ).encode()
            },
            "its pose is not 12 finite numbers",
        ),
        ({"00/000004.png": b"no image"}, "frame 00/000004: the image is damaged"),
        ({"00/000099.png": b"", "00/000099.json": b""}, r"holds 00/000099, of which index\.json knows nothing"),
    ],
)
def test_damaged_content_is_named(copy: Path, content: dict[str, bytes], message: str) -> None:
    rewrite(copy / "000000.tar", content=content)
    with pytest.raises(ShardError, match=message):
        read_shard(*_first(copy), **SIZE)


def test_a_missing_image_is_named(copy: Path) -> None:
    rewrite(copy / "000000.tar", without="00/000004.png")
    with pytest.raises(ShardError, match=r"frame 00/000004: has no image .*is it cut short"):
        read_shard(*_first(copy), **SIZE)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.5, 0.77])
def test_a_shard_that_is_cut_short_is_named(copy: Path, tree: Path, share: float) -> None:
    for path in copy.glob("*.tar"):
        content = path.read_bytes()
        path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(ShardError, match=r"\d{6}\.tar: .*cut short"):
        run_training(sharded(copy / "run", copy, tree))


def test_an_end_between_two_frames_is_found(copy: Path) -> None:
    for name in ("00/000010.json", "00/000010.png"):
        rewrite(copy / "000000.tar", without=name)
    with pytest.raises(ShardError, match="the end where frame 00/000010 should stand"):
        read_shard(*_first(copy), **SIZE)


def test_sources_that_are_not_there(packed: Path, tmp_path: Path, server: str) -> None:
    with pytest.raises(ShardError, match=r"/7\*\.tar: no shard has such a name; .* holds 000000\.tar to"):
        find_shards(f"{packed}/7*.tar")
    assert len(find_shards(f"{packed}/00000[01].tar")[1]) == 2
    with pytest.raises(ShardError, match=r"index\.json: no such file; --shards names a folder"):
        find_shards(str(tmp_path / "nowhere"))
    with pytest.raises(ShardError, match=r"nothing/index\.json: cannot be read"):
        find_shards(f"{server}/nothing")
    with pytest.raises(ShardError, match=r"a pipe needs \{\} where"):
        find_shards("pipe:cat index.json")
    (tmp_path / "index.json").write_text('{"format": 99}')
    with pytest.raises(ShardError, match="format 99, but this version reads 1"):
        find_shards(str(tmp_path))
    (tmp_path / "index.json").write_text("half of")
    with pytest.raises(ShardError, match="cannot be read as the index"):
        find_shards(str(tmp_path))


def test_what_cannot_be_packed(tree: Path, packed: Path, tmp_path: Path) -> None:
    with pytest.raises(ShardError, match="shards of other data or options are there"):
        write_shards([KittiSequence(tree, "01")], packed)
    with pytest.raises(ShardError, match="two sequences have the same name"):
        write_shards([KittiSequence(tree, "01")] * 2, tmp_path)
    blind = KittiSequence(tree, "01")
    blind.trajectory = None
    with pytest.raises(ShardError, match="sequence 01: has no ground-truth poses"):
        write_shards([blind], tmp_path)
    with pytest.raises(ShardError, match="--frames 1: a shard holds at least 2"):
        packing.ShardOptions(data=tree, out=tmp_path, frames=1)


def test_options_that_contradict(tree: Path, packed: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainError, match="--sequences: not with --shards"):
        TrainConfig(shards="x", sequences=("00",))
    with pytest.raises(TrainError, match=r"--world\.drives: not with --shards"):
        TrainConfig(shards="x", world=WorldConfig(drives=2))
    with pytest.raises(ClipError, match="shorten the clips"):
        run_training(sharded(tmp_path, packed, tree, time_steps=30, curriculum_epochs=0))


def test_a_missing_library_is_named(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "webdataset", None)
    with pytest.raises(ShardError, match=r"pip install 'convlstm-vo\[shards\]'"):
        find_shards(str(packed))
