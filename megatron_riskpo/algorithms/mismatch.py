"""The trainer's log-probs are not those that the responses were sampled with: how far apart, and what to do about it.

T = response tokens, flat, n = responses. d = log pi_old (the trainer's, before the update) - log pi_rollout, a token.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Float64, Int64
from torch import Tensor

from megatron_riskpo.algorithms.config import MismatchConfig, PolicyLossConfig
from megatron_riskpo.algorithms.kl import MAX_LOG_RATIO, kl_estimate
from megatron_riskpo.algorithms.option_checks import check_literals, check_range
from megatron_riskpo.algorithms.segments import segment_mean, segment_sum, spread
from megatron_riskpo.algorithms.surrogates import SURROGATES
from megatron_riskpo.errors import UsageError


@dataclass(frozen=True)
class MismatchSums:
    """What adds up over micro-batches and ranks: reduce `sums` by SUM, `largest` by MAX."""

    sums: Float64[Tensor, " 4"]
    """Number of tokens, sum of |d|, of k1 and of k3."""
    largest: Float64[Tensor, ""]
    """Largest |d|."""

    def __add__(self, other: "MismatchSums") -> "MismatchSums":
        return MismatchSums(self.sums + other.sums, torch.maximum(self.largest, other.largest))

    def metrics(self) -> dict[str, float]:
        """mismatch/logprob_abs_mean, mismatch/logprob_abs_max, mismatch/k1, mismatch/k3, in nats a token, and
        mismatch/perplexity_ratio = exp(mean d), the perplexity under the rollout engine over that under the trainer."""
        absolute, k1, k3 = (self.sums[1:] / self.sums[0].clamp(min=1)).unbind()
        return {
            "mismatch/logprob_abs_mean": float(absolute),
            "mismatch/logprob_abs_max": float(self.largest),
            "mismatch/k1": float(k1),
            "mismatch/k3": float(k3),
            "mismatch/perplexity_ratio": float(_exp(-k1)),
        }


def mismatch_sums(rollout_logprobs: Float[Tensor, " T"], trainer_logprobs: Float[Tensor, " T"]) -> MismatchSums:
    """Sums over response tokens, with d = trainer - rollout.

    The tokens were sampled by the rollout engine, so k1 and k3 both estimate KL(rollout || trainer) without bias
    (`kl_estimate`). float64: differences of 1e-6 are what is measured.
    """
    rollout, trainer = rollout_logprobs.detach().double(), trainer_logprobs.detach().double()
    absolute = (trainer - rollout).abs()
    k1, k3 = kl_estimate(rollout, trainer, "k1"), kl_estimate(rollout, trainer, "k3")
    num_tokens = torch.tensor(float(absolute.numel()), dtype=torch.float64, device=absolute.device)
    sums = torch.stack([num_tokens, absolute.sum(), k1.sum(), k3.sum()])
    return MismatchSums(sums, absolute.max() if absolute.numel() else num_tokens)


@dataclass(frozen=True)
class Correction:
    """What `policy_loss` takes as TokenInputs.weights and .keep; None: leave it out."""

    weights: Float[Tensor, " T"] | None
    keep: Bool[Tensor, " T"] | None
    metrics: dict[str, float]
    """mismatch/masked_fraction, of the tokens; mismatch/weight_mean, of the kept tokens (0 if none is kept)."""


def correct_mismatch(
    rollout_logprobs: Float[Tensor, " T"],
    old_logprobs: Float[Tensor, " T"],
    response_lengths: Int64[Tensor, " n"],
    config: MismatchConfig,
) -> Correction:
    """Weights and mask against the mismatch, with rho_t = pi_old/pi_rollout of token t, C = cap, |y| the length.

    none          nothing
    tis           weight min(rho_t, C)                          https://fengyao.notion.site/off-policy-rl
    tis_sequence  weight min(prod rho_t, C) at all tokens of the response
    mis           weight rho_t, keep 1/C <= rho_t <= C (IcePop) https://arxiv.org/abs/2510.18855
    geometric     keep the whole response if 1/C <= (prod rho_t)^(1/|y|) <= C

    Log-ratios stop at +-20 before exp(), so weights are finite and positive. The cut into micro-batches changes
    nothing. Weights are float32, or float64 as the log-probs. Raises ValueError where the sizes do not fit.
    """
    if rollout_logprobs.shape != old_logprobs.shape or rollout_logprobs.dim() != 1:
        raise ValueError(
            "correct_mismatch needs flat log-probs of one size, got "
            f"{list(rollout_logprobs.shape)} and {list(old_logprobs.shape)}"
        )
    difference = old_logprobs.detach().double() - rollout_logprobs.detach().double()
    num_tokens, bound = difference.numel(), math.log(config.cap)
    weights = keep = None
    if config.correction == "tis":
        weights = _exp(difference).clamp(max=config.cap)
    elif config.correction == "tis_sequence":
        ratios = _exp(segment_sum(difference, response_lengths)).clamp(max=config.cap)
        weights = spread(ratios, response_lengths, num_tokens)
    elif config.correction == "mis":
        weights, keep = _exp(difference), difference.abs() <= bound
    elif config.correction == "geometric":
        keep = spread(segment_mean(difference, response_lengths).abs() <= bound, response_lengths, num_tokens)
    dtype = torch.promote_types(old_logprobs.dtype, torch.float32)
    return Correction(None if weights is None else weights.to(dtype), keep, _metrics(weights, keep, num_tokens))


def _metrics(weights: Tensor | None, keep: Tensor | None, num_tokens: int) -> dict[str, float]:
    num_kept = num_tokens if keep is None else int(keep.sum())
    weight_sum = float(num_kept) if weights is None else float((weights if keep is None else weights[keep]).sum())
    return {
        "mismatch/masked_fraction": 1 - num_kept / num_tokens if num_tokens else 0.0,
        "mismatch/weight_mean": weight_sum / max(num_kept, 1),
    }


def _exp(log_ratio: Tensor) -> Tensor:
    return log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()


def validate_mismatch(config: MismatchConfig) -> None:
    """Raise UsageError unless the options can work."""
    check_literals("mismatch", config)
    check_range("mismatch.cap", config.cap, 1, math.inf)
    if config.cap == 1:
        raise UsageError("mismatch.cap = 1 is out of range: it must be more than 1, since no ratio is exactly 1")
    check_range("mismatch.abort_above", config.abort_above, 0, math.inf)


def needs_old_logprobs(loss: PolicyLossConfig, mismatch: MismatchConfig) -> bool:
    """Whether the log-probs of the policy before the update must be known when the update begins.

    They cost a forward pass; without need, and with one mini-batch a step, the update's own serve.
    """
    kl_in_reward = loss.kl_coefficient != 0 and loss.kl_in == "reward"
    return mismatch.correction != "none" or SURROGATES[loss.kind].needs_penalised or kl_in_reward
