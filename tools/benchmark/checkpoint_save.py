"""How long training stands still for a checkpoint: written at once, or in the background while the next step goes on.

One Qwen2 model of random weights, its AdamW state, float32, two ranks of one thread over gloo. A turn is an optimizer
step by itself, a save, and the step after it; ways take turns. Medians over the turns of

    stall          seconds until `save` returns
    step after     seconds of the next step: with a write in the background it shares cores and memory with it
    lost           stall, and what the step after took longer than the step before
    until written  seconds from the call until `latest` names the checkpoint

and the bytes a second of that, against `cp -r` of the same checkpoint in the same run (into the page cache), and `cp`
followed by fsync of every file, which a save does as well.
Usage: python tools/benchmark/checkpoint_save.py [--turns 5] [--json checkpoint_save.json]
"""

import argparse
import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

import torch
from markdown_table import markdown_table
from update import on_ranks
from update_workload import Workload, add_workload_options, chosen_workload, write_model

RANK_SCRIPT = Path(__file__).with_name("checkpoint_save_rank.py")
LAYOUTS = {"DP2": 1, "TP2": 2}
"""Tensor-parallel size; a distributed optimizer shards its state over data-parallel ranks."""
WAYS = ("synchronous", "asynchronous")
WORKLOAD = Workload(
    num_layers=6, hidden_size=640, num_heads=10, num_kv_heads=2, intermediate_size=1728, num_sequences=8
)

Turns = list[dict[str, float]]


def figures(turns: Turns, num_bytes: int) -> dict[str, float]:
    """Medians over the turns of one way."""
    lost = [turn["stall"] + turn["step_after"] - turn["step_before"] for turn in turns]
    written = median(turn["until_written"] for turn in turns)
    names = ("stall", "step_before", "step_after")
    return {name: median(turn[name] for turn in turns) for name in names} | {
        "lost": median(lost),
        "until_written": written,
        "bytes_per_second": num_bytes / written,
    }


def summary(found: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Of one layout's report, each way's figures, with their ratios to `cp` and to the save at once."""
    copied = {name: found["num_bytes"] / median(found[name]) for name in ("cp", "cp_fsync")}
    ways = {way: figures(found[way], found["num_bytes"]) for way in WAYS}
    for way in ways.values():
        way |= {f"of_{name}": way["bytes_per_second"] / speed for name, speed in copied.items()}
        way |= {f"{name}_ratio": way[name] / ways["synchronous"][name] for name in ("stall", "lost")}
    return ways


def table(report: dict[str, Any]) -> str:
    header = ["layout, way", "stall (s)", "of synchronous", "step before (s)", "step after (s)", "lost (s)",
              "of synchronous", "until written (s)", "MB/s", "of cp", "of cp with fsync"]  # fmt: skip
    rows = []
    for layout, found in report.items():
        for way, row in summary(found).items():
            rows.append([
                f"{layout} {way}", f"{row['stall']:.2f}", f"{row['stall_ratio']:.2f}", f"{row['step_before']:.2f}",
                f"{row['step_after']:.2f}", f"{row['lost']:.2f}", f"{row['lost_ratio']:.2f}",
                f"{row['until_written']:.2f}", f"{row['bytes_per_second'] / 1e6:.0f}", f"{row['of_cp']:.2f}",
                f"{row['of_cp_fsync']:.2f}",
            ])  # fmt: skip
    return markdown_table(header, rows)


def measure(workload: Workload, layouts: Sequence[str], turns: int, folder: Path) -> dict[str, Any]:
    """By layout, what rank 0 reports: times are the same on all ranks but for barriers."""
    write_model(workload, folder / "model")
    task = {"workload": asdict(workload), "model": str(folder / "model"), "turns": turns}
    return {
        layout: on_ranks(2, task | {"tp": LAYOUTS[layout], "folder": str(folder / layout)}, folder, RANK_SCRIPT)[0]
        for layout in layouts
    }


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=list(LAYOUTS))
    parser.add_argument(
        "--turns", type=int, default=5, help="measured saves of each way, after one that does not count"
    )
    parser.add_argument("--folder", type=Path, help="on the disk to measure; default: the system's temporary folder")
    add_workload_options(parser)
    parser.add_argument("--json", type=Path, help="write everything here as well")
    return parser.parse_args(arguments)


def main() -> None:
    arguments = parse()
    workload = chosen_workload(arguments, WORKLOAD)
    load_before = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(dir=arguments.folder) as temporary:
        report = measure(workload, arguments.layouts, arguments.turns, Path(temporary))
    environment = {
        "torch": torch.__version__, "cores": os.cpu_count(), "load_average": [load_before, os.getloadavg()[0]],
    }  # fmt: skip
    print(f"{environment}\n{asdict(workload)}")
    for layout, found in report.items():
        print(
            f"{layout}: {found['num_bytes'] / 1e6:.0f} MB a checkpoint; cp {median(found['cp']):.2f} s, with fsync "
            f"{median(found['cp_fsync']):.2f} s"
        )
    print(f"\n{table(report)}")
    if arguments.json:
        document = {"environment": environment, "workload": asdict(workload), "report": report,
                    "summary": {layout: summary(found) for layout, found in report.items()}}  # fmt: skip
        arguments.json.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
