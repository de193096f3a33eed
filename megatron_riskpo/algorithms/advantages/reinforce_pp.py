"""REINFORCE++ with the group mean as baseline (https://arxiv.org/abs/2501.03262)."""

from jaxtyping import Float64
from torch import Tensor

from megatron_riskpo.algorithms.advantages.contract import AdvantageInputs
from megatron_riskpo.algorithms.advantages.groups import EPS, centred


def reinforce_pp(inputs: AdvantageInputs) -> Float64[Tensor, "num_prompts group_size"]:
    """A = (r - mean over the question) / (std of that over the whole batch + 1e-6), unbiased std over responses.

    One divisor for all questions: none is weighed up because its own rewards happen to differ little.
    """
    advantages = centred(inputs.rewards)
    return advantages / (advantages.std() + EPS)
