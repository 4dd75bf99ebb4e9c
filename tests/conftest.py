"""Fixtures shared by all tests."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from convlstm_vo.models import kernels

# How long an example takes says more about a shared machine than about the code.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    """Small networks gain nothing from threads, and threads that wait for each other stall on a busy machine."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def _ctrl_c_works() -> None:
    """A shell starts what runs in the background with SIGINT ignored, and all processes below inherit that."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with real KITTI frames and trajectories that stands beside a checkout on our machines."""
    folder = Path(__file__).resolve().parents[2] / "shared"
    if not (folder / "kitti").is_dir():
        pytest.skip(f"{folder} is missing: real KITTI data is not part of the repository (licence CC BY-NC-SA)")
    return folder


@pytest.fixture
def by_torch(monkeypatch: pytest.MonkeyPatch):
    """Runs something once more without the kernels."""

    def run(call):
        with monkeypatch.context() as patch:
            patch.setattr(kernels, "usable", lambda *tensors, **options: False)
            return call()

    return run
