"""Calls that do not return, and what comes after them."""

import threading
import time

import pytest

from megatron_riskpo.distributed.patient_thread import PatientThread


def test_calls_are_made_in_order_and_return_their_value() -> None:
    thread, made = PatientThread(10.0), []
    for number in range(5):
        thread.begin(lambda number=number: made.append(number))
    assert thread.do(lambda: list(made), []) == [0, 1, 2, 3, 4]
    assert thread.is_idle
    assert not thread.hangs


def test_a_call_that_hangs_is_waited_for_once() -> None:
    thread, gate = PatientThread(0.2), threading.Event()
    assert thread.do(gate.wait, False) is False
    assert thread.hangs
    started = time.monotonic()
    assert [thread.do(lambda: 1, 0) for _ in range(10)] == [0] * 10
    assert time.monotonic() - started < 0.2
    gate.set()
    while thread.hangs:
        time.sleep(0.01)
    assert thread.do(lambda: 1, 0) == 1


def test_errors_reach_the_caller() -> None:
    def fail() -> int:
        raise TimeoutError("its own")

    thread = PatientThread(10.0)
    with pytest.raises(TimeoutError, match="its own"):
        thread.do(fail, 0)
    assert not thread.hangs
