"""Tokens a second of the update phase under several layouts, packed against padded.

One Qwen2 model of random weights and one batch of rollouts with log-normal response lengths in all rows; an update is
forward, backward and optimizer step of RiskPO's default loss. One process of one thread a rank over gloo. Tokens are
real ones, prompt and response; medians, and those of the fastest update, which other jobs on the machine disturb least.
TP1 is one rank on one core, all other layouts are two on two: the table has tokens/s a core, too, and tokens a second
of the processes' own time, which counts no waiting, and other jobs little.

packed: as this project trains, sequences end to end. padded: what a padded implementation computes. A micro-batch is a
rectangle, its sequences filled up to the longest with dummy tokens behind the response; rectangles have the same token
budget, padding counted. Dummies go through every layer and the output layer, as logits of a padded tensor do, and are
masked in the loss; they attend to what is before them, real tokens do not see them. It is the same model by the same
code, so nothing but the padding differs. In its favour prompt and response are padded together: padding prompts on the
left by themselves needs more. "padded" takes sequences as they come; "padded, sorted" by length, which pads least.

The learning rate is 0: all rows compute the same gradient, and the largest difference of its norm is printed. Ways take
turns within a process, layouts within a round.
Usage: python tools/benchmark/update.py [--json update.json]
"""

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

import torch
from markdown_table import markdown_table
from update_workload import (
    BASELINE,
    LAYOUTS,
    WAYS,
    Workload,
    add_workload_options,
    chosen_workload,
    make_rollouts,
    write_model,
)

from megatron_riskpo.distributed.launch import launch
from megatron_riskpo.errors import RunError

RANK_SCRIPT = Path(__file__).with_name("update_rank.py")

Rows = dict[tuple[str, str], dict[str, Any]]
"""By layout and way."""


def on_ranks(num_ranks: int, task: dict[str, Any], folder: Path, script: Path = RANK_SCRIPT) -> list[dict[str, Any]]:
    """The task's report of each rank, which runs `script`."""
    file = folder / "task.json"
    file.write_text(json.dumps(task))
    code = launch([sys.executable, str(script), str(file)], num_ranks)
    if code:
        raise RunError(f"the benchmark's ranks ended with exit code {code}; see the output above")
    return [json.loads((folder / f"rank_{rank}.json").read_text()) for rank in range(num_ranks)]


def measure(workload: Workload, layouts: Sequence[str], rounds: int, repeats: int) -> Rows:
    """Every layout once a round, those of one rank first."""
    rows: Rows = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_model(workload, folder / "model")
        task = {"workload": asdict(workload), "model": str(folder / "model"), "repeats": repeats}
        for turn in range(rounds):
            for num_ranks in sorted({LAYOUTS[name].num_ranks for name in layouts}):
                chosen = [name for name in layouts if LAYOUTS[name].num_ranks == num_ranks]
                print(f"round {turn + 1} of {rounds}: {', '.join(chosen)}", file=sys.stderr, flush=True)
                add_round(rows, on_ranks(num_ranks, task | {"layouts": chosen}, folder))
    return rows


def add_round(rows: Rows, ranks: Sequence[dict[str, Any]]) -> None:
    """Take in a round's report: wall-clock time is every rank's, processor seconds add up."""
    for layout, ways in ranks[0].items():
        for way, found in ways.items():
            row = rows.setdefault(
                (layout, way),
                {"tokens": found["tokens"], "micro_batches": found["micro_batches"], "wall": [], "processor": []}
                | {"grad_norms": []},
            )
            for turns in zip(*(rank[layout][way]["turns"] for rank in ranks), strict=True):
                row["wall"].append(turns[0]["wall"])
                row["processor"].append(sum(turn["processor"] for turn in turns))
                row["grad_norms"].append(turns[0]["grad_norm"])


def speeds(rows: Rows, real_tokens: int) -> dict[tuple[str, str], dict[str, float]]:
    """Real tokens a second of each row; medians over its updates, but for the fastest of them."""
    found = {}
    for (layout, way), row in rows.items():
        per_second = real_tokens / median(row["wall"])
        found[layout, way] = {
            "per_second": per_second,
            "fastest": real_tokens / min(row["wall"]),
            "per_core": per_second / LAYOUTS[layout].num_ranks,
            "per_processor_second": real_tokens / median(row["processor"]),
            "padding": 1 - real_tokens / row["tokens"],
        }
    return found


def table(rows: Rows, real_tokens: int) -> str:
    header = [
        "layout, way", "tokens/s", "of TP1 packed", "fastest", "of TP1 packed", "tokens/s a core",
        "tokens a processor s", "of TP1 packed", "padding", "micro-batches a rank",
    ]  # fmt: skip
    found = speeds(rows, real_tokens)
    base = found[BASELINE]
    lines = []
    for (layout, way), speed in found.items():
        ratio = {name: f"{speed[name] / base[name]:.2f}" for name in base if base[name]}
        lines.append([
            f"{layout} {way}", f"{speed['per_second']:,.0f}", ratio["per_second"],
            f"{speed['fastest']:,.0f}", ratio["fastest"], f"{speed['per_core']:,.0f}",
            f"{speed['per_processor_second']:,.0f}", ratio["per_processor_second"],
            f"{speed['padding']:.0%}", f"{rows[layout, way]['micro_batches']}",
        ])  # fmt: skip
    return markdown_table(header, lines)


def packed_over_padded(rows: Rows, real_tokens: int) -> list[str]:
    """How many times as fast packed is, a line a layout."""
    found = speeds(rows, real_tokens)
    lines = []
    for layout in dict.fromkeys(layout for layout, _ in rows):
        packed = found[layout, "packed"]
        parts = []
        for way in WAYS[1:]:
            wall, fastest, processor = (
                packed[name] / found[layout, way][name] for name in ("per_second", "fastest", "per_processor_second")
            )
            parts.append(f"{way} {wall:.2f} (fastest {fastest:.2f}, by processor seconds {processor:.2f})")
        lines.append(f"- {layout}: packed over {'; over '.join(parts)}")
    return lines


def norm_difference(rows: Rows) -> float:
    """Largest relative difference of a gradient norm from the first."""
    norms = [norm for row in rows.values() for norm in row["grad_norms"]]
    return max(abs(norm / norms[0] - 1) for norm in norms)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=list(LAYOUTS), help="TP1 is always measured")
    parser.add_argument("--rounds", type=int, default=3, help="launches of each layout")
    parser.add_argument("--repeats", type=int, default=2, help="measured updates of a way in a launch")
    add_workload_options(parser)
    parser.add_argument("--json", type=Path, help="write everything here as well")
    return parser.parse_args(arguments)


def main() -> None:
    arguments = parse()
    workload = chosen_workload(arguments, Workload())
    layouts = list(dict.fromkeys([BASELINE[0], *arguments.layouts]))
    real_tokens = int(make_rollouts(workload).lengths.sum())
    load_before = os.getloadavg()[0]
    rows = measure(workload, layouts, arguments.rounds, arguments.repeats)
    environment = {
        "torch": torch.__version__,
        "cores": os.cpu_count(),
        "load_average": [load_before, os.getloadavg()[0]],
    }
    print(f"{environment}\n{asdict(workload)}\n{workload.num_sequences} sequences, {real_tokens:,} real tokens\n")
    print(f"{table(rows, real_tokens)}\n")
    print("\n".join(packed_over_padded(rows, real_tokens)))
    print(f"\nLargest relative difference of the gradient norm between rows: {norm_difference(rows):.0e}.")
    if arguments.json:
        report = {
            "environment": environment,
            "workload": asdict(workload),
            "real_tokens": real_tokens,
            "rows": [
                {"layout": layout, "way": way} | row | speeds(rows, real_tokens)[layout, way]
                for (layout, way), row in rows.items()
            ],
            "norm_difference": norm_difference(rows),
        }
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
