"""Settings of a process that speed needs: environment variables, of which a user's own win, and the allocator's."""

from __future__ import annotations

import ctypes
import functools
import os
import sys
import time
from collections.abc import Mapping
from typing import Any

# glibc gives large blocks back to the kernel after each step and faults them in again for the next; keeping them,
# in huge pages, makes CPU training up to 1.4 times faster. It is read when a process starts, so it starts again.
_TRAINING = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "100000000000",
    "MALLOC_TOP_PAD_": "500000000",
}
_HUGE_PAGES = "glibc.malloc.hugetlb"
_RESTARTED = "CONVLSTM_VO_RESTARTED"  # set in a process that has started again, which must not do so without end
# After each of torch's loops a thread of it spins for milliseconds before it sleeps, on the core that the next
# kernel of ours, or another process, wants; one that sleeps wakes late. With 1000, 2000, 3000, 10000 turns of that
# a frame of single ones takes 37, 28.5, 29, 26.5 ms on an idle machine; 38, 39, 45, 68 where another process has
# one of two cores. (Another machine: 41 with 1000, 49 with GNU's own; beside a process 63, 97.) Training takes a
# tenth to a sixth less with 3000 than with none.
_SPINS = {"streaming": "2000", "training": "3000"}
# The same for single frames, in a running process, by glibc's numbers (malloc.h): blocks of up to 32 MiB, the most
# that it allows, come from memory that is kept. A frame takes a tenth less time: that of its page faults.
_MALLOPT = {"M_MMAP_THRESHOLD": (-3, 32 << 20), "M_TRIM_THRESHOLD": (-1, 256 << 20), "M_TOP_PAD": (-2, 64 << 20)}


def training_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """Environment variables of a process that trains: those given, which win, and what speed needs beside them."""
    tunables = environment.get("GLIBC_TUNABLES", "")
    if f"{_HUGE_PAGES}=" not in tunables:
        tunables = ":".join(filter(None, (tunables, f"{_HUGE_PAGES}=1")))
    waiting = {} if "OMP_WAIT_POLICY" in environment else {"GOMP_SPINCOUNT": _SPINS["training"]}
    return {**_TRAINING, **waiting, **environment, "GLIBC_TUNABLES": tunables, _RESTARTED: "1"}


def restart_for_training() -> None:
    """Start this process again with an allocator that keeps its memory (Linux with glibc)."""
    if sys.platform != "linux" or _RESTARTED in os.environ or "PYTEST_VERSION" in os.environ:
        return
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], training_environment(os.environ))


def set_for_streaming() -> None:
    """What makes single frames fast. Call it before torch is loaded, or only the allocator is set."""
    if "torch" not in sys.modules and "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", _SPINS["streaming"])
    if sys.platform == "linux" and not any(f"MALLOC_{name[2:]}_" in os.environ for name in _MALLOPT):
        try:
            mallopt = ctypes.CDLL(None).mallopt
        except (OSError, AttributeError):  # another C library
            return
        for number, value in _MALLOPT.values():
            mallopt(number, value)


@functools.cache
def bfloat16_pays(device: str = "cpu") -> bool:
    """Whether convolutions on "cpu", "cuda", ... are faster in bfloat16 than in float32; of a CPU it is measured.

    A processor without instructions for it takes many times as long: torch then has a plain loop and no more. With
    them, but without AMX, an AMD EPYC is twice as fast as in float32, and an Intel Xeon half as fast.
    """
    import torch  # not above: `set_for_streaming` comes before it

    if device != "cpu":
        return True
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    if not (capabilities.get("amx_bf16") or capabilities.get("avx512_bf16")):
        return False
    bfloat16, float32 = _seconds_of_convolutions()
    return bfloat16 < 0.9 * float32


def _seconds_of_convolutions() -> tuple[float, float]:
    """Of one in bfloat16 and of one in float32.

    In turn, and the least of some runs (0.1 s in all): others may be at work on the machine too.
    """
    import torch

    x, weight = torch.ones(1, 64, 48, 80), torch.ones(64, 64, 3, 3)
    runs: dict[torch.dtype, list[float]] = {torch.bfloat16: [], torch.float32: []}
    with torch.inference_mode():
        for _ in range(20):
            for dtype, seconds in runs.items():
                cells, taps = (value.to(dtype, memory_format=torch.channels_last) for value in (x, weight))
                began = time.perf_counter()
                torch.nn.functional.conv2d(cells, taps, padding=1)
                seconds.append(time.perf_counter() - began)
    bfloat16, float32 = (min(seconds) for seconds in runs.values())
    return bfloat16, float32
