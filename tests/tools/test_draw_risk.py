"""The curves behind docs/risk.md against plain formulas, and the facts that the page states.

Not tested: the pictures.
"""

import math
from pathlib import Path
from types import ModuleType

import pytest
import torch

from megatron_riskpo.algorithms import AlgorithmConfig, compute_advantages

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "risk.md").read_text(encoding="utf-8")
SCORES = range(6)
NUM_STEPS = 100


@pytest.fixture(scope="module")
def curves() -> ModuleType:
    import risk_curves

    return risk_curves


@pytest.fixture(scope="module")
def drawing() -> ModuleType:
    import draw_risk

    return draw_risk


def plus(value: float) -> float:
    return max(value, 0.0)


def binomial(n: int, hits: int, p: float) -> float:
    return math.comb(n, hits) * p**hits * (1 - p) ** (n - hits)


def test_scores_are_binomial(curves):
    scores = curves.binomial_scores(5, 0.3)
    assert scores.masses[0].tolist() == pytest.approx([binomial(5, s, 0.3) for s in SCORES])


# Binomial(5, 1/2): F = 1/32, 6/32, 16/32, 26/32, 31/32, 1, so the quantiles at .2 and .8 are 2 and 3.
CDF = [sum(math.comb(5, j) for j in range(s + 1)) / 32 for s in SCORES]


@pytest.mark.parametrize(
    ("spectrum", "psi"),
    [
        ("mean", lambda s: s - 5),
        ("mvar", lambda s: -plus(3 - s) - 0.5 * plus(2 - s)),
        ("cvar", lambda s: -plus(2 - s) / 0.2),
        ("rvar", lambda s: (plus(s - 2) - plus(s - 3) - 1) / 0.6),
        ("upper_tail", lambda s: -(5 - max(s, 3)) / 0.2),
        ("upper_mvar", lambda s: -(5 - max(s, 2)) - 0.5 * (5 - max(s, 3))),
        ("max_at_k", lambda s: -sum(4 * CDF[t] ** 3 for t in range(s, 5))),
    ],
)
def test_psi(curves, spectrum, psi):
    values = torch.tensor(SCORES, dtype=torch.float64)
    found = curves.weight_curve(AlgorithmConfig(spectrum=spectrum), curves.binomial_scores(5, 0.5), values)
    assert found.tolist() == pytest.approx([psi(s) for s in SCORES])


def test_phi(curves):
    levels = torch.tensor([0.0, 0.19, 0.2, 0.79, 0.8, 0.99], dtype=torch.float64)
    assert curves.spectrum_curve(AlgorithmConfig(), levels).tolist() == [1.5, 1.5, 1, 1, 0, 0]
    found = curves.spectrum_curve(AlgorithmConfig(spectrum="max_at_k", k=3), levels)
    assert found.tolist() == pytest.approx([3 * u**2 for u in levels.tolist()])


def test_simulated_weights_are_those_of_the_formula(curves):
    """Self bundles, mvar: w(p) = sum over t of P(Binomial(4, p) = t) (psi(t + 1) - psi(t)), with the quantiles of the
    mixture of Binomial(5, p) over the pass rates."""
    batch = curves.Batch(num_steps=NUM_STEPS)
    cdf = [
        sum(binomial(5, j, p) for p in batch.pass_rates for j in range(s + 1)) / len(batch.pass_rates) for s in SCORES
    ]
    q_alpha, q_beta = (min(s for s in SCORES if cdf[s] >= level) for level in (0.2, 0.8))
    psi = [-plus(q_beta - s) - 0.5 * plus(q_alpha - s) for s in SCORES]
    weights = [sum(binomial(4, t, p) * (psi[t + 1] - psi[t]) for t in range(5)) for p in batch.pass_rates]
    middle = (weights[4] + weights[5]) / 2
    found = curves.effective_weights(AlgorithmConfig(bundling="self"), batch)
    assert found.weights == pytest.approx([weight / middle for weight in weights], abs=0.08)
    assert max(found.standard_errors) < 0.04


def test_mean_weighs_all_alike(curves):
    found = curves.effective_weights(AlgorithmConfig(estimator="dr_grpo"), curves.Batch(num_steps=NUM_STEPS))
    assert found.weights == pytest.approx([1] * 10, abs=0.02)


def test_fact_1_random_bundles_and_global_quantiles_are_flat(curves):
    found = curves.effective_weights(AlgorithmConfig(), curves.Batch(num_steps=NUM_STEPS))
    assert found.weights == pytest.approx([1] * 10, abs=0.1)


@pytest.mark.parametrize(
    "config",
    [AlgorithmConfig(quantile_source="bundle"), AlgorithmConfig(estimator="riskpo_reference")],
    ids=["paper's weights", "released code"],
)
def test_fact_2_quantiles_of_the_group_weigh_easy_questions_more(curves, config):
    weights = curves.effective_weights(config, curves.Batch(num_steps=NUM_STEPS)).weights
    assert list(weights) == sorted(weights)
    assert weights[-1] > 1.15
    assert weights[0] < 0.85


@pytest.mark.parametrize("bundling", ["self", "sorted"])
def test_bundles_of_like_difficulty_weigh_hard_questions_more(curves, bundling):
    weights = curves.effective_weights(AlgorithmConfig(bundling=bundling), curves.Batch(num_steps=NUM_STEPS)).weights
    assert list(weights) == sorted(weights, reverse=True)
    assert weights[0] > 1.2
    assert weights[-1] < 0.6


@pytest.mark.parametrize("baseline", ["natural", "leave_one_out"])
def test_page_quotes_the_gradient_with_quantiles_of_one_question(baseline):
    """E[A | right] - E[A | wrong] over all outcomes of ten answers: nothing is shared between questions here."""
    (row,) = (line for line in PAGE.splitlines() if line.startswith(f"| complete, `{baseline}` |"))
    config = AlgorithmConfig(bundling="self", quantile_source="bundle", pairing="complete", baseline=baseline)
    advantages = compute_advantages((torch.arange(10) < torch.arange(11)[:, None]).double(), config).advantages
    # Right answers come first: with n of the nine others right, an answer is in row n + 1 or n.
    gaps = [float(advantages[n + 1, 0] - advantages[n, -1]) for n in range(10)]
    weights = [sum(binomial(9, n, p) * gaps[n] for n in range(10)) for p in ((i + 0.5) / 10 for i in range(10))]
    middle = (weights[4] + weights[5]) / 2
    assert [f"{weight / middle:.2f}" for weight in weights] == [cell.strip() for cell in row.split("|")[2:-1]]


def test_page_quotes_psi_as_it_is_drawn(drawing, tmp_path):
    rows = drawing.draw_psi(tmp_path).splitlines()[2:]
    assert len(rows) == 7
    assert all(row in PAGE.splitlines() for row in rows)
    assert (tmp_path / "psi.png").stat().st_size < 200_000


@pytest.mark.parametrize("source", ["global", "bundle"])
@pytest.mark.parametrize("bundling", ["random", "sorted", "self"])
def test_page_quotes_weights_as_they_are_drawn(curves, bundling, source):
    """Fewer steps than for the page, hence the tolerance: about four standard errors."""
    (row,) = (line for line in PAGE.splitlines() if line.startswith(f"| {bundling}, {source} |"))
    config = AlgorithmConfig(bundling=bundling, quantile_source=source)
    found = curves.effective_weights(config, curves.Batch(num_steps=NUM_STEPS))
    assert found.weights == pytest.approx([float(cell) for cell in row.split("|")[2:-1]], abs=0.15)


def test_table(curves):
    assert curves.table(["a", "1", "2"], {"b": [0.123, 1.0]}) == "| a | 1 | 2 |\n|---|---|---|\n| b | 0.12 | 1.00 |"
