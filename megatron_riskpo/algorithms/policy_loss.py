"""The policy loss: advantages and log-probs to a number to descend.

T = response tokens of a micro-batch, flat, n = its responses. Every number that leaves this file is a CONTRIBUTION,
already divided by the constant of the GLOBAL mini-batch: its sum over micro-batches and data-parallel ranks is the
value, however the mini-batch was cut.
"""

import math
from dataclasses import dataclass, fields
from typing import overload

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from megatron_riskpo.algorithms.config import PolicyLossConfig
from megatron_riskpo.algorithms.kl import kl_estimate
from megatron_riskpo.algorithms.option_checks import check_literals, check_name, check_range
from megatron_riskpo.algorithms.segments import count_kept, segment_mean
from megatron_riskpo.algorithms.surrogates import SURROGATES, SurrogateInputs
from megatron_riskpo.algorithms.token_inputs import TokenInputs
from megatron_riskpo.errors import UsageError


@dataclass(frozen=True)
class LossOutputs:
    """Contributions of one micro-batch; sum them over micro-batches and data-parallel ranks."""

    loss: Float[Tensor, ""]
    """Call backward on this, unscaled."""
    metrics: dict[str, Tensor]
    """Detached scalars, keys actor/*."""


def validate_policy_loss(config: PolicyLossConfig) -> None:
    """Raise UsageError unless the options can work, and have an effect on the surrogate."""
    check_literals("loss", config)
    check_name("loss.kind", config.kind, SURROGATES)
    # gmpo's bounds are of the log-ratio.
    check_range("loss.clip_low", config.clip_low, 0, math.inf if config.kind == "gmpo" else 1)
    for option in ("clip_high", "entropy_coefficient", "kl_coefficient", "cov_kl_coefficient"):
        check_range(f"loss.{option}", getattr(config, option), 0, math.inf)
    check_range("loss.dual_clip", config.dual_clip, 0, math.inf)
    if 0 < config.dual_clip <= 1:
        raise UsageError(f"loss.dual_clip = {config.dual_clip} is out of range: it must be more than 1, or 0 for off")
    check_range("loss.cov_fraction", config.cov_fraction, 0, 1)
    if config.cov_fraction == 0:
        raise UsageError("loss.cov_fraction = 0 is out of range: it must be more than 0; for none, loss.kind = ppo")
    if _kl_in_loss(config) and config.kl_estimator == "k1":
        raise UsageError(
            "loss.kl_estimator = k1 in the loss has an expected gradient of 0 and only adds noise: choose k2 or k3, or "
            "loss.kl_in = reward"
        )
    _check_effect(config)


def _check_effect(config: PolicyLossConfig) -> None:
    of_some_kinds = frozenset[str]().union(*(surrogate.options for surrogate in SURROGATES.values()))
    for item in fields(config):
        value = getattr(config, item.name)
        if item.name in of_some_kinds - SURROGATES[config.kind].options and value != item.default:
            kinds = ", ".join(name for name, surrogate in SURROGATES.items() if item.name in surrogate.options)
            raise UsageError(
                f"loss.{item.name} = {value} has no effect on loss.kind = {config.kind}: leave it out, or use {kinds}"
            )


def loss_normalizer(
    config: PolicyLossConfig, kept_lengths: Int64[Tensor, " num_sequences"], max_response_tokens: int
) -> float:
    """The constant of the GLOBAL mini-batch by which `policy_loss` divides; never 0.

    `kept_lengths` are the tokens of each of its responses, over all micro-batches and data-parallel ranks, that no
    correction masks (`count_kept`). sequence_mean: responses with such a token; token_mean: these tokens;
    sequence_mean_token_sum_norm: those responses times `max_response_tokens`. 1 where everything is masked.
    """
    num_sequences = int((kept_lengths > 0).sum())
    normalizers = {
        "sequence_mean": num_sequences,
        "token_mean": int(kept_lengths.sum()),
        "sequence_mean_token_sum_norm": num_sequences * max_response_tokens,
    }
    return float(normalizers[config.aggregation]) or 1.0


def policy_loss(
    logprobs: Float[Tensor, " T"],
    advantages: Float[Tensor, " n"],
    response_lengths: Int64[Tensor, " n"],
    config: PolicyLossConfig,
    normalizer: float,
    tokens: TokenInputs,
    entropy: Float[Tensor, " T"] | None = None,
    num_tokens: float | None = None,
) -> LossOutputs:
    """-surrogate + kl_coefficient KL(pi || ref) - entropy_coefficient entropy, aggregated over tokens and responses.

    Tokens with `tokens.keep` False leave all of it, metrics and denominators included; a response's ratio is then that
    of its other tokens. `tokens.weights` multiply the surrogate, not KL or entropy. `normalizer` is `loss_normalizer`
    of the whole mini-batch. `entropy`, in nats a token, needs a graph only if its coefficient is not 0. Computed in
    float32 (float64 inputs stay float64).

    Metrics are aggregated as the loss; under sequence_mean_token_sum_norm, which is no mean, they are means over the
    mini-batch's `num_tokens` kept tokens if you give that number. actor/loss; actor/clip_fraction, where a bound cuts
    the gradient (cispo: the weight); actor/ratio_mean; actor/approx_kl, the k3 estimate of KL(old || new) in nats a
    token; actor/entropy and actor/kl_ref, in nats a token, where there is something to compute them from.

    Raises ValueError for what the configuration needs and is not there, and for shapes that do not fit.
    """
    _check_inputs(logprobs, advantages, response_lengths, config, tokens, entropy)
    dtype = torch.promote_types(logprobs.dtype, torch.float32)
    lengths = count_kept(response_lengths, tokens.keep)
    current = _kept(logprobs, tokens.keep, dtype)
    fixed = {item.name: _kept(getattr(tokens, item.name), tokens.keep, dtype) for item in fields(tokens)}
    old = current.detach() if tokens.old_logprobs is None else fixed["old_logprobs"]
    surrogate = SURROGATES[config.kind].compute(
        SurrogateInputs(
            current, current - old, advantages.to(dtype), lengths, config, fixed["weights"], fixed["penalised"]
        )
    )
    objective = surrogate.objective
    means = {
        "actor/clip_fraction": surrogate.clip_fraction,
        "actor/ratio_mean": surrogate.ratio,
        "actor/approx_kl": segment_mean(kl_estimate(old, current.detach(), "k3"), lengths),
    }
    if tokens.ref_logprobs is not None:
        divergence = kl_estimate(
            current if _kl_in_loss(config) else current.detach(), fixed["ref_logprobs"], config.kl_estimator
        )
        means["actor/kl_ref"] = segment_mean(divergence, lengths)
        if _kl_in_loss(config):
            objective = objective - config.kl_coefficient * means["actor/kl_ref"]
    if entropy is not None:
        entropy = entropy if config.entropy_coefficient else entropy.detach()
        means["actor/entropy"] = segment_mean(_kept(entropy, tokens.keep, dtype), lengths)
        if config.entropy_coefficient:
            objective = objective + config.entropy_coefficient * means["actor/entropy"]
    # What a response's mean counts: as much as any other response's, or as much as it has tokens.
    shares = (lengths > 0 if config.aggregation == "sequence_mean" else lengths).to(dtype) / normalizer
    loss = -(shares * objective).sum()
    if config.aggregation == "sequence_mean_token_sum_norm" and num_tokens is not None:
        shares = lengths.to(dtype) / max(num_tokens, 1)
    metrics = {key: (shares * values.detach()).sum() for key, values in means.items()}
    return LossOutputs(loss, metrics | {"actor/loss": loss.detach()})


def _kl_in_loss(config: PolicyLossConfig) -> bool:
    return config.kl_coefficient != 0 and config.kl_in == "loss"


@overload
def _kept(values: Tensor, keep: Tensor | None, dtype: torch.dtype) -> Tensor: ...
@overload
def _kept(values: None, keep: Tensor | None, dtype: torch.dtype) -> None: ...
def _kept(values: Tensor | None, keep: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Without the masked tokens; floats in the loss's precision."""
    if values is None:
        return None
    values = values if keep is None else values[keep]
    return values.to(dtype) if values.is_floating_point() else values


def _check_inputs(
    logprobs: Tensor, advantages: Tensor, lengths: Tensor, config: PolicyLossConfig, tokens: TokenInputs,
    entropy: Tensor | None,
) -> None:  # fmt: skip
    if logprobs.dim() != 1 or advantages.shape != lengths.shape:
        raise ValueError(
            f"policy_loss needs flat log-probs, got {list(logprobs.shape)}, and an advantage a response, got "
            f"{list(advantages.shape)} for {list(lengths.shape)} lengths"
        )
    # By segment_reduce and repeat_interleave as well, each with words of its own.
    if int(lengths.sum()) != logprobs.numel() or (lengths < 0).any():
        raise ValueError(
            f"policy_loss: response_lengths add up to {int(lengths.sum())} tokens, with {logprobs.numel()} log-probs; "
            "give each response's tokens, 0 or more"
        )
    per_token = {item.name: getattr(tokens, item.name) for item in fields(tokens)} | {"entropy": entropy}
    for name, values in per_token.items():
        if values is not None and values.shape != logprobs.shape:
            raise ValueError(f"policy_loss: {name} has shape {list(values.shape)}, logprobs {list(logprobs.shape)}")
    if _kl_in_loss(config) and tokens.ref_logprobs is None:
        raise ValueError("loss.kl_coefficient is not 0, but policy_loss was given no ref_logprobs")
    if config.entropy_coefficient and entropy is None:
        raise ValueError("loss.entropy_coefficient is not 0, but policy_loss was given no entropy")
