"""Dr. GRPO: GRPO without the division by the standard deviation (https://arxiv.org/abs/2503.20783)."""

from jaxtyping import Float64
from torch import Tensor

from megatron_riskpo.algorithms.advantages.contract import AdvantageInputs
from megatron_riskpo.algorithms.advantages.groups import centred


def dr_grpo(inputs: AdvantageInputs) -> Float64[Tensor, "num_prompts group_size"]:
    """A = r - mean over the question's responses.

    The division it leaves out weighs questions by their difficulty. Its other half is loss.aggregation =
    sequence_mean_token_sum_norm: no division by the response's own length either.
    """
    return centred(inputs.rewards)
