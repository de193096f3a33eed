"""RS-GRPO: the entropic risk measure of the question's rewards (https://arxiv.org/abs/2509.24261)."""

from jaxtyping import Float64
from torch import Tensor

from megatron_riskpo.algorithms.advantages.contract import AdvantageInputs


def rs_grpo(inputs: AdvantageInputs) -> Float64[Tensor, "num_prompts group_size"]:
    """A = (exp(b r) / mean exp(b r) - 1) / b over the question's responses, b = risk_temperature, not 0.

    Gradient weight of log E[exp(b r)] / b: b > 0 seeks risk, b < 0 avoids it, b -> 0 is r - mean.
    """
    temperature = inputs.config.risk_temperature
    exponents = temperature * inputs.rewards
    # Against the largest exponent nothing overflows; expm1 keeps the digits that exp(small) - 1 would lose.
    growth = (exponents - exponents.amax(dim=1, keepdim=True)).expm1()
    mean = growth.mean(dim=1, keepdim=True)
    return (growth - mean) / (1 + mean) / temperature
