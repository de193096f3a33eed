"""Intervals: 2,000 simulated evaluations whose truth is known; the arithmetic against a plain loop.

The truth is the expected pass@k over all questions of a kind. pass rates of questions follow beta distributions, those
of two models on one question are correlated.
"""

import numpy as np
import pytest

from megatron_riskpo.evaluation.intervals import (
    NUM_RESAMPLES,
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


SPREAD, HARD, VERY_HARD, EASY = (0.5, 0.5), (1.0, 3.0), (0.2, 1.8), (3.0, 1.5)
"""Beta distributions of the questions' pass rates."""
CASES = [
    *((num, kind, asked) for num in (30, 100, 500) for kind in (SPREAD, HARD) for asked in ((1, 1), (8, 1), (8, 8))),
    *((num, VERY_HARD, asked) for num in (100, 500) for asked in ((1, 1), (8, 1), (8, 8))),
    *((num, EASY, asked) for num in (100, 500) for asked in ((1, 1), (8, 1))),
]


def share_coverage(num_questions: int, kind: tuple[float, float], asked: tuple[int, int]) -> float:
    generator = np.random.default_rng([num_questions, *asked])
    truth = expected_pass_at_k(generator.beta(*kind, NUM_TRUTH), asked[1])
    rates = generator.beta(*kind, (num_questions, NUM_EVALUATIONS))
    return coverage(share_intervals(observed(rates, *asked, generator)), truth)


@pytest.mark.parametrize(("num_questions", "kind", "asked"), CASES)
def test_share_intervals_cover_the_truth(num_questions: int, kind: tuple[float, float], asked: tuple[int, int]):
    assert 0.93 <= share_coverage(num_questions, kind, asked) <= 0.97


def test_intervals_of_nearly_saturated_shares_are_too_wide_and_not_too_narrow():
    assert share_coverage(30, EASY, (8, 8)) > 0.97


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


def test_an_interval_of_equal_values_is_no_point():
    (low, high), *_ = share_intervals(np.ones((30, 1)))
    assert low == pytest.approx(1 - 3 / 32, abs=0.04)
    assert high == 1.0
    assert share_intervals(np.zeros((30, 1)))[0].tolist() == pytest.approx([0.0, 1 - low], abs=0.02)


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
