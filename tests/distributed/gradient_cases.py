"""What one rank does in test_gradient_health: updates with gradients that one rank spoils. Imported by the ranks."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.optimizer.optimizer import ChainedOptimizer, FP32Optimizer
from torch import Tensor

from megatron_riskpo.actor.actor import Actor, policy_micro_loss
from megatron_riskpo.actor.gradient_health import _finite_everywhere
from megatron_riskpo.actor.model import named_parameters
from megatron_riskpo.actor.optimizer import inner_optimizers
from megatron_riskpo.actor.packing import MicroBatch
from megatron_riskpo.actor.passes import MicroBatchLoss
from megatron_riskpo.algorithms.config import PolicyLossConfig
from megatron_riskpo.algorithms.token_inputs import TokenInputs
from megatron_riskpo.checkpoint.sharded import collect_parts
from megatron_riskpo.config import ActorConfig, OptimizerConfig
from megatron_riskpo.distributed.grid import build_grid
from megatron_riskpo.errors import RunError
from tests.distributed.layout_cases import TEMPERATURE, ragged_rollouts
from tests.distributed.ranks import release_groups

SPOILT_RANK = 1
"""The last stage under pp2: the one that has a loss."""
NUM_STEPS = 10
# Weights must tell a step from none, and one learning rate from the next.
OPTIMIZER = OptimizerConfig(lr=1e-3, schedule="cosine", eps=1e-3, clip_grad=0.1, max_skipped_steps=1)
PLAIN = {"distributed_optimizer": False, "micro_batch_tokens": 150}

LAYOUTS = {
    "dp2": (ActorConfig(**PLAIN), torch.float32),
    "dp2 distributed optimizer": (ActorConfig(micro_batch_tokens=150), torch.float32),
    "dp2 distributed optimizer bfloat16": (ActorConfig(micro_batch_tokens=150), torch.bfloat16),
    "tp2": (ActorConfig(tp=2, **PLAIN), torch.float32),
    "tp2 bfloat16": (ActorConfig(tp=2, **PLAIN), torch.bfloat16),
    "tp2 sp distributed optimizer": (ActorConfig(tp=2, sequence_parallel=True, micro_batch_tokens=150), torch.float32),
    "tp2 two optimizers": (ActorConfig(tp=2, **PLAIN), torch.float32),
    "pp2": (ActorConfig(pp=2, **PLAIN), torch.float32),
    "pp2 distributed optimizer": (ActorConfig(pp=2, micro_batch_tokens=150), torch.float32),
}

CASES = [*(("nan", layout) for layout in LAYOUTS), *(("inf", layout) for layout in ("dp2", "tp2", "pp2"))]


def make_actor(layout: str, folder: Path, **options: Any) -> Actor:
    config, dtype = LAYOUTS[layout]
    grid = build_grid(config, seed=1)
    actor = Actor.from_hf(folder.parent / "model", config, replace(OPTIMIZER, **options), dtype, grid)
    if "two optimizers" in layout:
        actor.optimizer = actor.guarded.optimizer = as_two(actor)
    return actor


def as_two(actor: Actor) -> ChainedOptimizer:
    """Every second parameter in an optimizer of its own with a process group of its own, as experts have them."""
    (whole,) = inner_optimizers(actor.optimizer)
    parameters = whole.get_parameters()
    parts = []
    for half in (parameters[::2], parameters[1::2]):
        adam = torch.optim.AdamW(half, eps=OPTIMIZER.eps, weight_decay=0.0)
        part = FP32Optimizer(adam, whole.config, lambda *_: None)
        part.grad_stats_parallel_group = dist.new_group()
        parts.append(part)
    return ChainedOptimizer(parts)


def step(actor: Actor, number: int, factor: float = 1.0) -> dict[str, float]:
    """Train on batch `number`, one micro-batch's loss on one rank times `factor`; the metrics."""
    rollouts, advantages, _ = ragged_rollouts(8, seed=number)
    loss = policy_micro_loss(rollouts, advantages, TokenInputs(), PolicyLossConfig(), 40, actor.grid.device)
    return actor.train_step(rollouts, spoil_first(loss, factor), TEMPERATURE, NUM_STEPS)[1]


def spoil_first(loss: MicroBatchLoss, factor: float) -> MicroBatchLoss:
    num_calls = 0

    def spoilt(batch: MicroBatch, logprobs: Tensor, entropies: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        nonlocal num_calls
        num_calls += 1
        contribution, metrics = loss(batch, logprobs, entropies)
        return contribution * (factor if num_calls == 1 and dist.get_rank() == SPOILT_RANK else 1.0), metrics

    return spoilt


def state(actor: Actor) -> dict[str, Tensor]:
    """All that an optimizer step may change on this rank: parameters, main weights, moments, counts of steps."""
    found = {name: parameter.detach().clone() for name, parameter in actor.chunks[0].named_parameters()}
    for i, inner in enumerate(inner_optimizers(actor.optimizer)):
        for j, main in enumerate(inner.get_parameters()):
            found[f"{i} {j} main"] = main.detach().clone()
            found |= {f"{i} {j} {key}": value.clone() for key, value in inner.optimizer.state[main].items()}
    return found


def skipping(layout: str, factor: float, folder: Path) -> dict[str, Any]:
    """A good step, a spoilt one, a good one; and the two good ones alone."""
    actor = make_actor(layout, folder)
    good = step(actor, 0)
    before = state(actor)
    spoilt = step(actor, 1, factor)
    after = state(actor)
    metrics = [good, step(actor, 2)]
    plain = make_actor(layout, folder)
    expected = [step(plain, 0)]
    plain.num_optimizer_steps += 1
    expected.append(step(plain, 2))
    return {
        "spoilt": spoilt, "before": before, "after": after, "metrics": metrics, "end": state(actor),
        "expected metrics": expected, "expected end": state(plain),
    }  # fmt: skip


def first_is_spoilt(layout: str, folder: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Nothing but a skipped step, a checkpoint of it, a good step; and the good step alone."""
    actor, plain = make_actor(layout, folder), make_actor(layout, folder)
    step(actor, 0, float("nan"))
    collect_parts(actor, detached=False)
    plain.num_optimizer_steps += 1
    for each in (actor, plain):
        step(each, 1)
    return state(actor), state(plain)


def aborting(layout: str, folder: Path) -> dict[str, str]:
    """The error, by what is allowed and spoilt; "" without one."""

    def error_of(spoilt: list[bool], parameter: str = "", **options: Any) -> str:
        actor = make_actor(layout, folder, **options)
        own = dict(named_parameters(actor.chunks)).get(parameter)
        try:
            for number, is_spoilt in enumerate(spoilt):
                if own is not None and dist.get_rank() == SPOILT_RANK:
                    own.register_hook(lambda gradient: gradient * torch.inf)
                step(actor, number, float("nan") if is_spoilt and not parameter else 1.0)
        except RunError as error:
            return str(error)
        return ""

    return {
        "none allowed": error_of([False, True], max_skipped_steps=0),
        "not in a row": error_of([True, False, True, False]),
        "two in a row": error_of([False, True, True]),
        "one parameter": error_of([True], "decoder.layers.1.mlp.linear_fc2.weight", max_skipped_steps=0),
        "too large": too_large(layout, folder),
    }


def too_large(layout: str, folder: Path) -> str:
    """Finite gradients whose squares are not."""
    actor = make_actor(layout, folder, max_skipped_steps=0)
    try:
        step(actor, 0, 1e25)
    except RunError as error:
        return str(error)
    return ""


def run(folder: Path) -> dict[tuple[str, str], Any]:
    """By (what, layout)."""
    norm, grid = (math.inf if dist.get_rank() == SPOILT_RANK else 1.0), build_grid(ActorConfig(), seed=1)
    results: dict[tuple[str, str], Any] = {("agreement", "dp2"): _finite_everywhere(norm, grid)}
    for kind, layout in CASES:
        results[kind, layout] = skipping(layout, float(kind), folder)
        release_groups()
    for layout in ("dp2 distributed optimizer", "tp2", "pp2"):
        results["first", layout] = first_is_spoilt(layout, folder)
        release_groups()
        results["abort", layout] = aborting(layout, folder)
        release_groups()
    return results
