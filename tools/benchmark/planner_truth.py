"""Published runs of other trainers, and what the planner says of them: one row of a table each.

    python tools/benchmark/planner_truth.py [--only WORD] [--json]

They let the rollout engine sleep while they train, so only what the actor takes is compared: state, activations of the
fullest micro-batch, the context of CUDA and NCCL. Two things are taken as they have them: whole logits, which this
project does not make, and the width of gradient buffers.
Facts are their sources' own; the layout is put into this project's options as close as they go.
"""

import argparse
import dataclasses
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_riskpo.algorithms import AlgorithmConfig
from megatron_riskpo.algorithms.config import PolicyLossConfig
from megatron_riskpo.config import ActorConfig, DataConfig, ModelConfig, RolloutConfig, TrainConfig
from megatron_riskpo.config_io import read_model_config
from megatron_riskpo.planning.gpus import GIB, GPUS, TIGHT, Gpu
from megatron_riskpo.planning.plan import Plan, make_plan
from megatron_riskpo.planning.state_bytes import stage_ranks

MODELS = Path(__file__).parents[2] / "examples" / "models"
H20 = dataclasses.replace(GPUS["h100"], name="H20", memory=95.6 * GIB, peak_flops=148e12, memory_rate=4.0e12)
"""96 GB, of Hopper's architecture: as many bytes, fewer FLOPs than an H100 (NVIDIA's data sheet)."""


@dataclass(frozen=True)
class Published:
    """A run as its source states it."""

    source: str
    model: str
    gpus: int
    gpu: Gpu
    actor: dict[str, Any]
    tokens: int
    """Of a micro-batch: its longest sequence, or its pack."""
    outcome: str
    """runs, or out of memory."""
    seconds: float = 0.0
    """Of a step, where it is published with what the step did."""
    step: tuple[int, int, int, int] = (64, 32, 4096, 4096)
    """Questions, responses each, mean and longest tokens."""
    rollout_tp: int = 1
    peak_gb: float = 0.0
    """Most memory in 10^9 bytes, where it is published."""
    note: str = ""
    whole_logits: bool = True
    """Whether its trainer makes them."""
    gradient_bytes: int = 4
    """An element of its gradient buffers; this project's are float32."""


LOGITS_BYTES = 2 + 4 + 4
"""An element of whole logits on the last stage, in the passes: bfloat16 as the output layer gives them, float32 for the
loss (Megatron-Core's Float16Module), and its softmax, which becomes the gradient in place (its cross entropy)."""
LONG = (64, 32, 8192, 8192)
BRIDGE = "Megatron-Bridge, scripts/performance/configs/llama, H100, bfloat16"
NEMO = "NeMo RL 0.4, docs/about/performance-summary.md and examples/configs/recipes/llm/performance"
RUNS = (
    Published(
        NEMO, "Llama-3.1-8B-Instruct", 16, GPUS["h100"], {"pp": 2, "mini_batches": 4}, 4096, "runs",
        97.7, (64, 32, 1060, 4096),
    ),
    Published(
        NEMO, "Qwen3-32B", 32, GPUS["h100"], {"tp": 4, "pp": 4, "mini_batches": 4}, 4096, "runs",
        393, (64, 32, 3206, 4096), 4,
    ),
    Published(
        NEMO, "Qwen3-30B-A3B", 32, GPUS["h100"], {"tp": 2, "ep": 8, "mini_batches": 4}, 4096, "runs",
        225, (64, 32, 3154, 4096), 4,
    ),
    Published(
        NEMO, "Qwen3-235B-A22B", 128, GPUS["h100"],
        {"tp": 2, "cp": 2, "ep": 16, "pp": 8, "first_stage_layers": 11, "last_stage_layers": 11, "recompute": "full"},
        4096, "runs", 506, (16, 32, 5671, 8192), 16,
    ),
    Published(
        "Megatron-Bridge pull request 3880; layout of its H100 recipe", "Qwen3-30B-A3B", 16, GPUS["h100"],
        {"pp": 2, "vp": 24, "ep": 8}, 4096, "runs", peak_gb=61.35,
        note="pre-training; its optimizer may keep moments in 16 bits", gradient_bytes=2,
    ),
    Published(
        "verl documentation, perf/dpsk, the least for Qwen3-235B", "Qwen3-235B-A22B", 32, H20,
        {"tp": 4, "pp": 8, "ep": 4, "first_stage_layers": 11, "last_stage_layers": 11, "recompute": "full",
         "offload_optimizer": True}, 4096, "runs",
        note="its optimizer steps on the CPU; ours on the GPU, where the state comes back for it",
    ),
    Published(
        "slime issue 1851", "Qwen3-30B-A3B", 8, GPUS["h100"],
        {"tp": 4, "ep": 8, "recompute": "full", "offload_optimizer": True}, 20480, "runs",
        note="optimizer on the CPU; it ran out of host memory, 102 GB a rank",
    ),
    Published(
        "s1 issue 13", "Qwen2.5-32B", 8, GPUS["h100"], {"tp": 8, "recompute": "full"}, 20000, "out of memory",
        note="fully sharded over 8, here TP 8",
    ),
    Published(
        "s1 issue 13", "Qwen2.5-32B", 16, GPUS["h100"], {"tp": 8, "recompute": "full"}, 20000, "runs",
        note="fully sharded over 16, here TP 8 and a sharded optimizer",
    ),
    Published(
        "NeMo RL issue 1130", "Qwen3-30B-A3B", 8, GPUS["h100"], {"ep": 8, "recompute": "full"}, 4096, "out of memory",
        note="number of GPUs and tokens are not stated: 8 and 4096 taken",
    ),
    Published(
        "verl_megatron_practice issue 2", "Qwen2.5-7B", 8, GPUS["h100"], {"tp": 2}, 10240, "out of memory",
        note="its estimate is 88 GB", whole_logits=False,
    ),
    Published(
        "SkyRL pull request 368", "Qwen3-30B-A3B", 16, GPUS["h100"], {"tp": 4, "pp": 2, "ep": 8}, 6144, "out of memory",
        note="before the pull request; beside the actor it has a reference model, and the engine's share is 0.6",
    ),
    Published(
        "SkyRL pull request 368", "Qwen3-30B-A3B", 16, GPUS["h100"],
        {"tp": 4, "pp": 2, "ep": 8, "recompute": "full"}, 6144, "runs",
    ),
    Published(
        f"{BRIDGE}, pre-training", "Llama-3.1-8B-Instruct", 8, GPUS["h100"], {"cp": 2}, 4096, "runs", step=LONG,
        gradient_bytes=2,
    ),
    Published(
        f"{BRIDGE}, pre-training", "Llama-3.3-70B-Instruct", 64, GPUS["h100"],
        {"tp": 4, "pp": 4, "cp": 2, "vp": 5}, 4096, "runs", step=LONG, gradient_bytes=2,
    ),
    Published(
        f"{BRIDGE}, SFT", "Llama-3.3-70B-Instruct", 32, GPUS["h100"], {"tp": 4, "pp": 4, "vp": 5}, 4096, "runs",
        gradient_bytes=2,
    ),
    Published(
        "Megatron-Bridge pull request 3107", "Llama-3.3-70B-Instruct", 32, GPUS["h100"], {"tp": 4, "pp": 4, "vp": 5},
        4096, "out of memory", note="in 30 to 60 % of its runs; in FP8, here in bfloat16", gradient_bytes=2,
    ),
    Published(
        "Megatron-Bridge pull request 3107", "Llama-3.3-70B-Instruct", 32, GPUS["h100"], {"tp": 4, "pp": 4, "vp": 10},
        4096, "runs", note="in FP8, here in bfloat16", gradient_bytes=2,
    ),
    Published(
        "NeMo RL issue 903", "Qwen2.5-1.5B-Instruct", 512, GPUS["h100"], {"cp": 2}, 16384, "out of memory",
        step=(512, 4, 32768, 32768), note="SFT; kind of GPU not stated: H100 taken",
    ),
    Published(
        "NeMo RL issue 903", "Qwen2.5-1.5B-Instruct", 512, GPUS["h100"], {"cp": 4}, 8192, "runs",
        step=(512, 4, 32768, 32768), note="SFT; kind of GPU not stated: H100 taken",
    ),
    Published(
        "NeMo RL issue 366, of NeMo-Aligner", "Llama-3.1-8B-Instruct", 8, GPUS["h100"], {"tp": 4}, 8 * 4096,
        "out of memory", note="SFT; TP 4 is said of another trainer's run beside it",
    ),
    Published(
        "NeMo RL issue 366, of NeMo-Aligner", "Llama-3.1-8B-Instruct", 8, GPUS["h100"], {"tp": 4}, 4 * 4096, "runs",
        note="SFT; TP 4 is said of another trainer's run beside it",
    ),
)  # fmt: skip


def plan_of(run: Published) -> Plan:
    """Of the run in this project's terms."""
    actor = ActorConfig(
        **{"sequence_parallel": run.actor.get("tp", 1) > 1, "micro_batch_tokens": run.tokens, **run.actor}
    )
    prompts, group, mean, longest = run.step
    config = TrainConfig(
        model=ModelConfig(path=run.model, dtype="bfloat16"),
        data=DataConfig(prompts_per_step=prompts, max_prompt_tokens=min(512, run.tokens // 8)),
        rollout=RolloutConfig(
            group_size=group, max_response_tokens=longest - 512, tp=run.rollout_tp, gpu_memory_utilization=0.6
        ),
        algorithm=AlgorithmConfig(bundle_size=4),
        # NeMo RL's GRPO scores the old and the reference policy.
        loss=PolicyLossConfig(kl_coefficient=0.01 if run.seconds else 0.0),
        actor=actor,
    )
    ranks = stage_ranks(config.actor, run.gpus)
    hf_config = read_model_config(MODELS / run.model / "config.json")
    return make_plan(config, hf_config, run.gpus, run.gpu, mean, sorted({ranks[0], ranks[-1]}))


def peak_bytes(run: Published, plan: Plan) -> float:
    """Of the actor on the rank that holds most, with what its trainer makes besides."""
    saved = 1 - run.gradient_bytes / 4
    vocabulary = read_model_config(MODELS / run.model / "config.json")["vocab_size"] // run.actor.get("tp", 1)
    logits = LOGITS_BYTES * run.tokens * vocabulary if run.whole_logits else 0
    last = plan.memory[-1]
    return max(
        sum(size for name, size in phase.items() if name != "engine")
        + (logits if rank is last and "activations" in phase else 0)
        - saved * phase["gradients"]
        for rank in plan.memory
        for phase in rank.phases.values()
    )


def verdict(run: Published) -> dict[str, Any]:
    """The planner's figures beside the published ones."""
    plan = plan_of(run)
    peak = peak_bytes(run, plan)
    fits = "runs" if peak <= TIGHT * run.gpu.memory else "tight"
    says = fits if peak <= run.gpu.memory else "out of memory"
    return {
        "source": run.source,
        "model": run.model,
        "layout": f"{run.gpus} {run.gpu.name}, {_words(run.actor)}, {run.tokens} tokens",
        "published": run.outcome,
        "planner": says,
        "planner_gib": round(peak / GIB, 1),
        "gpu_gib": round(run.gpu.memory / GIB, 1),
        "published_gib": round(run.peak_gb * 1e9 / GIB, 1) if run.peak_gb else None,
        "published_seconds": run.seconds or None,
        "planner_seconds": round(plan.time.seconds) if run.seconds else None,
        "note": run.note,
    }


def _words(actor: dict[str, Any]) -> str:
    names = {"first_stage_layers": "first", "last_stage_layers": "last", "offload_optimizer": "offload"}
    actor = {name: value for name, value in actor.items() if name != "mini_batches"}
    shown = [
        names.get(name, name) if value is True else f"{names.get(name, name)} {value}" for name, value in actor.items()
    ]
    return " ".join(shown) or "data parallel"


def row(found: dict[str, Any]) -> str:
    """A row of Markdown."""
    memory = f"{found['planner_gib']} of {found['gpu_gib']}"
    memory += f" (published: {found['published_gib']})" if found["published_gib"] else ""
    time = f"{found['planner_seconds']} / {found['published_seconds']:.0f}" if found["published_seconds"] else ""
    cells = [found["model"], found["layout"], found["published"], found["planner"], memory, time, found["source"]]
    return "| " + " | ".join([*cells, found["note"]]) + " |"


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="runs whose source or model has this word")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    import warnings

    warnings.simplefilter("ignore")
    chosen = [run for run in RUNS if args.only.lower() in f"{run.source} {run.model}".lower()]
    if args.json:
        print(json.dumps([verdict(run) for run in chosen], indent=1))
        return 0
    head = [
        "model",
        "layout",
        "published",
        "planner",
        "GiB of the actor",
        "s a step: planner / published",
        "source",
        "note",
    ]
    print("| " + " | ".join(head) + " |\n" + "|---" * len(head) + "|")
    agree = 0
    for run in chosen:
        found = verdict(run)
        print(row(found), flush=True)
        agree += found["published"] == found["planner"]
    print(f"\n{agree} of {len(chosen)} as published", file=sys.stderr)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
