"""One progress bar for all long work: how far, how fast, how long still."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


@contextlib.contextmanager
def progress(what: str, total: int | None, *, unit: str = "frames") -> Iterator[Callable[[int], None]]:
    """A progress bar with rate (none without a unit) and time left; yields the function that advances it."""
    rate = TextColumn("{task.fields[rate]}")
    bar = Progress(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), rate, TimeRemainingColumn())
    started = time.perf_counter()
    with bar:
        task = bar.add_task(what, total=total, rate="")

        def advance(count: int) -> None:
            done = bar.tasks[task].completed + count
            shown = f"{done / (time.perf_counter() - started):.0f} {unit}/s" if unit else ""
            bar.update(task, advance=count, rate=shown)

        yield advance
