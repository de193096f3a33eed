"""What each of two ranks does for test_vllm_engine.py: two engines of one rank each, then one engine of two ranks."""

import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_riskpo.config import RolloutConfig
from megatron_riskpo.rollout.types import SamplingConfig
from megatron_riskpo.rollout.vllm_engine import VllmEngine
from tests.vllm_engines import push_folder

PROMPTS = [[5, 6, 7], [9, 10, 11, 12, 13], [20], [5, 6, 7], [30, 31, 32, 33]]
SEEDS = [0, 1, 2, 3, 4]
SAMPLING = SamplingConfig(group_size=4, max_response_tokens=16, temperature=1.0, stop_token_ids=(1, 2, 3))


def run(folder: Path) -> dict[int, dict[str, Any]]:
    """Results by tensor-parallel size; folder holds the checkpoints a and b."""
    return {tp: _run_layout(folder, tp) for tp in (1, 2)}


def _run_layout(folder: Path, tp: int) -> dict[str, Any]:
    engine = VllmEngine(
        folder / "a",
        RolloutConfig(tp=tp),
        dtype="float32",
        max_model_len=64,
        world_group=dist.group.WORLD,
        seed=0,
    )
    results: dict[str, Any] = {"left_in_memory": _names_in_shared_memory()}
    for version, name in enumerate("ab"):
        push_folder(engine, folder / name, version)
        told: dict[int, list[int]] = {}
        results[name] = engine.generate(PROMPTS, SAMPLING, SEEDS, told.__setitem__)
        results["told"] = told
    results["one_prompt"] = engine.generate(PROMPTS[:1], SAMPLING, SEEDS[:1])  # fewer prompts than engines
    results["scores"] = engine.token_logprobs([s.tolist() for s in results["b"].sequences()])
    engine.close()
    total = torch.ones(1)
    dist.all_reduce(total)
    return results | {"sum_after_close": total.item()}


def _names_in_shared_memory() -> list[str]:
    """Of the files of the engine's tensor-parallel group, which outlive processes that are killed."""
    return [path.name for path in Path("/dev/shm").iterdir() if path.name.startswith(os.environ["VLLM_DIST_IDENT"])]
