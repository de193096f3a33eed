"""Grade responses in processes of their own, each grading within hard limits."""

import math
import queue
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType

import torch
from torch import Tensor

from megatron_riskpo.rewards.answers import quick_grade
from megatron_riskpo.rewards.options import GraderOptions
from megatron_riskpo.rewards.process import GraderDied, GraderProcess
from megatron_riskpo.rewards.reference import BUILT_IN, Reference

PROGRESS_EVERY_S = 30.0


@dataclass(frozen=True)
class Grade:
    """The verdict on one response: a score, or the reason why there is none."""

    score: float
    """The grader's number (math: 1.0 right, 0.0 wrong); NaN if `error` is set."""
    error: str | None = None
    """Why the response could not be graded: the grader raised, overran a limit, or died."""


class GraderPool:
    """`workers` grader processes. A hanging one is killed and replaced, a dying one costs its own task only, and all
    of them die with this process.

    Not a multiprocessing pool: those import the trainer's main module into the workers, and break as a whole when an
    idle worker is killed (pebble 5.2), while here one pipe a worker says which task it has.
    """

    def __init__(
        self, graders: Sequence[str], workers: int, options: GraderOptions | None = None,
        log: Callable[[str], None] = lambda line: None,
    ) -> None:  # fmt: skip
        """`graders`: those that references may name. `options` has the limits of one grading; waiting for a free worker
        is not counted. `log` takes a line of progress every half a minute. Workers start now, in the background."""
        self._options = options or GraderOptions()
        self._log = log
        self._processes = [GraderProcess(graders, self._options) for _ in range(workers)]
        self._idle: queue.SimpleQueue[GraderProcess] = queue.SimpleQueue()
        # The threads live as long as the pool; on Linux a worker dies with the thread that started it.
        self._threads = ThreadPoolExecutor(workers, thread_name_prefix="grader")
        self._starts = [self._threads.submit(self._start, process) for process in self._processes]

    def wait_until_started(self) -> None:
        """Until all workers are up. Raises UsageError if a grader cannot be used here."""
        for start in self._starts:
            start.result()

    def submit(self, response: str, reference: Reference) -> "Future[Grade]":
        """Grade one response in the background, beside whatever the caller does meanwhile; never waits. Raises
        UsageError if a grader cannot be used."""
        for start in self._starts:
            if start.done():
                start.result()
        # Trivial cases of mathematics cost microseconds here and a hundred times that in a worker.
        quick = None
        if reference.grader == "math":
            quick = quick_grade(response, reference.expected_answer, self._options.answer_form)
        if quick is not None:
            done: Future[Grade] = Future()
            done.set_result(Grade(quick))
            return done
        return self._threads.submit(self._grade, response, reference)

    def score(self, responses: Sequence[str], references: Sequence[Reference]) -> list[Grade]:
        """One Grade a response, in order. Takes at most about num_responses / workers * the limit of one grading."""
        batch = GradingBatch(self)
        for response, reference in zip(responses, references, strict=True):
            batch.submit(response, reference)
        return batch.grades()

    def gather(self, futures: "Sequence[Future[Grade]]") -> list[Grade]:
        """The grades of what was submitted, in the order of `futures`; says how far it is."""
        grades, last_said = [], time.monotonic()
        for future in futures:
            grades.append(future.result())
            if time.monotonic() - last_said > PROGRESS_EVERY_S:
                last_said = time.monotonic()
                num_errors = sum(grade.error is not None for grade in grades)
                self._log(f"graded {len(grades)} of {len(futures)} responses ({num_errors} errors)")
        return grades

    @property
    def num_restarts(self) -> int:
        """Workers that took the place of one that was killed or died."""
        return sum(max(process.num_starts - 1, 0) for process in self._processes)

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

    def _grade(self, response: str, reference: Reference) -> Grade:
        process = self._idle.get()
        try:
            outcome = process.grade(response, reference)
        except (TimeoutError, GraderDied) as error:
            return Grade(math.nan, str(error))
        finally:
            self._idle.put(process)
        return Grade(outcome["score"]) if "score" in outcome else Grade(math.nan, outcome["error"])


@dataclass(frozen=True)
class _Equal:
    """Equal responses to one question."""

    response: str
    reference: Reference
    """The object itself: while it is here no other has its id."""
    future: "Future[Grade]"
    rows: list[int]


class GradingBatch:
    """Responses that are handed in one by one, as they come, and whose grades are taken together.

    Equal responses to the same question are graded once where the grader is built in: a policy that has learned gives
    the same answer often. (A user's own grader may toss coins.)
    """

    def __init__(self, pool: GraderPool) -> None:
        self._pool = pool
        self._futures: list[Future[Grade]] = []
        self._equals: dict[tuple[str, int], _Equal] = {}

    def submit(self, response: str, reference: Reference) -> None:
        """Grade it in the background; raises as GraderPool.submit."""
        key, row = (response, id(reference)), len(self._futures)
        if key in self._equals:
            self._equals[key].rows.append(row)
            self._futures.append(self._equals[key].future)
            return
        future = self._pool.submit(response, reference)
        if reference.grader in BUILT_IN:
            self._equals[key] = _Equal(response, reference, future, [row])
        self._futures.append(future)

    def grades(self) -> list[Grade]:
        """One Grade a response, in the order in which they were handed in; waits for those that are missing."""
        grades = self._pool.gather(self._futures)
        # A worker that was killed says nothing of what it graded: the error is one response's, the others try again.
        shared = [e for e in self._equals.values() if len(e.rows) > 1 and grades[e.rows[0]].error is not None]
        again = self._pool.gather([self._pool.submit(equal.response, equal.reference) for equal in shared])
        for equal, grade in zip(shared, again, strict=True):
            for row in equal.rows[1:]:
                grades[row] = grade
        return grades


def fill_errors(rewards: Tensor) -> Tensor:
    """Replace NaN, the reward of a response that could not be graded.

    rewards: float [num_prompts, group_size]. An error becomes the mean of its group's other rewards, so that it tells
    nothing for or against its response: it leaves the group's mean as it is and lies on every group baseline. 0 would
    punish, and leaving the row out would make groups ragged. A group of errors only becomes 0: no signal, either.
    """
    errors = rewards.isnan()
    means = rewards.nanmean(dim=1, keepdim=True).nan_to_num(nan=0.0)
    return torch.where(errors, means, rewards)
