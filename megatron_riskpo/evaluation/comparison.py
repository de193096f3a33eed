"""Two evaluations of the same questions against each other: paired intervals, sign test, difficulty bins."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import comb

import numpy as np
from numpy.typing import NDArray

from megatron_riskpo.errors import UsageError
from megatron_riskpo.evaluation.intervals import difference_intervals
from megatron_riskpo.evaluation.results import Results
from megatron_riskpo.evaluation.summary import Estimate, Summary, estimates, share_columns, summarize
from megatron_riskpo.rewards.reference import rows_by_source

# Upper ends of the bins of the mean pass rate; never and always solved stand apart.
BIN_EDGES = (0.25, 0.5, 0.75)


@dataclass(frozen=True)
class Bin:
    """Questions that have something in common."""

    label: str
    num_questions: int
    a: float
    """Mean pass rate of A in the bin."""
    b: float
    difference: Estimate


@dataclass(frozen=True)
class SignTest:
    """Questions on which one is better, by pass rate; equal ones say nothing."""

    b_better: int
    a_better: int
    equal: int
    p_value: float
    """Two-sided, exact: how likely a split so uneven, or more, is if neither is better."""


@dataclass(frozen=True)
class Comparison:
    """One benchmark, B against A."""

    name: str
    a: Summary
    b: Summary
    differences: dict[str, Estimate]
    """B - A of each share that both have: pass@k, majority@k, no_answer, truncated."""
    sign_test: SignTest
    bins: list[Bin]
    """By difficulty."""
    sources: list[Bin]
    """By data source; empty where there is only one."""


def compare(a: Results, b: Results) -> Comparison:
    """B against A. Raises UsageError where they are not about the same questions."""
    b = aligned(a, b)
    columns_a, columns_b = share_columns(a), share_columns(b)
    both = {name: columns_b[name] - columns_a[name] for name in columns_a if name in columns_b}
    intervals = difference_intervals(np.stack(list(both.values()), axis=1))
    rates_a, rates_b = a.correct.mean(axis=1), b.correct.mean(axis=1)
    return Comparison(
        name=a.name,
        a=summarize(a),
        b=summarize(b),
        differences=estimates(both, intervals),
        sign_test=sign_test(rates_b - rates_a),
        bins=difficulty_bins(rates_a, rates_b),
        sources=[bin_of(source, rates_a[rows], rates_b[rows]) for source, rows in rows_by_source(a.sources).items()],
    )


def aligned(a: Results, b: Results) -> Results:
    """B with its questions in A's order. Raises UsageError, with counts, where the questions are not the same."""
    only_a, only_b = set(a.keys) - set(b.keys), set(b.keys) - set(a.keys)
    if only_a or only_b:
        example = sorted(only_a or only_b)[0]
        raise UsageError(
            f"{a.name}: not the same questions: {len(only_a)} of A's {len(a.keys)} are not in B, {len(only_b)} of B's "
            f"{len(b.keys)} are not in A (for example {example!r:.60}); evaluate both on one file"
        )
    position = {key: row for row, key in enumerate(b.keys)}
    order = [position[key] for key in a.keys]
    changed = [key for key, problem, row in zip(a.keys, a.problems, order, strict=True) if problem != b.problems[row]]
    if changed:
        raise UsageError(
            f"{a.name}: {len(changed)} of {len(a.keys)} questions have one id and different texts in A and B (for "
            f"example {changed[0]!r:.60}); evaluate both on one file"
        )
    return b.take(order)


def pairs(a: Sequence[Results], b: Sequence[Results]) -> tuple[list[tuple[Results, Results]], list[str]]:
    """(benchmarks that both have, names that only one has). Two single benchmarks are a pair whatever their names.

    Raises UsageError where there is no pair.
    """
    by_name = {results.name: results for results in b}
    common = [(results, by_name[results.name]) for results in a if results.name in by_name]
    if not common and len(a) == len(b) == 1:
        return [(a[0], b[0])], []
    if not common:
        names = [", ".join(results.name for results in side) for side in (a, b)]
        raise UsageError(f"no benchmark in common: A has {names[0]}, B has {names[1]}; evaluate both on one file")
    shared = {results.name for results, _ in common}
    return common, sorted({results.name for results in (*a, *b)} - shared)


def sign_test(differences: NDArray[np.float64]) -> SignTest:
    """Of differences B - A, one a question; those of rounding count as equal."""
    up, down = int((differences > 1e-12).sum()), int((differences < -1e-12).sum())
    num = up + down
    tail = sum(comb(num, i) for i in range(min(up, down) + 1))
    return SignTest(up, down, len(differences) - num, min(1.0, 2 * tail / 2**num))


def difficulty_bins(rates_a: NDArray[np.float64], rates_b: NDArray[np.float64]) -> list[Bin]:
    """Questions by the mean of both pass rates, the hardest first; empty bins are left out.

    The mean, since A's rate alone would put A's bad luck into the hard bins, where B then seems better.
    """
    mean = (rates_a + rates_b) / 2
    steps = [f"up to {100 * edge:.0f} %" for edge in BIN_EDGES]
    labels = ["never solved", *steps, f"above {100 * BIN_EDGES[-1]:.0f} %", "always solved"]
    bins = np.searchsorted(BIN_EDGES, mean, side="left") + 1
    bins[mean <= 0] = 0
    bins[mean >= 1] = len(labels) - 1
    found = []
    for index, label in enumerate(labels):
        rows = bins == index
        if rows.any():
            found.append(bin_of(label, rates_a[rows], rates_b[rows]))
    return found


def bin_of(label: str, rates_a: NDArray[np.float64], rates_b: NDArray[np.float64]) -> Bin:
    """Of the pass rates of the bin's questions."""
    difference = rates_b - rates_a
    estimate = estimates({"": difference}, difference_intervals(difference[:, None]))[""]
    return Bin(label, len(difference), float(rates_a.mean()), float(rates_b.mean()), estimate)
