"""Milliseconds that every advantage estimator takes, against the released code's loops, and as a batch grows.

One thread. Times are of the processor, so that other jobs on the machine do not count; the JSON has wall-clock times as
well. "alone" is the estimator, "whole" is `compute_advantages`: the estimator with the checks of its inputs and the
metrics of every step. The loop (released_loop.py) makes neither metrics nor checks.
Usage: python tools/benchmark/advantages.py [--json advantages.json]
"""

import argparse
import json
import os
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from advantage_cases import Batch, Case, all_cases
from advantage_timing import CaseTimes, Timing, largest_difference, time_case, time_parts, time_shape
from markdown_table import markdown_table

from megatron_riskpo.algorithms import AlgorithmConfig

GROWTH_GROUP_SIZE = 10
COMMON_CASES = (
    Case("riskpo permutation", AlgorithmConfig()),
    Case("riskpo complete", AlgorithmConfig(pairing="complete")),
    Case("grpo", AlgorithmConfig(estimator="grpo")),
)
"""Whose time is looked at more closely: by its parts, and as the batch grows."""


def ratios(times: CaseTimes, loops: Mapping[str, Timing]) -> dict[str, float]:
    """How many times as long the loop takes; "best" divides the shortest runs of both."""
    loop = loops[times.case.credit]
    return {
        "alone": loop.median / times.alone.median,
        "whole": loop.median / times.whole.median,
        "whole_best": loop.best / times.whole.best,
    }


def shape_table(loops: Mapping[str, Timing], results: Sequence[CaseTimes]) -> str:
    header = [
        "estimator",
        "alone, ms",
        "best",
        "whole, ms",
        "best",
        "loop / alone",
        "loop / whole",
        "best",
        "goal",
        "verdict",
    ]
    rows = []
    for times in results:
        ratio, goal = ratios(times, loops), times.case.goal
        milliseconds = [times.alone.median, times.alone.best, times.whole.median, times.whole.best]
        rows.append([
            times.case.label,
            *(f"{1e3 * seconds:.2f}" for seconds in milliseconds),
            *(f"{value:,.0f}" for value in ratio.values()),
            str(goal),
            "met" if ratio["whole"] >= goal else "missed",
        ])  # fmt: skip
    return markdown_table(header, rows)


def loop_table(loops: Mapping[str, Timing]) -> str:
    rows = [
        [credit, str(len(loop.processor)), *(f"{1e3 * seconds:,.0f}" for seconds in (loop.median, loop.best))]
        for credit, loop in loops.items()
    ]
    return markdown_table(["released loop, credit", "runs", "ms", "best"], rows)


def parts_table(parts: Mapping[str, Mapping[str, Timing]]) -> str:
    header = ["ms", *next(iter(parts.values()))]
    rows = [[label, *(f"{1e3 * timing.median:.2f}" for timing in timings.values())] for label, timings in parts.items()]
    return markdown_table(header, rows)


def growth_table(growth: Mapping[int, Sequence[CaseTimes]]) -> str:
    """Nanoseconds an answer stay the same where the cost is linear."""
    header = ["estimator", "answers", "alone, ms", "whole, ms", "best", "alone, ns an answer", "whole, ns an answer"]
    rows = [
        [
            times.case.label,
            f"{answers:,}",
            *(f"{1e3 * seconds:.2f}" for seconds in (times.alone.median, times.whole.median, times.whole.best)),
            *(f"{1e9 * timing.median / answers:.0f}" for timing in (times.alone, times.whole)),
        ]
        for place in range(len(next(iter(growth.values()))))
        for answers, times in ((answers, results[place]) for answers, results in growth.items())
    ]
    return markdown_table(header, rows)


def environment() -> dict[str, str | int | float]:
    return {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cores": os.cpu_count() or 0,
        "load_average": os.getloadavg()[0],
    }


def report_shape(shape: tuple[int, int], rounds: int, repeats: int) -> dict[str, Any]:
    loops, results = time_shape(shape, all_cases(), rounds, repeats)
    difference = largest_difference(Batch.draw(*shape))
    print(f"## {shape[0]:,} questions x {shape[1]} answers\n\n{loop_table(loops)}\n")
    print(f"Largest difference of riskpo_reference from the loop: {difference:.1e}\n")
    parts = {case.label: time_parts(case, Batch.draw(*shape), rounds * repeats) for case in COMMON_CASES}
    print(f"{shape_table(loops, results)}\n\n{parts_table(parts)}\n", flush=True)
    return {
        "loops": {credit: asdict(loop) for credit, loop in loops.items()},
        "difference_from_reference": difference,
        "cases": [asdict(times) | {"ratios": ratios(times, loops)} for times in results],
        "parts": {label: {name: asdict(part) for name, part in of_case.items()} for label, of_case in parts.items()},
    }


def report_growth(sizes: Sequence[int], repeats: int) -> dict[int, Any]:
    growth = {}
    for answers in sizes:
        batch = Batch.draw(answers // GROWTH_GROUP_SIZE, GROWTH_GROUP_SIZE)
        growth[answers] = [time_case(case, batch, repeats) for case in COMMON_CASES]
    if growth:
        print(f"## Cost against size, groups of {GROWTH_GROUP_SIZE}\n\n{growth_table(growth)}")
    return {answers: [asdict(times) for times in results] for answers, results in growth.items()}


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Print each table when it is there; everything as JSON-able data."""
    torch.set_num_threads(1)
    found = environment()
    print(f"{found}\n", flush=True)
    shapes = {
        f"{shape[0]}x{shape[1]}": report_shape(shape, arguments.rounds, arguments.repeats) for shape in arguments.shapes
    }
    return {
        "environment": found,
        "shapes": shapes,
        "growth": report_growth(arguments.sizes, arguments.rounds * arguments.repeats),
    }


def shape_of(text: str) -> tuple[int, int]:
    """8192x5: questions x answers each."""
    try:
        num_prompts, group_size = map(int, text.split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text} is not QUESTIONSxANSWERS, such as 8192x5") from None
    return num_prompts, group_size


def at_least(least: int) -> Callable[[str], int]:
    """A whole number."""

    def number(text: str) -> int:
        if int(text) < least:
            raise argparse.ArgumentTypeError(f"{text} is not at least {least}")
        return int(text)

    return number


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shapes = [(8192, 5), (4096, 10)]
    parser.add_argument("--shapes", nargs="*", type=shape_of, default=shapes, help="default: 8192x5 4096x10")
    sizes = [1_000, 10_000, 100_000, 1_000_000]
    parser.add_argument("--sizes", nargs="*", type=at_least(50), default=sizes, help="answers, for cost against size")
    parser.add_argument("--repeats", type=at_least(1), default=10, help="runs of an estimator, a round")
    parser.add_argument("--rounds", type=at_least(1), default=3, help="runs of the loop, and of all estimators in turn")
    parser.add_argument("--json", type=Path, help="write all times here as well")
    arguments = parser.parse_args()
    report = run(arguments)
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
