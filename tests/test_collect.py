"""Dynamic sampling: which questions a step trains on. Second way: one by one, as a person would fill the batch."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_riskpo.collect import Groups, collect, rewards_differ
from megatron_riskpo.config import RolloutConfig
from megatron_riskpo.rewards.scoring import Rewards
from megatron_riskpo.rollout.types import Rollouts

NAN = float("nan")
NUM_PROMPTS, GROUP_SIZE = 3, 2
DRAWS = st.lists(
    st.lists(st.booleans(), min_size=NUM_PROMPTS, max_size=NUM_PROMPTS), min_size=5, max_size=5
)  # whether the rewards of each question differ


def ragged(first: int, num_prompts: int) -> Rollouts:
    """Sequence i of question q: one prompt token q, q + i + 1 response tokens 10 q + i."""
    rows = [(question, i) for question in range(first, first + num_prompts) for i in range(GROUP_SIZE)]
    responses = [[10 * question + i] * (question + i + 1) for question, i in rows]
    sequences = [[question, *response] for (question, _), response in zip(rows, responses, strict=True)]
    return Rollouts(
        tokens=torch.tensor([token for sequence in sequences for token in sequence]),
        prompt_lengths=torch.ones(len(rows), dtype=torch.int64),
        response_lengths=torch.tensor([len(r) for r in responses]),
        rollout_logprobs=-torch.tensor([float(token) for r in responses for token in r]),
        finished=torch.tensor([i == 0 for _, i in rows]),
    )  # fmt: skip


def drawing(draws: list[list[bool]], asked: list[int]):
    """Questions 0, 1, 2 in the first draw, 3, 4, 5 in the second, ..."""

    def draw(number: int) -> Groups:
        asked.append(number)
        first = number * NUM_PROMPTS
        matrix = torch.tensor([[1.0, 0.0] if differ else [1.0, 1.0] for differ in draws[number]], dtype=torch.float64)
        rewards = Rewards(matrix, torch.zeros_like(matrix, dtype=torch.bool), torch.ones_like(matrix, dtype=torch.bool))
        return Groups(list(range(first, first + NUM_PROMPTS)), ragged(first, NUM_PROMPTS), rewards)

    return draw


@given(DRAWS, st.integers(0, 4))
@settings(max_examples=60, deadline=None)
def test_equals_filling_by_hand(draws, max_refills):
    asked: list[int] = []
    collected = collect(drawing(draws, asked), RolloutConfig(dynamic_sampling=True, max_refills=max_refills))
    good: list[int] = []
    bad: list[int] = []
    num_draws = 0
    while len(good) < NUM_PROMPTS and num_draws < 1 + max_refills:
        for i, differ in enumerate(draws[num_draws]):
            (good if differ else bad).append(num_draws * NUM_PROMPTS + i)
        num_draws += 1
    expected = sorted((good + bad)[:NUM_PROMPTS])
    assert collected.batch.rows == expected
    assert asked == list(range(num_draws))
    assert collected.drawn.rows == list(range(num_draws * NUM_PROMPTS))
    assert collected.metrics == {
        "rollout/rounds": num_draws,
        "rollout/kept_share": pytest.approx(len(good) / (num_draws * NUM_PROMPTS)),
    }
    for position, question in enumerate(expected):
        assert_same(collected.batch.select([position]).rollouts, ragged(question, 1))
        is_good = draws[question // NUM_PROMPTS][question % NUM_PROMPTS]
        assert collected.batch.rewards.matrix[position].tolist() == ([1.0, 0.0] if is_good else [1.0, 1.0])
    assert collected.batch.lengths.tolist() == [[question + 1, question + 2] for question in expected]


def assert_same(a: Rollouts, b: Rollouts) -> None:
    for name in ("tokens", "prompt_lengths", "response_lengths", "rollout_logprobs", "finished"):
        assert torch.equal(getattr(a, name), getattr(b, name)), name


def test_off_takes_one_draw_as_it_is():
    asked: list[int] = []
    collected = collect(drawing([[False] * 3] * 5, asked), RolloutConfig())
    assert asked == [0]
    assert collected.batch is collected.drawn
    assert collected.metrics == {}


def test_concat_of_rollouts_undoes_select():
    whole = ragged(0, 4)
    assert_same(Rollouts.concat([whole.select(range(3)), whole.select(range(3, 8))]), whole)


def test_errors_make_no_difference_between_rewards():
    matrix = torch.tensor([[1.0, 1.0, 1.0], [0.1, 0.1, 0.10000000000000002], [1.0, 0.0, 0.5], [0.0, 0.0, 0.0]])
    errors = torch.tensor([[False, True, False], [False, False, True], [False, False, True], [True, True, True]])
    assert rewards_differ(Rewards(matrix.double(), errors, ~errors)).tolist() == [False, False, True, False]
