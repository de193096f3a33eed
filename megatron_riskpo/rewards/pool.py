"""Grade responses in processes of their own, each grading with a hard time-out."""

import math
import queue
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType

import torch
from torch import Tensor

from megatron_riskpo.rewards.answers import quick_grade
from megatron_riskpo.rewards.process import GraderDied, GraderProcess

MATH_GRADER = "megatron_riskpo.rewards.math_grader:grade_math"


@dataclass(frozen=True)
class Grade:
    """The verdict on one response: a score, or the reason why there is none."""

    score: float
    """The grader's number (math: 1.0 right, 0.0 wrong); NaN if `error` is set."""
    error: str | None = None
    """Why the response could not be graded: the grader raised, overran its time, or died."""


class GraderPool:
    """`workers` grader processes. A hanging one is killed and replaced, a dying one costs its own task only, and all
    of them die with this process.

    Not a multiprocessing pool: those import the trainer's main module into the workers, and break as a whole when an
    idle worker is killed (pebble 5.2), while here one pipe a worker says which task it has.
    """

    def __init__(self, grader: str, workers: int, timeout_s: float) -> None:
        """`grader`: module:function, called with (response, expected answer), returns a number. `timeout_s`: wall-clock
        limit of one grading, waiting for a free worker not counted. Workers start now, in the background."""
        self._grader, self._timeout_s = grader, timeout_s
        self._processes = [GraderProcess(grader) for _ in range(workers)]
        self._idle: queue.SimpleQueue[GraderProcess] = queue.SimpleQueue()
        # The threads live as long as the pool; on Linux a worker dies with the thread that started it.
        self._threads = ThreadPoolExecutor(workers, thread_name_prefix="grader")
        self._starts = [self._threads.submit(self._start, process) for process in self._processes]

    def score(self, responses: Sequence[str], answers: Sequence[str]) -> list[Grade]:
        """One Grade a response, in order. Takes at most about num_responses / workers * timeout_s.

        Raises UsageError if the grader cannot be imported.
        """
        for start in self._starts:
            if start.done():
                start.result()
        pairs = list(zip(responses, answers, strict=True))
        # Trivial cases of the built-in grader cost microseconds here and a hundred times that in a worker.
        quick = [quick_grade(*pair) if self._grader == MATH_GRADER else None for pair in pairs]
        futures = {i: self._threads.submit(self._grade, *pairs[i]) for i, score in enumerate(quick) if score is None}
        return [futures[i].result() if score is None else Grade(score) for i, score in enumerate(quick)]

    def close(self) -> None:
        """End all workers, also those in the middle of a task."""
        for process in self._processes:
            process.close()
        self._threads.shutdown()  # tasks that still wait end at once: a closed process grades nothing

    def __enter__(self) -> "GraderPool":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()

    def _start(self, process: GraderProcess) -> None:
        try:
            process.start()
        finally:
            self._idle.put(process)

    def _grade(self, response: str, answer: str) -> Grade:
        process = self._idle.get()
        try:
            outcome = process.grade(response, answer, self._timeout_s)
        except (TimeoutError, GraderDied) as error:
            return Grade(math.nan, str(error))
        finally:
            self._idle.put(process)
        return Grade(outcome["score"]) if "score" in outcome else Grade(math.nan, outcome["error"])


def fill_errors(rewards: Tensor) -> Tensor:
    """Replace NaN, the reward of a response that could not be graded.

    rewards: float [num_prompts, group_size]. An error becomes the mean of its group's other rewards, so that it tells
    nothing for or against its response: it leaves the group's mean as it is and lies on every group baseline. 0 would
    punish, and leaving the row out would make groups ragged. A group of errors only becomes 0: no signal, either.
    """
    errors = rewards.isnan()
    means = rewards.nanmean(dim=1, keepdim=True).nan_to_num(nan=0.0)
    return torch.where(errors, means, rewards)
