"""One grader process, seen from the trainer: every call ends within its time, whatever the grader does."""

import json
import os
import select
import subprocess
import sys
import threading
import time
from typing import Any

from megatron_riskpo.errors import RunError, UsageError

START_TIMEOUT_S = 120.0  # importing math-verify takes .6 s, on a busy shared file system many times that
READ_SIZE = 1 << 16


class GraderDied(Exception):
    """The process ended, or was ended, before it answered."""


class GraderProcess:
    """A worker that is started when needed, killed when it overruns, and replaced at the next call.

    One thread at a time may call `grade`; `close` may come from another.
    """

    def __init__(self, grader: str) -> None:
        self._grader = grader
        self._process: subprocess.Popen[bytes] | None = None
        self._unread = b""
        self._closed = False
        self._lock = threading.Lock()

    def grade(self, response: str, answer: str, timeout_s: float) -> dict[str, Any]:
        """{"score": ...} or {"error": ...}. Raises GraderDied, TimeoutError (the process is gone after both)."""
        process = self.start()
        try:
            process.stdin.write(json.dumps([response, answer]).encode() + b"\n")
            process.stdin.flush()
            return self._read(process, timeout_s)
        except BrokenPipeError as error:
            raise self._death(process) from error
        except TimeoutError:
            self._kill(process)
            raise

    def start(self) -> subprocess.Popen[bytes]:
        """The running worker; starts one if there is none. Raises UsageError if the grader cannot be imported."""
        if self._process is not None and self._process.poll() is None:
            return self._process
        process = self._spawn()
        try:
            first = self._read(process, START_TIMEOUT_S)
        except (TimeoutError, GraderDied) as error:
            self._kill(process)
            raise RunError(f"the grader process for {self._grader} did not start: {error}") from error
        if "error" in first:
            self._kill(process)
            raise UsageError(f"the grader {self._grader} cannot be imported: {first['error']}; name it module:function")
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
            self._process = subprocess.Popen(
                [sys.executable, "-m", "megatron_riskpo.rewards.worker", self._grader, str(os.getpid())],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(path or "." for path in sys.path)},
                start_new_session=True,  # Ctrl-C in the terminal is the parent's to handle
            )
            return self._process

    def _read(self, process: subprocess.Popen[bytes], timeout_s: float) -> dict[str, Any]:
        """The next line that the worker writes."""
        deadline = time.monotonic() + timeout_s
        while b"\n" not in self._unread:
            left = deadline - time.monotonic()
            poller = select.poll()
            poller.register(process.stdout, select.POLLIN)
            if left <= 0 or not poller.poll(left * 1000):
                raise TimeoutError(f"no answer within {timeout_s:g} s")
            chunk = os.read(process.stdout.fileno(), READ_SIZE)
            if not chunk:
                raise self._death(process)
            self._unread += chunk
        line, self._unread = self._unread.split(b"\n", 1)
        return json.loads(line)

    def _death(self, process: subprocess.Popen[bytes]) -> GraderDied:
        self._kill(process)
        return GraderDied(f"the grader process ended with code {process.returncode} (-9: killed)")

    @staticmethod
    def _kill(process: subprocess.Popen[bytes]) -> None:
        process.kill()
        process.wait()
