"""Checkpoints: what was saved comes back to the last bit, and nothing that goes wrong leaves half of one."""

from __future__ import annotations

import errno
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from convlstm_vo.models import checkpoint
from convlstm_vo.models.checkpoint import CheckpointError, load_checkpoint, load_weights, save_checkpoint
from convlstm_vo.models.config import preset
from convlstm_vo.models.network import OdometryNet

_SIZE = {"image_height": 32, "image_width": 48}


def make_net(seed: int = 0, **changes) -> OdometryNet:
    return OdometryNet(preset("tiny", **{**_SIZE, **changes}), seed=seed)


def same_weights(net: OdometryNet, other: OdometryNet) -> bool:
    pairs = zip(net.state_dict().values(), other.state_dict().values(), strict=True)
    return all(torch.equal(own, others) for own, others in pairs)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    save_checkpoint(tmp_path / "net", make_net())
    return tmp_path / "net"


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def no_space(*args: object, **kwargs: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("tiny", {"motion_scale": (1, 2, 3, 4, 5, 6)}),
        ("ascend", {**_SIZE, "encoder_channels": (2, 2, 3, 3, 4, 4)}),
        ("deepvo", {**_SIZE, "encoder_channels": (2, 2, 3, 3, 4, 4), "hidden_channels": 5}),
    ],
)
def test_what_was_saved_comes_back(tmp_path: Path, name: str, changes: dict) -> None:
    net = OdometryNet(preset(name, **changes)).to(memory_format=torch.channels_last)
    save_checkpoint(tmp_path / "net", net)
    loaded = load_checkpoint(tmp_path / "net")
    assert same_weights(net, loaded)
    assert loaded.config == net.config
    assert not loaded.training
    assert torch.equal(loaded.motion_scale, net.motion_scale)
    assert names(tmp_path / "net") == ["config.json", "model.safetensors"]
    assert names(tmp_path) == ["net"]


def test_saving_again_replaces(saved: Path) -> None:
    save_checkpoint(saved, make_net(seed=2), extra_files={"training.json": lambda path: path.write_text("{}")})
    assert same_weights(load_checkpoint(saved), make_net(seed=2))
    assert names(saved) == ["config.json", "model.safetensors", "training.json"]
    save_checkpoint(saved, make_net(seed=3))
    assert names(saved) == ["config.json", "model.safetensors"]
    assert names(saved.parent) == ["net"]


def test_missing_parents_are_made_and_an_empty_folder_is_filled(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "a" / "b", make_net())
    (tmp_path / "c").mkdir()
    save_checkpoint(tmp_path / "c", make_net())
    assert same_weights(load_checkpoint(tmp_path / "a" / "b"), load_checkpoint(tmp_path / "c"))


@pytest.mark.parametrize("where", ["weights", "extra file", "flush", "torch.save"])
def test_full_disk_leaves_the_old_checkpoint(saved: Path, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    def broken_torch_save(path: Path) -> None:
        raise RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed")

    extra = {"extra file": {"state.pt": no_space}, "torch.save": {"state.pt": broken_torch_save}}.get(where)
    if where == "weights":
        monkeypatch.setattr(checkpoint, "save_file", no_space)
    if where == "flush":
        monkeypatch.setattr(checkpoint.os, "fsync", no_space)
    with pytest.raises(CheckpointError, match=r"net: checkpoint cannot be written \(.*is the disk full"):
        save_checkpoint(saved, make_net(seed=5), extra_files=extra)
    assert same_weights(load_checkpoint(saved), make_net())
    assert names(saved.parent) == ["net"]


def test_failed_rename_brings_the_old_checkpoint_back(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rename = Path.rename

    def fails_into_place(self: Path, target: Path) -> Path:
        if target.name == "net" and not self.name.endswith(".previous"):
            no_space()
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fails_into_place)
    with pytest.raises(CheckpointError, match="cannot be written"):
        save_checkpoint(saved, make_net(seed=5))
    monkeypatch.undo()
    assert same_weights(load_checkpoint(saved), make_net())
    assert names(saved.parent) == ["net"]


def test_interruption_leaves_the_old_checkpoint(saved: Path) -> None:
    def interrupted(path: Path) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(saved, make_net(seed=5), extra_files={"state.pt": interrupted})
    assert same_weights(load_checkpoint(saved), make_net())
    assert names(saved.parent) == ["net"]


def test_folders_of_something_else_are_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.tex").write_text("years of work")
    with pytest.raises(CheckpointError, match="holds other files than a checkpoint"):
        save_checkpoint(tmp_path / "thesis", make_net())
    with pytest.raises(CheckpointError, match="is a file"):
        save_checkpoint(tmp_path / "thesis" / "chapter1.tex", make_net())
    assert (tmp_path / "thesis" / "chapter1.tex").read_text() == "years of work"


def test_missing_parts_are_named(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"nowhere: no checkpoint there \(config.json is missing\)"):
        load_checkpoint(tmp_path / "nowhere")
    (saved / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model.safetensors: missing"):
        load_checkpoint(saved)


def test_an_interrupted_rename_is_explained(saved: Path) -> None:
    saved.rename(saved.with_name(".net.previous"))
    with pytest.raises(CheckpointError, match=r"interrupted save left .*\.net\.previous: rename it"):
        load_checkpoint(saved)


@pytest.mark.parametrize("keep", [0, 4, 100, 0.5, -1])
def test_damaged_weights_are_named(saved: Path, keep: float) -> None:
    path = saved / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[: int(keep * len(data)) if keep == 0.5 else int(keep)])
    with pytest.raises(CheckpointError, match=r"model.safetensors: damaged or cut short"):
        load_checkpoint(saved)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not a JSON file"),
        ("[1]", "must hold an object"),
        ("{}", "format None, but this version reads format 1"),
        ('{"format": 99, "model": {}}', "format 99"),
        ('{"format": 1, "model": {"hiden_channels": 3}}', "unknown key 'hiden_channels'.*hidden_channels"),
        ('{"format": 1, "model": {"image_channels": 2}}', "image_channels is 2"),
    ],
)
def test_damaged_config_is_named(saved: Path, text: str, message: str) -> None:
    (saved / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(saved)


def test_weights_of_another_network_are_refused(saved: Path) -> None:
    header = json.loads((saved / "config.json").read_text())
    header["model"]["hidden_channels"] = 40
    (saved / "config.json").write_text(json.dumps(header))
    with pytest.raises(CheckpointError, match=r"tensor 'cell.conv.weight' is of shape.*do not belong together"):
        load_checkpoint(saved)


def test_surplus_and_missing_tensors_are_refused(saved: Path) -> None:
    path = saved / "model.safetensors"
    tensors = load_file(path)
    save_file({**tensors, "extra": torch.zeros(1)}, path)
    with pytest.raises(CheckpointError, match=r"'extra' is of shape .* there, but absent"):
        load_checkpoint(saved)
    save_file({name: tensor for name, tensor in tensors.items() if name != "head.linear.bias"}, path)
    with pytest.raises(CheckpointError, match=r"'head.linear.bias' is absent there"):
        load_checkpoint(saved)


def test_load_weights_into_the_same_network(saved: Path) -> None:
    net = make_net(seed=7, image_height=64, head_dropout=0.1)  # same weights at another size, other dropout
    load_weights(net, saved)
    assert same_weights(net, make_net())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cell": "convgru"}, "another architecture: cell is 'convlstm' there, but 'convgru' in this network"),
        ({"hidden_channels": 16}, "hidden_channels is 48 there, but 16.*build the network with hidden_channels=48"),
        ({"activation": "relu"}, "activation is 'leaky_relu' there"),
    ],
)
def test_load_weights_names_the_first_difference(saved: Path, changes: dict, message: str) -> None:
    net = make_net(seed=7, **changes)
    with pytest.raises(CheckpointError, match=message):
        load_weights(net, saved)
    assert same_weights(net, make_net(seed=7, **changes))


def test_image_size_that_binds_is_named(tmp_path: Path) -> None:
    options = {"encoder_channels": (2, 2, 3, 3, 4, 4)}
    save_checkpoint(tmp_path / "net", OdometryNet(preset("ascend", image_height=64, image_width=64, **options)))
    other = OdometryNet(preset("ascend", image_height=64, image_width=128, **options))
    with pytest.raises(CheckpointError, match=r"'cell.peepholes' is of shape \(3, 12, 1, 1\).*image size"):
        load_weights(other, tmp_path / "net")


def test_checkpoints_can_be_moved(saved: Path, tmp_path: Path) -> None:
    shutil.move(saved, tmp_path / "elsewhere")
    assert same_weights(load_checkpoint(tmp_path / "elsewhere"), make_net())
