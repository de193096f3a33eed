"""Stop signals in one process; that all ranks agree is tested with real ranks in test_launch.py."""

import os
import signal
import subprocess
import sys

import pytest

from megatron_riskpo.distributed.signals import STOP_SIGNALS, StopSignal


@pytest.fixture
def stop():
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    yield StopSignal.install()
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_the_first_signal_is_remembered(stop: StopSignal, number: signal.Signals) -> None:
    assert stop.received is None
    os.kill(os.getpid(), number)
    os.kill(os.getpid(), signal.SIGTERM)
    assert stop.received == number


def test_one_interrupt_after_another_signal_does_not_end_the_process(stop: StopSignal) -> None:
    os.kill(os.getpid(), signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGINT)
    assert stop.received == signal.SIGTERM


def test_a_second_interrupt_ends_the_process_at_once() -> None:
    program = (
        "import os, signal, time\n"
        "from megatron_riskpo.distributed.signals import StopSignal\n"
        "StopSignal.install()\n"
        "os.kill(os.getpid(), signal.SIGINT)\n"
        "print('first survived', flush=True)\n"
        "os.kill(os.getpid(), signal.SIGINT)\n"
        "time.sleep(60)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=30)
    assert done.stdout == "first survived\n"
    assert done.returncode == 130
