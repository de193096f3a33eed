"""Soft overlong punishment. Second way to the number: the paper's three cases, response by response."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_riskpo.config import RewardConfig
from megatron_riskpo.rewards.shaping import overlong_penalty, shaped_rewards


def by_cases(length: int, longest: int, buffer: int) -> float:
    if length <= longest - buffer:
        return 0.0
    if length <= longest:
        return ((longest - buffer) - length) / buffer
    return -1.0


@given(st.integers(2, 50), st.data())
def test_equals_the_cases_of_the_paper(longest, data):
    buffer = data.draw(st.integers(1, longest - 1))
    lengths = torch.arange(longest + 5)
    expected = [by_cases(length, longest, buffer) for length in lengths.tolist()]
    assert overlong_penalty(lengths, longest, buffer).tolist() == pytest.approx(expected, abs=1e-15)


def test_a_cut_response_loses_the_whole_penalty_and_the_rewards_stay():
    rewards = torch.tensor([[1.0, 1.0, 0.0]], dtype=torch.float64)
    config = RewardConfig(overlong_buffer_tokens=4, overlong_penalty=0.5)
    shaped = shaped_rewards(
        rewards, torch.tensor([[6, 8, 10]]), torch.ones(1, 3, dtype=torch.bool), config, max_response_tokens=10
    )
    assert shaped.tolist() == [[1.0, 0.75, -0.5]]
    assert rewards.tolist() == [[1.0, 1.0, 0.0]]


def test_off_by_default():
    rewards = torch.ones(1, 2, dtype=torch.float64)
    assert (
        shaped_rewards(rewards, torch.tensor([[10, 10]]), torch.ones(1, 2, dtype=torch.bool), RewardConfig(), 10)
        is rewards
    )


def test_the_format_bonus_is_for_the_form_right_or_wrong():
    rewards = torch.tensor([[1.0, 1.0, 0.0, 0.0]], dtype=torch.float64)
    formatted = torch.tensor([[True, False, True, False]])
    config = RewardConfig(answer_form="boxed", format_bonus=0.25)
    shaped = shaped_rewards(rewards, torch.ones(1, 4, dtype=torch.int64), formatted, config, max_response_tokens=10)
    assert shaped.tolist() == [[1.25, 1.0, 0.25, 0.0]]
    assert rewards.tolist() == [[1.0, 1.0, 0.0, 0.0]]
