"""A grader process: reads [response, answer] lines (JSON) from stdin, writes one {"score"} or {"error"} line each.

    python -m megatron_riskpo.rewards.worker MODULE:FUNCTION PARENT_PID

A program of its own rather than a multiprocessing child, so that it imports the grader and nothing of the trainer.
"""

import ctypes
import importlib
import json
import math
import os
import resource
import signal
import sys
from collections.abc import Callable
from typing import Any

PR_SET_PDEATHSIG = 1  # linux/prctl.h
MAX_MEMORY = 4 << 30  # bytes of address space: an answer such as 9**9**9 ends in a MemoryError, not in the OOM killer
MAX_ERROR_LENGTH = 300


def main(grader: str, parent_pid: int) -> int:
    """Serve until stdin closes."""
    _follow_parent(parent_pid)
    answers = os.fdopen(os.dup(1), "w", encoding="ascii", buffering=1)
    os.dup2(2, 1)  # what a grader prints must not get between the answers
    try:
        grade = load_grader(grader)
    except Exception as error:
        answers.write(json.dumps({"error": _describe(error)}) + "\n")
        return 1
    answers.write(json.dumps({"ready": True}) + "\n")
    for line in sys.stdin.buffer:
        answers.write(json.dumps(_outcome(grade, *json.loads(line))) + "\n")
    return 0


def load_grader(grader: str) -> Callable[[str, str], float]:
    """The function named by module:function."""
    module, _, function = grader.partition(":")
    return getattr(importlib.import_module(module), function)


def _outcome(grade: Callable[[str, str], float], response: str, answer: str) -> dict[str, Any]:
    try:
        score = float(grade(response, answer))
    # math-verify's TimeoutException and a grader's sys.exit() are no Exceptions, and still only this task's error.
    except BaseException as error:
        return {"error": _describe(error)}
    return {"score": score} if math.isfinite(score) else {"error": f"the grader returned {score}"}


def _follow_parent(parent_pid: int) -> None:
    """Die with the parent, at once and however it dies; leave signals that the whole job gets to the parent."""
    for name in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(name, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if sys.platform == "linux":
        resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY, MAX_MEMORY))
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent_pid:  # it died before the line above
        os._exit(1)


def _describe(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:MAX_ERROR_LENGTH]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], int(sys.argv[2])))
