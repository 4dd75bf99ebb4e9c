"""A training of a second or two, for tests that start it in processes of their own, kill it, or run two of it."""

from __future__ import annotations

import contextlib
import dataclasses
import multiprocessing
import os
import socket
from collections.abc import Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch

from convlstm_vo.models.config import ModelConfig, preset
from convlstm_vo.sequences.kitti import open_kitti
from convlstm_vo.training.cache import DecodedSequence, decode_sequence
from convlstm_vo.training.config import TrainConfig
from convlstm_vo.training.log import TrainingLog
from convlstm_vo.training.loop import train

SMALL: ModelConfig = preset(
    "tiny", image_height=48, image_width=160, encoder_channels=(8, 8, 8, 8, 8), hidden_channels=8
)


def small_config(out: Path, **changes: Any) -> TrainConfig:
    """Two lanes, clips of three motions, states carried over two clips."""
    defaults = TrainConfig(
        out=out,
        model=SMALL,
        batch_size=2,
        time_steps=3,
        carry_clips=2,
        epochs=3,
        lr=3e-3,
        warmup_steps=2,
        precision="fp32",
        device="cpu",
        ema=0.9,
        keep_epochs=0,
    )
    return dataclasses.replace(defaults, **changes)


def decoded(tree: Path) -> list[DecodedSequence]:
    """The sequences of a tree at the size of `SMALL`."""
    return [decode_sequence(s, height=48, width=160, channels=1, threads=1) for s in open_kitti(tree)]


def train_small(config: TrainConfig, tree: Path, *, double: bool = False) -> Path:
    """Train on all sequences but the last two, validate on those; in float64 where sums in another order matter."""
    torch.set_num_threads(1)
    *training, one, other = decoded(tree)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64 if double else before)
    try:
        return train(config, training, [one, other], TrainingLog(config.out, quiet=True))
    finally:
        torch.set_default_dtype(before)


def start(target: Any, *args: Any) -> BaseProcess:
    """Start a function in a process of its own; the first one imports torch, the others find it imported."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.small_runs"])
    process = context.Process(target=target, args=args)
    process.start()
    return process


def train_as_one_of(rank: int, processes: int, port: int, config: TrainConfig, tree: Path) -> None:
    """What `accelerate launch` sets up for each of its processes, and the training in float64."""
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "ACCELERATE_USE_CPU": "true",
    }
    try:
        train_small(config, tree, double=True)
    finally:
        torch.distributed.destroy_process_group()


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@contextlib.contextmanager
def killed_at(run: type, step: int) -> Iterator[None]:
    """Within the block a `WeighRun` or `FlowRun` dies before this update; it has to."""
    update = run.update

    def dies(self: Any) -> None:
        if self.step == step:
            raise KeyboardInterrupt
        update(self)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(run, "update", dies)
        yield
