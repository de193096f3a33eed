"""The pool against graders that hang, die, raise, lie and print."""

import math
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator

import pytest
import torch

from megatron_riskpo.errors import UsageError
from megatron_riskpo.rewards.pool import MATH_GRADER, Grade, GraderPool, fill_errors
from megatron_riskpo.rewards.process import GraderProcess

HOSTILE = "tests.rewards.hostile_graders"


@pytest.fixture(scope="module")
def hostile_pool() -> Iterator[GraderPool]:
    with GraderPool(f"{HOSTILE}:by_request", workers=2, timeout_s=0.5) as pool:
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
def test_a_failing_task_costs_itself_only(hostile_pool: GraderPool, request_: str, reason: str):
    responses = ["a", "b", request_, "c", "d", request_, "e"]
    grades = hostile_pool.score(responses, ["a", "x", "a", "c", "x", "a", "e"])
    assert [grade.score for grade in grades if grade.error is None] == [1.0, 0.0, 1.0, 0.0, 1.0]
    failed = [grades[2], grades[5]]
    for grade in failed:
        assert math.isnan(grade.score)
        assert re.search(reason, grade.error)


def test_a_graders_prints_do_not_become_grades(hostile_pool: GraderPool):
    assert [grade.score for grade in hostile_pool.score(["print", "a"], ["print", "b"])] == [1.0, 0.0]


def test_text_arrives_as_it_is(hostile_pool: GraderPool):
    texts = ["", "\n\r\u2028", "🙂\x00\ud800", "x" * 300_000, '{"score": 1}']
    assert all(grade.score == 1.0 for grade in hostile_pool.score(texts, texts))


def test_waiting_for_a_worker_is_not_counted():
    with GraderPool(f"{HOSTILE}:slow", workers=1, timeout_s=0.4) as pool:  # the last one waits 0.8 s
        assert [grade.score for grade in pool.score(["r"] * 5, ["a"] * 5)] == [1.0] * 5


def test_an_idle_worker_that_was_killed_is_replaced():
    with GraderPool(f"{HOSTILE}:pid", workers=1, timeout_s=5) as pool:
        first = int(pool.score(["r"], ["a"])[0].score)
        os.kill(first, signal.SIGKILL)
        _wait_until(lambda: not _is_alive(first))
        grade = pool.score(["r"], ["a"])[0]
        assert grade.error is None
        assert grade.score != first


def test_workers_outlive_the_thread_that_used_them():
    with GraderPool(f"{HOSTILE}:pid", workers=1, timeout_s=5) as pool:
        seen: list[float] = []
        for _ in range(2):
            thread = threading.Thread(target=lambda: seen.append(pool.score(["r"], ["a"])[0].score))
            thread.start()
            thread.join()
        assert seen[0] == seen[1]


def test_workers_import_neither_torch_nor_the_main_module():
    with GraderPool(f"{HOSTILE}:imported_heavy_modules", workers=1, timeout_s=5) as pool:
        assert pool.score(["r"], ["a"])[0].score == 0.0


def test_workers_die_with_their_parent_even_while_they_hang():
    script = (
        "from megatron_riskpo.rewards.process import GraderProcess\n"
        f"process = GraderProcess('{HOSTILE}:by_request')\n"
        "print(process.start().pid, flush=True)\n"
        "process.grade('hang', 'a', 60.0)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    worker = int(parent.stdout.readline())
    time.sleep(0.2)  # the task is on its way
    parent.kill()
    parent.wait()
    parent.stdout.close()
    _wait_until(lambda: not _is_alive(worker))


def test_stop_signals_for_the_whole_job_leave_the_workers_to_the_parent():
    with GraderPool(f"{HOSTILE}:pid", workers=1, timeout_s=5) as pool:
        worker = int(pool.score(["r"], ["a"])[0].score)
        for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            os.kill(worker, signum)
        assert pool.score(["r"], ["a"])[0].score == worker


def test_close_does_not_wait_for_a_hanging_task():
    pool = GraderPool(f"{HOSTILE}:by_request", workers=1, timeout_s=600)
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


@pytest.mark.parametrize("grader", ["no.such.module:f", f"{HOSTILE}:no_such_function", "no_colon"])
def test_a_grader_that_cannot_be_imported_is_a_usage_error(grader: str):
    with GraderPool(grader, workers=1, timeout_s=5) as pool, pytest.raises(UsageError, match="cannot be imported"):
        pool.score(["r"], ["a"])


def test_a_grader_that_always_fails_gives_errors_with_the_reason():
    with GraderPool(f"{HOSTILE}:always_raises", workers=1, timeout_s=5) as pool:
        grades = pool.score(["r"] * 3, ["a"] * 3)
    assert [grade.error for grade in grades] == ["ValueError: broken grader"] * 3


def test_math_grades_come_in_order_and_a_hanging_power_is_an_error():
    responses = ["\\boxed{\\frac12}", "\\boxed{9^{9^{9^{9}}}}", "\\boxed{-3}", "no answer", "\\boxed{1+x}"]
    with GraderPool(MATH_GRADER, workers=1, timeout_s=1.0) as pool:
        grades = pool.score(responses, ["0.5", "1", "-3", "3", "x+1"])
    assert [grade.score for grade in grades if grade.error is None] == [1.0, 1.0, 0.0, 1.0]
    assert grades[1].error is not None


def test_integer_answers_need_no_worker(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delattr(GraderProcess, "grade")
    with GraderPool(MATH_GRADER, workers=1, timeout_s=1.0) as pool:
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
