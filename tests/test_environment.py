"""What our processes find in their environment: our settings where the user has none."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys

import pytest
import torch

from convlstm_vo.environment import (
    _seconds_of_convolutions,
    bfloat16_pays,
    set_for_streaming,
    training_environment,
)
from convlstm_vo.models.geometric import GeometricNet
from convlstm_vo.odometer import VisualOdometry
from convlstm_vo.training.flow import FlowConfig
from convlstm_vo.world.sequence import KITTI_CAMERA

SETTINGS = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "100000000000",
    "MALLOC_TOP_PAD_": "500000000",
    "GOMP_SPINCOUNT": "3000",
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
}


@pytest.mark.parametrize("name", SETTINGS)
def test_what_the_user_has_set_stays_and_the_others_are_added(name: str) -> None:
    own = "glibc.malloc.hugetlb=0" if name == "GLIBC_TUNABLES" else "1"
    found = training_environment({name: own, "HOME": "/home/me"})
    assert {key: found[key] for key in SETTINGS} == SETTINGS | {name: own}
    assert found["HOME"] == "/home/me"


def test_a_user_who_says_how_to_wait_is_heard() -> None:
    assert "GOMP_SPINCOUNT" not in training_environment({"OMP_WAIT_POLICY": "PASSIVE"})


def test_other_tunables_are_kept_beside_ours() -> None:
    found = training_environment({"GLIBC_TUNABLES": "glibc.malloc.arena_max=2"})
    assert found["GLIBC_TUNABLES"] == "glibc.malloc.arena_max=2:glibc.malloc.hugetlb=1"


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has the allocator that is set here")
def test_the_process_starts_again_once() -> None:
    code = (
        "import json, os\n"
        "from convlstm_vo import environment\n"
        "print('started', flush=True)\n"
        "environment.restart_for_training()\n"
        "print(json.dumps(dict(os.environ)))\n"
    )
    ours = {*SETTINGS, "CONVLSTM_VO_RESTARTED", "PYTEST_VERSION", "PYTEST_CURRENT_TEST"}
    environment = {key: value for key, value in os.environ.items() if key not in ours}
    environment["MALLOC_TRIM_THRESHOLD_"] = "1000000"
    command = [sys.executable, "-c", code]
    shown = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=60).stdout
    *starts, found = shown.splitlines()
    assert starts == ["started", "started"]
    assert SETTINGS.items() - json.loads(found).items() == {("MALLOC_TRIM_THRESHOLD_", "100000000000")}


@pytest.mark.parametrize(
    ("loaded", "own", "expected"),
    [
        (False, {}, "2000"),
        (False, {"GOMP_SPINCOUNT": "7"}, "7"),
        (False, {"OMP_WAIT_POLICY": "PASSIVE"}, None),
        (True, {}, None),
    ],
)
def test_single_frames_wait_briefly(monkeypatch, loaded, own, expected) -> None:
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    if loaded:
        monkeypatch.setitem(sys.modules, "torch", sys)
    monkeypatch.setattr(os, "environ", dict(own))
    set_for_streaming()
    assert os.environ.get("GOMP_SPINCOUNT") == expected


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library's allocator is left alone")
@pytest.mark.parametrize(("own", "again"), [({}, False), ({"MALLOC_TRIM_THRESHOLD_": "131072"}, True)])
def test_memory_of_a_frame_is_kept_for_the_next(own, again) -> None:
    code = (
        "import resource\n"
        "import numpy as np\n"
        "from convlstm_vo.environment import set_for_streaming\n"
        "set_for_streaming()\n"
        "def faults():\n"
        "    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "    frame = [np.ones(1 << 19) for _ in range(8)]\n"
        "    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before\n"
        "print(*(faults() for _ in range(4)))\n"
    )
    environment = {key: value for key, value in os.environ.items() if not key.startswith("MALLOC_")} | own
    command = [sys.executable, "-c", code]
    shown = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=60).stdout
    first, *_, last = map(int, shown.split())
    assert first > 100 and (last > first / 2) == again, shown


def test_run_sets_it_before_torch_is_loaded() -> None:
    code = (
        "import os, sys\n"
        "from convlstm_vo import cli\n"
        "try:\n"
        "    cli.main(['run', '/nowhere'])\n"
        "finally:\n"
        "    print(os.environ.get('GOMP_SPINCOUNT'), 'torch' in sys.modules)\n"
    )
    environment = {
        key: value for key, value in os.environ.items() if key not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
    }
    command = [sys.executable, "-c", code]
    shown = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60).stdout
    assert shown.split() == ["2000", "True"]


@pytest.mark.parametrize(
    ("instructions", "seconds", "fast"),
    [
        ("amx_bf16", 0.1, True),
        ("avx512_bf16", 0.5, True),
        ("avx512_bf16", 2.0, False),
        (None, 0.5, False),
    ],
)
def test_bfloat16_is_used_only_where_the_processor_is_faster_with_it(
    instructions: str | None, seconds: float, fast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without instructions for it torch has a plain loop, and an update of the flow takes 14 s in place of 0.6."""
    monkeypatch.setattr("torch.cpu.get_capabilities", lambda: {instructions: True, "avx512_f": True}, raising=False)
    monkeypatch.setattr("convlstm_vo.environment._seconds_of_convolutions", lambda: (seconds, 1.0))
    bfloat16_pays.cache_clear()
    try:
        _precision_is_used(fast)
    finally:
        bfloat16_pays.cache_clear()


def test_pace_of_convolutions_is_measured() -> None:
    assert all(0 < seconds < 1 for seconds in _seconds_of_convolutions())


def _precision_is_used(fast: bool) -> None:
    assert bfloat16_pays() is fast
    assert FlowConfig().autocast(torch.device("cpu"))._enabled is fast
    assert FlowConfig(precision="bf16").autocast(torch.device("cpu"))._enabled
    net = VisualOdometry.from_checkpoint(camera=KITTI_CAMERA).net
    assert isinstance(net, GeometricNet) and net.mixed is fast
