"""RLOO: the other responses to the question are the baseline (https://arxiv.org/abs/2402.14740)."""

from jaxtyping import Float64
from torch import Tensor

from megatron_riskpo.algorithms.advantages.contract import AdvantageInputs
from megatron_riskpo.algorithms.advantages.groups import centred


def rloo(inputs: AdvantageInputs) -> Float64[Tensor, "num_prompts group_size"]:
    """A = r - mean of the question's G - 1 other responses = G / (G - 1) (r - mean of all); needs two responses."""
    group_size = inputs.rewards.size(1)
    return centred(inputs.rewards) * (group_size / (group_size - 1))
