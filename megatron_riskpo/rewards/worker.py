"""A grader process: reads one task a line (JSON) from stdin, writes one {"score"} or {"error"} line each.

    python -m megatron_riskpo.rewards.worker CONFIG PARENT_PID

CONFIG is {"graders": names, "options": GraderOptions} as JSON; a task is [grader's number, response, expected answer,
fields]. A program of its own and no multiprocessing child, so that it imports graders and nothing of the trainer.
"""

import ctypes
import json
import math
import os
import resource
import signal
import sys
from typing import Any

from megatron_riskpo.errors import UsageError
from megatron_riskpo.rewards.graders import Grader, load_grader
from megatron_riskpo.rewards.options import CodeOptions, GraderOptions

PR_SET_PDEATHSIG = 1  # linux/prctl.h
MAX_ERROR_LENGTH = 300


def main(config: dict[str, Any], parent_pid: int) -> int:
    """Serve until stdin closes."""
    options = GraderOptions(**{**config["options"], "code": CodeOptions(**config["options"]["code"])})
    _follow_parent(parent_pid, int(options.memory_gib * 2**30))
    answers = os.fdopen(os.dup(1), "w", encoding="ascii", buffering=1)
    os.dup2(2, 1)  # what a grader prints must not get between the answers
    graders: list[Grader] = []
    for name in config["graders"]:
        try:
            graders.append(load_grader(name, options))
        except Exception as error:
            reason = str(error) if isinstance(error, UsageError) else f"it cannot be imported: {_describe(error)}"
            answers.write(json.dumps({"error": reason, "grader": name}) + "\n")
            return 1
    answers.write(json.dumps({"ready": True}) + "\n")
    for line in sys.stdin.buffer:
        answers.write(json.dumps(_graded(graders, options.cpu_s, *json.loads(line))) + "\n")
    return 0


def _graded(
    graders: list[Grader], cpu_s: float, number: int, response: str, expected_answer: str, fields: dict[str, Any]
) -> dict[str, Any]:
    _allow_cpu(cpu_s)
    try:
        score = float(graders[number](response, expected_answer, fields))
    # math-verify's TimeoutException and a grader's sys.exit() are no Exceptions, and still only this task's error.
    except BaseException as error:
        return {"error": _describe(error)}
    return {"score": score} if math.isfinite(score) else {"error": f"the grader returned {score}"}


def _allow_cpu(seconds: float) -> None:
    """Let the process use so many more seconds of CPU; the kernel ends it (SIGXCPU) when it uses more."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    limit = math.ceil(usage.ru_utime + usage.ru_stime + seconds)
    resource.setrlimit(resource.RLIMIT_CPU, (limit, resource.getrlimit(resource.RLIMIT_CPU)[1]))


def _follow_parent(parent_pid: int, memory: int) -> None:
    """Die with the parent, at once and however it dies; leave signals that the whole job gets to the parent."""
    for name in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(name, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if sys.platform == "linux":
        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent_pid:  # it died before the line above
        os._exit(1)


def _describe(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:MAX_ERROR_LENGTH]


if __name__ == "__main__":
    sys.exit(main(json.loads(sys.argv[1]), int(sys.argv[2])))
