"""Pass@k training: the advantage of groups of k, shared by their members (https://arxiv.org/abs/2508.10751)."""

import torch
from jaxtyping import Float64
from torch import Tensor
from torch.nn.functional import pad

from megatron_riskpo.algorithms.advantages.contract import AdvantageInputs
from megatron_riskpo.algorithms.advantages.pass_at_k import shares_within


def passk(inputs: AdvantageInputs) -> Float64[Tensor, "num_prompts group_size"]:
    """Mean standardised largest reward M of the groups of k that a response is in, over all such groups:
    A = (E[M | response in the group] - E[M]) / std(M); 0 where all groups are alike.

    For rewards of two values, with q = C(n-c, k) / C(n, k) the share of groups without one of the c correct responses,
    this is the published sqrt(q / (1-q)) if correct and (q - C(n-c-1, k-1) / C(n-1, k-1)) / sqrt(q (1-q)) if not. Other
    values occur (an answer that could not be graded, a length penalty) and are compared by the same rule.
    """
    ordered, order = inputs.rewards.sort(dim=1)
    group_size = ordered.size(1)
    # A does not depend on the rewards' unit; that of their range keeps tiny ones from vanishing when they are squared.
    spread = ordered[:, -1:] - ordered[:, :1]
    ordered = (ordered - ordered[:, :1]) / torch.where(spread > 0, spread, 1.0)
    gaps = ordered.diff(dim=1)
    # At rank j: the share of groups within the j lowest responses, so that M stays below the gap behind them.
    within = shares_within(group_size, inputs.config.k)[1:]
    rank = torch.arange(1, group_size, dtype=torch.float64)
    missed = gaps * within[:-1]
    # Of the groups with one of these j responses a share of n/j as many stay within them: the difference of the two
    # shares, without subtracting nearly equal numbers.
    lost = missed * (group_size - rank) / rank
    numerator = pad(missed.cumsum(dim=1), (1, 0)) - pad(lost.flip(1).cumsum(dim=1).flip(1), (0, 1))
    masses = within.diff(prepend=within.new_zeros(1))
    mean = (masses * ordered).sum(dim=1, keepdim=True)
    std = (masses * (ordered - mean).square()).sum(dim=1, keepdim=True).sqrt()
    standardised = torch.where(numerator != 0, numerator / std, 0.0)
    return torch.empty_like(ordered).scatter_(1, order, standardised)
