"""Groups and bundles, checked by plain loops over their members."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_riskpo.algorithms import AlgorithmConfig
from megatron_riskpo.algorithms.bundles import cut_own_responses, make_groups, pair_at_random


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def members_of(membership):
    found = {}
    for prompt, row in enumerate(membership.tolist()):
        for response, bundle in enumerate(row):
            found.setdefault(bundle, []).append((prompt, response))
    return found


@given(st.integers(1, 6), st.integers(0, 20), st.sampled_from(["balance", "drop", "reuse"]), st.integers(0, 10))
def test_groups(size, more_prompts, remainder, seed):
    num_prompts = size + more_prompts
    groups = make_groups(num_prompts, AlgorithmConfig(bundle_size=size, remainder=remainder), None, seeded(seed))
    rows = [[q for q in row if q >= 0] for row in groups.members.tolist()]
    sizes = [len(row) for row in rows]
    assert groups.sizes.tolist() == sizes
    assert all(len(set(row)) == len(row) for row in rows)
    owned = groups.members[groups.owned].tolist()
    assert len(set(owned)) == len(owned)
    if remainder == "drop":
        assert len(owned) == num_prompts // size * size
    else:
        assert sorted(owned) == list(range(num_prompts))
    if remainder == "balance":
        assert max(sizes) <= size
        assert max(sizes) - min(sizes) <= 1
    else:
        assert set(sizes) == {size}
    assert len(rows) == (num_prompts // size if remainder == "drop" else -(-num_prompts // size))


@given(st.integers(1, 5), st.integers(1, 4), st.integers(0, 10))
def test_sorted_groups_hold_neighbouring_pass_rates(size, num_groups, seed):
    pass_rates = torch.rand(size * num_groups, dtype=torch.float64, generator=seeded(seed))
    config = AlgorithmConfig(bundle_size=size, bundling="sorted")
    groups = make_groups(len(pass_rates), config, pass_rates, seeded(seed))
    in_order = pass_rates[groups.members].sort(dim=1).values.flatten().tolist()
    assert in_order == sorted(in_order)


def test_questions_without_a_pass_rate_stand_in_the_middle_in_random_order():
    pass_rates = torch.tensor([0.9, float("nan"), 0.1, float("nan"), 0.5, float("nan")], dtype=torch.float64)
    config = AlgorithmConfig(bundle_size=1, bundling="sorted")
    orders = {tuple(make_groups(6, config, pass_rates, seeded(s)).members[:, 0].tolist()) for s in range(40)}
    assert {order[0] for order in orders} == {2}
    assert {order[-1] for order in orders} == {0}
    assert len(orders) > 10
    nothing_known = torch.full((6,), float("nan"), dtype=torch.float64)
    assert len({tuple(make_groups(6, config, nothing_known, seeded(s)).members[:, 0].tolist()) for s in range(9)}) == 9


@given(
    st.integers(1, 4), st.integers(0, 9), st.integers(1, 6), st.sampled_from(["balance", "drop", "reuse"]),
    st.integers(0, 10),
)  # fmt: skip
def test_bundles_of_a_group(size, more_prompts, group_size, remainder, seed):
    num_prompts = size + more_prompts
    rewards = torch.rand(num_prompts, group_size, dtype=torch.float64, generator=seeded(seed))
    groups = make_groups(num_prompts, AlgorithmConfig(bundle_size=size, remainder=remainder), None, seeded(seed))
    bundles = pair_at_random(rewards, groups, seeded(seed))
    assert bundles.scores.shape == (len(groups.members), group_size)
    found = members_of(bundles.membership)
    dropped = found.pop(-1, [])
    assert len(dropped) == (num_prompts % size * group_size if remainder == "drop" else 0)
    for bundle, pairs in found.items():
        group = groups.members[bundle // group_size]
        own = {int(q) for q, owned in zip(group, groups.owned[bundle // group_size], strict=True) if owned}
        assert {prompt for prompt, _ in pairs} == own
        assert len(pairs) == len(own)
        if len(own) == int((group >= 0).sum()):  # no question is there for the second time
            mean = sum(float(rewards[pair]) for pair in pairs) / len(pairs)
            assert float(bundles.scores.flatten()[bundle]) == pytest.approx(size * mean, abs=1e-9)
    for row in bundles.membership.tolist():
        assert len(set(row)) == group_size or row[0] == -1
    # Every group scores each response of each of its questions once.
    for group, scores in zip(groups.members, bundles.scores, strict=True):
        present = group[group >= 0]
        assert float(scores.sum()) == pytest.approx(float(rewards[present].sum()) * size / len(present), abs=1e-9)


@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 5), st.integers(0, 10))
def test_self_bundles(bundle_size, per_question, num_prompts, seed):
    rewards = torch.rand(num_prompts, bundle_size * per_question, dtype=torch.float64, generator=seeded(seed))
    bundles = cut_own_responses(rewards, bundle_size, seeded(seed))
    found = members_of(bundles.membership)
    assert sorted(found) == list(range(num_prompts * per_question))
    for bundle, pairs in found.items():
        assert len(pairs) == bundle_size
        assert {prompt for prompt, _ in pairs} == {bundle // per_question}
        score = float(bundles.scores.flatten()[bundle])
        assert score == pytest.approx(sum(float(rewards[pair]) for pair in pairs), abs=1e-9)


def test_questions_meet_at_random_and_with_independent_permutations():
    rewards, together, same_slot = torch.zeros(4, 3, dtype=torch.float64), torch.zeros(4), 0
    generator = seeded(0)
    for _ in range(3000):
        groups = make_groups(4, AlgorithmConfig(bundle_size=2), None, generator)
        membership = pair_at_random(rewards, groups, generator).membership
        partner = next(p for p in (1, 2, 3) if set(membership[p].tolist()) == set(membership[0].tolist()))
        together[partner] += 1
        same_slot += int(membership[partner, 0] == membership[0, 0])
    assert (together[1:] / 3000 - 1 / 3).abs().max() < 0.04  # 4.6 standard errors
    assert abs(same_slot / 3000 - 1 / 3) < 0.04


def test_the_same_seed_gives_the_same_bundles():
    rewards = torch.zeros(12, 4, dtype=torch.float64)

    def membership(seed):
        generator = seeded(seed)
        return pair_at_random(rewards, make_groups(12, AlgorithmConfig(), None, generator), generator).membership

    assert torch.equal(membership(5), membership(5))
    assert not torch.equal(membership(5), membership(6))
