"""Processes that work beside this one, each on the same task again and again."""

from __future__ import annotations

import io
import multiprocessing
import signal
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any

import torch

from convlstm_vo.training.config import TrainError

Message = dict[str, Any]
"""Plain values and tensors, in dicts, lists and tuples."""
Task = Callable[[Message], Message]


class Helper:
    """A process, of one thread, that answers messages; it ends with the block, or with this process.

    Args:
        make: a function of a module. It is called once, over there, and returns what makes an answer of a message.
        message: that ``make`` gets.

    Raises:
        TrainError: (by `ask` and `answer`) the process has ended, as by the system for want of memory.
        RuntimeError: (by `answer`) the task failed; with the traceback.
    """

    def __init__(self, make: Callable[[Message], Task], message: Message) -> None:
        # Spawned, not forked: a fork would copy torch's and numba's threads in whatever state they are.
        context = multiprocessing.get_context("spawn")
        self._line, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, make), daemon=True)
        self._process.start()
        theirs.close()  # so that here, too, the line ends with the process
        self.ask(message)

    def ask(self, message: Message) -> None:
        """Send a message and return at once."""
        try:
            self._line.send_bytes(_packed(message))
        except ConnectionError:
            raise self._ended() from None

    def answer(self) -> Message:
        """Wait for the answer to the oldest message that has none yet."""
        try:
            answer = _unpacked(self._line.recv_bytes())
        except (EOFError, ConnectionError):
            raise self._ended() from None
        if "failure" in answer:
            raise RuntimeError(f"in a helping process:\n{answer['failure']}")
        return answer

    def __enter__(self) -> Helper:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()  # nothing of it is on disk
        self._process.join()
        self._line.close()

    def _ended(self) -> TrainError:
        self._process.join(5.0)
        return TrainError(
            f"a process that helped with the training has ended (exit code {self._process.exitcode}; -9: the "
            "system killed it, most likely for want of memory); start the same command again and it goes on, with "
            "--threads 1 in one process"
        )


def _serve(line: Connection, make: Callable[[Message], Task]) -> None:
    """Answer until the other end is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that is helped
    torch.set_num_threads(1)
    task: Task | None = None
    while True:
        try:
            message = _unpacked(line.recv_bytes())
            if task is None:
                task = make(message)
                continue
            line.send_bytes(_packed(task(message)))
        except (EOFError, ConnectionError):
            return
        except Exception:
            line.send_bytes(_packed({"failure": traceback.format_exc()}))
            return


def _packed(message: Message) -> bytes:
    # As torch writes it, not pickled: pickled tensors go through shared memory, of which containers have little.
    buffer = io.BytesIO()
    torch.save(message, buffer)
    return buffer.getvalue()


def _unpacked(data: bytes) -> Message:
    message: Message = torch.load(io.BytesIO(data), weights_only=True)
    return message
