"""The sandbox against programs that try to leave it: all contained, the host unchanged, the next program served.

The numbers of system calls in escapes.py are x86-64's; elsewhere those attempts make other calls, and prove less.
"""

import contextlib
import os
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_riskpo.rewards.sandbox.contract import Case, CaseResult
from megatron_riskpo.rewards.sandbox.local import Limits, LocalRunner
from tests.rewards.sandbox.escapes import ABUSES, ATTEMPTS, PRELUDE
from tests.sandboxes import needs_sandbox

pytestmark = needs_sandbox

# Time enough to fill the memory on a busy machine, or the wrong limit is met first.
LIMITS = Limits(cpu_s=1.0, memory_bytes=256 << 20, output_bytes=100_000, tmp_bytes=16 << 20)
VARIABLE, VALUE = "A_SECRET_OF_THE_RUN", "hidden-in-the-environment"


@pytest.fixture(scope="module")
def runner() -> Iterator[LocalRunner]:
    os.environ[VARIABLE] = VALUE
    made = LocalRunner(LIMITS)
    yield made
    made.close()
    del os.environ[VARIABLE]


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, object]]:
    """What attempts are after; fails at the end if one of them got it."""
    folder = tmp_path_factory.mktemp("host")
    secret = folder / "secret"
    secret.write_text("a secret")
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        socket.socket(socket.AF_UNIX) as unix,
        subprocess.Popen(["sleep", "600"]) as process,
    ):
        unix.bind(str(folder / "unix"))
        unix.listen()
        met: list[object] = []
        for listener in (server, unix):
            threading.Thread(target=_accept, args=(listener, met), daemon=True).start()
        before = sorted(os.listdir("/")), socket.gethostname(), _named_by_attempts()
        yield {
            "port": server.getsockname()[1], "unix_socket": folder / "unix", "secret": secret, "pid": process.pid,
            "worker": os.getpid(), "variable": VARIABLE, "value": VALUE, "repository": Path(__file__).parents[3],
        }  # fmt: skip
        assert process.poll() is None, "a process of the host was killed"
        process.kill()
        assert secret.read_text() == "a secret"
        assert sorted(path.name for path in folder.iterdir()) == ["secret", "unix"]
        assert before == (sorted(os.listdir("/")), socket.gethostname(), _named_by_attempts())
        assert not met, "somebody connected"


def _named_by_attempts() -> list[str]:
    """Files in the host's /tmp under the names that attempts and abuses give; other processes have others."""
    return sorted(name for name in os.listdir("/tmp") if name.startswith("sandboxed-"))


def _accept(listener: socket.socket, met: list[object]) -> None:
    with contextlib.suppress(OSError):  # closed at the end
        met.append(listener.accept()[1])


def run(runner: LocalRunner, program: str, stdin: str = "") -> CaseResult:
    (result,) = runner.run(program, [Case(stdin=stdin)])
    return result


def test_there_are_more_than_forty():
    assert len(ATTEMPTS) + len(ABUSES) >= 40


@pytest.mark.parametrize("name", ATTEMPTS)
def test_attempts_are_contained(runner: LocalRunner, host: dict[str, object], name: str):
    program = ATTEMPTS[name]
    for key, value in host.items():
        program = program.replace(f"{{{key}}}", str(value))
    result = run(runner, PRELUDE + program)
    assert "ESCAPED" not in result.output, result.output
    assert "contained" in result.output or result.status == "failed", result
    assert run(runner, "print(input())", "next").output == "next\n"


@pytest.mark.parametrize("name", ABUSES)
def test_abuses_end_within_their_limits(runner: LocalRunner, host: dict[str, object], name: str):
    program, outcomes = ABUSES[name]
    start = time.monotonic()
    result = run(runner, program)
    assert result.status in outcomes
    assert time.monotonic() - start < 4 * LIMITS.cpu_s + 15
    assert len(result.output) <= LIMITS.output_bytes
    assert "LARGE" not in result.output
    if "THREADS" in result.output:
        assert int(result.output.split()[1]) < LIMITS.num_threads
    assert run(runner, "print(input())", "next").output == "next\n"


def test_nothing_is_left_running(runner: LocalRunner):
    """Of all that ran before only the spare sandbox lives."""
    runner.close()
    deadline = time.monotonic() + 10
    while _sandboxes() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert _sandboxes() == []


def _sandboxes() -> list[int]:
    """Children of this process that are bubblewrap."""
    listed = subprocess.run(["ps", "--ppid", str(os.getpid()), "-o", "pid=,comm="], capture_output=True, text=True)
    return [int(line.split()[0]) for line in listed.stdout.splitlines() if "bwrap" in line and "defunct" not in line]
