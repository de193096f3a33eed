"""Seconds, GB/s and memory of a weight push between two CPU ranks over gloo.

A Qwen2 model of random weights (float32). Four ways fill the buffers that vLLM's parameters would be, on both ranks at
once, taking turns: memcpy, the same bytes copied within a rank; push, the planned bridge through shared memory, and the
same over sockets (gloo); gather, its first form, where every tensor is gathered whole on every rank, which then takes
its part. All end with the same bits. Medians between barriers. Memory is the resident set above that before, of the
rank with most; of the push over sockets two buckets are allowed (vLLM's modules are not made here: all its buffers are
there before).
With an engine, whole syncs into vLLM are timed as well, and what of them is vLLM's own packing of its layers.
Usage: python tools/benchmark/bridge.py [--json bridge.json] [--skip-engine]
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from markdown_table import markdown_table

from megatron_riskpo.distributed.launch import launch
from megatron_riskpo.errors import RunError

RANK_SCRIPT = Path(__file__).with_name("bridge_rank.py")
NUM_RANKS = 2
CASES: dict[str, tuple[dict[str, Any], int]] = {
    "tp 2 -> tp 1": ({"tp": 2}, 1),
    "pp 2 -> tp 1": ({"pp": 2}, 1),
    "pp 2 -> tp 2": ({"pp": 2}, 2),
}
"""Actor's layout, vLLM's tensor-parallel size."""


def write_model(folder: Path, num_layers: int, hidden_size: int) -> int:
    """A checkpoint of random weights; its bytes. Layers as in Qwen2.5-0.5B, with a smaller vocabulary."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=16384, hidden_size=hidden_size, intermediate_size=5 * hidden_size, num_hidden_layers=num_layers,
        num_attention_heads=hidden_size // 64, num_key_value_heads=2, max_position_embeddings=128,
        tie_word_embeddings=False, dtype="float32",
    )  # fmt: skip
    model = Qwen2ForCausalLM(config)
    model.save_pretrained(folder)
    return sum(parameter.nbytes for parameter in model.parameters())


def on_ranks(task: dict[str, Any], folder: Path, script: Path = RANK_SCRIPT) -> list[dict[str, Any]]:
    """Each rank's report."""
    file = folder / "task.json"
    file.write_text(json.dumps(task))
    code = launch([sys.executable, str(script), str(file)], NUM_RANKS)
    if code:
        raise RunError(f"the benchmark's ranks ended with exit code {code}; see the output above")
    return [json.loads((folder / f"rank_{rank}.json").read_text()) for rank in range(NUM_RANKS)]


def summarize(ranks: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One case: medians of the seconds, which both ranks share; memory of the rank with most."""
    ways = {
        way: {
            "seconds": median(turn["seconds"] for turn in turns),
            "fastest": min(turn["seconds"] for turn in turns),
            "peak": max(turn["peak"] for rank in ranks for turn in rank["turns"][way]),
        }
        for way, turns in ranks[0]["turns"].items()
    }
    sizes = {name: max(rank[name] for rank in ranks) for name in ("shard", "received", "buckets", "rounds")}
    found = {"ways": ways, **sizes}
    if "engine" in ranks[0]:
        found["engine"] = {name: median(times) for name, times in ranks[0]["engine"].items()}
    return found


def table(cases: dict[str, Any]) -> str:
    header = ["case, way", "seconds", "GB/s of the shard", "of memcpy", "fastest", "of memcpy", "extra MiB"]
    rows = []
    for name, case in cases.items():
        base = case["ways"]["memcpy"]
        for way, found in case["ways"].items():
            rows.append([
                f"{name}, {way}", f"{found['seconds']:.3f}", f"{case['shard'] / found['seconds'] / 1e9:.2f}",
                f"{found['seconds'] / base['seconds']:.2f}", f"{found['fastest']:.3f}",
                f"{found['fastest'] / base['fastest']:.2f}", f"{found['peak'] / 2**20:.0f}",
            ])  # fmt: skip
    return markdown_table(header, rows)


def remarks(cases: dict[str, Any]) -> list[str]:
    """A line a case: sizes, the bound, the engine."""
    lines = []
    for name, case in cases.items():
        line = (
            f"- {name}: a shard of {case['shard'] / 1e6:.0f} MB, {case['received'] / 1e6:.0f} MB of it from the other "
            f"rank, {case['rounds']} rounds; two buckets are {case['buckets'] / 2**20:.0f} MiB"
        )
        if "engine" in case:
            line += (
                f"; sync into vLLM {case['engine']['sync']:.2f} s, of which its packing {case['engine']['pack']:.2f} s"
            )
        lines.append(line)
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--hidden-size", type=int, default=896)
    parser.add_argument("--bucket-mib", type=float, default=32)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--skip-engine", action="store_true")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        size = write_model(folder / "model", args.layers, args.hidden_size)
        task = {
            "model": str(folder / "model"), "bucket_mib": args.bucket_mib, "repeats": args.repeats,
            "cases": {name: CASES[name] for name in args.cases}, "with_engine": not args.skip_engine,
        }  # fmt: skip
        ranks = on_ranks(task, folder)
    cases = {name: summarize([rank[name] for rank in ranks]) for name in args.cases}
    print(f"{size / 1e6:.0f} MB model, {NUM_RANKS} ranks, buckets of {args.bucket_mib:g} MiB\n")
    print("\n".join([table(cases), "", *remarks(cases)]))
    if args.json:
        args.json.write_text(json.dumps({"bytes": size, "cases": cases}, indent=2) + "\n")


if __name__ == "__main__":
    main()
