"""A rank's side of the watchdog: it says where it is, and its guard does the rest."""

import contextlib
import faulthandler
import json
import os
import re
import subprocess
import sys
import time
import traceback
from dataclasses import asdict, replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from megatron_riskpo.distributed.launch import RankEnv, inherited_fds
from megatron_riskpo.watchdog.ending import longest_s
from megatron_riskpo.watchdog.process import DUMP_SIGNAL
from megatron_riskpo.watchdog.record import Position, SharedPosition
from megatron_riskpo.watchdog.settings import GuardSettings

if TYPE_CHECKING:
    from megatron_riskpo.config import RunConfig

_TIMED_OUT = re.compile(r"timed? ?out", re.IGNORECASE)


class Watchdog:
    """Context manager around a rank's run. With run.stall_limit_s = 0 it does nothing.

    A rank that stays in one phase longer than the limit, or that waited for others until a collective timed out, ends
    the run on all ranks: stacks in the run folder, and one line that names the ranks that lag.
    """

    def __init__(self, run: "RunConfig", env: RankEnv) -> None:
        self._run, self._env = run, env
        self._position = Position()
        self._shared: SharedPosition | None = None
        self._guard: subprocess.Popen[bytes] | None = None
        self._stack = contextlib.ExitStack()

    def enter(self, phase: str) -> None:
        """The rank begins a phase. Costs a copy of 82 bytes."""
        self._move(replace(self._position, phases=self._position.phases + 1, phase=phase))

    def step_done(self, step: int) -> None:
        """Steps up to this one are done."""
        self._move(replace(self._position, steps_done=step, is_starting=self._position.is_starting and step == 0))

    def _move(self, position: Position) -> None:
        self._position = position
        if self._shared is not None:
            self._shared.write(position)

    def __enter__(self) -> "Watchdog":
        if self._run.stall_limit_s > 0:
            self._start()
        return self

    def _start(self) -> None:
        fds = [os.memfd_create(name) for name in ("riskpo-position", "riskpo-stacks")]
        for fd in fds:
            self._stack.callback(os.close, fd)
        self._shared = SharedPosition(fds[0])
        self._stack.callback(self._shared.close)
        self._shared.write(self._position)
        self._answer_with_stacks(fds[1])
        settings = GuardSettings(
            run_dir=str((Path(self._run.dir) / self._run.name).absolute()), rank=self._env.rank,
            local_rank=self._env.local_rank, world_size=self._env.world_size, pid=os.getpid(),
            limit_s=self._run.stall_limit_s, timeout_s=self._run.timeout_s, position_fd=fds[0], stacks_fd=fds[1],
        )  # fmt: skip
        command = [sys.executable, "-m", "megatron_riskpo.watchdog.guard", json.dumps(asdict(settings))]
        self._guard = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, pass_fds=[*fds, *inherited_fds()]
        )

    def _answer_with_stacks(self, fd: int) -> None:
        faulthandler.register(DUMP_SIGNAL, file=fd, all_threads=True)
        self._stack.callback(faulthandler.unregister, DUMP_SIGNAL)
        self._stacks_fd = fd
        if not faulthandler.is_enabled():
            faulthandler.enable(file=fd)
            self._stack.callback(faulthandler.disable)

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._guard is not None:
            if error is not None and _is_timeout(error):
                self._ask_for_help(error)
            self._guard.kill()
            self._guard.wait()
        self._shared = None
        self._stack.close()

    def _ask_for_help(self, error: BaseException) -> None:
        """Let the guards find out who lags; this rank's ends it."""
        assert self._guard is not None
        os.write(self._stacks_fd, "".join(traceback.format_exception(error)).encode())
        self._move(replace(self._position, timed_out=True))
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._guard.wait(2 * longest_s(self._env.world_size))
        # The kill of a guard that is done is on its way.
        time.sleep(1.0 if self._guard.poll() is not None else 0.0)


def _is_timeout(error: BaseException) -> bool:
    """Whether torch gave up waiting for a peer. (The project's own errors say themselves who is late.)"""
    return isinstance(error, RuntimeError) and _TIMED_OUT.search(str(error)) is not None
