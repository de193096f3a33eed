"""Estimators that compare a question's responses: against plain loops over their definitions, and by properties.

pkpo and passk have tests of their own beside the properties here.
"""

import math
import statistics
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from megatron_riskpo.algorithms.advantages.validation import validate_algorithm
from megatron_riskpo.algorithms.config import AlgorithmConfig
from megatron_riskpo.errors import UsageError
from tests.algorithms.advantages.cases import advantages_of, reward_matrices, some_rewards

# dapo is grpo.
NAMES = ["grpo", "dr_grpo", "rloo", "reinforce_pp", "gpg", "opo", "qae", "rs_grpo", "pkpo", "passk"]
EPS = 1e-6
Rows = list[list[float]]


def plain_grpo(rows: Rows, lengths: Rows) -> Rows:
    return [[(r - statistics.mean(row)) / (statistics.stdev(row) + EPS) for r in row] for row in rows]


def plain_dr_grpo(rows: Rows, lengths: Rows) -> Rows:
    return [[r - statistics.mean(row) for r in row] for row in rows]


def plain_rloo(rows: Rows, lengths: Rows) -> Rows:
    return [[r - statistics.mean(row[:i] + row[i + 1 :]) for i, r in enumerate(row)] for row in rows]


def plain_reinforce_pp(rows: Rows, lengths: Rows) -> Rows:
    centred = plain_dr_grpo(rows, lengths)
    std = statistics.stdev([a for row in centred for a in row])
    return [[a / (std + EPS) for a in row] for row in centred]


def plain_gpg(rows: Rows, lengths: Rows) -> Rows:
    factor = len(rows) / sum(min(row) != max(row) for row in rows)
    return [[factor * a for a in row] for row in plain_dr_grpo(rows, lengths)]


def plain_opo(rows: Rows, lengths: Rows) -> Rows:
    baselines = [
        sum(n * r for n, r in zip(of_row, row, strict=True)) / sum(of_row)
        for of_row, row in zip(lengths, rows, strict=True)
    ]
    return [[r - b for r in row] for b, row in zip(baselines, rows, strict=True)]


def plain_qae(rows: Rows, lengths: Rows) -> Rows:
    result = []
    for row in rows:
        baseline = min(x for x in row if sum(r <= x for r in row) >= 0.4 * len(row))
        result.append([(r - baseline) / (statistics.stdev(row) + EPS) for r in row])
    return result


def plain_rs_grpo(rows: Rows, lengths: Rows) -> Rows:
    result = []
    for row in rows:
        mean = statistics.mean(math.exp(2 * r) for r in row)
        result.append([(math.exp(2 * r) / mean - 1) / 2 for r in row])
    return result


PLAIN: dict[str, Callable[[Rows, Rows], Rows]] = {
    "grpo": plain_grpo,
    "dapo": plain_grpo,
    "dr_grpo": plain_dr_grpo,
    "rloo": plain_rloo,
    "reinforce_pp": plain_reinforce_pp,
    "gpg": plain_gpg,
    "opo": plain_opo,
    "qae": plain_qae,
    "rs_grpo": plain_rs_grpo,
}


def some_lengths(rewards: Tensor) -> Tensor:
    return torch.randint(1, 500, rewards.shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("kind", ["binary", "plus_minus_one", "continuous"])
@pytest.mark.parametrize("name", PLAIN)
def test_against_a_plain_loop(name: str, kind: str) -> None:
    rewards = some_rewards(20, 6, seed=0, kind=kind)
    rewards[3] = rewards[3, 0]
    lengths = some_lengths(rewards)
    expected = torch.tensor(PLAIN[name](rewards.tolist(), lengths.tolist()), dtype=torch.float64)
    torch.testing.assert_close(advantages_of(name, rewards, lengths), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", NAMES)
@given(rewards=reward_matrices(), shift=st.integers(-16, 16))
def test_a_constant_added_to_the_rewards_changes_nothing(name: str, rewards: Tensor, shift: int) -> None:
    rewards = suited(name, rewards)
    lengths = some_lengths(rewards)
    expected = advantages_of(name, rewards, lengths)
    torch.testing.assert_close(advantages_of(name, rewards + shift, lengths), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", NAMES)
@given(rewards=reward_matrices())
def test_finite_and_never_less_for_a_better_response(name: str, rewards: Tensor) -> None:
    rewards = suited(name, rewards)
    order = rewards.sort(dim=1).indices
    advantages = advantages_of(name, rewards, some_lengths(rewards))
    assert advantages.isfinite().all()
    assert (advantages.gather(1, order).diff(dim=1) >= 0).all()
    assert (advantages.amax(dim=1) >= 0).all()
    assert (advantages.amin(dim=1) <= 0).all()


@pytest.mark.parametrize("name", NAMES)
@given(rewards=reward_matrices(), seed=st.integers(0, 99))
def test_the_order_of_the_responses_does_not_matter(name: str, rewards: Tensor, seed: int) -> None:
    rewards = suited(name, rewards)
    lengths = some_lengths(rewards)
    order = torch.randperm(rewards.size(1), generator=torch.Generator().manual_seed(seed))
    moved = advantages_of(name, rewards[:, order], lengths[:, order])
    torch.testing.assert_close(moved, advantages_of(name, rewards, lengths)[:, order], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("value", [0.1, -1 / 3, 1e6 + 0.1, 0.0])
@pytest.mark.parametrize("name", NAMES)
def test_equal_rewards_teach_exactly_nothing(name: str, value: float) -> None:
    rewards = torch.full((3, 7), value, dtype=torch.float64)
    assert not advantages_of(name, rewards, some_lengths(rewards)).any()
    if name != "passk":
        rewards[1] = some_rewards(1, 7, seed=0)
    assert not advantages_of(name, rewards, some_lengths(rewards))[[0, 2]].any()


def suited(name: str, rewards: Tensor) -> Tensor:
    return (rewards > 0).double() if name == "passk" else rewards


def test_one_answer_of_one_token_outweighs_none_of_the_long_ones_in_opo() -> None:
    rewards = torch.tensor([[1.0, 0.0, 0.0, 0.0]], dtype=torch.float64)
    lengths = torch.tensor([[1, 333, 333, 333]])
    torch.testing.assert_close(advantages_of("opo", rewards, lengths), rewards - 0.001)


def test_opo_of_empty_responses_is_finite() -> None:
    rewards = some_rewards(2, 4, seed=0)
    assert advantages_of("opo", rewards, torch.zeros(2, 4, dtype=torch.long)).isfinite().all()


@pytest.mark.parametrize(("num_correct", "learns"), [(1, 1.0), (6, 1.0), (7, 0.0), (9, 0.0)])
def test_qae_learns_from_successes_up_to_a_pass_rate_of_1_minus_k_and_from_failures_above(
    num_correct: int, learns: float
) -> None:
    rewards = torch.zeros(1, 10, dtype=torch.float64)
    rewards[0, :num_correct] = 1
    advantages = advantages_of("qae", rewards, quantile_level=0.4)
    assert torch.equal(advantages != 0, rewards == learns)


def test_qae_counts_a_level_that_rounding_puts_above_a_share_of_the_group() -> None:
    # 0.07 * 100 is 7.000000000000001 in float64.
    rewards = torch.arange(100, dtype=torch.float64)[None]
    assert int((advantages_of("qae", rewards, quantile_level=0.07) == 0).nonzero()[0, 1]) == 6


def test_rs_grpo_tends_to_the_centred_reward_and_takes_either_sign() -> None:
    rewards = some_rewards(5, 6, seed=0)
    for temperature in (1e-9, -1e-9):
        close = advantages_of("rs_grpo", rewards, risk_temperature=temperature)
        torch.testing.assert_close(close, advantages_of("dr_grpo", rewards), rtol=1e-6, atol=1e-8)
    mirrored = -advantages_of("rs_grpo", -rewards, risk_temperature=3.0)
    torch.testing.assert_close(advantages_of("rs_grpo", rewards, risk_temperature=-3.0), mirrored)


def test_rs_grpo_does_not_overflow() -> None:
    rewards = torch.tensor([[0.0, 1e4, 1e4, 0.0]], dtype=torch.float64)
    expected = torch.tensor([[-0.5, 0.5, 0.5, -0.5]], dtype=torch.float64)
    torch.testing.assert_close(advantages_of("rs_grpo", rewards, risk_temperature=2.0), expected)
    torch.testing.assert_close(advantages_of("rs_grpo", rewards, risk_temperature=-2.0), expected)


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("qae", {"quantile_level": 0.0}, "above 0 and below 1"),
        ("qae", {"quantile_level": 1.0}, "above 0 and below 1"),
        ("qae", {"quantile_level": math.nan}, "quantile_level = nan"),
        ("passk", {"k": 0}, "algorithm.k = 0"),
        ("rs_grpo", {"risk_temperature": 0.0}, "risk_temperature = 0"),
        ("riskpo_reference", {"reference_mix_weight": -1.0}, "0 or more"),
        ("grpo", {"k": 2}, "no effect on grpo"),
        ("passk", {"k": 7}, "7 tries of 6"),
        ("pkpo", {"k": 7}, "7 tries of 6"),
        ("pkpo", {"k": 1}, "rloo"),
    ],
)
def test_options_that_an_estimator_cannot_take_are_refused_in_one_line(
    name: str, options: dict[str, float], said: str
) -> None:
    with pytest.raises(UsageError, match=said) as caught:
        validate_algorithm(AlgorithmConfig(estimator=name, **options), 20, 6)
    assert "\n" not in str(caught.value)
