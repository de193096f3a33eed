"""The risk weights against finite differences of the risk measure on policies small enough to enumerate.

The policy: 5 questions, 4 possible answers each, softmax over free logits; one bundle holds an answer to each question,
so that the distribution of its score is known exactly (1024 outcomes, ties everywhere when rewards are 0/1).
"""

import itertools

import pytest
import torch

from megatron_riskpo.algorithms.quantiles import empirical_quantile
from megatron_riskpo.algorithms.spectra import cvar, mvar, mvar_weight, quantile_integral, rvar

QUESTIONS, ANSWERS = 5, 4
OUTCOMES = torch.tensor(list(itertools.product(range(ANSWERS), repeat=QUESTIONS)))


def outcome_logprobs(logits):
    logprobs = logits.log_softmax(dim=1)
    return sum(logprobs[question, OUTCOMES[:, question]] for question in range(QUESTIONS))


def exact_mvar(logits, scores, alpha, beta, omega):
    """Walk up the quantile function, atom by atom."""
    total, level = 0.0, 0.0
    probabilities = outcome_logprobs(logits).exp().tolist()
    for score, probability in sorted(zip(scores.tolist(), probabilities, strict=True)):
        top = level + probability
        below = max(0.0, min(top, alpha) - level)
        middle = max(0.0, min(top, beta) - max(level, alpha))
        total += score * ((1 + omega) * below + middle)
        level = top
    return total


def exact_quantile(probabilities, scores, level):
    order = scores.argsort()
    return float(scores[order][torch.searchsorted(probabilities[order].cumsum(0), level)])


def finite_differences(function, point, step=1e-5):
    gradient = torch.zeros_like(point)
    for index in itertools.product(*map(range, point.shape)):
        moved = point.clone()
        moved[index] += step
        up = function(moved)
        moved[index] -= 2 * step
        gradient[index] = (up - function(moved)) / (2 * step)
    return gradient


@pytest.mark.parametrize("rewards_are", ["binary", "graded", "distinct"])
@pytest.mark.parametrize(("alpha", "beta", "omega"), [(0.2, 0.8, 0.5), (0.1, 1.0, 2.0), (0.35, 0.6, 0.0)])
def test_weight_gives_the_gradient_of_mvar(rewards_are, alpha, beta, omega):
    generator = torch.Generator().manual_seed(7)
    rewards = torch.rand(QUESTIONS, ANSWERS, dtype=torch.float64, generator=generator)
    rewards = {"binary": rewards.round(), "graded": (rewards * 3).round() / 3, "distinct": rewards}[rewards_are]
    scores = sum(rewards[question, OUTCOMES[:, question]] for question in range(QUESTIONS))
    if rewards_are != "distinct":
        scores = (scores * 6).round() / 6  # one float for each atom
    logits = torch.randn(QUESTIONS, ANSWERS, dtype=torch.float64, generator=generator, requires_grad=True)
    logprobs = outcome_logprobs(logits)
    probabilities = logprobs.detach().exp()
    quantiles = [exact_quantile(probabilities, scores, min(level, 1 - 1e-12)) for level in (alpha, beta)]
    weight = mvar_weight(scores, *quantiles, omega)
    (gradient,) = torch.autograd.grad((probabilities * weight * logprobs).sum(), logits)
    expected = finite_differences(lambda x: exact_mvar(x, scores, alpha, beta, omega), logits.detach())
    assert (gradient - expected).norm() <= 1e-6 * expected.norm()


def test_risk_measures_against_a_fine_grid_of_quantiles():
    sample = torch.tensor([3.0, 0.0, 1.0, 1.0, 5.0, 1.0, 2.0], dtype=torch.float64)
    alpha, beta, omega = 0.23, 0.81, 0.5
    levels = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
    quantiles = sample.sort().values[(levels * 7).long()]
    low, middle = (
        quantiles[levels <= alpha].sum() / 100_000,
        quantiles[(levels > alpha) & (levels <= beta)].sum() / 100_000,
    )
    assert mvar(sample, alpha, beta, omega) == pytest.approx(float(1.5 * low + middle), abs=1e-4)
    assert rvar(sample, alpha, beta) == pytest.approx(float(middle) / (beta - alpha), abs=1e-4)
    assert cvar(sample, alpha) == pytest.approx(float(low) / alpha, abs=1e-4)


def test_the_whole_integral_is_the_mean():
    sample = torch.tensor([0.5, -2.0, 7.0], dtype=torch.float64)
    assert quantile_integral(sample, 0.0, 1.0) == pytest.approx(float(sample.mean()))


def test_weight_shape_slopes_and_top():
    scores = torch.tensor([0.0, 1.0, 2.0, 3.0, 4.0, 9.0], dtype=torch.float64)
    weight = mvar_weight(scores, 2.0, 4.0, 0.5)
    assert weight.diff().tolist() == [1.5, 1.5, 1.0, 1.0, 0.0]
    assert weight.max() == 0


def test_weight_agrees_with_the_two_part_form_of_the_paper():
    scores = torch.randn(50, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    a, b, omega = empirical_quantile(scores, 0.2), empirical_quantile(scores, 0.8), 0.7
    g = (scores - a).clamp(min=0) - (scores - b).clamp(min=0) + a - b
    torch.testing.assert_close(mvar_weight(scores, a, b, omega), -(1 + omega) * (a - scores).clamp(min=0) + g)
