"""Time and peak memory of log-probs and entropy, from hidden states to their gradients, in three ways.

chunked: this project's pass. plain: log_softmax of whole logits by autograd (several ranks gather the logits). usual:
whole float32 logits on each rank, Megatron's vocabulary-parallel cross-entropy, the entropy by a function of its own.
Each on 1 and on 2 tensor-parallel ranks, once with the entropy as a metric and once in the loss. Times: the ways take
turns in one process a rank. Memory: a process of its own for each way; the peak above inputs and model, so gradients
count. On the CPU it is the resident set's high-water mark, on a GPU torch's allocator's.
Usage: python tools/benchmark/logprobs.py [--json logprobs.json]
"""

import argparse
import json
import os
import platform
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

import torch
from logprob_rank import ENTROPY, Shape
from markdown_table import markdown_table

from megatron_riskpo.distributed.launch import launch
from megatron_riskpo.errors import RunError

WAYS = ("chunked", "plain", "usual")
BASELINE = "usual"
TIME_GOAL, MEMORY_GOAL = 1.0, 0.2
"""At most so many times the baseline's."""
MEMORY_REPEATS = 2
RANK_SCRIPT = Path(__file__).with_name("logprob_rank.py")


def on_ranks(num_ranks: int, task: dict[str, Any]) -> list[dict[str, Any]]:
    """The task's report of each rank."""
    with tempfile.TemporaryDirectory() as temporary:
        file = Path(temporary) / "task.json"
        file.write_text(json.dumps(task))
        code = launch([sys.executable, str(RANK_SCRIPT), str(file)], num_ranks)
        if code:
            raise RunError(f"the benchmark's ranks ended with exit code {code}; see the output above")
        return [json.loads(file.with_name(f"rank_{rank}.json").read_text()) for rank in range(num_ranks)]


def measure(shape: Shape, num_ranks: int, repeats: int) -> list[dict[str, Any]]:
    """A case for each place of the entropy. Of each way: seconds of every turn, the slowest rank's, and the highest
    peak in bytes, the largest rank's."""
    task = {"shape": asdict(shape), "repeats": repeats, "ways": WAYS}
    timed = on_ranks(num_ranks, task)
    alone = {way: on_ranks(num_ranks, task | {"ways": [way], "repeats": MEMORY_REPEATS}) for way in WAYS}
    cases = []
    for place in ENTROPY:
        ways = {}
        for way in WAYS:
            turns = list(zip(*(rank[place]["runs"][way] for rank in timed), strict=True))
            ways[way] = {kind: [max(run[kind] for run in turn) for turn in turns] for kind in ("wall", "processor")}
            runs = [run for rank in alone[way] for run in rank[place]["runs"][way]]
            ways[way]["peak_bytes"] = max(run["peak_bytes"] for run in runs)
        differences = {way: max(rank[place]["differences"][way] for rank in timed) for way in WAYS if way != BASELINE}
        cases.append({"ranks": num_ranks, "entropy": place, "ways": ways, "differences": differences})
    return cases


def ratios(case: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Of each way to the baseline; those of time are medians of the ratios within a turn."""
    base = case["ways"][BASELINE]
    return {
        way: {
            kind: median(mine / theirs for mine, theirs in zip(measured[kind], base[kind], strict=True))
            for kind in ("wall", "processor")
        }
        | {"memory": measured["peak_bytes"] / base["peak_bytes"]}
        for way, measured in case["ways"].items()
    }


def case_table(case: dict[str, Any]) -> str:
    header = ["way", "wall, s", "processor, s", "peak, MiB", "wall / usual", "processor / usual", "peak / usual"]
    rows = []
    for way, ratio in ratios(case).items():
        measured = case["ways"][way]
        rows.append([
            way,
            *(f"{median(measured[kind]):.2f}" for kind in ("wall", "processor")),
            f"{measured['peak_bytes'] / 2**20:,.0f}",
            *(f"{ratio[kind]:.2f}" for kind in ("wall", "processor", "memory")),
        ])  # fmt: skip
    return markdown_table(header, rows)


def print_case(case: dict[str, Any]) -> None:
    ratio = ratios(case)["chunked"]
    # A GPU's seconds are not the process's.
    kind = "wall" if torch.cuda.is_available() else "processor"
    verdicts = [
        f"{name} {value:.3f} of {BASELINE}, goal {goal}: {'met' if value <= goal else 'missed'}"
        for name, value, goal in ((f"{kind} time", ratio[kind], TIME_GOAL), ("peak", ratio["memory"], MEMORY_GOAL))
    ]
    differences = ", ".join(f"{way} {value:.0e}" for way, value in case["differences"].items())
    print(f"### {case['ranks']} rank(s), entropy {case['entropy']}\n\n{case_table(case)}\n\n{'; '.join(verdicts)}.")
    print(f"Largest relative difference from {BASELINE}, values and gradients: {differences}.\n", flush=True)


def environment() -> dict[str, str | int | float]:
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cores": os.cpu_count() or 0,
        "load_average": os.getloadavg()[0],
    }


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--vocab", type=int, default=32_000, help="entries; the ranks divide it")
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of hidden states, weights")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=5, help="turns of the ways, timed")
    parser.add_argument("--json", type=Path, help="write everything here as well")
    return parser.parse_args(arguments)


def main() -> None:
    arguments = parse()
    for num_ranks in arguments.ranks:
        if arguments.vocab % num_ranks:
            raise SystemExit(f"error: {num_ranks} ranks do not divide a vocabulary of {arguments.vocab}")
    shape = Shape(arguments.tokens, arguments.vocab, arguments.hidden, arguments.dtype)
    report: dict[str, Any] = {"environment": environment(), "shape": asdict(shape), "cases": []}
    print(f"{report['environment']}\n{report['shape']}\n", flush=True)
    for num_ranks in arguments.ranks:
        cases = measure(shape, num_ranks, arguments.repeats)
        for case in cases:
            print_case(case)
        report["cases"] += cases
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
