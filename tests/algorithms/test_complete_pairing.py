"""Complete pairing against all combinations, one by one, and against the gradient that it estimates."""

import functools
import itertools
import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_riskpo.algorithms import AlgorithmConfig, QuantileTracker, compute_advantages
from megatron_riskpo.algorithms.complete_pairing import _block, _listed_block, complete_blocks
from megatron_riskpo.algorithms.convolution import convolve, means_over_the_others
from megatron_riskpo.algorithms.distribution import Distribution
from megatron_riskpo.algorithms.lattice import Lattice
from megatron_riskpo.algorithms.score_blocks import pool
from megatron_riskpo.algorithms.spectra import rule_weights, spectrum_of
from megatron_riskpo.algorithms.subsets import LatticeSubsets, ListedSubsets, _unique_rows, response_subsets


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def matrix(draw, values, num_prompts, group_size):
    row = st.lists(values, min_size=group_size, max_size=group_size)
    return torch.tensor(draw(st.lists(row, min_size=num_prompts, max_size=num_prompts)), dtype=torch.float64)


def listed(rewards, size):
    return ListedSubsets(rewards, torch.tensor(list(itertools.combinations(range(rewards.size(1)), size))))


VALUES = {
    "binary": st.sampled_from([0.0, 1.0]),
    "plus or minus 1": st.sampled_from([-1.0, 1.0]),
    "format and answer": st.sampled_from([0.0, 0.1, 1.0, 1.1]),
    "shifted": st.sampled_from([3.7, 3.7 + 1 / 3, 3.7 + 2 / 3]),
}


@st.composite
def lattice_rewards(draw, most_prompts=4, most_responses=4):
    values = VALUES[draw(st.sampled_from(sorted(VALUES)))]
    return matrix(draw, values, draw(st.integers(1, most_prompts)), draw(st.integers(1, most_responses)))


def bent(scores):
    """A function of the score that is no risk weight, but concave with a kink: any function must come out right."""
    return -(2.05 - scores).clamp(min=0) - 0.3 * scores.square()


@given(lattice_rewards(), st.integers(0, 3))
def test_one_group_against_all_combinations(rewards, more):
    """G^B combinations; `more`: the group is smaller than bundle_size, so that scores are stretched."""
    size, group_size = rewards.shape
    group, owned = torch.arange(size)[None], torch.ones(1, size, dtype=torch.bool)
    sums, counts = torch.zeros_like(rewards), torch.zeros_like(rewards)
    scores = []
    for choice in itertools.product(range(group_size), repeat=size):
        score = (size + more) / size * sum(rewards[q, r] for q, r in enumerate(choice))
        scores.append(float(score))
        for question, response in enumerate(choice):
            sums[question, response] += bent(score)
            counts[question, response] += 1
    for block in (
        _block(Lattice.of(rewards), group, owned, size + more),
        _listed_block(rewards, group, owned, size + more),
    ):
        torch.testing.assert_close(block.spread(bent(block.values())), sums / counts, rtol=1e-12, atol=1e-12)
        for level in (0.2, 0.5, 0.8, 1.0):
            rank = max(1, math.ceil(level * len(scores) * (1 - 1e-12)))
            assert block.pooled.quantile(level) == pytest.approx(sorted(scores)[rank - 1], abs=1e-12)
            assert float(block.rows().quantiles(level)) == pytest.approx(block.pooled.quantile(level), abs=1e-12)


@given(lattice_rewards(most_responses=6), st.data())
def test_self_bundles_against_all_subsets(rewards, data):
    num_prompts, group_size = rewards.shape
    size = data.draw(st.integers(1, group_size))
    expected, scores = torch.zeros_like(rewards), []
    for question in range(num_prompts):
        for subset in itertools.combinations(range(group_size), size):
            score = sum(rewards[question, response] for response in subset)
            scores.append(float(score))
            expected[question, list(subset)] += bent(score)
    expected /= math.comb(group_size - 1, size - 1)
    for subsets in (listed(rewards, size), LatticeSubsets(Lattice.of(rewards), size)):
        weights = subsets.response_weights(bent(subsets.values()))
        torch.testing.assert_close(weights, expected, rtol=1e-12, atol=1e-12)
        by_row = subsets.response_weights(bent(subsets.values()).expand(num_prompts, -1))
        torch.testing.assert_close(by_row, expected, rtol=1e-12, atol=1e-12)
        for level in (0.2, 0.8):
            rank = max(1, math.ceil(level * len(scores) * (1 - 1e-12)))
            assert subsets.pooled().quantile(level) == pytest.approx(sorted(scores)[rank - 1], abs=1e-12)
        assert subsets.rows().num_rows == num_prompts


def test_many_questions_are_listed_a_few_at_a_time(monkeypatch):
    """The same numbers, but for scores that the pooled distribution leaves out where there are more than it keeps."""
    rewards = torch.rand(60, 6, dtype=torch.float64, generator=seeded(0))
    config = AlgorithmConfig(bundling="self", bundle_size=3, pairing="complete", baseline="leave_one_out")
    whole = compute_advantages(rewards, config)
    monkeypatch.setattr("megatron_riskpo.algorithms.subsets._LISTED_AT_A_TIME", 150)
    assert [part.num_prompts for part in response_subsets(rewards, 3)] == [7] * 8 + [4]
    cut = compute_advantages(rewards, config)
    torch.testing.assert_close(cut.advantages, whole.advantages, rtol=1e-12, atol=1e-12)
    assert cut.metrics == pytest.approx(whole.metrics, rel=1e-12)
    monkeypatch.setattr("megatron_riskpo.algorithms.subsets._MOST_POOLED", 400)  # of 1,200
    assert all(isinstance(part, ListedSubsets) for part in response_subsets(rewards, 3))
    assert pool(complete_blocks(rewards, config, None, None)).atoms.size(1) == 8 * 47 + 27
    torch.testing.assert_close(compute_advantages(rewards, config).advantages, whole.advantages, rtol=0, atol=0.02)


@pytest.mark.parametrize(("rewards_are", "group_size", "size", "form"), [
    ("hundredths", 10, 5, ListedSubsets), ("hundredths", 20, 10, LatticeSubsets), ("binary", 10, 5, LatticeSubsets),
    ("continuous", 10, 5, ListedSubsets), ("continuous", 16, 8, ListedSubsets), ("continuous", 20, 10, LatticeSubsets),
])  # fmt: skip
def test_the_form_does_not_change_where_questions_are_many(rewards_are, group_size, size, form, monkeypatch):
    """Above 2^23 subsets all went through the dynamic program, which took 8 times as long for 10 answers in 5s."""
    rewards = torch.rand(2, group_size, dtype=torch.float64, generator=seeded(0))
    kinds = {"hundredths": (100 * rewards).round() / 100, "binary": rewards.round(), "continuous": rewards}
    # More than 2^23 subsets in all.
    rewards = kinds[rewards_are].repeat(2**22 // math.comb(group_size, size) + 1, 1)
    monkeypatch.setattr(LatticeSubsets, "__init__", lambda self, lattice, size: None)
    assert {type(part) for part in response_subsets(rewards, size)} == {form}


@pytest.mark.parametrize(("group_size", "size"), [(128, 16), (256, 12), (1024, 8), (68, 34), (600, 300)])
def test_self_bundles_of_more_subsets_than_an_integer_holds(group_size, size):
    """0/1 rewards: the number of right answers in a subset is hypergeometric. Second way: Python's whole numbers."""
    num_right = [group_size // 3] if group_size == 600 else [0, 1, group_size // 3, group_size - 1]
    rewards = (torch.arange(group_size)[None] < torch.tensor(num_right)[:, None]).double()
    (subsets,) = response_subsets(rewards, size)
    psi = -torch.rand(1, size + 1, dtype=torch.float64, generator=seeded(0))
    weights = subsets.response_weights(psi)
    for row, right in enumerate(num_right):
        masses = subsets.rows().masses[row]
        torch.testing.assert_close(masses, hypergeometric(group_size, right, size), rtol=0, atol=1e-13)
        for own in {*rewards[row].tolist()}:
            others = hypergeometric(group_size - 1, right - int(own), size - 1)
            expected = float(others @ psi[0, int(own) : int(own) + size])
            found = weights[row][rewards[row] == own]
            torch.testing.assert_close(found, torch.full_like(found, expected), rtol=1e-11, atol=0)


def test_the_default_path_takes_large_groups():
    rewards = (torch.rand(8, 128, generator=seeded(0)) < 0.5).double()
    config = AlgorithmConfig(bundling="self", pairing="complete", bundle_size=16, baseline="leave_one_out")
    advantages = compute_advantages(rewards, config).advantages
    right = (advantages * rewards).sum(1) / rewards.sum(1)
    assert ((advantages - right[:, None]).abs()[rewards == 1] < 1e-12).all()
    assert advantages.sum(1).abs().max() < 1e-12


@pytest.mark.parametrize("spectrum", ["mvar", "max_at_k"])
def test_one_answer_each_makes_one_bundle_of_any_size(spectrum):
    """More questions than a tensor has dimensions; the only score there is, is the largest one."""
    rewards = torch.rand(100, 1, dtype=torch.float64, generator=seeded(0))
    outputs = compute_advantages(rewards, AlgorithmConfig(bundle_size=100, pairing="complete", spectrum=spectrum))
    assert outputs.advantages.abs().max() == 0
    assert outputs.metrics["risk/q_alpha"] == pytest.approx(float(rewards.sum()), rel=1e-12)


def hypergeometric(total, right, drawn):
    ways = [math.comb(right, hits) * math.comb(total - right, drawn - hits) for hits in range(drawn + 1)]
    return torch.tensor([float(Fraction(way, math.comb(total, drawn))) for way in ways], dtype=torch.float64)


@pytest.mark.parametrize(
    ("num_points", "group_size", "fraction"),
    [(2, 63, 0.0), (2, 64, 0.0), (129, 8, 0.0), (129, 9, 0.0), (2**20, 3, 0.0), (2**21, 3, 0.0), (3, 4, 0.5)],
)
def test_cases_are_the_different_rows_in_ascending_order(num_points, group_size, fraction):
    """By one number a row up to 63 bits, row by row above that and where positions are no whole numbers."""
    rows = torch.randint(num_points, (5, group_size), generator=seeded(0)).double()
    rows[0], rows[1] = 0, num_points - 1
    rows = rows[torch.randint(5, (40,), generator=seeded(1))]
    rows[:, 0] = (rows[:, 0] - fraction).clamp(min=0)
    found = _unique_rows(rows, num_points)
    assert all(map(torch.equal, found, rows.unique(dim=0, return_inverse=True)))


@pytest.mark.parametrize("points", [2, 60])
def test_short_and_long_convolutions_agree_with_the_definition(points):
    """60 points go through the Fourier transform."""
    masses = torch.rand(3, 4, points, dtype=torch.float64, generator=seeded(0))
    masses /= masses.sum(2, keepdim=True)
    psi = -torch.rand(3, 4 * (points - 1) + 1, dtype=torch.float64, generator=seeded(1))
    means = means_over_the_others(masses, psi)
    for row, own in itertools.product(range(3), range(4)):
        others = torch.ones(1, dtype=torch.float64)
        for question in set(range(4)) - {own}:
            others = torch.tensor(
                [
                    sum(others[i] * masses[row, question, s - i] for i in range(len(others)) if 0 <= s - i < points)
                    for s in range(len(others) + points - 1)
                ]
            )
        expected = [float(others @ psi[row, v : v + len(others)]) for v in range(points)]
        torch.testing.assert_close(means[row, own], torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close(convolve(masses[:, 0], masses[:, 1]).sum(1), torch.ones(3, dtype=torch.float64))


@pytest.mark.parametrize("spectrum", ["max_at_k", "mvar"])
@pytest.mark.parametrize("source", ["global", "bundle"])
def test_transforms_make_no_scores_that_no_bundle_has(source, spectrum):
    """A lattice of 100 steps, most points of which no sum reaches. Second way: all 32 sums."""
    rewards = torch.tensor([[0.0, 0.01], [0.0, 1.0], [0.0, 1.0], [0.3, 0.3], [0.0, 1.0]], dtype=torch.float64)
    config = AlgorithmConfig(bundle_size=5, pairing="complete", spectrum=spectrum, quantile_source=source)
    (block,) = complete_blocks(rewards, config, None, seeded(0))
    scores = sorted(float(sum(choice)) for choice in itertools.product(*rewards.tolist()))
    for found in (block.pooled, block.rows()):
        present = found.masses[0] > 0
        assert found.support() == pytest.approx((scores[0], scores[-1]), abs=1e-12)
        assert found.atoms[0][present].tolist() == pytest.approx(sorted({round(s, 9) for s in scores}), abs=1e-9)
    assert float(block.pooled.masses.sum()) == pytest.approx(1, abs=1e-15)
    advantages = compute_advantages(rewards, config, generator=seeded(0)).advantages
    of_sample = Distribution.of_sample(torch.tensor(scores, dtype=torch.float64))
    values = torch.tensor(list(itertools.product(*rewards.tolist())), dtype=torch.float64).sum(1)
    psi = rule_weights(values[None], of_sample, spectrum_of(config).density).view(2, 2, 2, 2, 2)
    expected = torch.stack([psi.mean([other for other in range(5) if other != own]) for own in range(5)])
    torch.testing.assert_close(advantages, expected, rtol=0, atol=1e-12)


def test_continuous_rewards_stay_within_the_stated_error():
    rewards = torch.rand(4, 5, dtype=torch.float64, generator=seeded(3))
    lattice = Lattice.of(rewards)
    assert not lattice.is_exact
    step = float(rewards.max() - rewards.min()) / lattice.num_steps
    block = _block(lattice, torch.arange(4)[None], torch.ones(1, 4, dtype=torch.bool), 4)

    def kinked(scores):
        return -(2.0 - scores).clamp(min=0) - 0.5 * (1.5 - scores).clamp(min=0)

    expected = torch.zeros_like(rewards)
    scores = []
    for choice in itertools.product(range(5), repeat=4):
        score = sum(rewards[q, r] for q, r in enumerate(choice))
        scores.append(float(score))
        for question, response in enumerate(choice):
            expected[question, response] += kinked(score) / 5**3
    error = (block.spread(kinked(block.values())) - expected).abs().max()
    assert 0 < float(error) <= 1.5 / 2 * step * 4  # sup phi / 2 * h B
    for level in (0.2, 0.8):
        assert abs(block.pooled.quantile(level) - sorted(scores)[math.ceil(level * 625) - 1]) <= step * 4
    listed_form, lattice_form = listed(rewards, 3), LatticeSubsets(Lattice.of(rewards, 128), 3)
    difference = listed_form.response_weights(kinked(listed_form.values())) - lattice_form.response_weights(
        kinked(lattice_form.values())
    )
    assert 0 < float(difference.abs().max()) <= 1.5 / 2 * step * 2 * 3


@given(lattice_rewards(most_prompts=6, most_responses=5), st.sampled_from(["sorted", "self"]), st.integers(0, 5))
def test_does_not_depend_on_the_order_of_responses_and_questions(rewards, bundling, seed):
    """Sorted bundles: with pass rates that differ, the groups are the same whatever the order."""
    num_prompts, group_size = rewards.shape
    size = min(rewards.shape[bundling == "self"], 2)
    config = AlgorithmConfig(bundling=bundling, pairing="complete", bundle_size=size, spectrum="max_at_k")
    pass_rates = torch.rand(num_prompts, dtype=torch.float64, generator=seeded(seed))
    advantages = compute_advantages(rewards, config, pass_rates=pass_rates, generator=seeded(0)).advantages
    questions = torch.randperm(num_prompts, generator=seeded(seed))
    responses = torch.rand(num_prompts, group_size, generator=seeded(seed)).argsort(dim=1)
    moved = compute_advantages(
        rewards[questions].gather(1, responses), config, pass_rates=pass_rates[questions], generator=seeded(1)
    ).advantages
    torch.testing.assert_close(moved, advantages[questions].gather(1, responses), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("bundling", ["random", "self"])
@pytest.mark.parametrize("baseline", ["natural", "leave_one_out"])
def test_is_the_mean_over_permutations(bundling, baseline):
    """At fixed quantiles, one group: the mean of many one-permutation advantages, within its standard error."""
    rewards = (torch.rand(3, 6, generator=seeded(2)) < 0.5).double()
    options = {"bundling": bundling, "bundle_size": 3, "baseline": baseline}
    fixed = {"quantile_source": "tracked", "tracker_step": 0.0}
    tracker = QuantileTracker((0.2, 0.8), (1.0, 2.0), 0.0, 3.0)
    complete = compute_advantages(
        rewards, AlgorithmConfig(pairing="complete", **options, **fixed), tracker=tracker, generator=seeded(0)
    ).advantages
    generator, config = seeded(1), AlgorithmConfig(**options, **fixed)
    draws = torch.stack(
        [compute_advantages(rewards, config, tracker=tracker, generator=generator).advantages for _ in range(800)]
    )
    standard_error = draws.std(0) / 800**0.5
    assert ((draws.mean(0) - complete).abs() <= 4.5 * standard_error + 1e-12).all()
    assert float(standard_error.max()) > 0.003


# Two questions, three answers each, two responses a question: 81 samples, enumerated with their probabilities.
TOY_REWARDS = {
    "binary": torch.tensor([[0.0, 1.0, 0.0], [1.0, 0.0, 1.0]]),
    "plus or minus 1": torch.tensor([[-1.0, 1.0, -1.0], [1.0, -1.0, 1.0]]),
    "continuous": torch.tensor([[0.13, 0.77, 0.41], [0.92, 0.05, 0.58]]),
}
TOY_SPECTRA = {
    "mean": lambda u: u,
    "cvar": lambda u: min(u, 0.3) / 0.3,
    "rvar": lambda u: (min(u, 0.7) - min(u, 0.3)) / 0.4,
    "mvar": lambda u: min(u, 0.7) + 0.5 * min(u, 0.3),
}


@pytest.mark.parametrize("pairing", ["permutation", "complete"])
@pytest.mark.parametrize("rewards_are", TOY_REWARDS)
@pytest.mark.parametrize("spectrum", TOY_SPECTRA)
def test_expected_gradient_is_that_of_the_risk_measure(spectrum, rewards_are, pairing):
    """The advantages that compute_advantages gives, at the true pooled quantiles, averaged over every sample that the
    policy can draw, against finite differences of the risk of the bundle score."""
    table, cumulative = TOY_REWARDS[rewards_are].double(), TOY_SPECTRA[spectrum]
    logits = torch.tensor([[0.3, -0.4, 0.1], [-0.2, 0.5, 0.0]], dtype=torch.float64)
    config = AlgorithmConfig(
        spectrum=spectrum, bundle_size=2, alpha=0.3, beta=0.7, pairing=pairing, quantile_source="tracked",
        tracker_step=0.0, baseline="leave_one_out",
    )  # fmt: skip
    tracker = true_tracker(table, logits)
    gradient = torch.zeros_like(logits)
    probabilities = logits.softmax(1)
    for sample in itertools.product(range(3), repeat=4):
        answers = torch.tensor(sample).view(2, 2)
        chance = float(probabilities.gather(1, answers).prod())
        advantages = mean_over_pairings(table.gather(1, answers), config, tracker)
        scores = torch.nn.functional.one_hot(answers, 3) - probabilities[:, None]
        gradient += chance * (advantages[:, :, None] * scores).mean(1)
    expected = torch.zeros_like(logits)
    for index in itertools.product(range(2), range(3)):
        step = torch.zeros_like(logits)
        step[index] = 1e-5
        expected[index] = (
            exact_risk(table, logits + step, cumulative) - exact_risk(table, logits - step, cumulative)
        ) / 2e-5
    assert (gradient - expected).norm() <= 1e-6 * expected.norm()


def mean_over_pairings(rewards, config, tracker):
    """Two responses a question meet in two ways, each as likely."""
    seeds = seeds_of_both_pairings() if config.pairing == "permutation" else (0,)
    outputs = [compute_advantages(rewards, config, tracker=tracker, generator=seeded(seed)) for seed in seeds]
    return sum(output.advantages for output in outputs) / len(outputs)


@functools.cache
def seeds_of_both_pairings():
    """A seed for each pairing, told by rewards that say which responses met."""
    probe = torch.tensor([[0.0, 1.0], [0.0, 1.0]], dtype=torch.float64)
    config = AlgorithmConfig(bundle_size=2, spectrum="mean")
    found = {
        float(compute_advantages(probe, config, generator=seeded(seed)).advantages.min()): seed for seed in range(64)
    }
    assert set(found) == {-2.0, 0.0}  # scores 0 and 2, or 1 and 1
    return tuple(found.values())


def score_distribution(table, logits):
    probabilities = logits.softmax(1)
    outcomes = itertools.product(range(3), range(3))
    return sorted(
        (round(float(table[0, a] + table[1, b]), 9), float(probabilities[0, a] * probabilities[1, b]))
        for a, b in outcomes
    )


def exact_risk(table, logits, cumulative):
    total, level = 0.0, 0.0
    for score, probability in score_distribution(table, logits):
        total += score * (cumulative(min(level + probability, 1.0)) - cumulative(level))
        level = min(level + probability, 1.0)
    return total


def true_tracker(table, logits):
    pairs = score_distribution(table, logits)
    quantiles = []
    for wanted in (0.3, 0.7):
        level = 0.0
        for score, probability in pairs:
            level += probability
            if level >= wanted:
                quantiles.append(score)
                break
    return QuantileTracker((0.3, 0.7), tuple(quantiles), pairs[0][0], pairs[-1][0])


def test_groups_of_two_sizes_are_pooled_with_equal_weight_a_group():
    rewards = (torch.rand(5, 4, generator=seeded(0)) < 0.5).double()
    config = AlgorithmConfig(bundle_size=3, pairing="complete")
    blocks = complete_blocks(rewards, config, None, seeded(1))
    assert [block.num_rows for block in blocks] == [1, 1]
    assert sorted(torch.cat([block.questions for block in blocks]).tolist()) == list(range(5))
    mean = sum(float((b.pooled.atoms * b.pooled.masses).sum()) for b in blocks) / 2
    pooled = pool(blocks)
    assert float((pooled.atoms * pooled.masses).sum()) == pytest.approx(mean)
