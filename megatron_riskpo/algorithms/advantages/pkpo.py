"""PKPO: rewards turned into those of the best of k tries (https://arxiv.org/abs/2505.15201)."""

import torch
from jaxtyping import Float64
from torch import Tensor
from torch.nn.functional import pad

from megatron_riskpo.algorithms.advantages.contract import AdvantageInputs
from megatron_riskpo.algorithms.advantages.pass_at_k import check_k, shares_within
from megatron_riskpo.algorithms.config import AlgorithmConfig
from megatron_riskpo.errors import UsageError


def pkpo(inputs: AdvantageInputs) -> Float64[Tensor, "num_prompts group_size"]:
    """Gradient weights of E[max of k responses' rewards], any real rewards; pass@k where they are 0 or 1.

    A_i = 1 / C(n, k) * sum over the subsets I of k of the n responses with i in I of max_I r, less max_{I without i} r
    with pkpo_leave_one_out. Both are unbiased: the SUM over i of A_i grad log pi_i has the gradient as its mean. With
    c of n correct and no baseline this is k/n if correct, k/n * (1 - C(n-1-c, k-1) / C(n-1, k-1)) if not.
    """
    ordered, order = inputs.rewards.sort(dim=1)
    group_size, k = ordered.size(1), inputs.config.k
    # Summed over the gaps between neighbours in rank instead of over rewards: equal rewards leave exactly 0.
    gaps = ordered.diff(dim=1)
    # At m: the chance that the k - 1 companions of a response are among m of the other group_size - 1.
    shares = shares_within(group_size - 1, k - 1)
    if inputs.config.pkpo_leave_one_out:
        gained = pad((gaps * shares[1:]).cumsum(dim=1), (1, 0))
    else:
        surpassed = (gaps * (1 - shares[:-1])).flip(1).cumsum(dim=1).flip(1)
        gained = ordered + pad(surpassed, (0, 1))
    return torch.empty_like(ordered).scatter_(1, order, gained * (k / group_size))


def check_pkpo(config: AlgorithmConfig, num_prompts: int, group_size: int) -> None:
    """Raise UsageError unless k tries can be drawn, and more than one for a baseline from the others."""
    check_k(config, num_prompts, group_size)
    if config.k == 1 and config.pkpo_leave_one_out:
        raise UsageError(
            "algorithm.pkpo_leave_one_out = true compares with the other k - 1 tries, but algorithm.k = 1: raise k, or "
            "use the estimator rloo, which is that case"
        )
