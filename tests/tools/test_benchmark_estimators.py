"""tools/benchmark/estimators.py: its exact gradients, and its figures against second ways to them."""

import json
import math
from collections.abc import Callable
from itertools import product
from pathlib import Path
from types import ModuleType

import pytest
import torch

from megatron_riskpo.algorithms import AlgorithmConfig
from megatron_riskpo.algorithms.spectra import spectrum_of
from tests.algorithms.spectral_risk import spectral_risk

PASS_RATES = (0.05, 0.2, 0.5, 0.8, 0.95)


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    import estimators

    return estimators


@pytest.fixture(scope="module")
def noise() -> ModuleType:
    import gradient_noise

    return gradient_noise


@pytest.fixture(scope="module")
def policies() -> ModuleType:
    import bernoulli_policy

    return bernoulli_policy


@pytest.mark.parametrize("spectrum", ["mvar", "mean", "cvar", "rvar", "upper_tail"])
@pytest.mark.parametrize("pass_rates", [PASS_RATES, (0.02, 0.04, 0.06, 0.08, 0.1), (0.3,)])
def test_exact_gradient_is_the_finite_difference_of_the_risk(
    policies: ModuleType, pass_rates: tuple[float, ...], spectrum: str
) -> None:
    config, step = AlgorithmConfig(spectrum=spectrum), 1e-5
    logits = torch.tensor(pass_rates, dtype=torch.float64).logit()

    def risk(moved: torch.Tensor) -> float:
        return spectral_risk(policies.BernoulliPolicy(tuple(moved.sigmoid().tolist())).scores(), spectrum_of(config))

    directions = torch.eye(len(pass_rates), dtype=torch.float64) * step
    expected = [(risk(logits + way) - risk(logits - way)) / (2 * step) for way in directions]
    gradient = policies.BernoulliPolicy(pass_rates).gradient(config)
    torch.testing.assert_close(gradient, torch.tensor(expected, dtype=torch.float64), rtol=1e-6, atol=1e-9)


def test_scores_are_the_distribution_of_the_sum(policies: ModuleType) -> None:
    policy = policies.BernoulliPolicy((0.5, 0.5, 0.5))
    assert policy.scores().masses[0].tolist() == pytest.approx([1 / 8, 3 / 8, 3 / 8, 1 / 8])
    assert policy.tracker(AlgorithmConfig()).values == (1.0, 2.0)


def test_estimates_are_unbiased_by_enumeration(noise: ModuleType, policies: ModuleType) -> None:
    """All rewards that 3 questions with 2 answers each can have, weighed by their probabilities; no permutation is
    drawn with complete pairing, so the expectation is exact."""
    policy = policies.BernoulliPolicy((0.1, 0.4, 0.7))
    rewards = torch.tensor(list(product((0.0, 1.0), repeat=6)), dtype=torch.float64).view(-1, 3, 2)
    likely = torch.where(rewards == 1, policy.rates[:, None], 1 - policy.rates[:, None]).flatten(1).prod(dim=1)
    rewards = rewards.view(-1, 2)
    for name, method in noise.methods(3).items():
        if "complete" not in name and name != "rloo":
            continue
        advantages = noise.advantages_of(policy, method, rewards, torch.Generator())
        mean = likely @ policy.gradient_estimates(rewards, advantages)
        torch.testing.assert_close(mean, policy.gradient(method.target), rtol=1e-10, atol=1e-12)


def test_replicates_do_not_mix(noise: ModuleType, policies: ModuleType) -> None:
    """The bundle of a replicate gets the same advantages alone and among others."""
    policy, generator = policies.BernoulliPolicy(PASS_RATES), torch.Generator().manual_seed(0)
    rewards = policy.answers(8, 4, generator)
    method = noise.methods(5)["riskpo complete natural"]
    together = noise.advantages_of(policy, method, rewards, generator)
    alone = [noise.advantages_of(policy, method, part, generator) for part in rewards.split(5)]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-12, atol=1e-12)


def test_mean_of_bundles_without_permutation_is_rloo(noise: ModuleType, policies: ModuleType) -> None:
    simulation = noise.Simulation.run(policies.BernoulliPolicy(PASS_RATES), group_size=4, replicates=20)
    torch.testing.assert_close(
        simulation.advantages["mean_bundle complete leave_one_out"], simulation.advantages["rloo"]
    )


def test_many_answers_against_autograd(policies: ModuleType) -> None:
    """The estimate is the gradient of (1/G) sum of A log pi of the answers given."""
    policy, num_wrong, seed = policies.BernoulliPolicy((0.2, 0.7)), 3, 5
    rewards = policy.answers(3, 4, torch.Generator().manual_seed(1))
    advantages = torch.randn(rewards.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    right = policy.rates.repeat(3)[:, None]
    logits = torch.cat([right, ((1 - right) / num_wrong).expand(-1, num_wrong)], dim=1).log().requires_grad_()
    wrong = torch.randint(1, num_wrong + 1, rewards.shape, generator=torch.Generator().manual_seed(seed))
    chosen = torch.where(rewards == 1, 0, wrong)
    (advantages * logits.log_softmax(dim=1).gather(1, chosen)).mean(dim=1).sum().backward()
    found = policy.estimates_of_many_answers(rewards, advantages, num_wrong, torch.Generator().manual_seed(seed))
    torch.testing.assert_close(found, logits.grad.view(3, -1))


def test_one_wrong_answer_is_the_bernoulli_policy(policies: ModuleType) -> None:
    policy, generator = policies.BernoulliPolicy((0.2, 0.7)), torch.Generator().manual_seed(0)
    rewards = policy.answers(6, 4, generator)
    advantages = torch.randn(rewards.shape, dtype=torch.float64, generator=generator)
    found = policy.estimates_of_many_answers(rewards, advantages, 1, generator).view(6, 2, 2)
    expected = policy.gradient_estimates(rewards, advantages)
    torch.testing.assert_close(found, torch.stack([expected, -expected], dim=2))


def test_noise_by_hand(noise: ModuleType) -> None:
    estimates = torch.tensor([[1.0, 0.0], [3.0, 4.0], [2.0, 2.0]], dtype=torch.float64)
    found = noise.Noise.of(estimates)
    assert found.mean == [2.0, 2.0]
    assert found.signal_to_noise == pytest.approx([2.0, 1.0])
    assert found.overall == pytest.approx(math.sqrt(8 / 5))
    assert found.deviation(torch.tensor([2.0, 0.0])) == pytest.approx(2 / (2 / math.sqrt(3)))
    assert noise.signal_to_noise_ratio(estimates, estimates - 1) == pytest.approx(2.0)
    assert noise.noise_ratio(estimates, 3 * estimates) == pytest.approx(3.0)


def test_jackknife_of_a_mean_is_its_standard_error(noise: ModuleType) -> None:
    values = torch.randn(40, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found, error = noise.jackknife(lambda a, b: float(a.mean() - b.mean()), values, 0 * values, num_blocks=40)
    assert found == pytest.approx(float(values.mean()))
    assert error == pytest.approx(float(values.std()) / math.sqrt(40))


def test_a_small_run_has_all_methods(
    benchmark: ModuleType, tmp_path: Path, run_script: Callable[..., None], capsys: pytest.CaptureFixture
) -> None:
    output = tmp_path / "noise.json"
    arguments = ["--replicates", "200", "--group-size", "5", "--questions", "400"]
    run_script(benchmark, *arguments, "--json", str(output))
    printed, report = capsys.readouterr().out, json.loads(output.read_text())
    for name in ("mixed", "very hard"):
        assert set(report[name]["noise"]) == set(benchmark.methods(5))
        # Of the six that have a target, none is off it by more than chance allows.
        policy = benchmark.POLICIES[name]
        for method, noise in report[name]["noise"].items():
            if (target := benchmark.methods(5)[method].target) is not None:
                assert benchmark.Noise(**noise).deviation(policy.gradient(target)) < 5
    assert all(f"| {name} |" in printed for name in (*benchmark.methods(5), *benchmark.weight_cases()))
    assert set(report["effective_weights"]) == set(benchmark.weight_cases())
    assert all(
        weights["0.4-0.6"] == 1 or math.isnan(weights["0.4-0.6"]) for weights in report["effective_weights"].values()
    )
