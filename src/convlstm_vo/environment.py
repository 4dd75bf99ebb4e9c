"""Environment variables that speed needs, read when a process starts or a library is loaded. A user's own win."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping

# glibc gives large blocks back to the kernel after each step and faults them in again for the next; keeping them,
# in huge pages, makes CPU training up to 1.4 times faster. It is read when a process starts, so it starts again.
# Threads that sleep while they wait, instead of spinning, do not stall when anything else runs on the machine.
_TRAINING = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "100000000000",
    "MALLOC_TOP_PAD_": "500000000",
    "OMP_WAIT_POLICY": "PASSIVE",
}
_HUGE_PAGES = "glibc.malloc.hugetlb"
_RESTARTED = "CONVLSTM_VO_RESTARTED"  # set in a process that has started again, which must not do so without end
# After each of torch's loops a thread of it spins for milliseconds, on the core that the next kernel of ours wants.
# With shorter spins a frame takes a sixth less time, with none as long as before. Where another process has a core,
# spins cost most: a frame of 41 ms then takes 63 with these, 97 with GNU's own, 155 with ten times these.
_STREAMING = {"GOMP_SPINCOUNT": "1000"}


def training_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """Environment variables of a process that trains: those given, which win, and what speed needs beside them."""
    tunables = environment.get("GLIBC_TUNABLES", "")
    if f"{_HUGE_PAGES}=" not in tunables:
        tunables = ":".join(filter(None, (tunables, f"{_HUGE_PAGES}=1")))
    return {**_TRAINING, **environment, "GLIBC_TUNABLES": tunables, _RESTARTED: "1"}


def restart_for_training() -> None:
    """Start this process again with an allocator that keeps its memory (Linux with glibc)."""
    if sys.platform != "linux" or _RESTARTED in os.environ or "PYTEST_VERSION" in os.environ:
        return
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], training_environment(os.environ))


def set_for_streaming() -> None:
    """What makes single frames fast, for libraries that are loaded after this; too late once torch is there."""
    if "torch" not in sys.modules and "OMP_WAIT_POLICY" not in os.environ:
        for name, value in _STREAMING.items():
            os.environ.setdefault(name, value)
