"""What one rank does in test_end_to_end's comparison of actor, vLLM and transformers after training."""

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_riskpo.actor.actor import Actor
from megatron_riskpo.checkpoint.training_state import agree_on_latest, load_checkpoint
from megatron_riskpo.config import ActorConfig, BridgeConfig, OptimizerConfig, RolloutConfig
from megatron_riskpo.distributed.grid import build_grid
from megatron_riskpo.resharding.bridge import Bridge
from megatron_riskpo.rollout.types import SamplingConfig
from megatron_riskpo.rollout.vllm_engine import VllmEngine

TEMPERATURE = 1.0
NUM_ROLLOUTS = 20


def score_rollouts_of_trained_actor(folder: Path) -> dict[str, Any]:
    """The trained actor from its last checkpoint, its weights pushed into vLLM, and 20 rollouts scored by both."""
    run_dir = folder.parent / "runs" / "vllm-whole"
    base = folder.parent / "runs" / "base" / "hf"
    grid = build_grid(ActorConfig(tp=2), seed=0)
    actor = Actor.from_hf(base, ActorConfig(tp=2), OptimizerConfig(), torch.float32, grid)
    checkpoint = agree_on_latest(run_dir / "checkpoints", dist.group.WORLD)
    state = load_checkpoint(checkpoint, actor)
    engine = VllmEngine(base, RolloutConfig(), dtype="float32", max_model_len=64, world_group=dist.group.WORLD, seed=0)
    Bridge(actor, engine, BridgeConfig(verify="probe"), seed=0).sync(state["step"])
    vocab_size = actor.shape.vocab_size
    prompts = [[4 + (7 * i + j) % (vocab_size - 4) for j in range(3 + i)] for i in range(5)]
    sampling = SamplingConfig(NUM_ROLLOUTS // 5, 16, TEMPERATURE, stop_token_ids=(2,))
    rollouts = engine.generate(prompts, sampling, seeds=list(range(5)))
    result = {"rollouts": rollouts, "actor": actor.logprobs(rollouts, TEMPERATURE), "step": state["step"]}
    engine.close()
    return result
