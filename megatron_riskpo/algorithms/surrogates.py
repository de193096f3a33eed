"""Every surrogate objective by the name that `loss.kind` takes. A new one is a function and an entry here.

A surrogate is MAXIMISED. rho_t = pi/pi_old of token t, |y| = tokens of the response, A = its advantage; T tokens, flat,
n responses. Masked tokens are gone before a surrogate sees anything.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from megatron_riskpo.algorithms.config import PolicyLossConfig
from megatron_riskpo.algorithms.kl import MAX_LOG_RATIO
from megatron_riskpo.algorithms.segments import segment_mean, spread


@dataclass(frozen=True)
class SurrogateInputs:
    """One micro-batch. Log-probs and their ratio carry the graph, nothing else does."""

    logprobs: Float[Tensor, " T"]
    log_ratio: Float[Tensor, " T"]
    """log pi - log pi_old, as it is; `_exp` bounds it."""
    advantages: Float[Tensor, " n"]
    lengths: Int64[Tensor, " n"]
    config: PolicyLossConfig
    weights: Float[Tensor, " T"] | None = None
    penalised: Bool[Tensor, " T"] | None = None

    @property
    def token_advantages(self) -> Float[Tensor, " T"]:
        return spread(self.advantages, self.lengths, self.logprobs.numel())


@dataclass(frozen=True)
class SurrogateOutputs:
    """Means over each of n responses; only the objective carries a graph."""

    objective: Float[Tensor, " n"]
    clip_fraction: Float[Tensor, " n"]
    ratio: Float[Tensor, " n"]


@dataclass(frozen=True)
class Surrogate:
    """An entry of the registry."""

    description: str
    """One line, for the user."""
    compute: Callable[[SurrogateInputs], SurrogateOutputs]
    options: frozenset[str] = frozenset()
    """Fields of PolicyLossConfig that belong to some surrogates only and that this one reads."""
    needs_penalised: bool = False
    """It holds back the tokens that `covariant_tokens` finds."""
    has_ratio: bool = True
    """Its gradient depends on the old log-probs."""


def gspo(inputs: SurrogateInputs) -> SurrogateOutputs:
    """min(s A, clip(s, 1 - clip_low, 1 + clip_high) A) with s = (prod rho_t)^(1/|y|), one a response.

    RiskPO's own objective. Being one a response, it is weighed by the mean of its tokens' weights.
    https://arxiv.org/abs/2507.18071, https://arxiv.org/abs/2510.00911
    """
    ratio = _exp(segment_mean(inputs.log_ratio, inputs.lengths))
    objective, clipped = _clip(ratio, inputs.advantages, inputs.config)
    return _of_responses(inputs, objective, clipped, ratio)


def ppo(inputs: SurrogateInputs) -> SurrogateOutputs:
    """min(rho_t A, clip(rho_t, 1 - clip_low, 1 + clip_high) A); with dual_clip = c > 1 at least c A where A < 0.

    https://arxiv.org/abs/1707.06347; dual clip: https://arxiv.org/abs/1912.09729
    """
    ratio = _exp(inputs.log_ratio)
    objective, clipped = _clip(ratio, inputs.token_advantages, inputs.config)
    return _of_tokens(inputs, objective, clipped, ratio)


def gmpo(inputs: SurrogateInputs) -> SurrogateOutputs:
    """A (prod rho'_t)^(1/|y|), rho'_t = min(rho_t, e^clip_high) where A > 0 and max(rho_t, e^-clip_low) where A < 0.

    Each token is clipped on the side where it would raise the objective. The paper has one bound for both, .4.
    Being one a response, the objective is weighed by the mean of its tokens' weights.
    https://arxiv.org/abs/2507.20673
    """
    log_ratio, config = inputs.log_ratio, inputs.config
    clipped_ratio = torch.where(
        inputs.token_advantages >= 0, log_ratio.clamp(max=config.clip_high), log_ratio.clamp(min=-config.clip_low)
    )
    objective = inputs.advantages * _exp(segment_mean(clipped_ratio, inputs.lengths))
    clipped = segment_mean((clipped_ratio != log_ratio).to(log_ratio), inputs.lengths)
    return _of_responses(inputs, objective, clipped, _exp(segment_mean(log_ratio, inputs.lengths)))


def cispo(inputs: SurrogateInputs) -> SurrogateOutputs:
    """stopgrad(clip(rho_t, 1 - clip_low, 1 + clip_high)) A log pi_t: no token loses its gradient.

    The paper averages over tokens (aggregation token_mean) and sets no lower bound (clip_low 1).
    https://arxiv.org/abs/2506.13585
    """
    ratio = _exp(inputs.log_ratio.detach())
    factor = ratio.clamp(1 - inputs.config.clip_low, 1 + inputs.config.clip_high)
    return _of_tokens(inputs, factor * inputs.token_advantages * inputs.logprobs, factor != ratio, ratio)


def reinforce(inputs: SurrogateInputs) -> SurrogateOutputs:
    """A log pi_t, without ratio or clip: right for one mini-batch a step only. https://arxiv.org/abs/2504.02546"""
    never = torch.zeros_like(inputs.log_ratio)
    return _of_tokens(inputs, inputs.token_advantages * inputs.logprobs, never, _exp(inputs.log_ratio))


def clip_cov(inputs: SurrogateInputs) -> SurrogateOutputs:
    """ppo's without dual clip; 0, so without a gradient, on the penalised tokens, which stay in the denominator.

    https://arxiv.org/abs/2505.22617
    """
    ratio = _exp(inputs.log_ratio)
    objective, clipped = _clip(ratio, inputs.token_advantages, inputs.config)
    penalised = _penalised(inputs)
    return _of_tokens(inputs, objective.masked_fill(penalised, 0), clipped | penalised, ratio)


def kl_cov(inputs: SurrogateInputs) -> SurrogateOutputs:
    """rho_t A, unclipped; on the penalised tokens rho_t A - cov_kl_coefficient |log rho_t|.

    At pi = pi_old the penalty has no gradient: it acts from the second mini-batch of a step on.
    https://arxiv.org/abs/2505.22617
    """
    ratio = _exp(inputs.log_ratio)
    penalty = inputs.config.cov_kl_coefficient * inputs.log_ratio.abs() * _penalised(inputs)
    return _of_tokens(inputs, ratio * inputs.token_advantages - penalty, torch.zeros_like(ratio), ratio)


def _exp(log_ratio: Tensor) -> Tensor:
    return log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()


def _clip(ratio: Tensor, advantages: Tensor, config: PolicyLossConfig) -> tuple[Tensor, Tensor]:
    """PPO's objective, and where it has no gradient because of a bound; of tokens or of responses."""
    unclipped = ratio * advantages
    clipped = ratio.clamp(1 - config.clip_low, 1 + config.clip_high) * advantages
    objective, is_clipped = torch.minimum(unclipped, clipped), clipped < unclipped
    if config.dual_clip:
        floor = torch.where(advantages < 0, config.dual_clip * advantages, -torch.inf)
        is_clipped = is_clipped | (floor > objective)
        objective = torch.maximum(objective, floor)
    return objective, is_clipped


def _penalised(inputs: SurrogateInputs) -> Tensor:
    if inputs.penalised is None:
        raise ValueError(f"loss.kind = {inputs.config.kind} needs penalised tokens, but policy_loss was given none")
    return inputs.penalised


def _of_tokens(inputs: SurrogateInputs, objective: Tensor, clipped: Tensor, ratio: Tensor) -> SurrogateOutputs:
    if inputs.weights is not None:
        objective = inputs.weights * objective
    means = [segment_mean(values.to(objective), inputs.lengths) for values in (objective, clipped, ratio.detach())]
    return SurrogateOutputs(*means)


def _of_responses(inputs: SurrogateInputs, objective: Tensor, clipped: Tensor, ratio: Tensor) -> SurrogateOutputs:
    if inputs.weights is not None:
        objective = segment_mean(inputs.weights, inputs.lengths) * objective
    return SurrogateOutputs(objective, clipped.to(objective), ratio.detach())


_CLIP = frozenset({"clip_low", "clip_high"})

SURROGATES: Mapping[str, Surrogate] = MappingProxyType(
    {
        "gspo": Surrogate("clipped ratio of the whole response (arXiv 2507.18071)", gspo, _CLIP | {"dual_clip"}),
        "ppo": Surrogate("clipped ratio of each token (arXiv 1707.06347)", ppo, _CLIP | {"dual_clip"}),
        "gmpo": Surrogate("geometric mean of clipped token ratios (arXiv 2507.20673)", gmpo, _CLIP),
        "cispo": Surrogate("log-prob weighed by the clipped token ratio (arXiv 2506.13585)", cispo, _CLIP),
        "clip_cov": Surrogate(
            "ppo without the tokens that take the most entropy (arXiv 2505.22617)",
            clip_cov, _CLIP | {"cov_fraction"}, needs_penalised=True,
        ),
        "kl_cov": Surrogate(
            "unclipped token ratio, those tokens held near the old policy (arXiv 2505.22617)",
            kl_cov, frozenset({"cov_fraction", "cov_kl_coefficient"}), needs_penalised=True,
        ),
        "reinforce": Surrogate(
            "log-prob times advantage, no ratio (arXiv 2504.02546)", reinforce, has_ratio=False
        ),
    }
)  # fmt: skip
