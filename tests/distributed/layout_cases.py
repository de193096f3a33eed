"""What one rank does in test_layout_invariance: the same update under several layouts. Imported by the ranks."""

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_riskpo.actor.actor import Actor
from megatron_riskpo.algorithms.config import PolicyLossConfig
from megatron_riskpo.algorithms.token_inputs import TokenInputs
from megatron_riskpo.config import ActorConfig, OptimizerConfig
from megatron_riskpo.distributed.grid import build_grid
from megatron_riskpo.resharding.export import ExportItem, export_weights
from megatron_riskpo.rollout.types import Rollouts
from tests.tiny_models import VOCAB_SIZE

TEMPERATURE = 0.8
LOSSES = {
    "riskpo": PolicyLossConfig(),
    "grpo": PolicyLossConfig(kind="ppo", aggregation="token_mean", entropy_coefficient=0.01),
}


def ragged_rollouts(num_sequences: int = 16, seed: int = 5) -> tuple[Rollouts, Tensor, Tensor]:
    """Rollouts of very different lengths, advantages, and old log-probs a little off the model's."""
    g = torch.Generator().manual_seed(seed)
    prompts = torch.randint(1, 9, (num_sequences,), generator=g)
    responses = torch.randint(1, 40, (num_sequences,), generator=g)
    num_tokens, num_targets = int((prompts + responses).sum()), int(responses.sum())
    rollouts = Rollouts(
        tokens=torch.randint(0, VOCAB_SIZE, (num_tokens,), generator=g),
        prompt_lengths=prompts,
        response_lengths=responses,
        rollout_logprobs=torch.zeros(num_targets),
        finished=torch.ones(num_sequences, dtype=torch.bool),
    )
    advantages = torch.randn(num_sequences, generator=g, dtype=torch.float64)
    return rollouts, advantages, 0.05 * torch.randn(num_targets, generator=g)


def gradients_in_hf_layout(actor: Actor) -> dict[str, Tensor]:
    """Whole gradients under their Hugging Face names: the export path, fed with main_grad for the weights."""
    module = actor.module
    with torch.no_grad():
        kept = {name: parameter.data for name, parameter in module.named_parameters()}
        for parameter in module.parameters():
            parameter.data = parameter.main_grad.clone()  # type: ignore[attr-defined]
        plan = [ExportItem(i.rule, i.owner, i.local_shape, torch.float32) for i in actor._export_plan]
        gradients = {n: t.clone() for n, t in export_weights(module, plan, actor.shape, actor.grid)}
        for name, parameter in module.named_parameters():
            parameter.data = kept[name]
    return gradients


def one_update(actor_config: ActorConfig, model_dir: Path, loss: PolicyLossConfig) -> dict[str, Any]:
    """Log-probs before, one optimizer step, its metrics and gradients, and the weights after."""
    grid = build_grid(actor_config.tp, actor_config.pp, seed=1)
    # A large eps: AdamW's first step is g / (|g| + eps), which near g = 0 would turn rounding into a whole step.
    optimizer = OptimizerConfig(lr=1e-3, clip_grad=1.0, eps=1e-3)
    actor = Actor.from_hf(model_dir, actor_config, optimizer, torch.float32, grid)
    rollouts, advantages, noise = ragged_rollouts()
    before = actor.logprobs(rollouts, TEMPERATURE)
    tokens = TokenInputs(old_logprobs=before + noise)
    outputs = actor.update(rollouts, advantages, tokens, loss, TEMPERATURE, 40, num_optimizer_steps_total=10)
    # A distributed optimizer reduces gradients into each rank's own shard only; the weights after tell the rest.
    gradients = {} if actor_config.distributed_optimizer else gradients_in_hf_layout(actor)
    weights = {name: tensor.clone() for name, tensor in actor.export_weights()}
    return {
        "before": before,
        "logprobs": outputs.logprobs,
        "metrics": outputs.metrics,
        "gradients": gradients,
        "weights": weights,
    }


def layouts(world_size: int) -> dict[str, ActorConfig]:
    """Every case is split into several micro-batches."""
    common = {"micro_batch_tokens": 150, "distributed_optimizer": False}
    if world_size == 1:
        return {
            "reference": ActorConfig(distributed_optimizer=False, micro_batch_tokens=10**6),
            "micro-batches": ActorConfig(**common),
            "distributed optimizer": ActorConfig(micro_batch_tokens=150),
            "reference of 2 mini-batches": ActorConfig(mini_batches=2, distributed_optimizer=False),
        }
    if world_size == 4:
        return {
            "tp2 pp2 sp": ActorConfig(tp=2, pp=2, sequence_parallel=True, **common),
            "tp2 dp2 distributed optimizer": ActorConfig(tp=2, micro_batch_tokens=150),
            "pp2 dp2, 2 mini-batches": ActorConfig(pp=2, mini_batches=2, **common),
        }
    return {
        "tp2": ActorConfig(tp=2, **common),
        "tp2 sp": ActorConfig(tp=2, sequence_parallel=True, **common),
        "pp2": ActorConfig(pp=2, **common),
        "dp2": ActorConfig(**common),
        "dp2 distributed optimizer": ActorConfig(micro_batch_tokens=150),
        "tp2 distributed optimizer": ActorConfig(tp=2, micro_batch_tokens=150),
        "dp2, 2 mini-batches": ActorConfig(mini_batches=2, **common),
    }


def run(folder: Path) -> dict[tuple[str, str, str], dict[str, Any]]:
    """All layouts of this world size, tied and untied, both losses."""
    results = {}
    for layout, config in layouts(dist.get_world_size()).items():
        for tied in ("tied", "untied"):
            for name, loss in LOSSES.items():
                results[layout, tied, name] = one_update(config, folder.parent / tied, loss)
    return results
