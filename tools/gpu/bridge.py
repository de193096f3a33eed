"""Weights from one process to another on the same GPU by CUDA IPC, beside a copy within the device.

A Qwen2 model of random weights (bfloat16). This process holds them as one rank of an actor does; another one, as the
worker of a server, opens them and fills the buffers of its shard by plan, as server.transport = "shared_memory" does.
Both then copy as many bytes within the device. Here also: filling buckets with all of the weights, as a push over the
network does before it sends (bucket conversion). One JSON object on stdout.
Usage: python tools/gpu/bridge.py [--small] [--repeats 10] [--json bridge.json]
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from ceilings import describe, the_device, time_calls, wait_for
from torch import Tensor

from megatron_riskpo.checkpoint.weight_map import family_of, shape_of
from megatron_riskpo.resharding.checksums import checksum
from megatron_riskpo.resharding.layouts import ActorLayout
from megatron_riskpo.resharding.memory_sink import MemorySink
from megatron_riskpo.resharding.peer_parameters import SharedParameters, open_parameters
from megatron_riskpo.resharding.placements import hf_tensors
from megatron_riskpo.resharding.plan import plan_rank
from megatron_riskpo.resharding.pull import WeightPull
from megatron_riskpo.resharding.rounds import bucket_sizes, make_rounds
from megatron_riskpo.resharding.schedule import BridgeLayout

QWEN_1_5B = {
    "model_type": "qwen2", "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28,
    "num_attention_heads": 12, "num_key_value_heads": 2, "vocab_size": 151_936, "tie_word_embeddings": True,
}  # fmt: skip
SMALL = QWEN_1_5B | {
    "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 512,
}  # fmt: skip


def layout_of(hf_config: dict[str, Any], bucket_mib: float) -> BridgeLayout:
    """One rank, and one server of one worker."""
    return BridgeLayout.served(hf_config, ActorLayout(1), 1, 1, torch.bfloat16.itemsize, bucket_mib, node_size=2)


def random_parameters(layout: BridgeLayout, hf_config: dict[str, Any], device: torch.device) -> dict[str, Tensor]:
    """By their names in the family's table, fused as Megatron has them."""
    torch.manual_seed(0)
    whole = {name: torch.randn(shape, dtype=torch.bfloat16, device=device) for name, shape, *_ in hf_tensors(layout)}
    shape = shape_of(hf_config)
    rules = family_of(hf_config).rules(shape)
    return {rule.megatron: rule.fusion.fuse([whole[name] for name in rule.hf], shape) for rule in rules}


def report(seconds: Sequence[float], num_bytes: int, copy: Sequence[float]) -> dict[str, float]:
    return {
        "seconds": median(seconds), "gb_per_s": num_bytes / median(seconds) / 1e9,
        "of_copy": median(seconds) / median(copy),
    }  # fmt: skip


def copied(tensors: Sequence[Tensor], device: torch.device, repeats: int) -> list[float]:
    """Seconds of a copy of the same tensors within the device, one call each."""
    targets = [torch.empty_like(tensor) for tensor in tensors]

    def copy() -> None:
        for target, tensor in zip(targets, tensors, strict=True):
            target.copy_(tensor)

    return time_calls(copy, device, repeats)


def receive(task: dict[str, Any]) -> dict[str, Any]:
    """The other process: what it measures, and whether it sees the owner's numbers, and has copied them."""
    device = the_device()
    layout = layout_of(task["hf_config"], task["bucket_mib"])
    plan = plan_rank(layout, 1)
    peers = {0: open_parameters(task["record"], device)}
    sink = MemorySink(layout, 0, torch.empty(0, dtype=torch.bfloat16, device=device))
    WeightPull(plan, peers, with_checksums=True).run(sink, version=0)
    pull = WeightPull(plan, peers)
    seconds = time_calls(lambda: pull.run(sink, version=1), device, task["repeats"])
    num_bytes = plan.num_bytes(plan.receives)
    copy = copied(list(sink.parameters.values()), device, task["repeats"])
    return {
        "bytes": num_bytes, "copy_seconds": median(copy), **report(seconds, num_bytes, copy),
        "weights_are_the_same": checksums(peers[0]) == task["checksums"],
    }  # fmt: skip


def checksums(parameters: Mapping[str, Tensor]) -> dict[str, int]:
    return {name: int(checksum(tensor)) for name, tensor in parameters.items()}


def in_another_process(task: dict[str, Any], timeout_s: float) -> dict[str, Any]:
    """Ended, by an error that says so, after `timeout_s`."""
    command = [sys.executable, str(Path(__file__).resolve()), "--receive"]
    try:
        done = subprocess.run(
            command, input=json.dumps(task), stdout=subprocess.PIPE, text=True, check=True, timeout=timeout_s
        )
    except subprocess.TimeoutExpired:
        sys.exit(f"the process that receives was not done after {timeout_s:g} s (--timeout-s)")
    except subprocess.CalledProcessError as error:
        sys.exit(f"the process that receives failed (exit code {error.returncode})")
    return json.loads(done.stdout)


def fill_buckets(layout: BridgeLayout, parameters: dict[str, Tensor]) -> Callable[[], None]:
    """All that a rank sends in a push, into two buckets in turn."""
    rounds = make_rounds(plan_rank(layout, 0))
    example = next(iter(parameters.values()))
    buckets = [example.new_empty(size) for size in bucket_sizes(rounds)]

    def fill() -> None:
        for index, step in enumerate(rounds):
            for message in step.sends:
                for part in message.parts:
                    piece = buckets[index % 2][part.offset :][: part.numel].view(part.source.shape)
                    part.source.copy(parameters[part.source.parameter], piece)

    return fill


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="tiny sizes: shows on a CPU that the script runs")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--bucket-mib", type=float, default=512)
    parser.add_argument("--timeout-s", type=float, default=300, help="for the receiving process, in seconds")
    parser.add_argument("--json", type=Path, help="write the JSON here as well")
    parser.add_argument("--receive", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.receive:
        print(json.dumps(receive(json.load(sys.stdin))))
        return
    device, hf_config = the_device(), SMALL if arguments.small else QWEN_1_5B
    layout = layout_of(hf_config, arguments.bucket_mib)
    parameters = random_parameters(layout, hf_config, device)
    shared = SharedParameters(parameters)
    wait_for(device)
    task = {
        "hf_config": hf_config, "bucket_mib": arguments.bucket_mib, "repeats": arguments.repeats,
        "record": shared.record, "checksums": checksums(parameters),
    }  # fmt: skip
    received = in_another_process(task, arguments.timeout_s)
    copy = copied(list(parameters.values()), device, arguments.repeats)
    filled = time_calls(fill_buckets(layout, parameters), device, arguments.repeats)
    text = json.dumps(
        {
            "about": describe(device), "pull": received,
            "bucket_conversion": report(filled, received["bytes"], copy),
        },
        indent=1,
    )  # fmt: skip
    print(text)
    if arguments.json:
        arguments.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
