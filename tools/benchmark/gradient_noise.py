"""Gradient estimates of the advantage estimators on enumerated policies, and how noisy they are."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from bernoulli_policy import BernoulliPolicy
from jaxtyping import Float64
from torch import Generator, Tensor

from megatron_riskpo.algorithms import AlgorithmConfig, compute_advantages

PAIRINGS, BASELINES = ("permutation", "complete"), ("natural", "leave_one_out")
NUM_BLOCKS = 50
"""The replicates are cut into so many parts, for the jackknife."""


@dataclass(frozen=True)
class Method:
    """An estimator, and the risk measure whose gradient it estimates without bias (None: of none of these)."""

    config: AlgorithmConfig
    target: AlgorithmConfig | None


def methods(bundle_size: int) -> dict[str, Method]:
    """What is compared; the first four are pairing x baseline."""
    mvar, mean = (AlgorithmConfig(spectrum=name, bundle_size=bundle_size) for name in ("mvar", "mean"))
    bundled = replace(mvar, bundling="sorted", quantile_source="tracked", tracker_step=0.0)
    found = {
        f"riskpo {pairing} {baseline}": Method(replace(bundled, pairing=pairing, baseline=baseline), mvar)
        for baseline in BASELINES
        for pairing in PAIRINGS
    }
    for pairing in PAIRINGS:
        config = replace(bundled, estimator="mean_bundle", pairing=pairing, baseline="leave_one_out")
        found[f"mean_bundle {pairing} leave_one_out"] = Method(config, mean)
    for credit in ("uniform", "sum_mean"):
        config = AlgorithmConfig(estimator="riskpo_reference", bundle_size=bundle_size, reference_credit=credit)
        found[f"riskpo_reference {credit}"] = Method(config, None)
    found["rloo"] = Method(AlgorithmConfig(estimator="rloo"), mean)
    found["grpo"] = Method(AlgorithmConfig(estimator="grpo"), None)
    return found


def advantages_of(
    policy: BernoulliPolicy, method: Method, rewards: Float64[Tensor, "num_questions group_size"], generator: Generator
) -> Float64[Tensor, "num_questions group_size"]:
    """Each bundle by itself."""
    bundle_size = len(policy.pass_rates)
    outputs = compute_advantages(
        rewards,
        method.config,
        tracker=policy.tracker(method.config),
        pass_rates=(torch.arange(len(rewards)) // bundle_size).double(),
        generator=generator,
    )
    return outputs.advantages


@dataclass(frozen=True)
class Noise:
    """Of a method's gradient estimates."""

    mean: list[float]
    standard_errors: list[float]
    """Of the mean."""
    signal_to_noise: list[float]
    """Of each question."""
    overall: float
    noise: float
    """Root of the summed variances."""

    @classmethod
    def of(cls, estimates: Float64[Tensor, "num_bundles bundle_size"]) -> "Noise":
        mean, std = estimates.mean(dim=0), estimates.std(dim=0)
        noise = float(std.square().sum().sqrt())
        return cls(
            mean.tolist(),
            (std / math.sqrt(len(estimates))).tolist(),
            (mean.abs() / std).tolist(),
            float(mean.norm()) / noise,
            noise,
        )

    def deviation(self, exact: Float64[Tensor, " bundle_size"]) -> float:
        """Of the mean from the exact gradient: the largest over the questions, in standard errors."""
        return max(
            abs(mean - value) / error
            for mean, value, error in zip(self.mean, exact.tolist(), self.standard_errors, strict=True)
        )


def signal_to_noise_ratio(numerator: Tensor, denominator: Tensor) -> float:
    """Of all questions together."""
    return Noise.of(numerator).overall / Noise.of(denominator).overall


def noise_ratio(numerator: Tensor, denominator: Tensor) -> float:
    """How many times as noisy the denominator is: the ratio above if both have the same expectation."""
    return Noise.of(denominator).noise / Noise.of(numerator).noise


def jackknife(
    statistic: Callable[[Tensor, Tensor], float], first: Tensor, second: Tensor, num_blocks: int = NUM_BLOCKS
) -> tuple[float, float]:
    """A statistic of two paired samples and its standard error, a block of replicates left out at a time."""
    blocks = [sample.tensor_split(num_blocks) for sample in (first, second)]
    without = torch.tensor(
        [
            statistic(*(torch.cat([*parts[:left_out], *parts[left_out + 1 :]]) for parts in blocks))
            for left_out in range(num_blocks)
        ]
    )
    error = math.sqrt((num_blocks - 1) * float(without.var(correction=0)))
    return statistic(first, second), error


@dataclass(frozen=True)
class Simulation:
    """The same answers, to every method."""

    policy: BernoulliPolicy
    rewards: Float64[Tensor, "num_questions group_size"]
    advantages: dict[str, Float64[Tensor, "num_questions group_size"]]

    @classmethod
    def run(cls, policy: BernoulliPolicy, group_size: int, replicates: int, seed: int = 0) -> "Simulation":
        generator = torch.Generator().manual_seed(seed)
        rewards = policy.answers(replicates, group_size, generator)
        compared = methods(len(policy.pass_rates))
        advantages = {name: advantages_of(policy, method, rewards, generator) for name, method in compared.items()}
        return cls(policy, rewards, advantages)

    def estimates(self) -> dict[str, Float64[Tensor, "num_bundles bundle_size"]]:
        """Of the gradient, one a replicate."""
        return {name: self.policy.gradient_estimates(self.rewards, a) for name, a in self.advantages.items()}

    def with_many_answers(self, name: str, num_wrong: int) -> float:
        """Overall signal to noise where wrong answers are of num_wrong kinds."""
        generator = torch.Generator().manual_seed(num_wrong)
        return Noise.of(
            self.policy.estimates_of_many_answers(self.rewards, self.advantages[name], num_wrong, generator)
        ).overall
