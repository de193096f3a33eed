"""Bundles are a partition: checked by plain loops over their members."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_riskpo.algorithms import AlgorithmConfig
from megatron_riskpo.algorithms.bundles import make_bundles


def members(bundles):
    found = {}
    for prompt, row in enumerate(bundles.membership.tolist()):
        for response, bundle in enumerate(row):
            found.setdefault(bundle, []).append((prompt, response))
    return found


def seeded(seed):
    return torch.Generator().manual_seed(seed)


@given(st.integers(1, 6), st.integers(0, 20), st.integers(1, 6), st.integers(0, 10))
def test_random_bundles(bundle_size, more_prompts, group_size, seed):
    num_prompts = bundle_size + more_prompts
    rewards = torch.rand(num_prompts, group_size, dtype=torch.float64, generator=seeded(seed))
    bundles = make_bundles(rewards, AlgorithmConfig(bundle_size=bundle_size), seeded(seed))
    found = members(bundles)
    assert sorted(found) == list(range(bundles.scores.numel()))  # each response is in one bundle by construction
    sizes = {len(pairs) for pairs in found.values()}
    assert max(sizes) <= bundle_size
    assert max(sizes) - min(sizes) <= 1
    assert num_prompts % bundle_size or sizes == {bundle_size}
    for bundle, pairs in found.items():
        assert len({prompt for prompt, _ in pairs}) == len(pairs)  # one response a question
        mean = sum(float(rewards[pair]) for pair in pairs) / len(pairs)
        assert abs(float(bundles.scores[bundle]) - bundle_size * mean) < 1e-9
    for row in bundles.membership.tolist():
        assert len(set(row)) == group_size


@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 5), st.integers(0, 10))
def test_self_bundles(bundle_size, per_question, num_prompts, seed):
    rewards = torch.rand(num_prompts, bundle_size * per_question, dtype=torch.float64, generator=seeded(seed))
    bundles = make_bundles(rewards, AlgorithmConfig(bundle_size=bundle_size, bundling="self"), seeded(seed))
    found = members(bundles)
    assert sorted(found) == list(range(num_prompts * per_question))
    for bundle, pairs in found.items():
        assert len(pairs) == bundle_size
        assert len({prompt for prompt, _ in pairs}) == 1
        assert abs(float(bundles.scores[bundle]) - sum(float(rewards[pair]) for pair in pairs)) < 1e-9


def test_questions_meet_at_random_and_with_independent_permutations():
    rewards, together, same_slot = torch.zeros(4, 3, dtype=torch.float64), torch.zeros(4), 0
    generator = seeded(0)
    for _ in range(3000):
        membership = make_bundles(rewards, AlgorithmConfig(bundle_size=2), generator).membership
        partner = next(p for p in (1, 2, 3) if set(membership[p].tolist()) == set(membership[0].tolist()))
        together[partner] += 1
        same_slot += int(membership[partner, 0] == membership[0, 0])
    assert (together[1:] / 3000 - 1 / 3).abs().max() < 0.04  # 4.6 standard errors
    assert abs(same_slot / 3000 - 1 / 3) < 0.04


def test_the_same_seed_gives_the_same_bundles():
    rewards = torch.zeros(12, 4, dtype=torch.float64)
    first, second, other = (make_bundles(rewards, AlgorithmConfig(), seeded(seed)) for seed in (5, 5, 6))
    assert torch.equal(first.membership, second.membership)
    assert not torch.equal(first.membership, other.membership)
