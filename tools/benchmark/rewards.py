"""Grades and programs a second of the reward pool, beside a plain subprocess a grade and a plain subprocess a test;
and how long programs are still graded after the last answer, handed in as they finish and all together.

The plain subprocess is what a harness without a pool does: no sandbox, no limits but a time-out, one interpreter
started each time; with "bare", the interpreter is started without its site packages, as fast as one starts. All ways
take turns in every round on as many cores, so that other jobs on the machine touch them alike; ratios are medians over
rounds. For the second table answers finish evenly over a time that is as long as their grading takes in the same round;
what decodes them is a sleep, so that the cores are free, as they are where a GPU decodes.
Usage: python tools/benchmark/rewards.py [--workers 2] [--rounds 5] [--json rewards.json]
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median

from markdown_table import markdown_table

from megatron_riskpo.rewards.options import CodeOptions, GraderOptions
from megatron_riskpo.rewards.pool import Grade, GraderPool, GradingBatch
from megatron_riskpo.rewards.reference import Reference

PAIRS = Path(__file__).parents[2] / "tests" / "data" / "math_pairs.jsonl"
PROGRAM = """n = int(input())
sieve = [True] * (n + 1)
for p in range(2, n + 1):
    if sieve[p]:
        for multiple in range(p * p, n + 1, p):
            sieve[multiple] = False
print(sum(sieve[2:]) + {salt} - {salt})
"""
NUM_PRIMES = {10: 4, 100: 25, 500: 95, 1000: 168, 30: 10, 50: 15, 200: 46, 300: 62, 400: 78, 600: 109}
ONE_GRADE = (
    "import sys; from megatron_riskpo.rewards.graders.mathematics import MathGrader; "
    "print(MathGrader()(sys.argv[1], sys.argv[2], {}))"
)
MATHEMATICS, CODE = "mathematics", "code"
TOGETHER, AS_FINISHED = "handed in together", "handed in as they finish"


def math_tasks(num: int) -> list[tuple[str, Reference]]:
    """Hand-checked pairs, over again with other texts around them: equal responses would be graded once."""
    pairs = [json.loads(line) for line in PAIRS.read_text(encoding="utf-8").splitlines()]
    chosen = [(i, pairs[i % len(pairs)]) for i in range(num)]
    return [(f"{i}: {pair['answer']}", Reference(pair["expected_answer"])) for i, pair in chosen]


def code_tasks(num: int, num_tests: int) -> list[tuple[str, Reference]]:
    """Different programs that count primes, each with `num_tests` tests."""
    tests = [{"input": f"{n}\n", "output": f"{count}\n"} for n, count in list(NUM_PRIMES.items())[:num_tests]]
    reference = Reference("", "code", fields={"tests": tests})
    return [(f"```python\n{PROGRAM.replace('{salt}', str(i))}```", reference) for i in range(num)]


def by_pool(pool: GraderPool, tasks: list[tuple[str, Reference]]) -> None:
    check(pool.score(*map(list, zip(*tasks, strict=True))))


def check(grades: list[Grade]) -> None:
    """A time counts only if everything was graded."""
    failed = [grade.error for grade in grades if grade.error is not None]
    if failed:
        raise SystemExit(f"error: {len(failed)} of {len(grades)} could not be graded: {failed[0]}")


def in_parallel(workers: int, run: Callable[[tuple[str, Reference]], None], tasks: list[tuple[str, Reference]]) -> None:
    with ThreadPoolExecutor(workers) as threads:
        list(threads.map(run, tasks))


def one_grade(task: tuple[str, Reference]) -> None:
    words = [sys.executable, "-c", ONE_GRADE, task[0], task[1].expected_answer]
    subprocess.run(words, capture_output=True, timeout=60, check=True)


def one_program(task: tuple[str, Reference], *flags: str) -> None:
    program = task[0].removeprefix("```python\n").removesuffix("```")
    for test in task[1].fields["tests"]:
        words = [sys.executable, *flags, "-c", program]
        done = subprocess.run(words, input=test["input"], capture_output=True, text=True, timeout=60, check=True)
        if done.stdout != test["output"]:
            raise SystemExit(f"error: the benchmark's program printed {done.stdout!r}")


def timed(run: Callable[[], None], num: int) -> float:
    """`num` things a second."""
    start = time.perf_counter()
    run()
    return num / (time.perf_counter() - start)


def seconds_after_last(pool: GraderPool, tasks: list[tuple[str, Reference]], decoding_s: float, way: str) -> float:
    """From the last answer to the last grade; answers finish evenly over decoding_s."""
    batch, start = GradingBatch(pool), time.perf_counter()
    for number, task in enumerate(tasks, 1):
        time.sleep(max(0.0, start + decoding_s * number / len(tasks) - time.perf_counter()))
        if way == AS_FINISHED:
            batch.submit(*task)
    last = time.perf_counter()
    if way == TOGETHER:
        for task in tasks:
            batch.submit(*task)
    grades = batch.grades()
    seconds = time.perf_counter() - last
    check(grades)
    return seconds


def measure(
    workers: int, rounds: int, num_math: int, num_programs: int, num_tests: int
) -> tuple[dict[str, dict[str, list[float]]], dict[str, list[float]]]:
    """{what: {way: rate of each round}}; {way: seconds after the last answer of each round}."""
    options = GraderOptions(timeout_s=60.0, code=CodeOptions(program_timeout_s=120.0))
    rates: dict[str, dict[str, list[float]]] = {MATHEMATICS: {}, CODE: {}}
    waits: dict[str, list[float]] = {TOGETHER: [], AS_FINISHED: []}

    def add(what: str, way: str, rate: float) -> None:
        rates[what].setdefault(way, []).append(rate)

    maths, codes = math_tasks(num_math), code_tasks(num_programs, num_tests)
    few = maths[: max(2 * workers, 4)]
    with GraderPool(["math", "code"], workers, options) as pool:
        by_pool(pool, [*few, *codes[:workers]])  # workers are up
        for _ in range(rounds):
            add(MATHEMATICS, "pool", timed(lambda: by_pool(pool, maths), num_math))
            add(MATHEMATICS, "subprocess", timed(lambda: in_parallel(workers, one_grade, few), len(few)))
            add(CODE, "pool", timed(lambda: by_pool(pool, codes), num_programs))
            add(CODE, "subprocess", timed(lambda: in_parallel(workers, one_program, codes), num_programs))
            bare = timed(lambda: in_parallel(workers, lambda task: one_program(task, "-I", "-S"), codes), num_programs)
            add(CODE, "subprocess, bare", bare)
            decoding_s = num_programs / rates[CODE]["pool"][-1]
            for way, seconds in waits.items():
                seconds.append(seconds_after_last(pool, codes, decoding_s, way))
    return rates, waits


def table(rates: dict[str, dict[str, list[float]]], num_tests: int) -> str:
    rows = []
    units = {MATHEMATICS: "grades", CODE: f"programs of {num_tests} tests"}
    for what, ways in rates.items():
        for way, found in ways.items():
            ratio = median(ours / theirs for ours, theirs in zip(ways["pool"], found, strict=True))
            rows.append([f"{units[what]} a second, {way}", f"{median(found):.1f}", f"{ratio:.2f}"])
    return markdown_table(["", "rate", "pool's rate over it"], rows)


def waits_table(waits: dict[str, list[float]], num_programs: int) -> str:
    rows = []
    for way, found in waits.items():
        ratio = median(own / together for own, together in zip(found, waits[TOGETHER], strict=True))
        rows.append([f"{num_programs} programs {way}", f"{median(found):.2f}", f"{ratio:.2f}"])
    return markdown_table(["", "seconds after the last answer", "of those together"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--grades", type=int, default=400, help="mathematics, a round")
    parser.add_argument("--programs", type=int, default=10, help="a round")
    parser.add_argument("--tests", type=int, default=10, help=f"a program, at most {len(NUM_PRIMES)}")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    rates, waits = measure(arguments.workers, arguments.rounds, arguments.grades, arguments.programs, arguments.tests)
    print(table(rates, arguments.tests), waits_table(waits, arguments.programs), sep="\n\n")
    if arguments.json:
        arguments.json.write_text(json.dumps(rates | {"after": waits}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
