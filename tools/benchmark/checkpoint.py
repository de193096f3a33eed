"""Conversion of a checkpoint both ways, against `cp` of the same bytes in the same run.

    python tools/benchmark/checkpoint.py --json checkpoint.json                      # 3.1 billion parameters, 6.2 GB
    python tools/benchmark/checkpoint.py --model 0.5B --rounds 1 --ranks 1           # 1 GB

Writes a random bfloat16 model of one of Qwen2.5's sizes, converts it to torch_dist and back, and compares the two
folders bit for bit. Needs free disk for four copies. Each way is the whole command, in processes of its own, and ends
with its bytes on the disk (fsync), `cp` too. Prints tables; nothing is asserted about time.
"""

import argparse
import contextlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import torch
from markdown_table import markdown_table

from megatron_riskpo.checkpoint.hf_folder import write_config
from megatron_riskpo.checkpoint.manifest import sync_to_disk
from megatron_riskpo.checkpoint.safetensors_writer import ShardWriter, name_shards
from megatron_riskpo.checkpoint.weight_map import family_of, shape_of
from megatron_riskpo.checkpoint.weight_map.shapes import hf_shapes
from megatron_riskpo.data.character_tokenizer import qwen2_tokenizer, train_character_model

SIZES = {
    "tiny": {"num_hidden_layers": 2, "hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4,
             "num_key_value_heads": 2, "vocab_size": 1000},
    "0.5B": {"num_hidden_layers": 24, "hidden_size": 896, "intermediate_size": 4864, "num_attention_heads": 14,
             "num_key_value_heads": 2, "vocab_size": 151936},
    "3B": {"num_hidden_layers": 36, "hidden_size": 2048, "intermediate_size": 11008, "num_attention_heads": 16,
           "num_key_value_heads": 2, "vocab_size": 151936},
}  # fmt: skip
GOAL_RATIO, GOAL_BYTES = 3.0, 2e9


def write_model(folder: Path, size: str) -> int:
    """A Hugging Face folder with random weights; returns their bytes."""
    config = {"model_type": "qwen2", "tie_word_embeddings": True, **SIZES[size]}
    folder.mkdir()
    train_character_model(["1 + 2 = 3"] * 20, folder / "tokenizer.model")
    qwen2_tokenizer(folder / "tokenizer.model").save_pretrained(folder)
    writer = ShardWriter(folder)
    for rule in family_of(config).rules(shape_of(config)):
        for name, shape in zip(rule.hf, hf_shapes(rule, config), strict=True):
            writer.add(name, torch.randn(shape, dtype=torch.bfloat16))
    shards = writer.finish()
    name_shards(shards)
    write_config(folder, config, torch.bfloat16)
    return sum(shard.num_bytes for shard in shards)


def run_timed(command: Sequence[str]) -> dict[str, float]:
    """Wall-clock and processor seconds of a command, and the peak resident memory of the largest of its processes."""
    start, peak = time.perf_counter(), 0
    process = psutil.Popen(command, stdout=subprocess.DEVNULL)
    while True:
        finished, status, usage = os.wait4(process.pid, os.WNOHANG)
        if finished:
            break
        peak = max(peak, largest_peak(process))
        time.sleep(0.02)
    if status != 0:
        raise SystemExit(f"{' '.join(command)} failed: see its output above")
    processor = usage.ru_utime + usage.ru_stime
    return {"wall": time.perf_counter() - start, "processor": processor, "peak_bytes": peak}


def largest_peak(process: psutil.Process) -> int:
    """VmHWM, in bytes: getrusage's figure would be this script's own, whose memory a child has until it calls exec."""
    peaks = [0]
    with contextlib.suppress(psutil.Error, OSError):
        for one in (process, *process.children(recursive=True)):
            lines = Path(f"/proc/{one.pid}/status").read_text().splitlines()
            peaks += [1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:")]
    return max(peaks)


def run_cp(source: Path, target: Path) -> dict[str, float]:
    """`cp` and fsync of what it wrote."""
    found = run_timed(["cp", "--recursive", "--reflink=never", str(source), str(target)])
    start = time.perf_counter()
    for path in target.rglob("*"):
        sync_to_disk(path)
    return found | {"wall": found["wall"] + time.perf_counter() - start}


def measure(folder: Path, rounds: int, num_ranks: Sequence[int]) -> dict[str, list[dict[str, float]]]:
    """By way, its turns: each way once a round, between two of `cp`'s."""
    convert = [sys.executable, "-m", "megatron_riskpo.cli", "convert"]
    model, megatron, back, copied = (folder / name for name in ("model", "megatron", "back", "copied"))
    turns: dict[str, list[dict[str, float]]] = {}

    def take(way: str, found: dict[str, float]) -> None:
        turns.setdefault(way, []).append(found)
        print(f"{way}: {found['wall']:.1f} s", file=sys.stderr, flush=True)
        shutil.rmtree(copied, ignore_errors=True)
        # What one way has left to write is not the next one's.
        os.sync()

    for turn in range(rounds):
        for count in num_ranks:
            ranks = ["--ranks", str(count)]
            for target in (megatron, back):
                shutil.rmtree(target, ignore_errors=True)
            take("cp", run_cp(model, copied))
            command = [*convert, "hf-to-megatron", str(model), str(megatron), *ranks]
            take(f"hf-to-megatron, {count} ranks", run_timed(command))
            take("cp", run_cp(model, copied))
            command = [*convert, "megatron-to-hf", str(megatron), str(back), *ranks]
            take(f"megatron-to-hf, {count} ranks", run_timed(command))
        if turn == 0:
            take("check", run_timed([*convert, "check", str(model), str(back)]))
    return turns


def summarize(turns: dict[str, list[dict[str, float]]], num_bytes: int) -> list[dict[str, Any]]:
    """Medians of each way, and how many times as long as `cp` it takes."""
    cp = statistics.median(turn["wall"] for turn in turns["cp"])
    rows = []
    for way, found in turns.items():
        wall = statistics.median(turn["wall"] for turn in found)
        rows.append({
            "way": way,
            "turns": [turn["wall"] for turn in found],
            "wall": wall,
            "gb_per_second": num_bytes / 1e9 / wall,
            "times_cp": wall / cp,
            "fastest_times_fastest_cp": min(turn["wall"] for turn in found) / min(turn["wall"] for turn in turns["cp"]),
            "processor": statistics.median(turn["processor"] for turn in found),
            "peak_bytes": max(turn["peak_bytes"] for turn in found),
        })  # fmt: skip
    return rows


def table(rows: Sequence[dict[str, Any]]) -> str:
    header = ["way", "s", "GB/s", "times cp", "fastest over fastest cp", "processor, s", "peak, MB a process"]
    return markdown_table(header, [
        [row["way"], f"{row['wall']:.1f}", f"{row['gb_per_second']:.2f}", f"{row['times_cp']:.2f}",
         f"{row['fastest_times_fastest_cp']:.2f}", f"{row['processor']:.1f}", f"{row['peak_bytes'] / 1e6:,.0f}"]
        for row in rows
    ])  # fmt: skip


def verdicts(rows: Sequence[dict[str, Any]]) -> list[str]:
    """A line a conversion: goals met or missed."""
    lines = []
    for row in rows:
        if " ranks" in row["way"]:
            speed = "met" if row["times_cp"] <= GOAL_RATIO else "missed"
            memory = "met" if row["peak_bytes"] <= GOAL_BYTES else "missed"
            lines.append(f"- {row['way']}: {row['times_cp']:.2f} times cp, {speed}; "
                         f"{row['peak_bytes'] / 1e9:.2f} GB, {memory}")  # fmt: skip
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=SIZES, default="3B")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2], help="processes of a conversion")
    parser.add_argument("--folder", type=Path, help="on the disk to measure; a temporary folder without")
    parser.add_argument("--json", type=Path, help="write everything here as well")
    arguments = parser.parse_args()
    load_before = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(dir=arguments.folder) as temporary:
        folder = Path(temporary)
        num_bytes = write_model(folder / "model", arguments.model)
        rows = summarize(measure(folder, arguments.rounds, arguments.ranks), num_bytes)
    environment = {
        "torch": torch.__version__,
        "cores": os.cpu_count(),
        "load_average": [load_before, os.getloadavg()[0]],
    }
    print(f"{environment}\n{num_bytes / 2 / 1e9:.2f} billion parameters, {num_bytes / 1e9:.2f} GB in bfloat16\n")
    print(f"{table(rows)}\n\n" + "\n".join(verdicts(rows)))
    if arguments.json:
        report = {"environment": environment, "num_bytes": num_bytes, "rows": rows}
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
