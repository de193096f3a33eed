"""Programs in bubblewrap on this machine. Raises nothing of its own but SandboxError and Unavailable."""

import base64
import contextlib
import dataclasses
import json
import math
import os
import select
import subprocess
import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from megatron_riskpo.rewards.sandbox import as_nobody, bubblewrap
from megatron_riskpo.rewards.sandbox.contract import GRACE_S, Case, CaseResult, SandboxError, wall_limit_s
from megatron_riskpo.rewards.sandbox.seccomp import SeccompMissing, program_filter, sandbox_filter

ZYGOTE = (Path(__file__).parent / "zygote.py").read_text(encoding="utf-8")


@dataclass(frozen=True)
class Limits:
    """Of each test."""

    cpu_s: float = 4.0
    """CPU time, in seconds (the kernel rounds up); wall clock: contract.wall_limit_s."""
    memory_bytes: int = 512 << 20
    """Address space."""
    output_bytes: int = 1 << 20
    """Of standard output, or of the returned value."""
    tmp_bytes: int = 64 << 20
    """Files in /tmp, over all tests of a program."""
    num_threads: int = 64
    num_files: int = 64

    def job(self, program: str) -> dict[str, object]:
        """What the zygote is told first."""
        limits = {
            "RLIMIT_AS": self.memory_bytes, "RLIMIT_CPU": math.ceil(self.cpu_s), "RLIMIT_FSIZE": self.tmp_bytes,
            "RLIMIT_NOFILE": self.num_files, "RLIMIT_NPROC": self.num_threads, "RLIMIT_CORE": 0, "RLIMIT_MEMLOCK": 0,
            "RLIMIT_MSGQUEUE": 0,
        }  # fmt: skip
        return {
            "program": program, "limits": limits, "max_output": self.output_bytes,
            "filter": base64.b64encode(program_filter()).decode(),
        }  # fmt: skip


class LocalRunner:
    """One sandbox a program, and the next one starting while a program runs; one fork a case."""

    def __init__(self, limits: Limits | None = None) -> None:
        """Starts the first sandbox. Raises bubblewrap.Unavailable."""
        self._limits = limits or Limits()
        self._spare: Sandbox | None = Sandbox(self._limits)

    def run(self, program: str, cases: Sequence[Case], deadline: float = math.inf) -> Generator[CaseResult, None, None]:
        """See CodeRunner."""
        sandbox: Sandbox | None = None
        try:
            for case in cases:
                if sandbox is None:
                    sandbox = self._take(program)
                result, clean = sandbox.run(case, wall_limit_s(self._limits.cpu_s, deadline))
                if not clean:
                    sandbox.close()
                    sandbox = None
                yield result
        finally:
            if sandbox is not None:
                sandbox.close()

    def close(self) -> None:
        """See CodeRunner."""
        if self._spare is not None:
            self._spare.close()
            self._spare = None

    def _take(self, program: str) -> "Sandbox":
        sandbox = self._spare or Sandbox(self._limits)
        self._spare = Sandbox(self._limits)
        sandbox.load(program)
        return sandbox


class Sandbox:
    """One running sandbox."""

    def __init__(self, limits: Limits) -> None:
        """Starts it, without waiting until it is up. Raises bubblewrap.Unavailable."""
        self._limits, self._unread = limits, b""
        bubblewrap.bwrap_path()  # before the slower look at what it would show
        reader, writer = os.pipe()
        try:
            filter_bytes = sandbox_filter()
            os.write(writer, filter_bytes)  # a few KiB, less than a pipe holds
        except SeccompMissing as error:
            os.close(reader)
            raise bubblewrap.Unavailable(str(error)) from error
        finally:
            os.close(writer)
        sources, account = _sources_and_account()
        words = bubblewrap.command(ZYGOTE, sources, reader, limits.tmp_bytes)
        try:
            self._process = subprocess.Popen(
                words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={}, cwd="/",
                pass_fds=[reader], user=account, group=account, extra_groups=None if account is None else [],
            )  # fmt: skip
        except OSError as error:
            raise bubblewrap.Unavailable(f"bwrap cannot be started: {error}") from error
        finally:
            os.close(reader)
        os.set_blocking(self._process.stdin.fileno(), False)

    def load(self, program: str) -> None:
        """Say which program the cases are for."""
        self._send(self._limits.job(program), time.monotonic() + GRACE_S)

    def run(self, case: Case, wall_s: float) -> tuple[CaseResult, bool]:
        """(what it came to, whether the sandbox is as it was before). Raises SandboxError."""
        deadline = time.monotonic() + wall_s + GRACE_S
        self._send(dataclasses.asdict(case) | {"wall_s": wall_s}, deadline)
        reply = self._read(deadline)
        output = base64.b64decode(reply["output"]).decode("utf-8", errors="replace")
        return CaseResult(reply["status"], output), reply["clean"]

    def close(self) -> None:
        """Kill all that is in it."""
        self._process.kill()
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        self._process.stdout.close()
        self._process.stderr.close()
        self._process.wait()

    def _send(self, message: dict[str, object], deadline: float) -> None:
        data = json.dumps(message).encode() + b"\n"
        try:
            while data:
                self._wait(self._process.stdin.fileno(), select.POLLOUT, deadline)
                data = data[os.write(self._process.stdin.fileno(), data) :]
        except BrokenPipeError:
            raise self._failure() from None

    def _read(self, deadline: float) -> dict[str, Any]:
        while b"\n" not in self._unread:
            self._wait(self._process.stdout.fileno(), select.POLLIN, deadline)
            chunk = os.read(self._process.stdout.fileno(), 1 << 16)
            if not chunk:
                raise self._failure()
            self._unread += chunk
        line, self._unread = self._unread.split(b"\n", 1)
        return json.loads(line)

    def _wait(self, file: int, event: int, deadline: float) -> None:
        poller = select.poll()
        poller.register(file, event)
        if not poller.poll(max(deadline - time.monotonic(), 0) * 1000):
            self._process.kill()
            raise SandboxError("the sandbox does not answer; it was killed")

    def _failure(self) -> SandboxError:
        self._process.kill()
        said = self._process.stderr.read(2000).decode(errors="replace").strip()
        self._process.wait()
        return SandboxError(f"the sandbox ended with code {self._process.returncode}: {said or 'no message'}")


@cache
def _sources_and_account() -> tuple[dict[str, str], int | None]:
    """What bwrap binds, and the account that it runs as (None: ours). Raises bubblewrap.Unavailable."""
    sources = bubblewrap.sources()
    if os.geteuid() != 0:
        return sources, None
    try:
        return as_nobody.visible_to_nobody(sources), as_nobody.NOBODY
    except OSError as error:
        raise bubblewrap.Unavailable(f"root, but without the right to mount ({error})") from error
