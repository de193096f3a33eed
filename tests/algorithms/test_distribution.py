"""Distributions against their definitions, by fractions and plain loops."""

from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_riskpo.algorithms.distribution import Distribution


def float64(values):
    return torch.tensor(values, dtype=torch.float64)


@given(st.lists(st.integers(0, 4), min_size=1, max_size=40), st.integers(1, 40))
def test_a_quantile_is_the_smallest_score_whose_share_at_or_below_reaches_the_level(scores, fortieths):
    level = Fraction(fortieths, 40)
    shares = {x: Fraction(sum(score <= x for score in scores), len(scores)) for x in scores}
    expected = min(x for x, share in shares.items() if share >= level)
    assert Distribution.of_sample(float64(scores)).quantile(fortieths / 40) == expected


@given(st.integers(1, 2000), st.data())
def test_levels_that_hit_a_rank_exactly_are_not_rounded_up(num_scores, data):
    rank = data.draw(st.integers(1, num_scores))
    scores = Distribution.of_sample(torch.arange(1, num_scores + 1, dtype=torch.float64))
    assert scores.quantile(rank / num_scores) == rank


def test_the_rounding_error_of_a_tenth_of_thirty():
    assert Distribution.of_sample(torch.arange(1, 31, dtype=torch.float64)).quantile(0.1) == 3
    assert Distribution.of_sample(torch.arange(1, 11, dtype=torch.float64)).quantile(0.1 + 0.2) == 3


weighted = st.lists(st.tuples(st.integers(-3, 3), st.integers(0, 5)), min_size=1, max_size=8).filter(
    lambda pairs: any(count for _, count in pairs)
)


@given(weighted, st.integers(1, 20), st.integers(-4, 4))
def test_masses_count_as_so_many_equal_scores(pairs, twentieths, value):
    pairs = sorted(pairs)
    repeated = float64([score for score, count in pairs for _ in range(count)])
    by_mass = Distribution.of_masses(float64([s for s, _ in pairs]), float64([[c for _, c in pairs]]))
    by_count = Distribution.of_sample(repeated)
    assert by_mass.quantile(twentieths / 20) == by_count.quantile(twentieths / 20)
    assert by_mass.share_below(value) == pytest.approx(float((repeated < value).double().mean()))
    assert by_mass.support() == (float(repeated.min()), float(repeated.max()))
    assert float(by_mass.std()) == pytest.approx(float(repeated.std(unbiased=False)), abs=1e-12)


def test_a_pool_weighs_its_parts():
    parts = [Distribution.of_sample(float64([0.0, 2.0])), Distribution.of_sample(float64([1.0]))]
    pooled = Distribution.pool(parts, [3, 1])
    assert pooled.atoms.tolist() == [[0.0, 1.0, 2.0]]
    assert pooled.masses[0].tolist() == pytest.approx([3 / 8, 2 / 8, 3 / 8])


def test_rows_are_apart():
    scores = Distribution.of_sample(float64([[3.0, 1.0], [5.0, 9.0]]))
    assert scores.quantiles(0.5).tolist() == [1.0, 5.0]
    assert scores.quantiles(1.0).tolist() == [3.0, 9.0]


@given(st.lists(st.integers(-3, 3), min_size=1, max_size=30), st.integers(1, 7), st.integers(1, 20))
def test_thinning_moves_a_quantile_by_fewer_atoms_than_it_leaves_out(scores, every, twentieths):
    whole = Distribution.of_sample(float64(scores))
    thin, rank = whole.thinned(every), -(-twentieths * len(scores) // 20)
    assert thin.atoms.size(1) == -(-len(scores) // every)
    assert (
        sorted(scores)[rank - 1]
        <= thin.quantile(twentieths / 20)
        <= sorted(scores)[min(rank + every - 2, len(scores) - 1)]
    )
    assert thin.quantile(1.0) == max(scores)
