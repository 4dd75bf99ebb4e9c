"""Ctrl-C between two steps or jobs, never within one: what is saved then is exact."""

from __future__ import annotations

import multiprocessing
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from types import FrameType

# Under torchrun one Ctrl-C arrives twice: from the terminal and from the launcher.
_SAME_SECONDS = 1.0


class Interrupts:
    """Remembers a Ctrl-C (or SIGTERM, where it is treated as one) until the training loop asks for it."""

    def __init__(self) -> None:
        self.asked = False
        self._since = 0.0

    @contextmanager
    def deferred(self, tell: Callable[[str], None]) -> Iterator[None]:
        """Within the block the first signal waits for `asked` to be looked at; a second one interrupts at once."""

        def remember(number: int, frame: FrameType | None) -> None:
            if self.asked:
                if time.monotonic() - self._since > _SAME_SECONDS:
                    signal.default_int_handler(number, frame)
                return
            self.asked, self._since = True, time.monotonic()
            tell("Stopping after this step (again to stop at once)")

        # Handlers that the program has set itself are left alone; threads cannot set any.
        main = threading.current_thread() is threading.main_thread()
        numbers = [n for n in (signal.SIGINT, signal.SIGTERM) if main and _interrupts(n)]
        for number in numbers:
            signal.signal(number, remember)
        try:
            yield
        finally:
            for number in numbers:
                signal.signal(number, signal.default_int_handler)


def _interrupts(number: signal.Signals) -> bool:
    return signal.getsignal(number) is signal.default_int_handler


@contextmanager
def process_pool(workers: int) -> Iterator[ProcessPoolExecutor]:
    """Processes for jobs. On Ctrl-C, or another error in the block, those at work end their job, and no other
    begins, but for one that already waits at their door."""
    ignore = (signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C reaches them too, and would spoil their jobs
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), signal.signal, ignore)
    try:
        yield pool
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        raise
    pool.shutdown()
