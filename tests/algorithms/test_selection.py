"""Selection of quantiles by counting digits. Second way to the number: sorting, and the definition in fractions."""

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_riskpo.algorithms import selection
from megatron_riskpo.algorithms.distribution import Distribution
from megatron_riskpo.algorithms.selection import quantile_index, quantiles_of_sorted, select_quantiles

TIES = st.sampled_from([0.0, -0.0, 1.0, -1.0, 3.0, math.inf, -math.inf, 5e-324, -5e-324])
SCORES = st.lists(st.one_of(TIES, st.floats(allow_nan=False)), min_size=1, max_size=60)
LEVELS = st.lists(st.one_of(st.sampled_from([0.1, 0.2, 0.5, 0.8, 1.0]), st.floats(1e-6, 1)), min_size=1, max_size=3)


def bits(values: tuple[float, ...]) -> list[int]:
    return torch.tensor(values, dtype=torch.float64).view(torch.int64).tolist()


def by_sorting(scores: Tensor, levels: list[float]) -> tuple[float, ...]:
    return quantiles_of_sorted(scores.sort().values, levels)


@given(SCORES, LEVELS)
@settings(max_examples=150, deadline=None)
def test_equals_the_sort_bit_for_bit(values, levels):
    scores = torch.tensor(values, dtype=torch.float64)
    selected = select_quantiles(scores, levels)
    assert bits(selected) == bits(by_sorting(scores, levels))
    # A zero of either sign is the same score to everyone else.
    assert selected == tuple(Distribution.of_sample(scores).quantile(level) for level in levels)


@given(st.integers(1, 400), st.integers(1, 100))
@settings(max_examples=200, deadline=None)
def test_index_is_the_definition(num_scores, percent):
    # In fractions nothing is rounded; percent / 100 and its float differ by less than the allowance.
    level = Fraction(percent, 100)
    expected = next(k for k in range(num_scores) if Fraction(k + 1, num_scores) >= level)
    assert quantile_index(num_scores, percent / 100) == expected


def test_chunks_do_not_show(monkeypatch):
    scores = torch.randn(1000, generator=torch.Generator().manual_seed(1), dtype=torch.float64).round(decimals=1)
    levels = [0.001, 0.2, 0.2, 0.8, 1.0]
    whole = select_quantiles(scores, levels)
    monkeypatch.setattr(selection, "CHUNK", 7)
    assert select_quantiles(scores, levels) == whole == by_sorting(scores, levels)


def test_a_million_scores_that_share_their_leading_digits():
    generator = torch.Generator().manual_seed(2)
    scores = 1 + 1e-10 * torch.randn(2**20 + 3, generator=generator, dtype=torch.float64)
    assert select_quantiles(scores, [0.2, 0.8]) == by_sorting(scores, [0.2, 0.8])


def test_order_and_view_do_not_matter():
    scores = torch.randn(50, 2, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    assert select_quantiles(scores[:, 0], [0.3]) == select_quantiles(scores[:, 0].flip(0), [0.3])


@pytest.mark.parametrize("function", [select_quantiles, by_sorting])
def test_what_has_no_quantiles_is_refused(function):
    with pytest.raises(ValueError, match="2 scores are NaN"):
        function(torch.tensor([1.0, math.nan, -math.nan, math.inf], dtype=torch.float64), [0.5])
    with pytest.raises(ValueError, match="there are no scores"):
        function(torch.zeros(0, dtype=torch.float64), [0.5])
    for level in (0.0, 1.1, math.nan):
        with pytest.raises(ValueError, match="is no quantile level"):
            function(torch.zeros(3, dtype=torch.float64), [level])
