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
    thread, gate = PatientThread(0.5), threading.Event()
    assert thread.do(gate.wait, False) is False
    assert thread.hangs
    begun = time.monotonic()
    # A hundredth of what they would take if each were waited for.
    assert [thread.do(lambda: 1, 0) for _ in range(100)] == [0] * 100
    assert time.monotonic() - begun < 25.0
    gate.set()
    assert asked_in_the_end(thread) == 1


def test_a_call_that_was_late_is_over_when_it_returns() -> None:
    """Whatever is begun afterwards, and takes its time."""
    thread, late, short = PatientThread(0.5), threading.Event(), threading.Event()
    assert thread.do(late.wait, False) is False
    late.set()
    assert asked_in_the_end(thread) == 1
    under_way = thread.begin(short.wait)
    assert not thread.is_idle
    assert not thread.hangs
    threading.Timer(0.1, short.set).start()
    assert thread.do(lambda: 2, 0) == 2
    assert under_way.done()


def asked_in_the_end(thread: PatientThread) -> int:
    """What it answers once it does not hang any more; 0 where that takes too long."""
    deadline = time.monotonic() + 30.0
    while thread.hangs and time.monotonic() < deadline:
        time.sleep(0.01)
    return thread.do(lambda: 1, 0)


def test_errors_reach_the_caller() -> None:
    def fail() -> int:
        raise TimeoutError("its own")

    thread = PatientThread(10.0)
    with pytest.raises(TimeoutError, match="its own"):
        thread.do(fail, 0)
    assert not thread.hangs
