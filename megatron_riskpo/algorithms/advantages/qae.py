"""QAE: a quantile of the group as baseline (https://arxiv.org/abs/2509.22611)."""

from jaxtyping import Float64
from torch import Tensor

from megatron_riskpo.algorithms.advantages.contract import AdvantageInputs
from megatron_riskpo.algorithms.advantages.groups import EPS
from megatron_riskpo.algorithms.config import AlgorithmConfig
from megatron_riskpo.algorithms.distribution import Distribution
from megatron_riskpo.errors import UsageError


def qae(inputs: AdvantageInputs) -> Float64[Tensor, "num_prompts group_size"]:
    """A = (r - b) / (std + 1e-6), b = inf{x : F(x) >= K}, F and the unbiased std of the question's responses.

    With 0/1 rewards of mean p: b = 0 where p <= 1 - K (only successes learn), b = 1 where p > 1 - K (only failures).
    The quantile is one of the rewards, not interpolated between two: in between, both would learn.
    """
    rewards = inputs.rewards
    baseline = Distribution.of_sample(rewards).quantiles(inputs.config.quantile_level)
    return (rewards - baseline[:, None]) / (rewards.std(dim=1, keepdim=True) + EPS)


def check_qae(config: AlgorithmConfig, num_prompts: int, group_size: int) -> None:
    """Raise UsageError unless 0 < quantile_level < 1."""
    if not 0 < config.quantile_level < 1:
        raise UsageError(
            f"algorithm.quantile_level = {config.quantile_level} is no quantile level: it must be above 0 and below 1"
        )
