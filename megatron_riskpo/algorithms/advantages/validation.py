"""Refuse impossible options and broken rewards in one line, before anything is computed."""

import math

import torch
from torch import Tensor

from megatron_riskpo.algorithms.advantages.registry import ESTIMATORS
from megatron_riskpo.algorithms.config import AlgorithmConfig
from megatron_riskpo.algorithms.option_checks import check_literals, check_name, check_range
from megatron_riskpo.errors import UsageError


def validate_algorithm(config: AlgorithmConfig, num_prompts: int, group_size: int) -> None:
    """Raise UsageError unless `config` can work on a step of num_prompts questions with group_size responses each."""
    check_name("algorithm.estimator", config.estimator, ESTIMATORS)
    check_literals("algorithm", config)
    if not 0 < config.alpha < config.beta <= 1:
        raise UsageError(
            f"algorithm.alpha = {config.alpha} and algorithm.beta = {config.beta} are not quantile levels: "
            "0 < alpha < beta <= 1 is needed"
        )
    check_range("algorithm.omega", config.omega, 0, math.inf)
    check_range("algorithm.bundle_size", config.bundle_size, 1, math.inf)
    check_range("algorithm.tracker_step", config.tracker_step, 0, math.inf)
    check_range("algorithm.tracker_decay", config.tracker_decay, 0, 1)
    ESTIMATORS[config.estimator].check(config, num_prompts, group_size)


def validated_rewards(rewards: Tensor) -> Tensor:
    """The reward matrix as float64 on the CPU. Raises UsageError where it is no finite [num_prompts, group_size]."""
    if rewards.dim() != 2 or rewards.numel() == 0:
        raise UsageError(
            f"rewards are {list(rewards.shape)}: give a matrix [num_prompts, group_size] that is not empty"
        )
    rewards = rewards.detach().to("cpu", torch.float64)
    broken = (~rewards.isfinite()).nonzero()
    if len(broken):
        prompt, response = broken[0].tolist()
        raise UsageError(
            f"{len(broken)} of {rewards.numel()} rewards are not finite numbers, the first "
            f"({float(rewards[prompt, response])}) of response {response} to question {prompt}: correct the reward"
        )
    return rewards
