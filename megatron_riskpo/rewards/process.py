"""One grader process, seen from the trainer: every call ends within its time, whatever the grader does."""

import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from megatron_riskpo.errors import RunError, UsageError
from megatron_riskpo.rewards.options import GraderOptions
from megatron_riskpo.rewards.reference import Reference

START_TIMEOUT_S = 120.0  # importing math-verify takes .6 s, on a busy shared file system many times that
READ_SIZE = 1 << 16


class GraderDied(Exception):
    """The process ended, or was ended, before it answered."""


class GraderProcess:
    """A worker that is started when needed, killed when it overruns, and replaced at the next call.

    One thread at a time may call `grade`; `close` may come from another.
    """

    def __init__(self, graders: Sequence[str], options: GraderOptions) -> None:
        self._graders, self._options = list(graders), options
        self.num_starts = 0
        self._process: subprocess.Popen[bytes] | None = None
        self._unread = b""
        self._closed = False
        self._lock = threading.Lock()

    def grade(self, response: str, reference: Reference) -> dict[str, Any]:
        """{"score": ...} or {"error": ...}. Raises GraderDied, TimeoutError (the process is gone after both)."""
        process = self.start()
        number = self._graders.index(reference.grader)
        task = [number, response, reference.expected_answer, dict(reference.fields)]
        limit_s = self._options.wall_limit_s(reference.grader)
        deadline = time.monotonic() + limit_s
        try:
            self._write(process, json.dumps(task).encode() + b"\n", deadline)
            outcome = self._read(process, deadline)
        except BrokenPipeError as error:
            raise self._death(process) from error
        except TimeoutError:
            self._kill(process)
            raise TimeoutError(f"no answer within {limit_s:g} s") from None
        if outcome.get("error", "").startswith("MemoryError"):
            self._kill(process)  # what is left of its address space may not do for the next task
        return outcome

    def start(self) -> subprocess.Popen[bytes]:
        """The running worker; starts one if there is none. Raises UsageError if the grader cannot be imported."""
        if self._process is not None and self._process.poll() is None:
            return self._process
        process = self._spawn()
        try:
            first = self._read(process, time.monotonic() + START_TIMEOUT_S)
        except (TimeoutError, GraderDied) as error:
            self._kill(process)
            raise RunError(f"the grader process for {', '.join(self._graders)} did not start: {error}") from error
        if "error" in first:
            self._kill(process)
            raise UsageError(f"the grader {first['grader']} cannot be used: {first['error']}")
        return process

    def close(self) -> None:
        """Kill the worker; later calls raise GraderDied."""
        with self._lock:
            self._closed = True
            process = self._process
        if process is not None:
            self._kill(process)

    def _spawn(self) -> subprocess.Popen[bytes]:
        with self._lock:
            if self._closed:
                raise GraderDied("the pool is closed")
            self._unread = b""
            self.num_starts += 1
            config = json.dumps({"graders": self._graders, "options": asdict(self._options)})
            self._process = subprocess.Popen(
                [sys.executable, "-m", "megatron_riskpo.rewards.worker", config, str(os.getpid())],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(path or "." for path in sys.path)},
                start_new_session=True,  # Ctrl-C in the terminal is the parent's to handle
            )
            os.set_blocking(self._process.stdin.fileno(), False)
            return self._process

    @staticmethod
    def _write(process: subprocess.Popen[bytes], data: bytes, deadline: float) -> None:
        """A stopped worker empties no pipe: writing has to end in time, too."""
        pipe = process.stdin.fileno()
        while data:
            _wait(pipe, select.POLLOUT, deadline)
            data = data[os.write(pipe, data) :]

    def _read(self, process: subprocess.Popen[bytes], deadline: float) -> dict[str, Any]:
        """The next line that the worker writes."""
        while b"\n" not in self._unread:
            _wait(process.stdout.fileno(), select.POLLIN, deadline)
            chunk = os.read(process.stdout.fileno(), READ_SIZE)
            if not chunk:
                raise self._death(process)
            self._unread += chunk
        line, self._unread = self._unread.split(b"\n", 1)
        return json.loads(line)

    def _death(self, process: subprocess.Popen[bytes]) -> GraderDied:
        self._kill(process)
        if process.returncode == -signal.SIGXCPU:
            return GraderDied(f"the grader used more than {self._options.cpu_s:g} s of CPU")
        return GraderDied(f"the grader process ended with code {process.returncode} (-9: killed)")

    @staticmethod
    def _kill(process: subprocess.Popen[bytes]) -> None:
        process.kill()
        process.wait()


def _wait(file: int, event: int, deadline: float) -> None:
    """Until the pipe is ready. Raises TimeoutError at the deadline (time.monotonic)."""
    poller = select.poll()
    poller.register(file, event)
    left = deadline - time.monotonic()
    if left <= 0 or not poller.poll(left * 1000):
        raise TimeoutError("not ready in time")
