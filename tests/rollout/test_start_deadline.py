"""A server that does not become healthy ends in time, whatever it hangs in; without vLLM here."""

import asyncio
import faulthandler
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import pytest
import uvloop

from megatron_riskpo.errors import RunError
from megatron_riskpo.rollout.start_deadline import Interrupted, StartDeadline, interrupt


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    """The process goes on here, other than a server's."""
    handler = signal.getsignal(signal.SIGALRM)
    yield
    faulthandler.cancel_dump_traceback_later()
    signal.signal(signal.SIGALRM, handler)


def _blocks() -> None:
    time.sleep(60)


def _waits_in_the_loop() -> None:
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(asyncio.sleep(60))


def _blocks_the_loop() -> None:
    async def block() -> None:
        time.sleep(60)

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(block())


def _fails_when_interrupted() -> None:
    try:
        time.sleep(60)
    finally:
        raise ValueError("engine core initialization failed")


def _takes_it_for_ctrl_c() -> None:
    """As vLLM does where it waits for its engine."""
    try:
        time.sleep(60)
    except KeyboardInterrupt:
        time.sleep(60)


def _returns_when_interrupted() -> None:
    try:
        time.sleep(60)
    except Interrupted:
        return


HANGS = [
    _blocks, _waits_in_the_loop, _blocks_the_loop, _fails_when_interrupted, _takes_it_for_ctrl_c,
    _returns_when_interrupted,
]  # fmt: skip


@pytest.mark.parametrize("hang", HANGS)
def test_what_hangs_is_interrupted_and_named(hang: Callable[[], None]) -> None:
    started = time.monotonic()
    message = r"not healthy within server\.start_timeout_s = 0\.1 s; see the lines above"
    with pytest.raises(RunError, match=message), StartDeadline(0.1):
        hang()
    assert time.monotonic() - started < 10


def test_a_healthy_server_stays() -> None:
    with StartDeadline(0.1) as deadline:
        deadline.met()
        time.sleep(0.2)


def test_other_ends_come_through() -> None:
    before = signal.signal(signal.SIGTERM, interrupt)
    with pytest.raises(Interrupted), StartDeadline(60):
        signal.raise_signal(signal.SIGTERM)
    signal.signal(signal.SIGTERM, before)
    with pytest.raises(ValueError, match="no model"), StartDeadline(60):
        raise ValueError("no model")
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)


DEAF = """
import signal, time
from megatron_riskpo.rollout.start_deadline import Interrupted, StartDeadline, interrupt
def hang_in_the_model(): time.sleep(600)
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGALRM})
with StartDeadline(0.1, grace_s=0.1):
    hang_in_the_model()
"""


def test_what_no_interrupt_reaches_ends_with_its_stack() -> None:
    ended = subprocess.run([sys.executable, "-c", DEAF], capture_output=True, text=True, timeout=60)
    assert ended.returncode == 1
    assert "in hang_in_the_model" in ended.stderr
