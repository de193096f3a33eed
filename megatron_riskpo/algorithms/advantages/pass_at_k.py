"""What the estimators that optimise k tries at a question have in common."""

import torch
from jaxtyping import Float64
from torch import Tensor

from megatron_riskpo.algorithms.config import AlgorithmConfig
from megatron_riskpo.errors import UsageError


def shares_within(total: int, size: int) -> Float64[Tensor, " total_plus_1"]:
    """At m = 0 ... total: C(m, size) / C(total, size), the share of the subsets of `size` that lie within m elements.

    0 <= size <= total. As products of (m - size) / m: precise to a few times 1e-16 a factor, where a difference of
    logarithms of factorials loses the digits that they have before the point.
    """
    elements = torch.arange(1, total + 1, dtype=torch.float64)
    factors = (elements - size) / elements  # 0 at m = size: none for fewer elements
    return torch.cat([factors.flip(0).cumprod(0).flip(0), torch.ones(1, dtype=torch.float64)])


def check_k(config: AlgorithmConfig, num_prompts: int, group_size: int) -> None:
    """Raise UsageError unless 1 <= k <= group_size: k tries are drawn from the group."""
    if not 1 <= config.k <= group_size:
        raise UsageError(
            f"algorithm.k = {config.k} tries of {group_size} responses cannot be drawn: set it between 1 and "
            "rollout.group_size"
        )
