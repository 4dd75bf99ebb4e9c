"""What an interruption leaves of jobs in other processes."""

from __future__ import annotations

import signal
import time

import pytest

from convlstm_vo.training.interrupts import process_pool


def test_jobs_that_are_not_begun_are_dropped() -> None:
    with pytest.raises(KeyboardInterrupt), process_pool(1) as pool:
        jobs = [pool.submit(time.sleep, 0.1) for _ in range(50)]
        jobs[0].result()
        raise KeyboardInterrupt
    while not all(job.done() for job in jobs):
        time.sleep(0.01)
    assert sum(job.cancelled() for job in jobs) > 40
    assert jobs[0].done() and not jobs[0].cancelled()


def test_a_terminal_s_interruption_does_not_reach_the_processes() -> None:
    with process_pool(1) as pool:
        assert pool.submit(signal.getsignal, signal.SIGINT).result() == signal.SIG_IGN
        assert [job.result() for job in [pool.submit(abs, -i) for i in range(5)]] == list(range(5))
