"""Tokens a second, MFU and peak memory of the update phase on one GPU.

A model of Qwen2.5-1.5B's shape with random weights, bfloat16 with float32 main weights, RiskPO's default loss on
rollouts of log-normal length, packed into micro-batches of 16,384 tokens. Each setting of recompute has a process of
its own, which measures the device's matrix rate and copy rate first. FLOPs are those of the model
(megatron_riskpo/actor/flops.py): what is computed again does not count. One JSON object on stdout.
Usage: python tools/gpu/update.py [--recompute none selective full] [--small] [--json update.json]
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args, get_type_hints

# The workload is that of the CPU benchmark, in another size.
sys.path.append(str(Path(__file__).parents[1] / "benchmark"))

from update_workload import Workload, add_workload_options, chosen_workload

from megatron_riskpo.config import ActorConfig
from megatron_riskpo.distributed.launch import launch

QWEN_1_5B = Workload(
    num_layers=28, hidden_size=1536, num_heads=12, num_kv_heads=2, intermediate_size=8960, vocab_size=151_936,
    num_sequences=64, median_response_tokens=1024, sigma=0.6, max_response_tokens=4096, prompt_tokens=(64, 256),
    micro_batch_tokens=16_384,
)  # fmt: skip
SMALL = Workload(
    num_layers=2, hidden_size=64, num_heads=4, num_kv_heads=2, intermediate_size=128, vocab_size=512,
    num_sequences=8, median_response_tokens=24, max_response_tokens=64, prompt_tokens=(4, 8), micro_batch_tokens=128,
)  # fmt: skip
RECOMPUTE = get_args(get_type_hints(ActorConfig)["recompute"])
RANK_SCRIPT = Path(__file__).with_name("update_rank.py")


def in_a_process(task: dict[str, Any]) -> dict[str, Any]:
    """The report of one setting; its process's failure is a result like any other, so that later ones still run."""
    with tempfile.TemporaryDirectory() as temporary:
        file, report = Path(temporary) / "task.json", Path(temporary) / "report.json"
        file.write_text(json.dumps(task))
        code = launch([sys.executable, str(RANK_SCRIPT), str(file), str(report)], 1)
        return {"failed": f"exit code {code}; see stderr"} if code else json.loads(report.read_text())


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recompute", nargs="+", choices=RECOMPUTE, default=list(RECOMPUTE), help="default: all")
    parser.add_argument("--steps", type=int, default=5, help="measured updates, after --warmup")
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--small", action="store_true", help="tiny sizes: shows on a CPU that the script runs")
    add_workload_options(parser)
    parser.add_argument("--json", type=Path, help="write the JSON here as well")
    return parser.parse_args(arguments)


def main() -> int:
    arguments = parse()
    workload = asdict(chosen_workload(arguments, SMALL if arguments.small else QWEN_1_5B))
    task = {name: getattr(arguments, name) for name in ("steps", "warmup", "small")} | {"workload": workload}
    runs = {recompute: in_a_process(task | {"recompute": recompute}) for recompute in arguments.recompute}
    text = json.dumps({"workload": workload, "recompute": runs}, indent=1)
    print(text)
    if arguments.json:
        arguments.json.write_text(text + "\n")
    return 1 if any("failed" in run for run in runs.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
