"""RiskPO against a plain loop over its definition, and what the tracker and the baselines owe it."""

import pytest
import torch

from megatron_riskpo.algorithms import AlgorithmConfig, QuantileTracker, compute_advantages
from megatron_riskpo.algorithms.bundles import make_bundles
from megatron_riskpo.errors import UsageError


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def binary_rewards(num_prompts, group_size, seed):
    generator = seeded(seed)
    return (
        torch.rand(num_prompts, group_size, generator=generator) < torch.rand(num_prompts, 1, generator=generator)
    ).double()


def plain_advantages(rewards, membership, config):
    """The paper's steps, one bundle at a time."""
    rows = membership.tolist()
    scores = {}
    for prompt, row in enumerate(rows):
        for response, bundle in enumerate(row):
            scores[bundle] = scores.get(bundle, 0.0) + float(rewards[prompt, response])
    ordered = sorted(scores.values())
    q_alpha, q_beta = (
        next(x for x in ordered if sum(s <= x for s in ordered) >= level * len(ordered) - 1e-9)
        for level in (config.alpha, config.beta)
    )
    psi = {b: -max(q_beta - s, 0.0) - config.omega * max(q_alpha - s, 0.0) for b, s in scores.items()}
    if config.baseline == "leave_one_out":
        return [[psi[b] - mean_of([psi[c] for c in row if c != b]) for b in row] for row in rows]
    centre = mean_of([psi[b] for row in rows for b in row]) if config.baseline == "mean" else 0.0
    return [[psi[b] - centre for b in row] for row in rows]


def mean_of(values):
    return sum(values) / len(values)


@pytest.mark.parametrize("baseline", ["natural", "leave_one_out", "mean"])
@pytest.mark.parametrize("bundling", ["random", "self"])
@pytest.mark.parametrize("seed", range(3))
def test_against_a_plain_loop(baseline, bundling, seed):
    rewards = binary_rewards(12, 8, seed)
    config = AlgorithmConfig(bundle_size=4, bundling=bundling, baseline=baseline, alpha=0.25, beta=0.75)
    membership = make_bundles(rewards, config, seeded(seed)).membership
    expected = torch.tensor(plain_advantages(rewards, membership, config), dtype=torch.float64)
    torch.testing.assert_close(compute_advantages(rewards, config, generator=seeded(seed)).advantages, expected)


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
    membership = make_bundles(rewards, config, seeded(0)).membership
    own = membership == membership[0, 0]
    torch.testing.assert_close(baselines[0][own], baselines[1][own])
    assert (baselines[0][~own] != baselines[1][~own]).all()


def test_a_tracker_moves_before_its_use_and_the_next_step_goes_on_from_it():
    config = AlgorithmConfig(quantile_source="tracked")
    first = compute_advantages(binary_rewards(20, 4, 0), config, generator=seeded(0))
    rewards = binary_rewards(20, 4, 1)
    scores = make_bundles(rewards, config, seeded(1)).scores
    expected = first.tracker.update(scores, config.tracker_step, config.tracker_decay)
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
