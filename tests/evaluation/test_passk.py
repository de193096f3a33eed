"""pass@k against the definition: the share of all k-subsets that hold a correct sample."""

from itertools import combinations
from math import comb

import numpy as np
import pytest

from megatron_riskpo.errors import UsageError
from megatron_riskpo.evaluation.passk import pass_at_k, question_pass_at_k


def by_enumeration(num_samples: int, num_correct: int, k: int) -> float:
    subsets = list(combinations(range(num_samples), k))
    return sum(min(subset) < num_correct for subset in subsets) / len(subsets)


@pytest.mark.parametrize("num_samples", [1, 2, 5, 8])
def test_equals_the_share_of_subsets_with_a_correct_sample(num_samples: int):
    for k in range(1, num_samples + 1):
        for num_correct in range(num_samples + 1):
            expected = by_enumeration(num_samples, num_correct, k)
            assert pass_at_k(num_samples, num_correct, k) == pytest.approx(expected, abs=1e-14)


def test_large_counts_match_exact_integers():
    # C(10000, 5000) has 3009 digits, far beyond floating point
    exact = 1 - comb(10000 - 3, 5000) / comb(10000, 5000)
    assert pass_at_k(10000, 3, 5000) == pytest.approx(exact, abs=1e-12)


def test_each_question_has_its_own():
    correct = np.random.default_rng(0).random((37, 8)) < np.linspace(0, 1, 37)[:, None]
    of_1, of_3, of_8 = question_pass_at_k(correct, (1, 3, 8)).T
    assert of_1 == pytest.approx(correct.mean(axis=1))
    assert of_3 == pytest.approx([by_enumeration(8, int(row.sum()), 3) for row in correct])
    assert of_8 == pytest.approx(correct.any(axis=1).astype(float))


@pytest.mark.parametrize(("num_samples", "num_correct", "k"), [(4, 1, 5), (4, 1, 0), (4, 5, 1), (4, -1, 1)])
def test_impossible_counts_are_usage_errors(num_samples: int, num_correct: int, k: int):
    with pytest.raises(UsageError, match=f"pass@{k} of {num_samples} samples"):
        pass_at_k(num_samples, num_correct, k)


@pytest.mark.parametrize("table", [[], [[]], [True, False]])
def test_a_table_without_entries_is_a_usage_error(table: list):
    with pytest.raises(UsageError, match="shape"):
        question_pass_at_k(table, (1,))
