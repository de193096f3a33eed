"""RiskPO against a plain loop over its definition, and what the tracker and the baselines owe it."""

import itertools

import pytest
import torch

from megatron_riskpo.algorithms import AlgorithmConfig, QuantileTracker, compute_advantages
from megatron_riskpo.algorithms.bundles import cut_own_responses, make_groups, pair_at_random
from megatron_riskpo.algorithms.distribution import Distribution
from megatron_riskpo.errors import UsageError


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def binary_rewards(num_prompts, group_size, seed):
    generator = seeded(seed)
    return (
        torch.rand(num_prompts, group_size, generator=generator) < torch.rand(num_prompts, 1, generator=generator)
    ).double()


def bundles_of(rewards, config, generator, pass_rates=None):
    """The bundles that an equally seeded generator gives compute_advantages."""
    if config.bundling == "self":
        return cut_own_responses(rewards, config.bundle_size, generator)
    return pair_at_random(rewards, make_groups(len(rewards), config, pass_rates, generator), generator)


def plain_advantages(rewards, membership, config):
    """The paper's steps, one bundle at a time."""
    rows = membership.tolist()
    scores = {}
    for prompt, row in enumerate(rows):
        for response, bundle in enumerate(row):
            scores[bundle] = scores.get(bundle, 0.0) + float(rewards[prompt, response])
    # A group's bundles have consecutive numbers: 8 with four questions a group, 2 with one's own responses.
    per_group = 2 if config.bundling == "self" else 8
    psi = {}
    for b, score in scores.items():
        pooled = (
            scores.values()
            if config.quantile_source == "global"
            else [s for other, s in scores.items() if other // per_group == b // per_group]
        )
        q_alpha, q_beta = (plain_quantile(pooled, level) for level in (config.alpha, config.beta))
        psi[b] = -max(q_beta - score, 0.0) - config.omega * max(q_alpha - score, 0.0)
    if config.baseline == "leave_one_out":
        return [[psi[b] - mean_of([psi[c] for c in row if c != b]) for b in row] for row in rows]
    centre = mean_of([psi[b] for row in rows for b in row]) if config.baseline == "mean" else 0.0
    return [[psi[b] - centre for b in row] for row in rows]


def plain_quantile(scores, level):
    ordered = sorted(scores)
    return next(x for x in ordered if sum(s <= x for s in ordered) >= level * len(ordered) - 1e-9)


def mean_of(values):
    return sum(values) / len(values)


@pytest.mark.parametrize("baseline", ["natural", "leave_one_out", "mean"])
@pytest.mark.parametrize("bundling", ["random", "sorted", "self"])
@pytest.mark.parametrize("source", ["global", "bundle"])
@pytest.mark.parametrize("seed", range(3))
def test_against_a_plain_loop(baseline, bundling, source, seed):
    rewards, pass_rates = binary_rewards(12, 8, seed), torch.rand(12, dtype=torch.float64, generator=seeded(seed + 9))
    config = AlgorithmConfig(
        bundle_size=4, bundling=bundling, baseline=baseline, quantile_source=source, alpha=0.25, beta=0.75
    )
    membership = bundles_of(rewards, config, seeded(seed), pass_rates).membership
    expected = torch.tensor(plain_advantages(rewards, membership, config), dtype=torch.float64)
    outputs = compute_advantages(rewards, config, pass_rates=pass_rates, generator=seeded(seed))
    torch.testing.assert_close(outputs.advantages, expected)


def test_leave_one_out_does_not_depend_on_the_bundle_it_is_taken_off():
    """Else it would bias the gradient: with fixed quantiles, a reward moves only the baselines of other bundles."""
    tracker = QuantileTracker((0.2, 0.8), (1.0, 2.0), 0.0, 2.0)
    config = AlgorithmConfig(
        bundle_size=2, bundling="self", baseline="leave_one_out", quantile_source="tracked", tracker_step=0.0
    )
    natural = AlgorithmConfig(bundle_size=2, bundling="self", quantile_source="tracked", tracker_step=0.0)
    baselines = []
    for first in (0.0, 1.0):
        rewards = torch.tensor([[first, 0.0, 1.0, 0.0, 1.0, 1.0]], dtype=torch.float64)
        with_baseline, without = (
            compute_advantages(rewards, c, tracker=tracker, generator=seeded(0)).advantages for c in (config, natural)
        )
        baselines.append(without - with_baseline)
    membership = bundles_of(rewards, config, seeded(0)).membership
    own = membership == membership[0, 0]
    torch.testing.assert_close(baselines[0][own], baselines[1][own])
    assert (baselines[0][~own] != baselines[1][~own]).all()


def test_a_tracker_moves_before_its_use_and_the_next_step_goes_on_from_it():
    config = AlgorithmConfig(quantile_source="tracked")
    first = compute_advantages(binary_rewards(20, 4, 0), config, generator=seeded(0))
    rewards = binary_rewards(20, 4, 1)
    scores = bundles_of(rewards, config, seeded(1)).scores
    expected = first.tracker.update(Distribution.of_sample(scores.flatten()), config.tracker_step, config.tracker_decay)
    second = compute_advantages(rewards, config, tracker=first.tracker, generator=seeded(1))
    assert second.tracker == expected != first.tracker
    assert (second.metrics["risk/q_alpha"], second.metrics["risk/q_beta"]) == expected.values
    alone = compute_advantages(rewards, config, generator=seeded(1))
    assert not torch.equal(alone.advantages, second.advantages)


def test_a_saved_and_restored_tracker_gives_the_same_next_step():
    config = AlgorithmConfig(quantile_source="tracked")
    first = compute_advantages(binary_rewards(20, 4, 0), config, generator=seeded(0))
    restored = QuantileTracker.from_state_dict(first.tracker.state_dict())
    nexts = [
        compute_advantages(binary_rewards(20, 4, 1), config, tracker=tracker, generator=seeded(1))
        for tracker in (first.tracker, restored)
    ]
    assert torch.equal(nexts[0].advantages, nexts[1].advantages)
    assert nexts[0].metrics == nexts[1].metrics
    assert nexts[0].tracker == nexts[1].tracker


def test_a_tracker_of_other_levels_is_refused():
    tracker = compute_advantages(binary_rewards(20, 4, 0), AlgorithmConfig(quantile_source="tracked")).tracker
    with pytest.raises(UsageError, match=r"0\.9"):
        compute_advantages(
            binary_rewards(20, 4, 0), AlgorithmConfig(quantile_source="tracked", beta=0.9), tracker=tracker
        )


def test_global_quantiles_leave_the_tracker_alone():
    assert compute_advantages(binary_rewards(20, 4, 0), AlgorithmConfig()).tracker is None


@pytest.mark.parametrize(
    ("estimator", "spectrum"), [("mean_bundle", "mean"), ("cvar_bundle", "cvar"), ("risk_seeking", "upper_tail")]
)
def test_the_named_bundle_estimators_are_riskpo_with_a_spectrum(estimator, spectrum):
    rewards = binary_rewards(12, 8, 0)
    named, spelt_out = (
        compute_advantages(rewards, config, generator=seeded(0)).advantages
        for config in (AlgorithmConfig(estimator=estimator), AlgorithmConfig(spectrum=spectrum))
    )
    assert torch.equal(named, spelt_out)
    assert named.any()


def test_mean_of_self_bundles_of_one_is_reinforce_with_leave_one_out():
    """psi(r) = r - max: with the leave-one-out baseline that is RLOO."""
    rewards = binary_rewards(6, 5, 1)
    config = AlgorithmConfig(estimator="mean_bundle", bundling="self", bundle_size=1, baseline="leave_one_out")
    expected = compute_advantages(rewards, AlgorithmConfig(estimator="rloo")).advantages
    torch.testing.assert_close(compute_advantages(rewards, config).advantages, expected)


def test_any_spectrum_by_the_rule_over_the_pooled_scores():
    rewards = binary_rewards(10, 4, 2)
    config = AlgorithmConfig(spectrum="max_at_k", k=3)
    bundles = bundles_of(rewards, config, seeded(0))
    scores = bundles.scores.flatten().tolist()
    ordered = sorted(scores)

    def psi(score):
        """- integral from the score to the maximum of 3 F(t)^2, gap by gap."""
        total = 0.0
        for low, high in itertools.pairwise(ordered):
            if low >= score:
                total -= 3 * (sum(s <= low for s in ordered) / len(ordered)) ** 2 * (high - low)
        return total

    expected = torch.tensor([[psi(scores[b]) for b in row] for row in bundles.membership.tolist()]).double()
    torch.testing.assert_close(compute_advantages(rewards, config, generator=seeded(0)).advantages, expected)


def test_bundle_std_divides_by_the_standard_deviation_of_the_groups_scores():
    rewards = binary_rewards(12, 8, 3)
    config = AlgorithmConfig(bundle_size=4, scale="bundle_std", scale_floor=0.2)
    bundles = bundles_of(rewards, config, seeded(0))
    plain = compute_advantages(rewards, AlgorithmConfig(bundle_size=4), generator=seeded(0)).advantages
    stds = bundles.scores.std(dim=1, unbiased=False)[bundles.membership[:, 0] // 8]
    least = 0.2 * float(plain.abs().max())
    expected = plain / torch.tensor([max(float(std), least) for std in stds])[:, None]
    torch.testing.assert_close(compute_advantages(rewards, config, generator=seeded(0)).advantages, expected)


@pytest.mark.parametrize("pairing", ["permutation", "complete"])
def test_dropped_questions_have_no_advantage_and_reused_ones_keep_their_own(pairing):
    rewards = binary_rewards(11, 6, 4)
    options = {"bundle_size": 4, "pairing": pairing, "baseline": "natural"}
    dropped = compute_advantages(rewards, AlgorithmConfig(remainder="drop", **options), generator=seeded(0)).advantages
    groups = make_groups(11, AlgorithmConfig(remainder="drop", **options), None, seeded(0))
    left_over = sorted(set(range(11)) - set(groups.members.flatten().tolist()))
    assert len(left_over) == 3
    assert not dropped[left_over].any()
    assert dropped.any(dim=1).sum() == 8
    reused = compute_advantages(rewards, AlgorithmConfig(remainder="reuse", **options), generator=seeded(0)).advantages
    assert reused.any(dim=1).sum() > 8


def test_one_bundle_and_groups_of_one_response():
    one_bundle = compute_advantages(torch.tensor([[1.0, 0.0], [0.0, 1.0]]), AlgorithmConfig(bundle_size=2))
    assert one_bundle.advantages.isfinite().all()
    singles = torch.tensor([[0.0], [1.0], [1.0], [0.0]], dtype=torch.float64)
    advantages = compute_advantages(singles, AlgorithmConfig(bundle_size=1, alpha=0.5, beta=1.0, omega=1.0)).advantages
    assert advantages.flatten().tolist() == [-1.0, 0.0, 0.0, -1.0]  # q_alpha = 0, q_beta = 1
