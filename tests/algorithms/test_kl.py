"""KL estimators and their gradients against the exact divergence of small distributions, by enumeration."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_riskpo.algorithms.config import PolicyLossConfig
from megatron_riskpo.algorithms.kl import MAX_LOG_RATIO, kl_estimate, kl_penalty

distributions = st.lists(st.floats(-3, 3), min_size=5, max_size=5).map(lambda x: torch.tensor(x, dtype=torch.float64))


def divergence(logits, ref_logits):
    logprobs, ref = logits.log_softmax(0), ref_logits.log_softmax(0)
    return (logprobs.exp() * (logprobs - ref)).sum()


def expected_estimate(logits, ref_logits, estimator):
    """E over tokens sampled from pi, where only the estimate is differentiated, as in a loss."""
    logprobs, ref = logits.log_softmax(0), ref_logits.log_softmax(0)
    return (logprobs.detach().exp() * kl_estimate(logprobs, ref, estimator)).sum()


def gradient(function, logits):
    logits = logits.clone().requires_grad_()
    return torch.autograd.grad(function(logits), logits)[0]


@given(distributions, distributions)
def test_values_of_k1_and_k3_are_unbiased(logits, ref_logits):
    exact = float(divergence(logits, ref_logits))
    for estimator in ("k1", "k3"):
        assert float(expected_estimate(logits, ref_logits, estimator)) == pytest.approx(exact, rel=1e-9, abs=1e-12)


@given(distributions, distributions)
def test_the_gradient_of_k2_is_that_of_the_divergence(logits, ref_logits):
    estimated = gradient(lambda x: expected_estimate(x, ref_logits, "k2"), logits)
    torch.testing.assert_close(estimated, gradient(lambda x: divergence(x, ref_logits), logits), rtol=1e-9, atol=1e-12)


@given(distributions, distributions)
def test_the_gradient_of_k1_is_zero(logits, ref_logits):
    estimated = gradient(lambda x: expected_estimate(x, ref_logits, "k1"), logits)
    torch.testing.assert_close(estimated, torch.zeros_like(logits), rtol=0, atol=1e-12)


@given(distributions, distributions)
def test_the_gradient_of_k3_is_that_of_the_reverse_divergence(logits, ref_logits):
    estimated = gradient(lambda x: expected_estimate(x, ref_logits, "k3"), logits)
    torch.testing.assert_close(estimated, gradient(lambda x: divergence(ref_logits, x), logits), rtol=1e-9, atol=1e-12)


def test_k2_is_biased_and_its_bias_vanishes_with_the_third_power():
    logits, direction = torch.randn(2, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    biases = []
    for size in (0.02, 0.01):
        ref = logits + size * direction
        biases.append(float(expected_estimate(logits, ref, "k2") - divergence(logits, ref)))
    assert abs(biases[1]) > 1e-9
    assert biases[0] / biases[1] == pytest.approx(8, rel=0.05)


def test_values_by_hand_and_the_bound_of_the_exponent():
    logprobs, ref = torch.tensor([-1.0, -50.0, -1.0]), torch.tensor([-3.0, -1.0, -50.0])
    assert kl_estimate(logprobs, ref, "k1").tolist() == [2.0, -49.0, 49.0]
    assert kl_estimate(logprobs, ref, "k2").tolist() == [2.0, 49**2 / 2, 49**2 / 2]
    ratios = torch.tensor([-2.0, MAX_LOG_RATIO, -49.0]).double().exp()
    expected = ratios - torch.tensor([-2.0, MAX_LOG_RATIO, -49.0]).double() - 1
    torch.testing.assert_close(kl_estimate(logprobs, ref, "k3").double(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_gradients_are_finite_and_pull_back_a_token_that_became_far_too_likely(estimator):
    logprobs = torch.tensor([0.0, -100.0], requires_grad=True)
    kl_estimate(logprobs, torch.tensor([-100.0, 0.0]), estimator).sum().backward()
    assert logprobs.grad.isfinite().all()
    assert logprobs.grad[0] > 0


def test_small_differences_keep_their_digits():
    difference = torch.tensor([1e-4, -1e-4])
    torch.testing.assert_close(
        kl_estimate(torch.zeros(2), difference, "k3"), difference.square() / 2, rtol=1e-2, atol=0
    )


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_reward_penalty_against_a_loop(estimator):
    config = PolicyLossConfig(kl_coefficient=0.3, kl_in="reward", kl_estimator=estimator)
    lengths = torch.tensor([2, 3, 1, 4, 0, 2])
    logprobs, ref = torch.randn(2, 12, generator=torch.Generator().manual_seed(0))
    rewards = torch.randn(2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    penalised = kl_penalty(rewards, logprobs.requires_grad_(), ref, lengths, config)
    assert penalised.dtype == torch.float64
    assert not penalised.requires_grad
    token = 0
    for row in range(6):
        total = 0.0
        for _ in range(int(lengths[row])):
            d = ref[token].double() - logprobs.detach()[token].double()
            total += float({"k1": -d, "k2": d**2 / 2, "k3": d.exp() - 1 - d}[estimator])
            token += 1
        expected = float(rewards[row // 3, row % 3]) - 0.3 * total
        assert float(penalised[row // 3, row % 3]) == pytest.approx(expected, rel=1e-9)


def test_reward_penalty_refuses_sizes_that_do_not_fit():
    rewards, lengths, config = torch.zeros(1, 2, dtype=torch.float64), torch.tensor([2, 1]), PolicyLossConfig()
    with pytest.raises(ValueError, match="got 3 and 2 for 3 tokens"):
        kl_penalty(rewards, torch.zeros(3), torch.zeros(2), lengths, config)
    with pytest.raises(ValueError, match="got 1 for 2"):
        kl_penalty(rewards, torch.zeros(2), torch.zeros(2), lengths[:1], config)
