"""What one rank does in test_parallel_invariance: the same updates under many layouts. Imported by the ranks."""

import dataclasses
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_riskpo.actor.actor import Actor
from megatron_riskpo.algorithms.config import PolicyLossConfig
from megatron_riskpo.algorithms.token_inputs import TokenInputs
from megatron_riskpo.config import ActorConfig, OptimizerConfig
from megatron_riskpo.distributed.grid import RankGrid, build_grid
from megatron_riskpo.resharding.export import export_weights
from megatron_riskpo.rollout.types import Rollouts
from tests.distributed.ranks import release_groups
from tests.tiny_models import VOCAB_SIZE, make_tiny

TEMPERATURE = 0.8
NUM_UPDATES = 3
MODELS = {
    "tied": ("qwen2", True),
    "untied": ("qwen2", False),
    "qk_norm": ("qwen3", True),
    "moe": ("qwen3_moe", False),
}
"""What make_tiny is asked for: family, tied embeddings."""
_TOKEN_MEAN = PolicyLossConfig(kind="ppo", aggregation="token_mean", entropy_coefficient=0.01)
LOSSES = {"tied": PolicyLossConfig(), "untied": _TOKEN_MEAN, "qk_norm": _TOKEN_MEAN, "moe": PolicyLossConfig()}


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
    with torch.no_grad():
        if actor.config.distributed_optimizer:
            _gather_gradient_shards(actor)
        parameters = [p for chunk in actor.chunks for p in chunk.parameters()]
        kept = [parameter.data for parameter in parameters]
        for parameter in parameters:
            parameter.data = parameter.main_grad.clone()  # type: ignore[attr-defined]
        plan = [dataclasses.replace(item, dtype=torch.float32) for item in actor._export_plan]
        gradients = {n: t.clone() for n, t in export_weights(actor.chunks, plan, actor.shape, actor.grid)}
        for parameter, data in zip(parameters, kept, strict=True):
            parameter.data = data
    return gradients


def _gather_gradient_shards(actor: Actor) -> None:
    """A distributed optimizer leaves each rank the sum of its own shard; give every rank all of them."""
    for chunk in actor.model:
        for buffer in [*chunk.buffers, *chunk.expert_parallel_buffers]:
            group = buffer.data_parallel_group
            for bucket in buffer.buckets:
                shard = bucket.grad_data.view(group.size(), -1)[group.rank()].clone()
                dist.all_gather_into_tensor(bucket.grad_data, shard, group=group)


def updates(actor_config: ActorConfig, grid: RankGrid, model_dir: Path, loss: PolicyLossConfig) -> dict[str, Any]:
    """Log-probs before, of three updates the metrics, log-probs and gradients, and the weights after."""
    # A large eps: AdamW's first step is g / (|g| + eps), which near g = 0 would turn rounding into a whole step.
    optimizer = OptimizerConfig(lr=2e-4, clip_grad=1.0, eps=1e-3)
    actor = Actor.from_hf(model_dir, actor_config, optimizer, torch.float32, grid)
    rollouts, advantages, noise = ragged_rollouts()
    if actor_config.micro_batch_tokens < rollouts.lengths.sum():
        half = rollouts.select(range(rollouts.num_sequences // actor_config.mini_batches))
        assert len(actor._plan(half)[0]) > 1
    before = actor.logprobs(rollouts, TEMPERATURE)
    tokens = TokenInputs(old_logprobs=before + noise)
    steps = []
    for _ in range(NUM_UPDATES):
        outputs = actor.update(rollouts, advantages, tokens, loss, TEMPERATURE, 40, num_optimizer_steps_total=10)
        steps.append((outputs.metrics, outputs.logprobs, gradients_in_hf_layout(actor)))
    weights = {name: tensor.clone() for name, tensor in actor.export_weights()}
    return {"before": before, "steps": steps, "weights": weights}


def _layout(**options: Any) -> ActorConfig:
    """Every rank gets several micro-batches, but for those of the references."""
    return ActorConfig(**{"micro_batch_tokens": 60, "distributed_optimizer": False, **options})


LAYOUTS: dict[int, dict[str, ActorConfig]] = {
    1: {
        "reference": _layout(micro_batch_tokens=10**6),
        "micro-batches": _layout(),
        "distributed optimizer": _layout(distributed_optimizer=True),
        "recompute attention": _layout(recompute="selective"),
        "recompute layers": _layout(recompute="full"),
        "offloaded optimizer": _layout(offload_optimizer=True),
        "reference of 2 mini-batches": _layout(mini_batches=2, micro_batch_tokens=10**6),
    },
    2: {
        "tp2": _layout(tp=2),
        "tp2 sp": _layout(tp=2, sequence_parallel=True),
        "pp2": _layout(pp=2),
        "pp2 vp2": _layout(pp=2, vp=2),
        "pp2, layers 1 + 3": _layout(pp=2, first_stage_layers=1),
        "cp2": _layout(cp=2),
        "dp2": _layout(),
        "dp2 distributed optimizer, offloaded": _layout(distributed_optimizer=True, offload_optimizer=True),
        "dp2, 2 mini-batches": _layout(mini_batches=2),
        "ep2": _layout(ep=2),
        "ep2 distributed optimizer": _layout(ep=2, distributed_optimizer=True),
    },
    4: {
        "tp2 pp2 sp": _layout(tp=2, pp=2, sequence_parallel=True),
        "tp2 cp2 sp": _layout(tp=2, cp=2, sequence_parallel=True),
        "pp2 cp2, recompute layers": _layout(pp=2, cp=2, recompute="full"),
        "tp2 pp2 vp2 distributed optimizer": _layout(
            tp=2, pp=2, vp=2, micro_batch_tokens=110, distributed_optimizer=True
        ),
        "tp2 dp2 distributed optimizer": _layout(tp=2, distributed_optimizer=True),
        "pp2 dp2, 2 mini-batches": _layout(pp=2, mini_batches=2),
        "tp2 ep2 sp": _layout(tp=2, ep=2, sequence_parallel=True),
        "pp2 ep2 dp2 distributed optimizer": _layout(pp=2, ep=2, distributed_optimizer=True),
        "cp2 ep4": _layout(cp=2, ep=4),
        "tp2 ep2 etp2 sp": _layout(tp=2, ep=2, etp=2, sequence_parallel=True),
        "tp2 etp2 sp distributed optimizer": _layout(tp=2, etp=2, sequence_parallel=True, distributed_optimizer=True),
    },
}


def make_models(folder: Path) -> None:
    """97 entries: tensor parallelism has to pad the vocabulary. Four layers: two stages of two chunks."""
    sizes = {"vocab_size": 97, "num_layers": 4, "hidden_size": 64}
    for name, (family, tied) in MODELS.items():
        make_tiny(folder / name, family, tied=tied, seed=3, **sizes)


def applies(config: ActorConfig, model: str) -> bool:
    """Experts need a model that has them; Megatron splits their layers only together with the sequence."""
    if model == "moe":
        return config.tp == 1 or config.sequence_parallel
    return config.ep == config.etp == 1


def run(folder: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """By (layout, model)."""
    results = {}
    for layout, config in LAYOUTS[dist.get_world_size()].items():
        grid = build_grid(config, seed=1)
        for model in (name for name in MODELS if applies(config, name)):
            results[layout, model] = updates(config, grid, folder.parent / model, LOSSES[model])
        release_groups()
    return results
