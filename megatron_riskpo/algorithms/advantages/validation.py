"""Refuse impossible options and broken inputs in one line, before anything is computed."""

import math
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from megatron_riskpo.algorithms.advantages.registry import ESTIMATORS
from megatron_riskpo.algorithms.config import AlgorithmConfig
from megatron_riskpo.algorithms.meant_values import as_meant
from megatron_riskpo.algorithms.option_checks import check_literals, check_name, check_range, check_whole
from megatron_riskpo.errors import UsageError

_READ_BY_ALL = frozenset(("estimator", "alpha", "beta", "omega"))
"""The metrics of every estimator report quantiles and risk at these levels."""

_LARGEST_REWARD = 1e100
"""Squares, and their sums over a batch, must fit into a float64."""

_RANGES = (
    ("omega", 0, math.inf),
    ("bundle_size", 1, math.inf),
    ("k", 1, math.inf),
    ("scale_floor", 1e-6, math.inf),
    ("tracker_step", 0, math.inf),
    ("tracker_decay", 0, 1),
    ("pass_rate_step", 1e-6, 1),
    ("quantile_level", 0, 1),
    ("reference_mix_weight", 0, math.inf),
)


def validate_algorithm(config: AlgorithmConfig, num_prompts: int, group_size: int) -> None:
    """Raise UsageError unless `config` can work on a step of num_prompts questions with group_size responses each."""
    check_name("algorithm.estimator", config.estimator, ESTIMATORS)
    check_literals("algorithm", config)
    if not 0 < config.alpha < config.beta <= 1:
        raise UsageError(
            f"algorithm.alpha = {config.alpha} and algorithm.beta = {config.beta} are not quantile levels: "
            "0 < alpha < beta <= 1 is needed"
        )
    for option in ("bundle_size", "k"):
        check_whole(f"algorithm.{option}", getattr(config, option))
    for option, low, high in _RANGES:
        check_range(f"algorithm.{option}", getattr(config, option), low, high)
    if not math.isfinite(config.risk_temperature) or config.risk_temperature == 0:
        raise UsageError(f"algorithm.risk_temperature = {config.risk_temperature} must be a finite number other than 0")
    _check_options_have_effect(config)
    estimator = ESTIMATORS[config.estimator]
    if group_size < estimator.least_group_size:
        raise UsageError(
            f"algorithm.estimator = {config.estimator} compares the responses of a question, but rollout.group_size = "
            f"{group_size}: set it to {estimator.least_group_size} or more"
        )
    if estimator.check is not None:
        estimator.check(config, num_prompts, group_size)


def _check_options_have_effect(config: AlgorithmConfig) -> None:
    """An option of another estimator would silently do nothing."""
    read = ESTIMATORS[config.estimator].options | _READ_BY_ALL
    default = AlgorithmConfig()
    idle = [
        f"algorithm.{item.name} = {getattr(config, item.name)}"
        for item in fields(config)
        if item.name not in read and getattr(config, item.name) != getattr(default, item.name)
    ]
    if idle:
        raise UsageError(
            f"{', '.join(idle)}: no effect on {config.estimator}; take {'it' if len(idle) == 1 else 'them'} out, or "
            "choose another algorithm.estimator"
        )


def validated_rewards(rewards: Tensor) -> Tensor:
    """The reward matrix as float64 on the CPU (`as_meant`). Raises UsageError where it is no finite
    [num_prompts, group_size]."""
    _check_tensor("rewards", rewards)
    if rewards.dim() != 2 or rewards.numel() == 0:
        raise UsageError(
            f"rewards are {list(rewards.shape)}: give a matrix [num_prompts, group_size] that is not empty"
        )
    rewards = as_meant(rewards.detach().cpu())
    # One pass where all is well: the sum is finite, unless it overflows.
    broken = [] if rewards.sum().isfinite() else (~rewards.isfinite()).nonzero()
    if len(broken):
        prompt, response = broken[0].tolist()
        raise UsageError(
            f"{len(broken)} of {rewards.numel()} rewards are not finite numbers, the first "
            f"({float(rewards[prompt, response])}) of response {response} to question {prompt}: correct the reward"
        )
    largest = float(rewards.abs().max())
    if largest > _LARGEST_REWARD:
        raise UsageError(f"rewards reach {largest:g}, beyond {_LARGEST_REWARD:g} in size: scale them down")
    return rewards


def _check_tensor(name: str, values: Any) -> None:
    if not isinstance(values, Tensor) or values.is_complex():
        what = f"complex ({values.dtype})" if isinstance(values, Tensor) else f"a {type(values).__name__}"
        raise UsageError(f"{name} must be a torch tensor of real numbers, got {what}")


def validated_lengths(lengths: Tensor | None, rewards: Tensor, config: AlgorithmConfig) -> Tensor | None:
    """Response lengths [num_prompts, group_size] in tokens, on the CPU. Raises UsageError where they are needed."""
    if lengths is None:
        if ESTIMATORS[config.estimator].needs_lengths:
            raise UsageError(f"algorithm.estimator = {config.estimator} needs the response lengths: give `lengths`")
        return None
    _check_tensor("lengths", lengths)
    if lengths.shape != rewards.shape:
        raise UsageError(
            f"lengths are {list(lengths.shape)}, rewards {list(rewards.shape)}: give one length a response"
        )
    lengths = lengths.to("cpu")
    if (lengths < 0).any():
        raise UsageError(f"lengths are tokens of each response, got {int(lengths.min())}: give 0 or more")
    return lengths


def validated_pass_rates(pass_rates: Tensor | None, rewards: Tensor, config: AlgorithmConfig) -> Tensor | None:
    """Running pass rates [num_prompts] as float64 on the CPU; NaN: none yet."""
    if pass_rates is None:
        if "bundling" in ESTIMATORS[config.estimator].options and config.bundling == "sorted":
            raise UsageError(
                "algorithm.bundling = sorted needs each question's pass rate so far: give `pass_rates`, NaN where "
                "there is none yet"
            )
        return None
    _check_tensor("pass_rates", pass_rates)
    if pass_rates.shape != rewards.shape[:1] or pass_rates.isinf().any():
        raise UsageError(
            f"pass_rates are {list(pass_rates.shape)} for {rewards.size(0)} questions: give one finite number or NaN a "
            "question"
        )
    return pass_rates.to("cpu", torch.float64)
