"""Running pass rates. Second way to the number: a dict, question by question."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_riskpo.algorithms.pass_rates import PassRates
from megatron_riskpo.errors import UsageError

NUM_QUESTIONS, GROUP_SIZE = 7, 3
BATCHES = st.lists(st.lists(st.integers(0, NUM_QUESTIONS - 1), min_size=1, max_size=6), max_size=6)


@given(BATCHES, st.sampled_from([0.25, 0.5, 1.0]), st.integers(0, 2**31))
@settings(max_examples=60, deadline=None)
def test_update_equals_a_loop(batches, step, seed):
    generator = torch.Generator().manual_seed(seed)
    rates, expected = PassRates.start(NUM_QUESTIONS, step), {}
    for rows in batches:
        rewards = torch.randint(-1, 3, (len(rows), GROUP_SIZE), generator=generator)
        rates = rates.update(rows, rewards)
        for row in set(rows):
            rewards_of_row = [r for i, group in enumerate(rewards.tolist()) if rows[i] == row for r in group]
            mean = sum(rewards_of_row) / len(rewards_of_row)
            expected[row] = expected[row] + step * (mean - expected[row]) if row in expected else mean
    found = rates.of(range(NUM_QUESTIONS))
    assert [row for row in range(NUM_QUESTIONS) if not found[row].isnan()] == sorted(expected)
    assert [found[row].item() for row in sorted(expected)] == pytest.approx([expected[r] for r in sorted(expected)])


def test_update_leaves_the_one_before_as_it_was():
    first = PassRates.start(3, 0.5).update([1], torch.tensor([[1.0, 0.0]]))
    second = first.update([1, 2], torch.tensor([[1.0, 1.0], [0.0, 0.0]]))
    assert first.of([1, 1]).tolist() == [0.5, 0.5]
    assert first.of([2]).isnan().all()
    assert second.of([2, 1]).tolist() == [0.0, 0.75]


@pytest.mark.parametrize("num_questions", [1, 20_000])
def test_state_survives_json_bit_for_bit(num_questions):
    rates = PassRates.start(num_questions, 0.5)
    rewards = torch.rand(num_questions, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    rates = rates.update(range(0, num_questions, 2), rewards[::2])
    state = json.loads(json.dumps(rates.state_dict()))
    restored = PassRates.from_state_dict(state, num_questions, 0.5)
    assert torch.equal(restored.rates.view(torch.int64), rates.rates.view(torch.int64))
    restored.update([0], rewards[:1])  # its memory is its own
    assert len(json.dumps(state)) < 12 * num_questions + 100


def test_state_of_other_questions_is_refused():
    state = PassRates.start(5, 0.5).state_dict()
    with pytest.raises(UsageError, match=r"pass rates are of 5 questions, this run has 6; restore the data"):
        PassRates.from_state_dict(state, 6, 0.5)
