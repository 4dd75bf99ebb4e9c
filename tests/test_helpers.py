"""Processes that help: their answers, their failures, their end."""

from __future__ import annotations

import os
import signal

import pytest
import torch

from convlstm_vo.training.config import TrainError
from convlstm_vo.training.helpers import Helper, Message, Task


def scaling(message: Message) -> Task:
    factor = message["factor"]

    def task(message: Message) -> Message:
        value = message["value"]
        return {
            "value": factor * value,
            "strides": value.stride(),
            "pid": os.getpid(),
            "nothing": message["nothing"],
        }

    return task


def test_a_helper_answers_in_order_until_the_block_ends():
    value = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    with Helper(scaling, {"factor": 3.0}) as helper:
        for part in (value, value[:1]):
            helper.ask({"value": part, "nothing": None})
        for part in (value, value[:1]):
            answer = helper.answer()
            torch.testing.assert_close(answer["value"], 3.0 * part, rtol=0, atol=0)
            assert answer["strides"] == part.stride() and answer["nothing"] is None
        assert answer["pid"] != os.getpid()
        os.kill(answer["pid"], signal.SIGINT)  # Ctrl-C reaches all processes of a terminal
        helper.ask({"value": value, "nothing": None})
        assert helper.answer()["pid"] == answer["pid"]
    with pytest.raises(ProcessLookupError):
        os.kill(answer["pid"], 0)


def test_what_fails_over_there_is_told_here():
    with Helper(scaling, {"factor": 3.0}) as helper:
        helper.ask({"wrong": 1})
        with pytest.raises(RuntimeError, match=r"(?s)in a helping process:.*in task.*KeyError: 'value'"):
            helper.answer()
    with Helper(scaling, {}) as helper, pytest.raises(RuntimeError, match="KeyError: 'factor'"):
        helper.answer()


def test_one_that_was_killed_is_an_error_with_a_remedy():
    with Helper(scaling, {"factor": 3.0}) as helper:
        helper._process.kill()
        with pytest.raises(TrainError, match=r"has ended \(exit code -9; .*--threads 1"):
            helper.answer()
        with pytest.raises(TrainError, match="start the same command again"):
            helper.ask({"value": torch.zeros(1 << 20), "nothing": None})


def test_it_ends_with_whom_it_helps():
    with Helper(scaling, {"factor": 3.0}) as helper:
        helper.ask({"value": torch.zeros(1), "nothing": None})
        helper.answer()
        helper._line.close()  # as when this process dies
        helper._process.join(10.0)
        assert helper._process.exitcode == 0
