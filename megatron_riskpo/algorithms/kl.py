"""The divergence to a reference policy, estimated from the sampled tokens, and as a penalty on rewards.

T = response tokens, flat. All in nats a token.
"""

from typing import Literal

from jaxtyping import Float, Float64, Int64
from torch import Tensor

from megatron_riskpo.algorithms.config import PolicyLossConfig
from megatron_riskpo.algorithms.segments import segment_sum

# Beyond e^20 a ratio says that something broke; the clamp keeps exp() and the gradient finite.
MAX_LOG_RATIO = 20.0


def kl_estimate(
    logprobs: Float[Tensor, " T"], ref_logprobs: Float[Tensor, " T"], estimator: Literal["k1", "k2", "k3"]
) -> Float[Tensor, " T"]:
    """Per-token estimates of KL(pi || ref) from tokens that pi sampled, with d = log ref - log pi.

    k1 = -d          unbiased, of either sign; its expected gradient is 0: it belongs into the reward, not into a loss
    k2 = d^2 / 2     biased by a term of third order in d; its expected gradient is exactly that of KL(pi || ref)
    k3 = e^d - d - 1 unbiased, never negative; its expected gradient is that of the OTHER divergence, KL(ref || pi)

    (http://joschu.net/blog/kl-approx.html; for the gradients take E_pi of (dk/d log pi) grad log pi.) What is said of
    gradients holds on-policy, with k differentiated and the sampling not: that is what a loss does. In k3's d stops at
    20, beyond which its value stays and its gradient is 0; k1 and k2 are as they are however far apart the two are.
    """
    difference = ref_logprobs - logprobs
    if estimator == "k1":
        return -difference
    if estimator == "k2":
        return difference.square() / 2
    # expm1 keeps the digits of the small differences between two versions of a policy.
    difference = difference.clamp(max=MAX_LOG_RATIO)
    return difference.expm1() - difference


def kl_penalty(
    rewards: Float64[Tensor, "num_prompts group_size"],
    logprobs: Float[Tensor, " T"],
    ref_logprobs: Float[Tensor, " T"],
    response_lengths: Int64[Tensor, " num_prompts*group_size"],
    config: PolicyLossConfig,
) -> Float64[Tensor, "num_prompts group_size"]:
    """Rewards less kl_coefficient times the sum of the divergence over each response's tokens (kl_in = "reward").

    Tokens are those of the responses in row-major order of the rewards; `logprobs` are those of the policy that the
    advantages belong to, and carry no gradient out of here. Raises ValueError where the sizes do not fit.
    """
    num_tokens = int(response_lengths.sum())
    if rewards.numel() != response_lengths.numel() or not logprobs.numel() == ref_logprobs.numel() == num_tokens:
        raise ValueError(
            f"kl_penalty needs a length a reward, got {response_lengths.numel()} for {rewards.numel()}, and two "
            f"log-probs a response token, got {logprobs.numel()} and {ref_logprobs.numel()} for {num_tokens} tokens"
        )
    divergence = kl_estimate(logprobs.detach().double(), ref_logprobs.detach().double(), config.kl_estimator)
    return rewards - config.kl_coefficient * segment_sum(divergence, response_lengths).view_as(rewards)
