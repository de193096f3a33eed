"""What a guard sees of its rank's process and does to it (Linux's /proc)."""

import contextlib
import os
import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import psutil

DUMP_SIGNAL = signal.SIGUSR2
"""faulthandler answers it in C, on the thread that it reaches: even in a call that holds Python's lock."""
_DUMP_S = 1.5
_SETTLED_S = 0.3
_RUN_VARIABLES = ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""Alike in all ranks of a run, as torchrun and `launch` start them."""


def process_state(pid: int) -> str:
    """R, S, D, T, ... (man 5 proc); X where it is no more."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return "X"


def dump_stacks(pid: int, stacks_fd: int) -> str:
    """Have the process write its threads' stacks, and return them with all that it wrote before. It is stopped then:
    a rank that went on would make steps, or even end well, in a run that is given up."""
    _send(pid, DUMP_SIGNAL)
    _send(pid, signal.SIGCONT)
    deadline = time.monotonic() + _DUMP_S
    size, since = os.fstat(stacks_fd).st_size, time.monotonic()
    begun = size
    while time.monotonic() < deadline:
        time.sleep(0.05)
        now = os.fstat(stacks_fd).st_size
        if now != size:
            size, since = now, time.monotonic()
        elif size > begun and time.monotonic() - since > _SETTLED_S:
            break
    _send(pid, signal.SIGSTOP)
    text = read_stacks(stacks_fd)
    return text if size > begun else f"{text}no stacks: the process does not answer ({_kernel_place(pid)})\n"


def read_stacks(stacks_fd: int) -> str:
    """All that the process wrote into the descriptor."""
    return os.pread(stacks_fd, os.fstat(stacks_fd).st_size, 0).decode(errors="replace")


def kill(pid: int) -> None:
    _send(pid, signal.SIGKILL)


def ranks_beside(pid: int) -> "list[psutil.Process]":
    """The other ranks of the run that the launcher of this one has started on this machine; none under srun, where a
    rank has a parent of its own."""
    # Takes tens of milliseconds, and a guard that ends with its rank never needs it.
    import psutil

    with contextlib.suppress(psutil.Error):
        rank = psutil.Process(pid)
        launcher, run = rank.parent(), _run_of(rank)
        if launcher is not None and run:
            return [child for child in launcher.children() if child.pid != pid and _run_of(child) == run]
    return []


def _run_of(rank: "psutil.Process") -> list[str]:
    """What tells its run from others; empty: it is no rank."""
    import psutil

    try:
        environment = rank.environ()
    except psutil.Error:
        return []
    return [environment[name] for name in _RUN_VARIABLES] if {"RANK", *_RUN_VARIABLES} <= environment.keys() else []


def _send(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.kill(pid, number)


def _kernel_place(pid: int) -> str:
    """Where the kernel has it wait."""
    place = ""
    with contextlib.suppress(OSError):
        place = Path(f"/proc/{pid}/wchan").read_text().strip("0")
    return f"state {process_state(pid)}{f', in {place}' if place else ''}"
