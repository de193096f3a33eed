"""What one rank does in test_exactness: real actors, real updates, and the memory that they take. Imported by the
ranks."""

import contextlib
import gc
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch.distributed import Work
from torch.profiler import ProfilerActivity, profile

from megatron_riskpo.actor.actor import Actor
from megatron_riskpo.algorithms.config import PolicyLossConfig
from megatron_riskpo.algorithms.token_inputs import TokenInputs
from megatron_riskpo.config import ActorConfig, OptimizerConfig
from megatron_riskpo.config_io import load_model_config
from megatron_riskpo.distributed.grid import build_grid
from megatron_riskpo.planning.activations import Lengths
from megatron_riskpo.rollout.types import Rollouts
from tests.distributed.ranks import release_groups
from tests.tiny_models import make_tiny

PROMPT, RESPONSE, A_MICRO_BATCH, NUM_MICRO_BATCHES = 8, 88, 4, 4
LENGTHS = Lengths((PROMPT,) * A_MICRO_BATCH, (RESPONSE,) * A_MICRO_BATCH)


def _layout(**options: Any) -> ActorConfig:
    tokens = A_MICRO_BATCH * (PROMPT + RESPONSE) // options.get("cp", 1)
    return ActorConfig(**{"micro_batch_tokens": tokens, **options})


CASES: dict[int, dict[str, tuple[str, str, ActorConfig]]] = {
    1: {
        "plain": ("dense", "float32", _layout(distributed_optimizer=False)),
        "bfloat16, recomputed": ("dense", "bfloat16", _layout(recompute="full")),
    },
    2: {
        "tp2 sp": ("dense", "float32", _layout(tp=2, sequence_parallel=True)),
        "pp2 tied, bfloat16": ("tied", "bfloat16", _layout(pp=2)),
        "dp2, distributed optimizer": ("tied", "float32", _layout()),
        "dp2, bfloat16, whole optimizer": ("dense", "bfloat16", _layout(distributed_optimizer=False)),
        "pp2 vp2": ("dense", "float32", _layout(pp=2, vp=2)),
        "cp2": ("dense", "float32", _layout(cp=2)),
        "ep2": ("moe", "bfloat16", _layout(ep=2)),
        "etp2": ("moe", "float32", _layout(etp=2)),
    },
}
"""By number of ranks: model, dtype, layout."""


def make_models(folder: Path) -> None:
    """97 entries of the vocabulary do not divide; activations are large beside what is not counted."""
    sizes = {"vocab_size": 97, "num_layers": 4, "hidden_size": 64}
    make_tiny(folder / "dense", "qwen2", tied=False, seed=3, **sizes)
    make_tiny(folder / "tied", "qwen3", tied=True, seed=3, **sizes)
    make_tiny(folder / "moe", "qwen3_moe", tied=False, seed=3, **sizes)


def run(folder: Path) -> dict[str, dict[str, float]]:
    """By case, what this rank's actor takes."""
    results = {}
    for name, (model, dtype, layout) in CASES[dist.get_world_size()].items():
        grid = build_grid(layout, seed=1)
        actor = Actor(load_model_config(folder.parent / model), layout, OptimizerConfig(), getattr(torch, dtype), grid)
        results[name] = _updated(actor, grid.dp.size())
        del actor
        gc.collect()
        release_groups()
    return results


def _updated(actor: Actor, data_parallel: int) -> dict[str, float]:
    """What the actor takes, after one update."""
    rollouts = _rollouts(data_parallel)
    advantages = torch.ones(rollouts.num_sequences, dtype=torch.float64)
    marks = _measure_passes(actor)
    actor.update(rollouts, advantages, TokenInputs(), PolicyLossConfig(), 1.0, RESPONSE, num_optimizer_steps_total=1)
    return {**_allocated(actor), "peak": max(marks)}


def _rollouts(data_parallel: int) -> Rollouts:
    num = A_MICRO_BATCH * NUM_MICRO_BATCHES * data_parallel
    ones = torch.ones(num, dtype=torch.long)
    return Rollouts(
        tokens=torch.arange(num * (PROMPT + RESPONSE)) % 90,
        prompt_lengths=PROMPT * ones,
        response_lengths=RESPONSE * ones,
        rollout_logprobs=torch.zeros(num * RESPONSE),
        finished=ones.bool(),
    )


def _allocated(actor: Actor) -> dict[str, float]:
    """Bytes by owner, after an optimizer step that allocated its own state."""
    parameters = [parameter for chunk in actor.chunks for parameter in chunk.parameters()]
    inner = getattr(actor.optimizer, "chained_optimizers", [actor.optimizer])
    states = [t for o in inner for state in o.optimizer.state.values() for t in state.values()]
    mains = [
        main
        for o in inner
        for groups in ("fp32_from_float16_groups", "shard_fp32_from_float16_groups")
        for group in getattr(o, groups, [])
        for main in group
    ]
    owners = {
        "parameters": _storages(parameters),
        "gradients": _storages([parameter.main_grad for parameter in parameters]),  # type: ignore[attr-defined]
        "main_weights": _storages([main for main in mains if main is not None]),
        "moments": _storages([t for t in states if t.dim() > 0]),
    }
    return {name: float(sum(sizes.values())) for name, sizes in owners.items()}


def _storages(tensors: list[torch.Tensor]) -> dict[int, int]:
    return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}


def _measure_passes(actor: Actor) -> list[float]:
    """Will hold, of each time that the actor runs its passes, the bytes that torch's allocator handed out at most above
    what it had."""
    marks: list[float] = []
    inner = actor._run

    def measured(*args: Any) -> Any:
        with threads_first(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            results = inner(*args)
        marks.append(_highest(profiler))
        return results

    actor._run = measured  # type: ignore[method-assign]
    return marks


@contextlib.contextmanager
def threads_first() -> Iterator[None]:
    """Have gloo's threads let go of a collective's tensors before its caller does: of what they free last the profiler
    sees nothing, and its sum would be too high."""
    wait = Work.wait

    def wait_longer(work: Work, *args: Any) -> bool:
        done = wait(work, *args)
        time.sleep(0.003)
        return done

    with mock.patch.object(Work, "wait", wait_longer):
        yield


def _highest(profiler: profile) -> float:
    """The running sum of allocations and frees at its highest. The profiler reports each with its size."""
    # torch's type stubs do not know all of an event.
    events: list[Any] = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    total = highest = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        total += event.nbytes()
        highest = max(highest, total)
    return float(highest)
