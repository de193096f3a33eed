"""What is added to the graders' rewards before advantages are made of them. The graded rewards stay as they are."""

from jaxtyping import Bool, Float64, Int64
from torch import Tensor

from megatron_riskpo.config import RewardConfig


def overlong_penalty(
    lengths: Int64[Tensor, "*shape"], max_response_tokens: int, buffer_tokens: int
) -> Float64[Tensor, "*shape"]:
    """Soft overlong punishment (arXiv 2503.14476, eq. 13), with Lmax = max_response_tokens and Lc = buffer_tokens > 0.

    0 up to a length of Lmax - Lc, from there linearly down to -1 at Lmax and beyond: ((Lmax - Lc) - |y|) / Lc. A
    response that was cut has length Lmax.
    """
    over = lengths.double() - (max_response_tokens - buffer_tokens)
    return -(over / buffer_tokens).clamp(0, 1)


def shaped_rewards(
    rewards: Float64[Tensor, "num_prompts group_size"],
    lengths: Int64[Tensor, "num_prompts group_size"],
    formatted: Bool[Tensor, "num_prompts group_size"],
    config: RewardConfig,
    max_response_tokens: int,
) -> Float64[Tensor, "num_prompts group_size"]:
    """The rewards with the bonus (for responses that are `formatted`) and the penalty that `config` asks for."""
    shaped = rewards
    if config.format_bonus:
        shaped = shaped + config.format_bonus * formatted
    if config.overlong_buffer_tokens:
        penalty = overlong_penalty(lengths, max_response_tokens, config.overlong_buffer_tokens)
        shaped = shaped + config.overlong_penalty * penalty
    return shaped
