"""Plans of micro-batches: how many, how evenly the work is spread over ranks, and how long planning takes.

Lengths are log-normal, cut at 16,384 tokens; work is the FLOPs of a model of the given size. Beside this project's
planner stands the one it had before (largest_first.py), on the same lengths in the same run. Times are of the
processor, medians: other jobs on the machine count little.
Usage: python tools/benchmark/packing.py [--json packing.json]
"""

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from largest_first import largest_first_plan
from markdown_table import markdown_table

from megatron_riskpo.actor.micro_batches import WorkModel, plan_micro_batches

MAX_TOKENS = 32_768
LONGEST = 16_384
BUDGET_S = 2.0
"""A planner is run again until this much time is spent on it: the one before takes minutes for a large batch."""
BIN_GOAL, SPREAD_GOAL, MILLISECONDS_GOAL = 0.01, 0.02, 20.0
"""Micro-batches of one rank over the lower bound; spread of the ranks' work; of the largest batch, with its ranks."""
QWEN_7B = {
    "vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
    "num_attention_heads": 28, "num_key_value_heads": 4,
}  # fmt: skip
QWEN_500M = {
    "vocab_size": 151936, "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24,
    "num_attention_heads": 14, "num_key_value_heads": 2,
}  # fmt: skip

Plan = list[list[list[int]]]


@dataclass(frozen=True)
class Case:
    """Lengths of a given median and sigma (of the logarithm), and the model that trains on them."""

    median: int
    sigma: float
    model: dict[str, int]

    def lengths(self, num_sequences: int) -> list[int]:
        drawn = np.random.default_rng(num_sequences).lognormal(np.log(self.median), self.sigma, num_sequences)
        return drawn.astype(int).clip(16, LONGEST).tolist()


CASES = {
    "median 1,000, 7B": Case(1000, 1.0, QWEN_7B),
    "median 1,000, 0.5B": Case(1000, 1.0, QWEN_500M),
    "median 4,000, 7B": Case(4000, 0.6, QWEN_7B),
}


@dataclass(frozen=True)
class Result:
    """Of one planner on one batch."""

    num_ranks: int
    micro_batches: int
    """Of all ranks."""
    least: int
    """Lower bound: the tokens over the budget, rounded up, and again to equally many on each rank."""
    spread: float
    """(most - least) / mean of the ranks' work."""
    in_step: float
    """What it costs if ranks wait for each other at each micro-batch: work of the heaviest of each place, summed, over
    the mean work of a rank, less 1."""
    milliseconds: float
    best: float


def measure(plan_of: Callable[[], Plan], case: Case, lengths: Sequence[int], repeats: int) -> Result:
    seconds: list[float] = []
    while not seconds or (len(seconds) < repeats and sum(seconds) < BUDGET_S):
        start = time.process_time()
        plan = plan_of()
        seconds.append(time.process_time() - start)
    work = WorkModel.from_hf_config(case.model).of(np.array(lengths, dtype=np.float64))
    works = np.array([[work[rows].sum() for rows in bins] for bins in plan])
    ranks = works.sum(axis=1)
    bound = -(-sum(lengths) // MAX_TOKENS)
    return Result(
        num_ranks=len(plan),
        micro_batches=works.size,
        least=-(-bound // len(plan)) * len(plan),
        spread=float((ranks.max() - ranks.min()) / ranks.mean()),
        in_step=float(works.max(axis=0).sum() / ranks.mean() - 1),
        milliseconds=1e3 * median(seconds),
        best=1e3 * min(seconds),
    )


def compare(case: Case, num_sequences: int, num_ranks: int, repeats: int) -> dict[str, Result]:
    """The planner before, and this one."""
    lengths, work = case.lengths(num_sequences), WorkModel.from_hf_config(case.model)
    before = partial(largest_first_plan, lengths, num_ranks, MAX_TOKENS)
    now = partial(plan_micro_batches, lengths, num_ranks, MAX_TOKENS, work)
    return {"before": measure(before, case, lengths, repeats), "now": measure(now, case, lengths, repeats)}


def table(found: dict[str, dict[str, Result]]) -> str:
    header = ["lengths, model", "planner", "micro-batches", "lower bound", "spread of ranks", "in step", "ms", "best"]
    rows = [
        [
            name, planner, f"{result.micro_batches:,}", f"{result.least:,}", f"{result.spread:.2%}",
            f"{result.in_step:.1%}", f"{result.milliseconds:,.1f}", f"{result.best:,.1f}",
        ]
        for name, results in found.items()
        for planner, result in results.items()
    ]  # fmt: skip
    rows += [
        [name, "before / now", "", "", "", "", *(f"{ratio:,.0f}" for ratio in ratios(results))]
        for name, results in found.items()
    ]
    return markdown_table(header, rows)


def ratios(results: dict[str, Result]) -> tuple[float, float]:
    """How many times as long the planner before takes: medians, shortest runs."""
    before, now = results["before"], results["now"]
    return before.milliseconds / now.milliseconds, before.best / now.best


def verdicts(found: dict[str, dict[str, Result]], num_ranks: int) -> list[str]:
    lines = []
    for name, results in found.items():
        now = results["now"]
        goals = {"planned in": (now.milliseconds, MILLISECONDS_GOAL, f"{now.milliseconds:.1f} ms")}
        if num_ranks == 1:
            over = now.micro_batches / now.least - 1
            goals["over the lower bound:"] = (over, BIN_GOAL, f"{over:.2%}")
        else:
            goals["spread"] = (now.spread, SPREAD_GOAL, f"{now.spread:.2%}")
        judged = [
            f"{what} {text}, {'met' if value <= goal else 'missed'}" for what, (value, goal, text) in goals.items()
        ]
        lines.append(f"- {name}: {'; '.join(judged)}")
    return lines


def report(num_sequences: int, num_ranks: int, repeats: int) -> dict[str, Any]:
    found = {name: compare(case, num_sequences, num_ranks, repeats) for name, case in CASES.items()}
    print(f"## {num_sequences:,} sequences, {num_ranks} {'rank' if num_ranks == 1 else 'ranks'}\n")
    print(f"{table(found)}\n")
    print("\n".join(verdicts(found, num_ranks)) + "\n", flush=True)
    return {name: {planner: asdict(result) for planner, result in results.items()} for name, results in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sequences", nargs="+", type=int, default=[5120, 16384], help="multiples of the ranks")
    parser.add_argument("--ranks", nargs="+", type=int, default=[1, 64])
    parser.add_argument("--repeats", type=int, default=20, help=f"of a planner, in at most about {BUDGET_S:g} s")
    parser.add_argument("--json", type=Path, help="write all figures here as well")
    arguments = parser.parse_args()
    figures = {
        f"{num_sequences} sequences, {num_ranks} ranks": report(num_sequences, num_ranks, arguments.repeats)
        for num_sequences in arguments.sequences
        for num_ranks in arguments.ranks
    }
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
