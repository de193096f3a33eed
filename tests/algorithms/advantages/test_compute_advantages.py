"""Properties that advantages have for any rewards, and what is refused."""

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_riskpo.algorithms import AlgorithmConfig, QuantileTracker, compute_advantages, validate_algorithm
from megatron_riskpo.algorithms.advantages import ESTIMATORS
from megatron_riskpo.algorithms.spectra import SPECTRA
from megatron_riskpo.errors import UsageError

SMALL = {"bundle_size": 2}
BUNDLED = [
    AlgorithmConfig(bundling=bundling, pairing=pairing, baseline=baseline, scale=scale, quantile_source=source, **SMALL)
    for bundling in ("random", "sorted", "self")
    for pairing in ("permutation", "complete")
    for baseline in ("natural", "leave_one_out", "mean")
    for scale in ("none", "batch_std", "bundle_std")
    for source in ("global", "tracked", "bundle")
]
OTHERS = [
    AlgorithmConfig(estimator=name, k=2) if "k" in estimator.options else AlgorithmConfig(estimator=name)
    for name, estimator in ESTIMATORS.items()
    if "bundling" not in estimator.options
]
CONFIGS = BUNDLED + OTHERS


def advantages_of(rewards, config, seed=0, tracker=None):
    generator = torch.Generator().manual_seed(seed)
    pass_rates = torch.rand(len(rewards), generator=generator, dtype=torch.float64)
    return compute_advantages(
        rewards, config, generator=generator, tracker=tracker, pass_rates=pass_rates,
        lengths=torch.arange(rewards.numel()).view_as(rewards) % 7 + 1,
    ).advantages  # fmt: skip


@st.composite
def reward_matrices(draw):
    num_prompts, group_size = draw(st.integers(2, 7)), draw(st.sampled_from([4, 6]))
    values = draw(st.sampled_from([st.sampled_from([0.0, 1.0]), st.integers(-8, 8).map(lambda n: n / 8)]))
    row = st.lists(values, min_size=group_size, max_size=group_size)
    return torch.tensor(draw(st.lists(row, min_size=num_prompts, max_size=num_prompts)), dtype=torch.float64)


@given(
    reward_matrices(), st.sampled_from(["random", "sorted", "self"]), st.sampled_from(["permutation", "complete"]),
    st.sampled_from(["balance", "drop", "reuse"]), st.sampled_from(sorted(SPECTRA)), st.integers(0, 99),
)  # fmt: skip
def test_natural_advantages_are_never_positive_and_touch_zero(rewards, bundling, pairing, remainder, spectrum, seed):
    """B does not divide the number of questions in half of the cases. Averages over bundles need not touch 0."""
    config = AlgorithmConfig(bundling=bundling, pairing=pairing, remainder=remainder, spectrum=spectrum, **SMALL)
    advantages = advantages_of(rewards, config, seed)
    assert float(advantages.max()) <= 1e-12
    if pairing == "permutation" and remainder != "reuse":
        assert float(advantages.max()) >= -1e-12
    assert (advantages[rewards == rewards.max()].mean() >= advantages.mean() - 1e-12) or bundling != "self"


@given(reward_matrices(), st.floats(0.01, 0.79), st.sampled_from(BUNDLED))
def test_without_omega_alpha_does_not_matter(rewards, alpha, config):
    config = dataclasses.replace(config, omega=0.0)
    moved = dataclasses.replace(config, alpha=alpha)
    torch.testing.assert_close(advantages_of(rewards, config), advantages_of(rewards, moved), rtol=0, atol=1e-12)


@given(reward_matrices(), st.floats(0.1, 10), st.floats(-5, 5), st.sampled_from(BUNDLED))
def test_an_affine_change_of_the_rewards_scales_the_advantages(rewards, factor, shift, config):
    expected = advantages_of(rewards, config) * (factor if config.scale == "none" else 1)
    torch.testing.assert_close(advantages_of(factor * rewards + shift, config), expected, rtol=1e-6, atol=1e-8)


@given(st.sampled_from(CONFIGS), st.floats(-3, 3), st.booleans())
def test_equal_rewards_give_finite_and_bounded_advantages(config, value, tracked_elsewhere):
    rewards = torch.full((5, 4), value, dtype=torch.float64)
    tracker = QuantileTracker((0.2, 0.8), (1.0, 2.0), 0.0, 2.0) if tracked_elsewhere else None
    advantages = advantages_of(rewards, config, tracker=tracker)
    assert advantages.isfinite().all()
    assert float(advantages.abs().max()) <= 30


@pytest.mark.parametrize("config", CONFIGS)
def test_a_pure_function_of_its_arguments(config):
    rewards = torch.rand(6, 4, generator=torch.Generator().manual_seed(1))
    before = rewards.clone()
    assert torch.equal(advantages_of(rewards, config, 3), advantages_of(rewards, config, 3))
    assert torch.equal(rewards, before)


@pytest.mark.parametrize("bundling", ["random", "self"])
def test_batch_std_makes_the_standard_deviation_one(bundling):
    rewards = torch.rand(40, 4, generator=torch.Generator().manual_seed(1)).round()
    config = AlgorithmConfig(bundling=bundling, baseline="mean", scale="batch_std", **SMALL)
    advantages = advantages_of(rewards, config)
    assert float(advantages.std(unbiased=False)) == pytest.approx(1)
    assert float(advantages.mean()) == pytest.approx(0, abs=1e-12)


def test_rounding_errors_are_not_scaled_up_to_advantages():
    rewards = torch.tensor([[0.1, 0.2, 0.3], [0.3, 0.2, 0.1], [0.2, 0.3, 0.1]], dtype=torch.float64)
    config = AlgorithmConfig(bundling="self", bundle_size=3, scale="batch_std", alpha=0.5, beta=1.0)
    assert 0 < float(advantages_of(rewards, config).abs().max()) < 1e-12  # .1 + .2 + .3 is not .3 + .2 + .1


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"estimator": "gprp"}, "did you mean grpo"),
        ({"estimator": "?"}, "choose from cvar_bundle"),
        ({"spectrum": "mvra"}, "did you mean mvar"),
        ({"spectrum": "max_at_k", "quantile_source": "tracked"}, "use global"),
        ({"k": 0}, "1 or more"),
        ({"scale_floor": 0.0}, "or more"),
        ({"risk_temperature": 0.0, "estimator": "rs_grpo"}, "other than 0"),
        ({"bundling": "slef"}, "did you mean self"),
        ({"alpha": 0.8, "beta": 0.2}, "0 < alpha < beta <= 1"),
        ({"alpha": 0.0}, "0 < alpha < beta <= 1"),
        ({"beta": float("nan")}, "0 < alpha < beta <= 1"),
        ({"omega": -0.1}, "0 or more"),
        ({"omega": float("inf")}, "0 or more"),
        ({"bundle_size": 0}, "1 or more"),
        ({"bundle_size": 7}, "a step has 6"),
        ({"bundle_size": 2.0}, "bundle_size = 2.0 must be a whole number"),
        ({"bundle_size": True}, "bundle_size = True must be a whole number"),
        ({"estimator": "passk", "k": 1.5}, "k = 1.5 must be a whole number"),
        ({"omega": "1"}, "omega = '1' must be a number"),
        ({"tracker_decay": 1.5}, "between 0 and 1"),
        ({"bundling": "self", "bundle_size": 3}, "divisor of rollout.group_size"),
        ({"bundling": "self", "bundle_size": 4, "baseline": "leave_one_out"}, "group_size above 4"),
        ({"bundling": "self", "bundle_size": 5, "pairing": "complete"}, "lower algorithm.bundle_size"),
        ({"estimator": "grpo", "scale": "batch_std"}, "no effect on grpo"),
        ({"estimator": "grpo", "bundling": "self", "k": 3}, "k = 3, algorithm.bundling = self: no effect"),
    ],
)
def test_impossible_options_are_refused_in_one_line(options, said):
    with pytest.raises(UsageError, match=said) as caught:
        validate_algorithm(AlgorithmConfig(**options), num_prompts=6, group_size=4)
    assert "\n" not in str(caught.value)


def test_grpo_and_leave_one_out_need_two_responses():
    for config in (AlgorithmConfig(estimator="grpo"), AlgorithmConfig(baseline="leave_one_out")):
        with pytest.raises(UsageError, match="group_size"):
            validate_algorithm(config, num_prompts=6, group_size=1)


@pytest.mark.parametrize(
    ("rewards", "said"),
    [
        (torch.zeros(8), "matrix"),
        (torch.zeros(0, 4), "not empty"),
        (torch.tensor([[0.0, 1.0], [float("nan"), 1.0]]), "response 0 to question 1"),
        (torch.tensor([[0.0, float("inf")]]), "response 1 to question 0"),
        (torch.tensor([[0.0, -2e100]], dtype=torch.float64), "beyond 1e\\+100 in size: scale them down"),
        ([[0.0, 1.0]], "a torch tensor of real numbers, got a list"),
        (torch.tensor([[0.0, 1.0j]]), "got complex"),
    ],
)
def test_broken_rewards_are_refused(rewards, said):
    with pytest.raises(UsageError, match=said) as caught:
        compute_advantages(rewards, AlgorithmConfig(bundle_size=1))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("config", CONFIGS)
def test_the_largest_and_the_smallest_rewards_give_finite_advantages(config):
    rewards = torch.tensor([[0.0, 1.0, 1.0, 0.5]] * 4 + [[1.0] * 4], dtype=torch.float64)
    for size in (1e100, -1e100, 1e-200):
        assert advantages_of(size * rewards, config).isfinite().all()


def test_lengths_of_another_shape_or_sign_are_refused():
    for lengths, said in (
        (torch.zeros(4, 5, dtype=torch.long), "one length a response"),
        (torch.full((5, 4), -1), "got -1: give 0 or more"),
        ([[1] * 4] * 5, "got a list"),
    ):
        with pytest.raises(UsageError, match=said):
            compute_advantages(torch.zeros(5, 4), AlgorithmConfig(), lengths=lengths)


def test_sorted_bundles_need_pass_rates_of_the_right_shape():
    config = AlgorithmConfig(bundling="sorted")
    with pytest.raises(UsageError, match="give `pass_rates`"):
        compute_advantages(torch.zeros(5, 4), config)
    with pytest.raises(UsageError, match="got a list"):
        compute_advantages(torch.zeros(5, 4), config, pass_rates=[0.5] * 5)
    for broken in (torch.zeros(4), torch.tensor([0.0, 1.0, float("inf"), 0.0, 0.0])):
        with pytest.raises(UsageError, match="one finite number or NaN"):
            compute_advantages(torch.zeros(5, 4), config, pass_rates=broken)


def test_lengths_are_asked_for_where_they_are_needed():
    with pytest.raises(UsageError, match="give `lengths`"):
        compute_advantages(torch.zeros(5, 4), AlgorithmConfig(estimator="opo"))
