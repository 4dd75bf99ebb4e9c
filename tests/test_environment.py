"""What the process that trains finds in its environment: our settings where the user has none."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from convlstm_vo.cli import training_environment

SETTINGS = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "100000000000",
    "MALLOC_TOP_PAD_": "500000000",
    "OMP_WAIT_POLICY": "PASSIVE",
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
}


@pytest.mark.parametrize("name", SETTINGS)
def test_what_the_user_has_set_stays_and_the_others_are_added(name: str) -> None:
    own = "glibc.malloc.hugetlb=0" if name == "GLIBC_TUNABLES" else "1"
    found = training_environment({name: own, "HOME": "/home/me"})
    assert {key: found[key] for key in SETTINGS} == SETTINGS | {name: own}
    assert found["HOME"] == "/home/me"


def test_other_tunables_are_kept_beside_ours() -> None:
    found = training_environment({"GLIBC_TUNABLES": "glibc.malloc.arena_max=2"})
    assert found["GLIBC_TUNABLES"] == "glibc.malloc.arena_max=2:glibc.malloc.hugetlb=1"


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has the allocator that is set here")
def test_the_process_starts_again_once() -> None:
    code = (
        "import json, os\n"
        "from convlstm_vo import cli\n"
        "print('started', flush=True)\n"
        "cli._restart_with_environment()\n"
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
