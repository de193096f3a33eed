"""The pool against graders that hang, die, raise, lie and print."""

import math
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch

from megatron_riskpo.errors import UsageError
from megatron_riskpo.rewards.options import GraderOptions
from megatron_riskpo.rewards.pool import Grade, GraderPool, fill_errors
from megatron_riskpo.rewards.process import GraderDied, GraderProcess
from megatron_riskpo.rewards.reference import Reference

HOSTILE = "tests.rewards.hostile_graders"
BY_REQUEST, SLOW, PID = (f"{HOSTILE}:{name}" for name in ("by_request", "slow", "pid"))


class OneGrader(GraderPool):
    """A pool for one grader, which grades by expected answers alone."""

    def __init__(self, grader: str, workers: int = 1, timeout_s: float = 5.0, **options: float) -> None:
        super().__init__([grader], workers, GraderOptions(timeout_s=timeout_s, **options))
        self.grader = grader

    def score(self, responses: Sequence[str], answers: Sequence[str]) -> list[Grade]:
        return super().score(responses, [Reference(answer, self.grader) for answer in answers])


@pytest.fixture(scope="module")
def hostile_pool() -> Iterator[OneGrader]:
    with OneGrader(BY_REQUEST, workers=2, timeout_s=0.5) as pool:
        yield pool


@pytest.mark.parametrize(
    ("request_", "reason"),
    [
        ("hang", r"no answer within 0\.5 s"),
        ("die", r"ended with code -9"),
        ("exit", "SystemExit: 3"),
        ("raise", "ValueError: two lines"),
        ("nan", "returned nan"),
        ("eat memory", "MemoryError"),
    ],
)
def test_a_failing_task_costs_itself_only(hostile_pool: OneGrader, request_: str, reason: str):
    responses = ["a", "b", request_, "c", "d", request_, "e"]
    grades = hostile_pool.score(responses, ["a", "x", "a", "c", "x", "a", "e"])
    assert [grade.score for grade in grades if grade.error is None] == [1.0, 0.0, 1.0, 0.0, 1.0]
    failed = [grades[2], grades[5]]
    for grade in failed:
        assert math.isnan(grade.score)
        assert re.search(reason, grade.error)


def test_a_graders_prints_do_not_become_grades(hostile_pool: OneGrader):
    assert [grade.score for grade in hostile_pool.score(["print", "a"], ["print", "b"])] == [1.0, 0.0]


def test_text_arrives_as_it_is(hostile_pool: OneGrader):
    texts = ["", "\n\r\u2028", "🙂\x00\ud800", "x" * 300_000, '{"score": 1}']
    assert all(grade.score == 1.0 for grade in hostile_pool.score(texts, texts))


def test_waiting_for_a_worker_is_not_counted():
    with OneGrader(SLOW, timeout_s=0.4) as pool:  # the last one waits 0.8 s
        assert [grade.score for grade in pool.score(["r"] * 5, ["a"] * 5)] == [1.0] * 5


def test_an_idle_worker_that_was_killed_is_replaced():
    with OneGrader(PID) as pool:
        first = int(pool.score(["r"], ["a"])[0].score)
        os.kill(first, signal.SIGKILL)
        _wait_until(lambda: not _is_alive(first))
        grade = pool.score(["r"], ["a"])[0]
        assert grade.error is None
        assert grade.score != first


def test_workers_outlive_the_thread_that_used_them():
    with OneGrader(PID) as pool:
        seen: list[float] = []
        for _ in range(2):
            thread = threading.Thread(target=lambda: seen.append(pool.score(["r"], ["a"])[0].score))
            thread.start()
            thread.join()
        assert seen[0] == seen[1]


def test_workers_import_neither_torch_nor_the_main_module():
    with OneGrader(f"{HOSTILE}:imported_heavy_modules") as pool:
        assert pool.score(["r"], ["a"])[0].score == 0.0


def test_workers_die_with_their_parent_even_while_they_hang():
    script = (
        "from megatron_riskpo.rewards.options import GraderOptions\n"
        "from megatron_riskpo.rewards.process import GraderProcess\n"
        "from megatron_riskpo.rewards.reference import Reference\n"
        f"process = GraderProcess(['{BY_REQUEST}'], GraderOptions(timeout_s=60.0))\n"
        "print(process.start().pid, flush=True)\n"
        f"process.grade('hang', Reference('a', '{BY_REQUEST}'))\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    worker = int(parent.stdout.readline())
    time.sleep(0.2)  # the task is on its way
    parent.kill()
    parent.wait()
    parent.stdout.close()
    _wait_until(lambda: not _is_alive(worker))


def test_stop_signals_for_the_whole_job_leave_the_workers_to_the_parent():
    with OneGrader(PID) as pool:
        worker = int(pool.score(["r"], ["a"])[0].score)
        for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            os.kill(worker, signum)
        assert pool.score(["r"], ["a"])[0].score == worker


def test_close_does_not_wait_for_a_hanging_task():
    pool = OneGrader(BY_REQUEST, timeout_s=600)
    pool.score(["a"], ["a"])
    grades: list[Grade] = []
    thread = threading.Thread(target=lambda: grades.extend(pool.score(["a", "hang", "a"], ["a", "a", "a"])))
    thread.start()
    time.sleep(0.2)
    start = time.monotonic()
    pool.close()
    thread.join()
    assert time.monotonic() - start < 2
    assert [grade.error is None for grade in grades] == [True, False, False]


@pytest.mark.parametrize(("signum", "reason"), [(signal.SIGKILL, "code -9"), (signal.SIGSTOP, "no answer within 1 s")])
def test_a_worker_that_is_killed_or_stopped_in_a_batch_costs_one_task(tmp_path: Path, signum: int, reason: str):
    place = tmp_path / "pids"
    with OneGrader(f"{HOSTILE}:marks_its_place", workers=2, timeout_s=1.0) as pool:
        grades: list[Grade] = []
        thread = threading.Thread(
            target=lambda: grades.extend(pool.score([str(i) for i in range(40)], [str(place)] * 40))
        )
        thread.start()
        _wait_until(lambda: place.exists() and len(place.read_text().split("\n")) > 10)
        os.kill(int(place.read_text().split()[-1]), signum)
        thread.join()
        again = pool.score(["7"], [str(place)])
        assert pool.num_restarts == 1
    failed = [i for i, grade in enumerate(grades) if grade.error is not None]
    assert len(failed) == 1
    assert reason in grades[failed[0]].error
    assert [grade.score for i, grade in enumerate(grades) if i not in failed] == [
        i for i in range(40) if i not in failed
    ]
    assert again == [Grade(7.0)]


def test_a_stopped_worker_does_not_keep_whoever_writes_to_it():
    with OneGrader(PID, timeout_s=0.5) as pool:
        os.kill(int(pool.score(["r"], ["a"])[0].score), signal.SIGSTOP)
        start = time.monotonic()
        grade = pool.score(["x" * 1_000_000], ["a"])[0]  # more than a pipe holds
        assert "no answer within 0.5 s" in grade.error
        assert time.monotonic() - start < 5
        assert pool.score(["r"], ["a"])[0].error is None


def test_cpu_time_of_all_threads_is_limited():
    with OneGrader(BY_REQUEST, timeout_s=60, cpu_s=1.0) as pool:
        grades = pool.score(["burn", "a"], ["a", "a"])
    assert grades[0].error == "the grader used more than 1 s of CPU"
    assert grades[1] == Grade(1.0)


def test_cpu_time_is_counted_anew_for_every_task():
    with OneGrader(f"{HOSTILE}:burns_a_little", cpu_s=1.0) as pool:
        grades = pool.score(["r"] * 8, ["a"] * 8)
        assert [grade.error for grade in grades] == [None] * 8
        assert len({grade.score for grade in grades}) == 1, "one process did all of it"


def test_after_a_memory_error_a_fresh_worker_takes_the_next_task():
    with OneGrader(BY_REQUEST) as pool:
        grades = pool.score(["eat memory", "a"], ["a", "a"])
        assert pool.num_restarts == 1
    assert [grade.error is None for grade in grades] == [False, True]


def test_submitted_responses_are_graded_while_the_caller_does_something_else():
    with OneGrader(SLOW, workers=2) as pool:
        futures = [pool.submit("r", Reference("a", SLOW)) for _ in range(4)]
        _wait_until(lambda: all(future.done() for future in futures))
        assert pool.gather(futures) == [Grade(1.0)] * 4


def test_progress_is_said(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("megatron_riskpo.rewards.pool.PROGRESS_EVERY_S", 0.1)
    lines: list[str] = []
    with GraderPool([SLOW], 1, log=lines.append) as pool:
        pool.score(["r"] * 3, [Reference("a", SLOW)] * 3)
    assert "graded 2 of 3 responses (0 errors)" in lines


def test_graders_of_several_kinds_share_the_workers():
    names = ["math", "choice", "exact", f"{HOSTILE}:third_parameter"]
    references = [
        Reference("\\frac12", "math"), Reference("B", "choice"), Reference("a b", "exact"),
        Reference("", f"{HOSTILE}:third_parameter", fields={"worth": -2.5}),
    ]  # fmt: skip
    with GraderPool(names, 1) as pool:
        grades = pool.score(["\\boxed{0.5}", "(B)", "a  b", "?"], references)
    assert [grade.score for grade in grades] == [1.0, 1.0, 1.0, -2.5]


def test_equal_responses_are_graded_once_by_a_built_in_grader(monkeypatch: pytest.MonkeyPatch):
    seen: list[str] = []
    grade = GraderProcess.grade

    def counting(self: GraderProcess, response: str, reference: Reference) -> dict:
        seen.append(response)
        return grade(self, response, reference)

    monkeypatch.setattr(GraderProcess, "grade", counting)
    half, third = Reference("1/2"), Reference("1/3")
    responses = ["\\boxed{0.5}", "\\boxed{0.5}", "\\boxed{0.5}", "\\boxed{0.50}"]
    with GraderPool(["math", SLOW], 1) as pool:
        grades = pool.score(responses, [half, half, third, half])
        assert [grade.score for grade in grades] == [1, 1, 0, 1]
        assert sorted(seen) == sorted([responses[0], responses[2], responses[3]])
        seen.clear()
        own = Reference("a", SLOW)
        pool.score(["r", "r"], [own, own])
        assert seen == ["r", "r"], "a user's grader may toss coins"


@pytest.mark.parametrize(("num_deaths", "num_errors"), [(1, 1), (2, 4)])
def test_a_workers_death_is_not_the_error_of_equal_responses(monkeypatch, num_deaths: int, num_errors: int):
    """They are graded once more, and where that fails as well, so that the answer itself is at fault, no more."""
    deaths: list[str] = []
    grade = GraderProcess.grade

    def dying(self: GraderProcess, response: str, reference: Reference) -> dict:
        if response == "\\boxed{0.5}" and len(deaths) < num_deaths:
            deaths.append(response)
            raise GraderDied("killed")
        return grade(self, response, reference)

    monkeypatch.setattr(GraderProcess, "grade", dying)
    half = Reference("1/2")
    with GraderPool(["math"], 1) as pool:
        grades = pool.score(["\\boxed{0.5}"] * 4 + ["\\boxed{0.50}"], [half] * 5)
    assert [grade.error for grade in grades] == ["killed"] * num_errors + [None] * (5 - num_errors)
    assert [grade.score for grade in grades[num_errors:]] == [1.0] * (5 - num_errors)
    assert deaths == ["\\boxed{0.5}"] * num_deaths


@pytest.mark.parametrize("grader", ["no.such.module:f", f"{HOSTILE}:no_such_function", "no_colon"])
def test_a_grader_that_cannot_be_imported_is_a_usage_error(grader: str):
    with OneGrader(grader) as pool, pytest.raises(UsageError, match=r"the grader .* cannot be used"):
        pool.score(["r"], ["a"])


def test_a_grader_that_always_fails_gives_errors_with_the_reason():
    with OneGrader(f"{HOSTILE}:always_raises") as pool:
        grades = pool.score(["r"] * 3, ["a"] * 3)
    assert [grade.error for grade in grades] == ["ValueError: broken grader"] * 3


def test_math_grades_come_in_order_and_a_hanging_power_is_an_error():
    responses = ["\\boxed{\\frac12}", "\\boxed{9^{9^{9^{9}}}}", "\\boxed{-3}", "no answer", "\\boxed{1+x}"]
    with OneGrader("math", timeout_s=3.0) as pool:
        grades = pool.score(responses, ["0.5", "1", "-3", "3", "x+1"])
    assert [grade.score for grade in grades if grade.error is None] == [1.0, 1.0, 0.0, 1.0]
    assert grades[1].error is not None


def test_integer_answers_need_no_worker(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delattr(GraderProcess, "grade")
    with OneGrader("math", timeout_s=1.0) as pool:
        grades = pool.score([f"\\boxed{{{i}}}" for i in range(256)], [str(i % 128) for i in range(256)])
    assert [grade.score for grade in grades] == [float(i < 128) for i in range(256)]


def test_an_error_takes_the_mean_of_its_group_and_moves_no_baseline():
    nan = math.nan
    filled = fill_errors(torch.tensor([[1.0, 0.0, 0.0, nan], [nan, nan, nan, nan], [1.0, 1.0, 0.0, 1.0]]))
    assert torch.equal(filled[2], torch.tensor([1.0, 1.0, 0.0, 1.0]))
    assert torch.equal(filled[1], torch.zeros(4))
    torch.testing.assert_close(filled[0].mean(), torch.tensor([1.0, 0.0, 0.0]).mean())
    leave_one_out = (filled[0].sum() - filled[0]) / 3
    torch.testing.assert_close((filled[0] - leave_one_out)[3], torch.tensor(0.0))


def _wait_until(condition: Callable[[], bool], timeout_s: float = 10.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.02)


def _is_alive(pid: int) -> bool:
    """Whether the process runs; a zombie that nobody has reaped yet does not."""
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False
