"""The policy loss as its papers define it: python floats, one response and one token at a time. No torch, no tricks."""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megatron_riskpo.algorithms.config import PolicyLossConfig
from megatron_riskpo.algorithms.policy_loss import LossOutputs, loss_normalizer, policy_loss
from megatron_riskpo.algorithms.segments import count_kept
from megatron_riskpo.algorithms.token_inputs import TokenInputs

LENGTHS = torch.tensor([3, 1, 7, 4, 2, 5])
MAX_RESPONSE_TOKENS = 8
KINDS = ("gspo", "ppo", "gmpo", "cispo", "clip_cov", "kl_cov", "reinforce")
AGGREGATIONS = ("sequence_mean", "token_mean", "sequence_mean_token_sum_norm")


@dataclass(frozen=True)
class Batch:
    logprobs: Tensor
    advantages: Tensor
    tokens: TokenInputs
    entropy: Tensor | None = None
    lengths: Tensor = LENGTHS

    def loss(self, config: PolicyLossConfig, **changes: Tensor) -> LossOutputs:
        batch = replace(self, **changes)
        kept = count_kept(batch.lengths, batch.tokens.keep)
        normalizer = loss_normalizer(config, kept, MAX_RESPONSE_TOKENS)
        return policy_loss(
            batch.logprobs, batch.advantages, batch.lengths, config, normalizer, batch.tokens, batch.entropy,
            float(kept.sum()),
        )  # fmt: skip


def make_batch(dtype: torch.dtype = torch.float64, seed: int = 0, masked: bool = True) -> Batch:
    """All inputs; if masked, a third of the tokens and all of the last response but one are."""
    generator = torch.Generator().manual_seed(seed)
    shape = (5, int(LENGTHS.sum()))
    old, noise, ref_noise, entropy, weights = torch.randn(shape, dtype=dtype, generator=generator)
    chance = torch.rand(shape, dtype=torch.float64, generator=generator)
    keep = (chance[0] > 1 / 3) & (torch.arange(6).repeat_interleave(LENGTHS) != 4)
    tokens = TokenInputs(
        old_logprobs=old - 3,
        ref_logprobs=old - 3 + 0.5 * ref_noise,
        weights=weights.exp(),
        keep=keep if masked else None,
        penalised=chance[1] < 1 / 4,
    )
    advantages = torch.randn(len(LENGTHS), dtype=dtype, generator=generator)
    return Batch(old - 3 + 0.3 * noise, advantages, tokens, entropy.abs())


def plain_loss(batch: Batch, config: PolicyLossConfig, frozen: Tensor | None = None) -> float:
    """`frozen`: log-probs at which cispo's factor, which is not differentiated, is taken."""
    frozen = batch.logprobs if frozen is None else frozen
    tokens, start, per_response = batch.tokens, 0, []
    for length, advantage in zip(batch.lengths.tolist(), batch.advantages.tolist(), strict=True):
        places = [t for t in range(start, start + length) if tokens.keep is None or bool(tokens.keep[t])]
        start += length
        if not places:
            continue
        per_token = [
            {
                "logprob": float(batch.logprobs[t]),
                "ratio": math.exp(float(batch.logprobs[t]) - float(tokens.old_logprobs[t])),
                "frozen_ratio": math.exp(float(frozen[t]) - float(tokens.old_logprobs[t])),
                "weight": 1.0 if tokens.weights is None else float(tokens.weights[t]),
                "penalised": tokens.penalised is not None and bool(tokens.penalised[t]),
            }
            for t in places
        ]
        objectives = plain_objectives(per_token, advantage, config)
        for i, t in enumerate(places):
            if batch.entropy is not None:
                objectives[i] += config.entropy_coefficient * float(batch.entropy[t])
            if config.kl_coefficient and config.kl_in == "loss":
                d = float(tokens.ref_logprobs[t]) - float(batch.logprobs[t])
                kl = {"k1": -d, "k2": d * d / 2, "k3": math.exp(d) - d - 1}[config.kl_estimator]
                objectives[i] -= config.kl_coefficient * kl
        per_response.append(objectives)
    if config.aggregation == "sequence_mean":
        return -sum(sum(o) / len(o) for o in per_response) / len(per_response)
    if config.aggregation == "token_mean":
        return -sum(map(sum, per_response)) / sum(map(len, per_response))
    return -sum(sum(o) / MAX_RESPONSE_TOKENS for o in per_response) / len(per_response)


def plain_objectives(tokens: list[dict], advantage: float, config: PolicyLossConfig) -> list[float]:
    """The surrogate objective of each token of a response; one of the response stands at each of its tokens."""
    if config.kind == "gspo":
        ratio = math.prod(token["ratio"] for token in tokens) ** (1 / len(tokens))
        mean_weight = sum(token["weight"] for token in tokens) / len(tokens)
        return [mean_weight * plain_clip(ratio, advantage, config)] * len(tokens)
    if config.kind == "gmpo":
        if advantage > 0:
            ratios = [min(token["ratio"], math.exp(config.clip_high)) for token in tokens]
        else:
            ratios = [max(token["ratio"], math.exp(-config.clip_low)) for token in tokens]
        mean_weight = sum(token["weight"] for token in tokens) / len(tokens)
        return [mean_weight * advantage * math.prod(ratios) ** (1 / len(tokens))] * len(tokens)
    return [token["weight"] * plain_token_objective(token, advantage, config) for token in tokens]


def plain_token_objective(token: dict, advantage: float, config: PolicyLossConfig) -> float:
    ratio = token["ratio"]
    if config.kind == "ppo":
        return plain_clip(ratio, advantage, config)
    if config.kind == "cispo":
        factor = min(max(token["frozen_ratio"], 1 - config.clip_low), 1 + config.clip_high)
        return factor * advantage * token["logprob"]
    if config.kind == "clip_cov":
        return 0.0 if token["penalised"] else plain_clip(ratio, advantage, config)
    if config.kind == "kl_cov":
        penalty = config.cov_kl_coefficient * abs(math.log(ratio)) if token["penalised"] else 0.0
        return ratio * advantage - penalty
    assert config.kind == "reinforce"
    return advantage * token["logprob"]


def plain_clip(ratio: float, advantage: float, config: PolicyLossConfig) -> float:
    clipped = min(max(ratio, 1 - config.clip_low), 1 + config.clip_high)
    objective = min(ratio * advantage, clipped * advantage)
    if config.dual_clip and advantage < 0:
        return max(objective, config.dual_clip * advantage)
    return objective
