"""Calling an estimator by its name, and rewards to call it with."""

import torch
from hypothesis import strategies as st
from torch import Tensor

from megatron_riskpo.algorithms.advantages.contract import AdvantageInputs
from megatron_riskpo.algorithms.advantages.registry import ESTIMATORS
from megatron_riskpo.algorithms.config import AlgorithmConfig


def advantages_of(estimator: str, rewards: Tensor, lengths: Tensor | None = None, **options: object) -> Tensor:
    config = AlgorithmConfig(estimator=estimator, **options)
    return ESTIMATORS[estimator].compute(AdvantageInputs(rewards, config, lengths=lengths)).advantages


def some_rewards(num_prompts: int, group_size: int, seed: int, kind: str = "continuous") -> Tensor:
    """kind: binary, plus_minus_one or continuous."""
    generator = torch.Generator().manual_seed(seed)
    uniform = torch.rand(num_prompts, group_size, generator=generator, dtype=torch.float64)
    if kind == "continuous":
        return 4 * uniform - 2
    pass_rates = torch.rand(num_prompts, 1, generator=generator, dtype=torch.float64)
    binary = (uniform < pass_rates).double()
    return binary if kind == "binary" else 2 * binary - 1


@st.composite
def reward_matrices(draw: st.DrawFn) -> Tensor:
    """Ties are frequent, and sums exact: multiples of 1/8."""
    num_prompts, group_size = draw(st.integers(1, 5)), draw(st.integers(4, 7))
    row = st.lists(st.integers(-8, 8).map(lambda eighths: eighths / 8), min_size=group_size, max_size=group_size)
    return torch.tensor(draw(st.lists(row, min_size=num_prompts, max_size=num_prompts)), dtype=torch.float64)
