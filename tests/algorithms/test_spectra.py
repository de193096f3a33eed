"""Spectra against finite differences of the risk measure on policies small enough to enumerate.

The policy: 5 questions, 4 possible answers each, softmax over free logits; one bundle holds an answer to each question,
so that the distribution of its score is known exactly (1024 outcomes, ties everywhere unless rewards are continuous).
"""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_riskpo.algorithms import AlgorithmConfig, compute_advantages
from megatron_riskpo.algorithms.distribution import Distribution
from megatron_riskpo.algorithms.spectra import (
    SPECTRA,
    Spectrum,
    cvar,
    mvar,
    quantile_integral,
    rule_weights,
    rvar,
    spectrum_of,
    step_weights,
)
from megatron_riskpo.errors import UsageError
from tests.algorithms.spectral_risk import spectral_risk

QUESTIONS, ANSWERS = 5, 4
OUTCOMES = torch.tensor(list(itertools.product(range(ANSWERS), repeat=QUESTIONS)))
ALPHA, BETA, OMEGA, K = 0.23, 0.81, 0.5, 4

# Phi(u) = integral_0^u phi, worked out by hand.
CUMULATIVE = {
    "mean": lambda u: u,
    "cvar": lambda u: min(u, ALPHA) / ALPHA,
    "rvar": lambda u: (min(u, BETA) - min(u, ALPHA)) / (BETA - ALPHA),
    "mvar": lambda u: min(u, BETA) + OMEGA * min(u, ALPHA),
    "upper_tail": lambda u: max(u - BETA, 0) / (1 - BETA),
    "upper_mvar": lambda u: max(u - ALPHA, 0) + OMEGA * max(u - BETA, 0),
    "max_at_k": lambda u: u**K,
    "own": lambda u: u - OMEGA * (u**2 - u),
}
OWN_SPECTRUM = "def pessimist(u, config):\n    return 1 + config.omega * (1 - 2 * u)\n"


@pytest.fixture
def config_of(tmp_path):
    (tmp_path / "own.py").write_text(OWN_SPECTRUM)

    def config(name):
        name = f"{tmp_path / 'own.py'}:pessimist" if name == "own" else name
        return AlgorithmConfig(spectrum=name, alpha=ALPHA, beta=BETA, omega=OMEGA, k=K)

    return config


def outcome_logprobs(logits):
    logprobs = logits.log_softmax(dim=1)
    return sum(logprobs[question, OUTCOMES[:, question]] for question in range(QUESTIONS))


def exact_risk(logits, scores, cumulative):
    """Walk up the quantile function, atom by atom."""
    total, level = 0.0, 0.0
    probabilities = outcome_logprobs(logits).exp().tolist()
    for score, probability in sorted(zip(scores.tolist(), probabilities, strict=True)):
        top = min(level + probability, 1.0)
        total += score * (cumulative(top) - cumulative(level))
        level = top
    return total


def finite_differences(function, point, step=1e-5):
    gradient = torch.zeros_like(point)
    for index in itertools.product(*map(range, point.shape)):
        moved = point.clone()
        moved[index] += step
        up = function(moved)
        moved[index] -= 2 * step
        gradient[index] = (up - function(moved)) / (2 * step)
    return gradient


def toy_policy(rewards_are):
    generator = torch.Generator().manual_seed(7)
    rewards = torch.rand(QUESTIONS, ANSWERS, dtype=torch.float64, generator=generator)
    kinds = {"binary": rewards.round(), "plus or minus 1": 2 * rewards.round() - 1, "continuous": rewards}
    rewards = kinds[rewards_are]
    scores = sum(rewards[question, OUTCOMES[:, question]] for question in range(QUESTIONS))
    if rewards_are != "continuous":
        scores = scores.round()  # one float for each atom
    return torch.randn(QUESTIONS, ANSWERS, dtype=torch.float64, generator=generator), scores


def distribution_of(scores, probabilities):
    atoms, order = scores.sort()
    return Distribution.of_masses(atoms, probabilities[order][None])


@pytest.mark.parametrize("rewards_are", ["binary", "plus or minus 1", "continuous"])
@pytest.mark.parametrize("name", CUMULATIVE)
def test_weights_give_the_gradient_of_the_risk_measure(name, rewards_are, config_of):
    logits, scores = toy_policy(rewards_are)
    logits.requires_grad_()
    logprobs = outcome_logprobs(logits)
    probabilities = logprobs.detach().exp()
    pooled, spectrum = distribution_of(scores, probabilities), spectrum_of(config_of(name))
    expected = finite_differences(lambda x: exact_risk(x, scores, CUMULATIVE[name]), logits.detach())
    forms = [rule_weights(scores[None], pooled, spectrum.density)]
    if spectrum.steps is not None:
        quantiles = [pooled.quantiles(level) for level, _ in spectrum.steps]
        forms.append(step_weights(scores[None], spectrum.steps, quantiles))
    for weights in forms:
        (gradient,) = torch.autograd.grad((probabilities * weights[0] * logprobs).sum(), logits, retain_graph=True)
        assert (gradient - expected).norm() <= 1e-6 * expected.norm()
    assert spectral_risk(pooled, spectrum) == pytest.approx(
        exact_risk(logits.detach(), scores, CUMULATIVE[name]), rel=1e-3 if spectrum.steps is None else 1e-9, abs=1e-4
    )


def test_the_test_knows_every_spectrum():
    assert set(CUMULATIVE) == set(SPECTRA) | {"own"}


samples = st.lists(st.integers(-6, 6).map(lambda n: n / 2), min_size=1, max_size=12)


@given(samples, st.lists(st.floats(-5, 5), min_size=1, max_size=5), st.sampled_from(sorted(SPECTRA)))
def test_the_rule_and_the_closed_form_agree_at_any_value(sample, values, name):
    spectrum = spectrum_of(AlgorithmConfig(spectrum=name, alpha=ALPHA, beta=BETA))
    if spectrum.steps is None:
        return
    scores = Distribution.of_sample(torch.tensor(sample, dtype=torch.float64))
    points = torch.tensor([[*values, *sample]], dtype=torch.float64)
    closed = step_weights(points, spectrum.steps, [scores.quantiles(level) for level, _ in spectrum.steps])
    torch.testing.assert_close(rule_weights(points, scores, spectrum.density), closed, rtol=0, atol=1e-9)


@given(samples, st.sampled_from(sorted(SPECTRA)))
def test_weights_rise_to_0_at_the_largest_score(sample, name):
    scores = Distribution.of_sample(torch.tensor(sample, dtype=torch.float64))
    density = spectrum_of(AlgorithmConfig(spectrum=name)).density
    weights = rule_weights(scores.atoms, scores, density)[0]
    assert (weights.diff() >= -1e-12).all()
    assert float(weights[-1]) == 0
    assert float(rule_weights(scores.atoms[:, -1:] + 3, scores, density)) == 0


def test_rows_are_weighed_each_by_its_own_distribution():
    sample = torch.randn(3, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    spectrum = spectrum_of(AlgorithmConfig(spectrum="max_at_k"))
    together = rule_weights(sample, Distribution.of_sample(sample), spectrum.density)
    alone = [rule_weights(row[None], Distribution.of_sample(row), spectrum.density)[0] for row in sample]
    torch.testing.assert_close(together, torch.stack(alone))


def test_max_at_k_is_the_expected_largest_of_k_draws():
    sample = torch.tensor([0.0, 1.0, 1.0, 4.0, 6.0], dtype=torch.float64)
    expected = torch.tensor([max(draw) for draw in itertools.product(sample.tolist(), repeat=3)]).mean()
    spectrum = spectrum_of(AlgorithmConfig(spectrum="max_at_k", k=3))
    assert spectral_risk(Distribution.of_sample(sample), spectrum) == pytest.approx(float(expected), abs=1e-3)


def test_risk_measures_against_a_fine_grid_of_quantiles():
    sample = torch.tensor([3.0, 0.0, 1.0, 1.0, 5.0, 1.0, 2.0], dtype=torch.float64)
    levels = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
    quantiles = sample.sort().values[(levels * 7).long()]
    low = quantiles[levels <= ALPHA].sum() / 100_000
    middle = quantiles[(levels > ALPHA) & (levels <= BETA)].sum() / 100_000
    scores = Distribution.of_sample(sample)
    assert mvar(scores, ALPHA, BETA, OMEGA) == pytest.approx(float(1.5 * low + middle), abs=1e-4)
    assert rvar(scores, ALPHA, BETA) == pytest.approx(float(middle) / (BETA - ALPHA), abs=1e-4)
    assert cvar(scores, ALPHA) == pytest.approx(float(low) / ALPHA, abs=1e-4)
    assert quantile_integral(scores, 0.0, 1.0) == pytest.approx(float(sample.mean()))


def test_mvar_has_the_slopes_and_the_two_part_form_of_the_paper():
    steps = spectrum_of(AlgorithmConfig(omega=0.5)).steps
    scores = torch.tensor([[0.0, 1.0, 2.0, 3.0, 4.0, 9.0]], dtype=torch.float64)
    a, b = 2.0, 4.0
    weights = step_weights(scores, steps, [b, a])
    assert weights.diff().tolist() == [[1.5, 1.5, 1.0, 1.0, 0.0]]
    g = (scores - a).clamp(min=0) - (scores - b).clamp(min=0) + a - b
    torch.testing.assert_close(weights, -1.5 * (a - scores).clamp(min=0) + g)


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("def own(u, config):\n    return u - 0.5\n", ">= 0"),
        ("def own(u, config):\n    return 1.0\n", "shape of its levels"),
        ("def own(u, config):\n    return u / 0 * 0\n", "finite"),
        ("def own(u, config):\n    return 1 / (u - 0.25).abs()\n", "not at u = 0.25"),
        ("def own(u, config):\n    raise KeyError(config.alpha)\n", "KeyError"),
        ("def other(u, config):\n    return u\n", "no function 'own'"),
        ("import nothing_of_this_name\n", "ModuleNotFoundError"),
    ],
)
def test_functions_that_are_no_spectrum_are_refused_in_one_line(source, said, tmp_path):
    (tmp_path / "mine.py").write_text(source)
    with pytest.raises(UsageError, match=said) as caught:
        spectrum_of(AlgorithmConfig(spectrum=f"{tmp_path / 'mine.py'}:own"))
    assert "\n" not in str(caught.value)


def test_phi_is_asked_for_levels_below_1_only(tmp_path):
    """Without bound there: E.g. 1 / sqrt(1 - u), whose weights are finite on every sample."""
    source = "def own(u, config):\n    assert (u < 1).all()\n    return (1 - u) ** -0.5\n"
    (tmp_path / "mine.py").write_text(source)
    config = AlgorithmConfig(spectrum=f"{tmp_path / 'mine.py'}:own", bundle_size=1)
    rewards = torch.tensor([[0.0, 1.0, 1.0, 3.0]])
    advantages = compute_advantages(rewards, config, generator=torch.Generator().manual_seed(0)).advantages
    assert advantages.tolist() == [pytest.approx([-2 * 2 - (4 / 3) ** 0.5, -4, -4, 0])]


def test_a_spectrum_that_breaks_at_a_level_of_the_sample_is_refused(tmp_path):
    """The trial levels are thousandths; a third is none of them."""
    (tmp_path / "mine.py").write_text(
        "def own(u, config):\n    return u.where((u - 1 / 3).abs() > 1e-9, float('nan'))\n"
    )
    config = AlgorithmConfig(spectrum=f"{tmp_path / 'mine.py'}:own", bundle_size=1)
    with pytest.raises(UsageError, match=r"not at u = 0\.333333") as caught:
        compute_advantages(torch.tensor([[0.0, 1.0, 3.0]]), config)
    assert "\n" not in str(caught.value)


def test_missing_files_and_unknown_names_are_refused():
    for name, said in (
        ("no_such_file.py:own", "cannot be loaded"),
        ("no_such_module:own", "cannot be loaded"),
        ("cvra", "did you mean cvar"),
    ):
        with pytest.raises(UsageError, match=said):
            spectrum_of(AlgorithmConfig(spectrum=name))
    with pytest.raises(UsageError, match="no tail"):
        spectrum_of(AlgorithmConfig(spectrum="upper_tail", beta=1.0))


def test_steps_are_the_density():
    spectrum = Spectrum.of_steps((0.5, 2.0), (1.0, 1.0))
    assert spectrum.density(torch.tensor([0.0, 0.49, 0.5, 0.99, 1.0])).tolist() == [3.0, 3.0, 1.0, 1.0, 0.0]
