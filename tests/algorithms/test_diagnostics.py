"""Metrics against numpy and plain loops."""

import numpy as np
import pytest
import torch

from megatron_riskpo.algorithms import AlgorithmConfig, compute_advantages, cov_logprob_advantage
from megatron_riskpo.algorithms.diagnostics import effective_weights, reward_metrics


def test_effective_weight_is_the_slope_of_advantages_on_rewards():
    generator = torch.Generator().manual_seed(2)
    rewards = (torch.rand(40, 10, generator=generator) < torch.rand(40, 1, generator=generator)).double()
    advantages = torch.randn(40, 10, dtype=torch.float64, generator=generator)
    bins = {}
    for reward, advantage in zip(rewards.numpy(), advantages.numpy(), strict=True):
        if reward.std() > 0:
            bins.setdefault(int(reward.sum()) // 2, []).append(np.polyfit(reward, advantage, 1)[0])
    expected = {f"risk/effective_weight/{b / 5:.1f}-{b / 5 + 0.2:.1f}": np.mean(w) for b, w in bins.items()}
    assert effective_weights(rewards, advantages) == pytest.approx(expected)


def test_questions_without_spread_have_no_weight():
    rewards = torch.tensor([[0.1, 0.1, 0.1], [0.0, 0.0, 0.0]], dtype=torch.float64)
    assert effective_weights(rewards, torch.randn(2, 3, dtype=torch.float64)) == {}


def test_mean_reward_weighs_all_questions_alike():
    rewards = (torch.arange(10)[None] < torch.arange(1, 10)[:, None]).double()
    weights = effective_weights(rewards, 3 * rewards - 7)
    assert len(weights) == 5
    assert list(weights.values()) == pytest.approx([3] * 5)


def test_self_bundles_weigh_hard_questions_more_than_easy_ones():
    generator = torch.Generator().manual_seed(4)
    rewards = (torch.rand(4000, 10, generator=generator) < torch.rand(4000, 1, generator=generator)).double()
    metrics = compute_advantages(rewards, AlgorithmConfig(bundling="self"), generator=generator).metrics
    weights = [value for key, value in metrics.items() if key.startswith("risk/effective_weight/")]
    assert weights == sorted(weights, reverse=True)
    assert weights[0] > 3 * weights[-1]


def test_random_bundles_weigh_all_questions_alike():
    generator = torch.Generator().manual_seed(4)
    rewards = (torch.rand(8000, 10, generator=generator) < torch.rand(8000, 1, generator=generator)).double()
    metrics = compute_advantages(rewards, AlgorithmConfig(), generator=generator).metrics
    weights = [value for key, value in metrics.items() if key.startswith("risk/effective_weight/")]
    assert weights == pytest.approx([np.mean(weights)] * 5, rel=0.06)


def test_solved_shares():
    rewards = torch.tensor([[1, 1], [1, 0], [0, 0], [0.5, 0.2]], dtype=torch.float64)
    expected = {
        "reward/mean": 3.7 / 8, "reward/solve_all": 0.5, "reward/solve_none": 0.25, "reward/zero_variance": 0.5
    }  # fmt: skip
    assert reward_metrics(rewards) == pytest.approx(expected)


def test_covariances_are_those_within_each_question():
    generator = torch.Generator().manual_seed(0)
    logprobs, advantages = torch.randn(2, 6, 5, generator=generator)
    rewards = torch.rand(6, 5, generator=generator).round()
    metrics = cov_logprob_advantage(logprobs, advantages, rewards)
    for name, values in (("advantage", advantages), ("reward", rewards)):
        pairs = zip(logprobs.numpy(), values.numpy(), strict=True)
        expected = np.mean([np.cov(lp, v, bias=True)[0, 1] for lp, v in pairs])
        assert metrics[f"risk/cov_logprob_{name}"] == pytest.approx(expected, rel=1e-5)
        within = [(x - x.mean(1, keepdim=True)).flatten().numpy() for x in (logprobs, values)]
        assert metrics[f"risk/corr_logprob_{name}"] == pytest.approx(np.corrcoef(*within)[0, 1], rel=1e-5)
    moved = cov_logprob_advantage(logprobs, advantages + torch.arange(6)[:, None], rewards)
    assert moved == pytest.approx(metrics, rel=1e-5)


def test_covariance_of_single_responses_is_taken_over_all_of_them():
    logprobs, advantages = torch.randn(2, 30, 1, generator=torch.Generator().manual_seed(0))
    expected = np.cov(logprobs[:, 0].numpy(), advantages[:, 0].numpy(), bias=True)[0, 1]
    metrics = cov_logprob_advantage(logprobs, advantages, torch.ones(30, 1))
    assert metrics["risk/cov_logprob_advantage"] == pytest.approx(expected, rel=1e-5)
    assert metrics["risk/corr_logprob_reward"] == 0.0


def test_zero_advantage_share():
    rewards = torch.tensor([[1, 0], [1, 1], [0, 0], [0, 1]], dtype=torch.float64)
    metrics = compute_advantages(rewards, AlgorithmConfig(estimator="grpo")).metrics
    assert metrics["risk/zero_advantage_share"] == 0.5
