"""GRPO against numpy."""

import numpy as np
import torch

from megatron_riskpo.algorithms import AlgorithmConfig, compute_advantages


def test_against_numpy():
    rewards = torch.rand(6, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rewards[2] = rewards[2].round()
    values = rewards.numpy()
    expected = (values - values.mean(1, keepdims=True)) / (values.std(1, ddof=1, keepdims=True) + 1e-6)
    outputs = compute_advantages(rewards, AlgorithmConfig(estimator="grpo"))
    np.testing.assert_allclose(outputs.advantages.numpy(), expected, rtol=1e-12)


def test_groups_of_equal_rewards_teach_exactly_nothing():
    rewards = torch.full((3, 7), 0.1, dtype=torch.float64)
    assert not compute_advantages(rewards, AlgorithmConfig(estimator="grpo")).advantages.any()


def test_risk_metrics_are_those_of_the_rewards():
    rewards = torch.tensor([[0.0, 1.0], [2.0, 3.0], [4.0, 4.0]], dtype=torch.float64)
    metrics = compute_advantages(rewards, AlgorithmConfig(estimator="grpo", alpha=0.5, beta=1.0)).metrics
    assert (metrics["risk/q_alpha"], metrics["risk/q_beta"]) == (2.0, 4.0)
    assert np.isclose(metrics["risk/cvar"], 1.0)
    assert np.isclose(metrics["risk/rvar"], 11 / 3)
