"""What one rank does in test_quantiles. Imported by the ranks; needs no Megatron."""

import contextlib
import math
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_riskpo.config import RewardConfig
from megatron_riskpo.distributed.quantiles import global_quantiles
from megatron_riskpo.rewards.pool import GraderPool
from tests.distributed.advantage_cases import (
    GROUP_SIZE,
    NUM_PROMPTS,
    REFERENCES,
    REWARDS,
    DigitTokenizer,
    rollouts_that_earn,
    score_rollouts,
)

LEVELS = (0.2, 0.5, 0.8, 1.0)
COLLECTIVES = ("all_reduce", "all_gather", "all_gather_into_tensor", "broadcast", "reduce_scatter", "all_to_all")


def _scores() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(4)
    normal = torch.randn(1003, generator=generator, dtype=torch.float64)
    return {
        "normal": normal,
        "ties": normal.round(),
        "both zeros": normal.sign() * 0.0,
        "lattice of bundle scores": torch.randint(0, 6, (500,), generator=generator).double(),
        "extremes": torch.tensor([math.inf, -math.inf, 5e-324, -5e-324, 1e308, -1e308, -0.0], dtype=torch.float64),
        "fewer than ranks": torch.tensor([2.5]),
        "equal but for the last bits": 1 + normal * 2e-15,
    }


SCORES = _scores()


def shares(scores: Tensor, num_ranks: int) -> dict[str, list[Tensor]]:
    """Ways to spread the scores: evenly; unevenly; all on the last rank, the others empty."""
    bounds = [int(scores.numel() * (rank / num_ranks) ** 2) for rank in range(num_ranks + 1)]
    return {
        "even": [scores[rank::num_ranks] for rank in range(num_ranks)],
        "uneven": [scores[low:high] for low, high in pairwise(bounds)],
        "last": [scores[:0]] * (num_ranks - 1) + [scores],
    }


@contextlib.contextmanager
def counted() -> Iterator[list[tuple[str, int]]]:
    """(collective, bytes of the tensor that this rank hands in) of every call in the body."""
    calls: list[tuple[str, int]] = []
    originals = {name: getattr(dist, name) for name in COLLECTIVES}

    def counting(name: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            tensor = args[1] if name in ("all_gather", "all_gather_into_tensor") else args[0]
            calls.append((name, tensor.numel() * tensor.element_size()))
            return originals[name](*args, **kwargs)

        return call

    for name in COLLECTIVES:
        setattr(dist, name, counting(name))
    try:
        yield calls
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)


def run(folder: Path) -> dict[str, Any]:
    """Quantiles of every case in both forms with the calls that they made; the errors; the calls of scoring."""
    world = dist.group.WORLD
    rank, num_ranks = world.rank(), world.size()
    results: dict[str, Any] = {}
    for name, scores in SCORES.items():
        for spread, parts in shares(scores, num_ranks).items():
            largest = max(part.numel() for part in parts)
            for form, options in {
                "gathered": {},
                "gathered, share known": {"largest_share": largest},
                "counted": {"max_gathered": 0},
                "counted, share known": {"largest_share": largest, "max_gathered": 0},
            }.items():
                with counted() as calls:
                    found = global_quantiles(parts[rank], LEVELS, world, **options)
                results[f"{name}/{spread}/{form}"] = (found, largest, calls)
    results["errors"] = [_error(world, rank, **options) for options in ({}, {"max_gathered": 0})]
    results["too large"] = _too_large(world, rank)
    results["scoring"] = _scoring_calls()
    return results


def _error(world: dist.ProcessGroup, rank: int, **options: int) -> list[str]:
    messages = []
    for scores in (torch.zeros(0, dtype=torch.float64), torch.tensor([math.nan if rank == 0 else 1.0])):
        try:
            global_quantiles(scores.double(), LEVELS, world, **options)
        except ValueError as error:
            messages.append(str(error))
    return messages


def _too_large(world: dist.ProcessGroup, rank: int) -> str:
    try:
        global_quantiles(torch.zeros(1 + rank, dtype=torch.float64), LEVELS, world, largest_share=world.size() - 1)
    except ValueError as error:
        return str(error)
    return "no error"


def _scoring_calls() -> list[tuple[str, int]]:
    with GraderPool(["math"], workers=1) as pool, counted() as calls:
        rewards = score_rollouts(
            rollouts_that_earn(REWARDS[0]), REFERENCES, DigitTokenizer(), pool, RewardConfig(), dist.group.WORLD
        )
    assert rewards.matrix.shape == (NUM_PROMPTS, GROUP_SIZE)
    return calls
