"""Intervals: 2,000 simulated evaluations whose truth is known; the arithmetic against a plain loop.

The truth is the expected pass@k over all questions of a kind. pass rates of questions follow beta distributions, those
of two models on one question are correlated.
"""

from math import comb

import numpy as np
import pytest

from megatron_riskpo.evaluation.intervals import (
    NUM_RESAMPLES,
    bayesian_means,
    bootstrap_means,
    difference_intervals,
    mean_intervals,
    share_intervals,
    student_quantile,
)
from megatron_riskpo.evaluation.passk import pass_at_k

NUM_EVALUATIONS = 2000
NUM_TRUTH = 2_000_000


def expected_pass_at_k(rates: np.ndarray, k: int) -> float:
    return float((1 - (1 - rates) ** k).mean())


def observed(rates: np.ndarray, num_samples: int, k: int, generator: np.random.Generator) -> np.ndarray:
    """pass@k of each question after num_samples answers."""
    by_count = np.array([pass_at_k(num_samples, c, k) for c in range(num_samples + 1)])
    return by_count[generator.binomial(num_samples, rates)]


def coverage(intervals: np.ndarray, truth: float) -> float:
    return float(((intervals[:, 0] <= truth) & (truth <= intervals[:, 1])).mean())


SPREAD, HARD, VERY_HARD, EASY, VERY_EASY = (0.5, 0.5), (1.0, 3.0), (0.2, 1.8), (3.0, 1.5), (9.0, 1.0)
"""Beta distributions of the questions' pass rates."""
# Shares that are so few different numbers, or so near 1, that coverage comes in steps: see below.
IN_STEPS = [(30, VERY_EASY, (1, 1)), (100, EASY, (8, 8)), *((num, VERY_EASY, (8, 8)) for num in (30, 100, 500))]
CASES = [
    case
    for num in (30, 100, 500)
    for kind in (SPREAD, HARD, VERY_HARD, EASY, VERY_EASY)
    for asked in ((1, 1), (8, 1), (8, 8))
    if (case := (num, kind, asked)) not in IN_STEPS
]


def truth_of(kind: tuple[float, float], k: int) -> float:
    """Expected pass@k: 1 - E[(1 - rate)^k], a product of the beta distribution's moments."""
    a, b = kind
    return 1 - float(np.prod([(b + i) / (a + b + i) for i in range(k)]))


def share_coverage(num_questions: int, kind: tuple[float, float], asked: tuple[int, int]) -> float:
    generator = np.random.default_rng([num_questions, *asked])
    rates = generator.beta(*kind, (num_questions, NUM_EVALUATIONS))
    return coverage(share_intervals(observed(rates, *asked, generator)), truth_of(kind, asked[1]))


def exact_coverage(num_questions: int, share: float) -> float:
    """Where a question counts 0 or 1: the sum over all numbers of solved questions."""
    solved = np.arange(num_questions + 1)
    columns = (np.arange(num_questions)[:, None] < solved).astype(float)
    holds = [low <= share <= high for low, high in share_intervals(columns)]
    chances = [comb(num_questions, s) * share**s * (1 - share) ** (num_questions - s) for s in solved.tolist()]
    return float(np.dot(holds, chances))


@pytest.mark.parametrize(("num_questions", "kind", "asked"), CASES)
def test_share_intervals_cover_the_truth(num_questions: int, kind: tuple[float, float], asked: tuple[int, int]):
    assert 0.93 <= share_coverage(num_questions, kind, asked) <= 0.97


@pytest.mark.parametrize(("num_questions", "kind", "asked"), IN_STEPS)
def test_where_coverage_comes_in_steps_it_is_the_sum_over_all_outcomes(
    num_questions: int, kind: tuple[float, float], asked: tuple[int, int]
):
    """Not simulated only: 2,000 evaluations know a coverage to a point."""
    exact = exact_coverage(num_questions, truth_of(kind, asked[1]))
    assert share_coverage(num_questions, kind, asked) == pytest.approx(exact, abs=0.015)
    assert exact >= 0.93


@pytest.mark.parametrize("num_questions", [30, 100, 500])
@pytest.mark.parametrize(("num_samples", "k"), [(8, 1), (8, 4), (1, 1)])
def test_difference_intervals_cover_the_truth(num_questions: int, num_samples: int, k: int):
    generator = np.random.default_rng([num_questions, num_samples, k])

    def two_models(shape) -> tuple[np.ndarray, np.ndarray]:
        ease, change = generator.normal(0, 1.5, shape), generator.normal(0.4, 0.7, shape)
        return 1 / (1 + np.exp(-ease)), 1 / (1 + np.exp(-ease - change))

    first, second = two_models(NUM_TRUTH)
    truth = expected_pass_at_k(second, k) - expected_pass_at_k(first, k)
    first, second = two_models((num_questions, NUM_EVALUATIONS))
    difference = observed(second, num_samples, k, generator) - observed(first, num_samples, k, generator)
    assert 0.93 <= coverage(difference_intervals(difference), truth) <= 0.97


@pytest.mark.parametrize("num_questions", [10, 30, 200])
def test_mean_intervals_cover_the_truth(num_questions: int):
    generator = np.random.default_rng(num_questions)
    lengths = generator.gamma(4.0, 100.0, (num_questions, NUM_EVALUATIONS))
    assert 0.93 <= coverage(mean_intervals(lengths), 400.0) <= 0.97


@pytest.mark.parametrize("num_solved", [0, 1, 4, 15, 27, 30])
def test_of_right_and_wrong_it_is_jeffreys_interval(num_solved: int):
    values = (np.arange(30) < num_solved).astype(float)[:, None]
    posterior = np.random.default_rng(0).beta(num_solved + 0.5, 30.5 - num_solved, 1_000_000)
    # As far as 2,000 resamples know their own quantiles.
    assert share_intervals(values)[0] == pytest.approx(np.quantile(posterior, (0.025, 0.975)), abs=0.012)


def test_an_interval_of_equal_values_is_no_point():
    (low, high), *_ = share_intervals(np.ones((30, 1)))
    assert low == pytest.approx(1 - 2.5 / 30, abs=0.01)
    assert high == pytest.approx(1.0, abs=1e-3)


def test_bayesian_means_are_those_of_a_plain_loop():
    values = np.random.default_rng(0).random((12, 2))
    generator = np.random.default_rng([95, 12])
    weights = generator.standard_exponential((NUM_RESAMPLES, 12))
    zeros, ones = generator.gamma(0.5, size=(2, NUM_RESAMPLES))
    means = bayesian_means(values)
    for resample in (0, NUM_RESAMPLES - 1):
        pairs = [*zip(weights[resample], values, strict=True), (zeros[resample], 0.0), (ones[resample], 1.0)]
        expected = sum(weight * value for weight, value in pairs) / sum(weight for weight, _ in pairs)
        assert means[resample] == pytest.approx(expected)


def test_bootstrap_means_are_those_of_a_plain_loop_and_columns_are_paired():
    values = np.random.default_rng(0).random((12, 2))
    means = bootstrap_means(np.hstack([values, values[:, :1] - values[:, 1:]]))
    counts = np.random.default_rng([95, 12]).multinomial(12, np.full(12, 1 / 12), size=NUM_RESAMPLES)
    for resample in (0, 1, NUM_RESAMPLES - 1):
        drawn = [row for row, count in enumerate(counts[resample]) for _ in range(count)]
        assert means[resample, :2] == pytest.approx(values[drawn].mean(axis=0))
    assert means[:, 2] == pytest.approx(means[:, 0] - means[:, 1])


@pytest.mark.parametrize(("degrees", "quantile"), [(5, 2.5706), (10, 2.2281), (29, 2.0452), (1000, 1.9623)])
def test_student_quantiles_are_those_of_the_tables(degrees: int, quantile: float):
    assert student_quantile(0.975, degrees) == pytest.approx(quantile, rel=2e-3)
