"""Comparisons: pairing against numpy's plain arithmetic, the sign test against enumeration, wrong pairs."""

from dataclasses import replace
from itertools import product

import numpy as np
import pytest

from megatron_riskpo.errors import UsageError
from megatron_riskpo.evaluation.comparison import aligned, compare, difficulty_bins, pairs, sign_test
from megatron_riskpo.evaluation.comparison_page import tables_of, write_page
from megatron_riskpo.evaluation.passk import question_pass_at_k
from megatron_riskpo.evaluation.results import Results


def results(name: str, correct, keys: list[str] | None = None) -> Results:
    correct = np.asarray(correct, dtype=bool)
    num, samples = correct.shape
    return Results(
        name=name,
        keys=keys or [f"q{i}" for i in range(num)],
        problems=[f"problem of {key}" for key in keys or [f"q{i}" for i in range(num)]],
        sources=[""] * num,
        correct=correct,
        errors=np.zeros_like(correct),
        predicted=[["1" if verdict else None for verdict in row] for row in correct.tolist()],
        lengths=np.full((num, samples), 7.0),
        truncated=~correct,
        seconds=1.0,
    )


@pytest.fixture
def two() -> tuple[Results, Results]:
    generator = np.random.default_rng(3)
    rates = generator.random(60)[:, None]
    return results("x", generator.random((60, 4)) < rates), results("x", generator.random((60, 8)) < rates**0.5)


def test_differences_are_those_of_the_tables(two):
    a, b = two
    comparison = compare(a, b)
    first, second = (question_pass_at_k(own.correct, range(1, 5)).mean(axis=0) for own in (a, b))
    for k in range(1, 5):
        difference = comparison.differences[f"pass@{k}"]
        assert difference.value == pytest.approx(second[k - 1] - first[k - 1])
        assert difference.low < difference.value < difference.high
    assert "pass@5" not in comparison.differences
    assert "pass@5" in comparison.b.shares


def test_pairing_makes_the_interval_narrower_than_two_of_their_own(two):
    a, b = two
    paired = compare(a, b).differences["pass@1"]
    mixed = np.random.default_rng(0).permutation(60)
    unpaired = compare(a, replace(b, correct=b.correct[mixed])).differences["pass@1"]
    assert unpaired.value == pytest.approx(paired.value)
    assert paired.high - paired.low < 0.85 * (unpaired.high - unpaired.low)


def test_the_order_of_questions_does_not_matter(two):
    a, b = two
    order = np.random.default_rng(1).permutation(60).tolist()
    assert compare(a, b.take(order)) == compare(a, b)


@pytest.mark.parametrize("signs", [[1, 1, 1, -1, 0, 0], [1] * 7, [0, 0], [-1, -1, 1, -1, -1, -1, -1]])
def test_the_sign_test_counts_all_equally_likely_splits(signs: list[int]):
    num = sum(sign != 0 for sign in signs)
    imbalance = abs(sum(signs))
    splits = [abs(sum(split)) for split in product((-1, 1), repeat=num)]
    expected = sum(split >= imbalance for split in splits) / len(splits)
    test = sign_test(np.array(signs, dtype=float))
    assert test.p_value == pytest.approx(expected)
    assert (test.b_better, test.a_better, test.equal) == (signs.count(1), signs.count(-1), signs.count(0))


def test_difficulty_bins_hold_every_question_once_by_the_mean_of_both(two):
    a = np.array([0.0, 0.0, 0.25, 0.5, 0.75, 1.0, 1.0])
    b = np.array([0.0, 0.5, 0.25, 0.5, 0.75, 1.0, 0.5])
    bins = difficulty_bins(a, b)
    assert [(own.label, own.num_questions) for own in bins] == [
        ("never solved", 1), ("up to 25 %", 2), ("up to 50 %", 1), ("up to 75 %", 2), ("always solved", 1),
    ]  # fmt: skip
    assert bins[1].difference.value == pytest.approx(0.25)
    rates = [own.correct.mean(axis=1) for own in two]
    total = sum(own.num_questions * own.difference.value for own in difficulty_bins(*rates))
    assert total / 60 == pytest.approx((rates[1] - rates[0]).mean())


def test_sources_are_compared_apart(two):
    a, b = two
    sources = ["sums" if row % 3 else "programs" for row in range(60)]
    comparison = compare(replace(a, sources=sources), replace(b, sources=["other"] * 60))
    assert [(own.label, own.num_questions) for own in comparison.sources] == [("programs", 20), ("sums", 40)]
    for own, rows in zip(comparison.sources, ([*range(0, 60, 3)], [row for row in range(60) if row % 3]), strict=True):
        alone = compare(a.take(rows), b.take(rows)).differences["pass@1"]
        assert (own.difference.value, own.difference.low, own.difference.high) == pytest.approx(
            (alone.value, alone.low, alone.high), abs=0.02
        )
        assert own.b - own.a == pytest.approx(alone.value)
    shown = [table.caption for table in tables_of(comparison)]
    assert shown[1] == "x: pass@1 by source"
    assert compare(a, b).sources == []


def test_other_questions_are_refused_with_counts(two):
    a, b = two
    with pytest.raises(UsageError, match="10 of A's 60 are not in B, 0 of B's 50 are not in A"):
        aligned(a, b.take(range(50)))
    changed = replace(b, problems=["other", *b.problems[1:]])
    with pytest.raises(UsageError, match="1 of 60 questions have one id and different texts"):
        aligned(a, changed)


def test_benchmarks_are_paired_by_name(two):
    a, b = two
    other = replace(b, name="y")
    assert pairs([a, other], [b]) == ([(a, b)], ["y"])
    assert pairs([a], [other]) == ([(a, other)], [])
    with pytest.raises(UsageError, match="no benchmark in common: A has x, B has y, z"):
        pairs([a], [other, replace(b, name="z")])


def test_tables_and_page_have_the_figures(two, tmp_path):
    comparison = compare(*two)
    shares, bins = (table.printed() for table in tables_of(comparison))
    value = comparison.differences["pass@4"]
    assert f"{100 * value.value:+.1f} [{100 * value.low:+.1f}, {100 * value.high:+.1f}]" in shares
    assert f"sign test p = {comparison.sign_test.p_value:.2g}" in shares
    assert str(comparison.bins[0].num_questions) in bins
    page = write_page(tmp_path / "c.html", [comparison], "<script>a", "b").read_text()
    assert "<script>a" not in page
    assert page.count("Plotly.newPlot(") >= 2
    assert f"{100 * value.value:+.1f} [" in page
