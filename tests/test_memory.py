"""Memory: recomputed activations change nothing but the peak, estimates are near it, and its lack has a remedy."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from convlstm_vo.models.config import preset
from convlstm_vo.training import memory
from convlstm_vo.training.config import TrainConfig, TrainError
from convlstm_vo.training.learner import Learner
from convlstm_vo.training.memory import describe_memory, estimate_memory, explaining_lack_of_memory
from tests.small_runs import SMALL, small_config, train_small
from tests.trees import write_tree

CPU = torch.device("cpu")
LANES, TIME = 4, 5


def learn(config: TrainConfig) -> tuple[Tensor, list[Tensor], int]:
    """The loss of one batch, all gradients, and the bytes that were kept for the backward pass."""
    model = config.model
    kept: dict[int, torch.UntypedStorage] = {}
    learner = Learner(config)
    own = {weight.untyped_storage().data_ptr() for weight in learner.parameters()}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage
        return tensor

    generator = torch.Generator().manual_seed(0)
    shape = (LANES, TIME + 1, model.image_channels, model.image_height, model.image_width)
    images = torch.rand(shape, generator=generator) * 255
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss, _ = learner(images, torch.full((LANES, 4), 50.0), None, torch.zeros(LANES, TIME, 6))
    loss.backward()
    gradients = [weight.grad for weight in learner.parameters() if weight.grad is not None]
    return loss, gradients, sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize("name", ["tiny", "ascend"])
def test_recomputed_activations_change_only_the_memory(tmp_path: Path, name: str) -> None:
    channels = {"encoder_channels": [4, 4, 6, 6, 8, 8], "image_height": 64, "image_width": 128}
    model = SMALL if name == "tiny" else preset("ascend", **channels)
    config = small_config(tmp_path, model=model)
    loss, gradients, kept = learn(config)
    other, others, less = learn(dataclasses.replace(config, checkpoint_activations=True))
    torch.testing.assert_close(other, loss, rtol=1e-5, atol=0)
    torch.testing.assert_close(
        others, gradients, rtol=1e-3, atol=1e-4 * max(g.abs().max() for g in gradients).item()
    )
    assert less < 0.6 * kept


@pytest.mark.parametrize("recompute", [False, True])
def test_estimates_are_what_a_forward_pass_keeps(tmp_path: Path, recompute: bool) -> None:
    config = small_config(tmp_path, time_steps=TIME, checkpoint_activations=recompute)
    _, _, kept = learn(config)
    estimate = estimate_memory(config, LANES, CPU, "fp32")
    # Recomputed, the peak comes in the backward pass: what is kept, and all of one clip.
    one_clip = estimate_memory(
        dataclasses.replace(config, checkpoint_activations=False), 1, CPU, "fp32"
    ).activations
    assert estimate.activations == pytest.approx(kept + (one_clip if recompute else 0), rel=0.15)
    weights = sum(weight.numel() for weight in Learner(config).net.parameters())
    assert estimate.weights == weights * 20


def test_estimates_grow_and_shrink_as_memory_does(tmp_path: Path) -> None:
    config = small_config(tmp_path)
    one, two = (estimate_memory(config, lanes, CPU, "fp32") for lanes in (1, 2))
    half = estimate_memory(config, 2, CPU, "bf16")
    assert two.activations == 2 * one.activations > half.activations
    assert two.total == two.weights + two.activations + two.images + two.libraries


def test_too_little_memory_is_told_before_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = small_config(tmp_path)
    assert "Warning" not in describe_memory(config, 2, CPU, "fp32")
    monkeypatch.setattr(memory, "free_memory", lambda device: 1000)
    told = describe_memory(config, 2, CPU, "fp32")
    assert (
        "Memory: about" in told and "Warning: that may not suffice" in told and "--checkpoint-activations" in told
    )


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried"),
        RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 1 bytes."),
        MemoryError(),
    ],
)
def test_out_of_memory_names_the_options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fail(*args: Any) -> None:
        raise error

    monkeypatch.setattr(Learner, "forward", fail)
    tree = write_tree(tmp_path / "tree", {"00": 13, "01": 9, "02": 9})
    with pytest.raises(
        TrainError, match=r"--batch-size 2, --time-steps 3 and images of 48x160: lower --batch-size"
    ):
        train_small(small_config(tmp_path / "run"), tree)


def test_other_errors_stay_what_they_are(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="something else"), explaining_lack_of_memory(small_config(tmp_path)):
        raise RuntimeError("something else")


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_AS is a limit of Linux")
def test_a_process_that_runs_out_of_memory_ends_with_one_message(tmp_path: Path) -> None:
    """For real: an address space with room for 1.5 GiB more, and a batch that needs several."""
    tree = write_tree(tmp_path / "tree", {"00": 40})
    code = (
        "import resource, sys, torch, accelerate, cv2, scipy.signal\n"
        "from convlstm_vo import cli\n"
        "import convlstm_vo.training.run\n"
        "torch.set_num_threads(1)\n"
        "size = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (size + (3 << 29), size + (3 << 29)))\n"
        "cli.main(sys.argv[1:])\n"
    )
    small = ["--model.image-height", "192", "--model.image-width", "640", "--batch-size", "64", "--preset", "tiny"]
    files = ["--data", str(tree), "--out", str(tmp_path / "run"), "--cache", str(tmp_path / "cache")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CONVLSTM_VO_RESTARTED": "1"}
    command = [sys.executable, "-c", code, "train", *files, *small, "--device", "cpu", "--precision", "fp32"]
    ended = subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=120)
    assert ended.returncode == 2, ended.stderr
    assert "error: out of memory with --batch-size 64" in ended.stderr and "Traceback" not in ended.stderr
