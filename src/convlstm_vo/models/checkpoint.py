"""Checkpoints: a folder with ``config.json`` and ``model.safetensors``, and whatever training adds.

Nobody ever finds half of one: a checkpoint is written into a folder beside its place, and then renamed.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save, save_file
from torch import Tensor

from convlstm_vo import config as plain
from convlstm_vo.errors import ConvlstmVoError
from convlstm_vo.geometry.files import umask
from convlstm_vo.models.config import ModelConfig, ModelError
from convlstm_vo.models.geometric import GeometricNet
from convlstm_vo.models.network import OdometryNet

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
_FORMAT = 1

# Settings that may differ between a checkpoint and the network it is loaded into: the same weights mean the same
# with another image size (where the parts take it, which their shapes tell) or with other dropout.
_FREE_KEYS = {
    "preset",
    "camera_height",
    "image_height",
    "image_width",
    "encoder_dropout",
    "cell_dropout",
    "head_dropout",
}


class CheckpointError(ConvlstmVoError):
    """A checkpoint that cannot be read, written, or loaded into this network."""


def save_checkpoint(
    folder: Path, net: Network, *, extra_files: dict[str, Callable[[Path], None]] | None = None
) -> None:
    """Write a checkpoint, in place of the one that may stand there.

    Args:
        folder: where; an existing folder must be a checkpoint or empty.
        net: what to save.
        extra_files: further files by name, each with a function that writes it to the path it is given.

    Raises:
        CheckpointError: a full disk, missing rights, or a folder of something else; what was there stays.
    """
    folder = Path(folder).resolve()
    _check_replaceable(folder)
    try:
        with _replacing_folder(folder) as temporary:
            header = {"format": _FORMAT, "model": net.config.to_dict()}
            (temporary / CONFIG_FILE).write_text(json.dumps(header, indent=2) + "\n", encoding="utf-8")
            save_file(_plain_tensors(net), temporary / WEIGHTS_FILE)
            for name, write in (extra_files or {}).items():
                write(temporary / name)
            _flush_to_disk(temporary)
    # torch.save reports a full disk as RuntimeError, safetensors as an error of its own.
    except (OSError, SafetensorError, RuntimeError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise CheckpointError(f"{folder}: checkpoint cannot be written ({reason}); is the disk full?") from error


Network = OdometryNet | GeometricNet
DEFAULT_CHECKPOINT = Path(__file__).parent.parent / "weights"  # shipped with the package


def build(config: ModelConfig, *, seed: int | None = None) -> Network:
    """The network of a configuration, untrained."""
    return (GeometricNet if config.encoder == "flow" else OdometryNet)(config, seed=seed)


def load_checkpoint(folder: Path = DEFAULT_CHECKPOINT, *, device: str | torch.device = "cpu") -> Network:
    """The network of a checkpoint, in eval mode.

    Raises:
        CheckpointError: a missing or damaged file, or weights that do not belong to the configuration.
        ModelError: a device that is not there.
    """
    folder = Path(folder)
    net = build(read_config(folder))
    _load_tensors(net, _read_tensors(folder), folder)
    try:
        torch.ones(1, device=device).item()
        return net.to(device).eval()
    except (AssertionError, RuntimeError) as error:  # torch has one of these for each kind of device
        reason = str(error).splitlines()[0]
        raise ModelError(f"device '{device}' cannot be used ({reason}); cpu always can") from None


def load_weights(net: Network, folder: Path) -> None:
    """Load a checkpoint's weights into a network of the same architecture.

    Raises:
        CheckpointError: a missing or damaged file, or another architecture (the first difference is named).
    """
    folder = Path(folder)
    saved, own = read_config(folder).to_dict(), net.config.to_dict()
    for key, value in own.items():
        if key not in _FREE_KEYS and saved[key] != value:
            raise CheckpointError(
                f"{folder}: checkpoint of another architecture: {key} is {saved[key]!r} there, but {value!r} in "
                f"this network; build the network with {key}={saved[key]!r}, or train a new checkpoint"
            )
    _load_tensors(net, _read_tensors(folder), folder)


def read_config(folder: Path) -> ModelConfig:
    """The configuration of a checkpoint.

    Raises:
        CheckpointError: no checkpoint there, or a damaged ``config.json``.
    """
    path = Path(folder) / CONFIG_FILE
    if not path.is_file():
        raise CheckpointError(f"{folder}: no checkpoint there ({CONFIG_FILE} is missing){_hint(Path(folder))}")
    try:
        header = plain.read_json(path)
        if header.get("format") != _FORMAT or not isinstance(header.get("model"), dict):
            raise CheckpointError(
                f"{path}: format {header.get('format')!r}, but this version reads format {_FORMAT}: "
                "use the version that wrote it, or train again"
            )
        return ModelConfig.from_dict(header["model"], source=str(path))
    except (plain.ConfigError, ModelError) as error:
        raise CheckpointError(str(error)) from None


def weights_sha256(net: Network) -> str:
    """SHA-256 of a network's weights, which is that of the ``model.safetensors`` that `save_checkpoint` writes."""
    return hashlib.sha256(save(_plain_tensors(net))).hexdigest()


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    path = folder / WEIGHTS_FILE
    try:
        return load_file(path)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: missing; a checkpoint has {CONFIG_FILE} and {WEIGHTS_FILE}") from None
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path}: damaged or cut short ({error}); copy it again or train again") from None


def _load_tensors(net: Network, tensors: dict[str, Tensor], folder: Path) -> None:
    """Strictly: the same names and shapes on both sides."""
    path = folder / WEIGHTS_FILE
    remedy = (
        f"{CONFIG_FILE} and {WEIGHTS_FILE} do not belong together, the image size differs, or another version "
        "wrote them (use that one, or train again)"
    )
    expected = net.state_dict()
    for name in [*expected, *tensors]:
        own, saved = _shape(expected.get(name)), _shape(tensors.get(name))
        if own != saved:
            raise CheckpointError(f"{path}: tensor '{name}' is {saved} there, but {own} in this network; {remedy}")
    net.load_state_dict(tensors)


def _shape(tensor: Tensor | None) -> str:
    return "absent" if tensor is None else f"of shape {tuple(tensor.shape)}"


def _plain_tensors(net: Network) -> dict[str, Tensor]:
    """Weights as safetensors takes them: on the CPU, in rows (a network may run with channels last)."""
    return {name: tensor.detach().cpu().contiguous() for name, tensor in net.state_dict().items()}


def _check_replaceable(folder: Path) -> None:
    """Replacing removes what is there: never do that to a folder of something else."""
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"{folder}: is a file, but a checkpoint is a folder; choose another name")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / CONFIG_FILE).is_file():
        raise CheckpointError(f"{folder}: holds other files than a checkpoint; choose an empty or new folder")


def _previous(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.previous")


def _hint(folder: Path) -> str:
    """After a power cut between two renames the old checkpoint has this name."""
    previous = _previous(folder.resolve())
    return f"; an interrupted save left {previous}: rename it" if previous.is_dir() else ""


@contextmanager
def _replacing_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder beside ``folder``, put in its place when the block ends without an error."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    previous = _previous(folder)
    try:
        yield temporary
        temporary.chmod(0o777 & ~umask())
        shutil.rmtree(previous, ignore_errors=True)
        if folder.is_dir():
            folder.rename(previous)
        try:
            temporary.rename(folder)
        except OSError:
            if previous.is_dir():
                previous.rename(folder)
            raise
        shutil.rmtree(previous, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _flush_to_disk(folder: Path) -> None:
    """Some file systems report a full disk only here."""
    for path in folder.iterdir():
        with path.open("r+b") as stream:  # Windows flushes only what may be written
            os.fsync(stream.fileno())
