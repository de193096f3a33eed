"""The clipped surrogate: advantages and log-probs to a loss.

T = response tokens of a micro-batch, flat, n = its responses. Every number that leaves this file is a CONTRIBUTION,
already divided by the constant of the GLOBAL mini-batch: its sum over micro-batches and data-parallel ranks is the
value, however the mini-batch was cut.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from megatron_riskpo.algorithms.config import PolicyLossConfig
from megatron_riskpo.algorithms.option_checks import check_literals, check_range

# Beyond e^20 a ratio says that something broke; the clamp keeps exp() and the gradient finite.
MAX_LOG_RATIO = 20.0


@dataclass(frozen=True)
class LossOutputs:
    """Contributions of one micro-batch; sum them over micro-batches and data-parallel ranks."""

    loss: Float[Tensor, ""]
    """Call backward on this, unscaled."""
    metrics: dict[str, Tensor]
    """Detached scalars, keys actor/*, aggregated over tokens and sequences as the loss is."""


def validate_policy_loss(config: PolicyLossConfig) -> None:
    """Raise UsageError unless the options can work."""
    check_literals("loss", config)
    check_range("loss.clip_low", config.clip_low, 0, 1)
    check_range("loss.clip_high", config.clip_high, 0, math.inf)
    check_range("loss.entropy_coefficient", config.entropy_coefficient, 0, math.inf)


def loss_normalizer(config: PolicyLossConfig, response_lengths: Int64[Tensor, " num_sequences"]) -> float:
    """The constant of the GLOBAL mini-batch: its number of sequences, or of response tokens.

    `response_lengths` are those of all responses of the mini-batch, over all micro-batches and data-parallel ranks.
    """
    return float(response_lengths.numel() if config.aggregation == "sequence_mean" else response_lengths.sum())


def policy_loss(
    logprobs: Float[Tensor, " T"],
    old_logprobs: Float[Tensor, " T"],
    advantages: Float[Tensor, " n"],
    response_lengths: Int64[Tensor, " n"],
    config: PolicyLossConfig,
    normalizer: float,
    entropy: Float[Tensor, " T"] | None = None,
) -> LossOutputs:
    """-mean of min(ratio A, clip(ratio, 1 - clip_low, 1 + clip_high) A), minus the entropy bonus.

    sequence ratio: (pi/pi_old)^(1/|y|), one a response (arXiv 2510.00911, 2507.18071); under token_mean a response
    counts by its length. token ratio: PPO's (arXiv 1707.06347). Computed in float32 (float64 inputs stay float64).
    `normalizer` is `loss_normalizer` of the whole mini-batch; `entropy`, in nats a token, needs a graph only if its
    coefficient is not 0. Metrics: actor/loss; actor/clip_fraction, where the clip cuts the gradient;
    actor/ratio_mean; actor/approx_kl, the k3 estimate of KL(old || new) in nats a token; actor/entropy if given.
    """
    _check_shapes(logprobs, old_logprobs, advantages, response_lengths)
    dtype = torch.promote_types(logprobs.dtype, torch.float32)
    log_ratio = logprobs.to(dtype) - old_logprobs.to(dtype)
    weights = torch.ones_like(response_lengths) if config.aggregation == "sequence_mean" else response_lengths
    weights = weights.to(log_ratio) / normalizer
    surrogate = _surrogate(log_ratio, advantages.to(log_ratio), response_lengths, config)
    loss = -(weights * surrogate.objective).sum()
    metrics = {
        "actor/clip_fraction": (weights * surrogate.clip_fraction).sum(),
        "actor/ratio_mean": (weights * surrogate.ratio).sum(),
        "actor/approx_kl": (weights * segment_mean(_k3(log_ratio.detach()), response_lengths)).sum(),
    }
    if config.entropy_coefficient and entropy is None:
        raise ValueError("loss.entropy_coefficient is not 0, but policy_loss was given no entropy")
    if entropy is not None:
        entropy = entropy if config.entropy_coefficient else entropy.detach()
        mean_entropy = (weights * segment_mean(entropy.to(dtype), response_lengths)).sum()
        metrics["actor/entropy"] = mean_entropy.detach()
        loss = loss - config.entropy_coefficient * mean_entropy
    return LossOutputs(loss, metrics | {"actor/loss": loss.detach()})


@dataclass(frozen=True)
class _Surrogate:
    """Means over each of n responses; only the objective carries a graph."""

    objective: Float[Tensor, " n"]
    clip_fraction: Float[Tensor, " n"]
    ratio: Float[Tensor, " n"]


def _surrogate(log_ratio: Tensor, advantages: Tensor, lengths: Tensor, config: PolicyLossConfig) -> _Surrogate:
    if config.ratio == "sequence":
        return _clip(segment_mean(log_ratio, lengths), advantages, config)
    per_token = _clip(log_ratio, advantages.repeat_interleave(lengths, output_size=log_ratio.numel()), config)
    return _Surrogate(
        segment_mean(per_token.objective, lengths),
        segment_mean(per_token.clip_fraction, lengths),
        segment_mean(per_token.ratio, lengths),
    )


def _clip(log_ratio: Tensor, advantages: Tensor, config: PolicyLossConfig) -> _Surrogate:
    ratio = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    unclipped = ratio * advantages
    clipped = ratio.clamp(1 - config.clip_low, 1 + config.clip_high) * advantages
    return _Surrogate(torch.minimum(unclipped, clipped), (clipped < unclipped).to(ratio), ratio.detach())


def _k3(log_ratio: Tensor) -> Tensor:
    # expm1 keeps the digits of the small differences between two versions of a policy.
    log_ratio = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    return log_ratio.expm1() - log_ratio


def _check_shapes(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, lengths: Tensor) -> None:
    if logprobs.shape != old_logprobs.shape or logprobs.dim() != 1 or advantages.shape != lengths.shape:
        raise ValueError(
            f"policy_loss needs flat log-probs of one size, got {list(logprobs.shape)} and {list(old_logprobs.shape)}"
            f", and an advantage a response, got {list(advantages.shape)} for {list(lengths.shape)} lengths"
        )


def segment_mean(values: Float[Tensor, " T"], lengths: Int64[Tensor, " n"]) -> Float[Tensor, " n"]:
    """Mean of each of n runs of values; 0 for an empty run. No atomics, so deterministic on a GPU too."""
    return torch.segment_reduce(values, "sum", lengths=lengths, initial=0) / lengths.clamp(min=1)
