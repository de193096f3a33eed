"""Seconds and memory of weight pushes from two CPU ranks to one vLLM server: files, the network, shared memory.

A Qwen2 model of random weights (float32), split over the ranks. All ways go to the same server, in blocks that take
turns; the first push of a block, which makes the group, does not count. A push is timed from the call that stops the
server to the one that lets it go on. Memory is that of the ranks above what they held before, mapped files included.
Usage: python tools/benchmark/server_push.py [--json server_push.json]
"""

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from bridge import on_ranks, write_model
from markdown_table import markdown_table

from megatron_riskpo.config import DataConfig, ModelConfig, RolloutConfig, ServerConfig, TrainConfig
from megatron_riskpo.rollout.server_process import ServerProcess

RANK_SCRIPT = Path(__file__).with_name("server_push_rank.py")
WAYS = ("file", "network", "shared_memory")
MAX_TOKENS = 32


def train_config(model: Path, urls: tuple[str, ...] = (), server: ServerConfig | None = None) -> TrainConfig:
    return TrainConfig(
        model=ModelConfig(path=str(model)),
        data=DataConfig(max_prompt_tokens=MAX_TOKENS),
        rollout=RolloutConfig(placement="server", max_response_tokens=MAX_TOKENS, server_urls=urls),
        server=server or ServerConfig(),
    )


def summarize(ranks: Sequence[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """By way: seconds of rank 0, which waits for all; memory of either rank; vLLM's packing, where it is told."""
    found = {}
    for way in WAYS:
        turns = [[turn for block in rank["blocks"] if block["way"] == way for turn in block["turns"]] for rank in ranks]
        seconds = [turn["seconds"] for turn in turns[0]]
        found[way] = {
            "seconds": median(seconds), "fastest": min(seconds),
            "pack": median(turn["pack"] for turn in turns[0]), "received": max(turn["received"] for turn in turns[0]),
            "peak_first": max(turn["peak"] for turn in turns[0]), "peak_last": max(turn["peak"] for turn in turns[-1]),
        }  # fmt: skip
    return found


def table(ways: dict[str, dict[str, float]]) -> str:
    header = ["way", "seconds", "of file", "fastest", "of file", "extra MiB, rank 0", "rank 1"]
    base, rows = ways["file"], []
    for way, found in ways.items():
        rows.append([
            way, f"{found['seconds']:.2f}", f"{found['seconds'] / base['seconds']:.2f}", f"{found['fastest']:.2f}",
            f"{found['fastest'] / base['fastest']:.2f}", f"{found['peak_first'] / 2**20:.0f}",
            f"{found['peak_last'] / 2**20:.0f}",
        ])  # fmt: skip
    return markdown_table(header, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden-size", type=int, default=896)
    parser.add_argument("--bucket-mib", type=float, default=32)
    parser.add_argument("--repeats", type=int, default=3, help="pushes of a block that count")
    parser.add_argument("--blocks", type=int, default=2, help="of each way")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        size = write_model(folder / "model", args.layers, args.hidden_size)
        server = ServerProcess(train_config(folder / "model"), 0, folder / "server")
        server.start()
        try:
            task = {
                "model": str(folder / "model"), "url": server.wait(), "bucket_mib": args.bucket_mib,
                "repeats": args.repeats, "ways": list(WAYS) * args.blocks,
            }  # fmt: skip
            ranks = on_ranks(task, folder, RANK_SCRIPT)
        finally:
            server.stop()
    ways = summarize(ranks)
    print(f"{size / 1e6:.0f} MB model, {len(ranks)} ranks (tp 2), one server, buckets of {args.bucket_mib:g} MiB\n")
    print(table(ways))
    network = ways["network"]
    print(
        f"\n- network: the worker received {network['received'] / 1e6:.0f} MB; of its seconds vLLM's packing took "
        f"{network['pack']:.2f}"
    )
    if args.json:
        args.json.write_text(json.dumps({"bytes": size, "ways": ways}, indent=2) + "\n")


if __name__ == "__main__":
    main()
