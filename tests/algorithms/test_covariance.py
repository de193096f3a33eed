"""Which tokens are held back, against a sort in plain python."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_riskpo.algorithms.covariance import covariant_tokens


def plain_choice(logprobs, token_advantages, fraction, keep):
    """Positions, by the largest covariance, of equal ones the earlier."""
    places = [t for t in range(len(logprobs)) if keep[t]]
    mean_a = math.fsum(token_advantages[t] for t in places) / max(len(places), 1)
    mean_l = math.fsum(logprobs[t] for t in places) / max(len(places), 1)
    covariance = {t: (token_advantages[t] - mean_a) * (logprobs[t] - mean_l) for t in places}
    order = sorted(places, key=lambda t: (-covariance[t], t))
    return set(order[: max(math.ceil(fraction * len(places) - 1e-6), 1)])


@st.composite
def mini_batches(draw):
    lengths = draw(st.lists(st.integers(0, 6), min_size=1, max_size=6).filter(any))
    total = sum(lengths)
    # Eighths: sums and means of up to 32 tokens of them differ in every digit that a tie needs.
    eighths = st.integers(-16, 16).map(lambda i: i / 8)
    logprobs = draw(st.lists(eighths, min_size=total, max_size=total, unique=total < 20))
    advantages = draw(st.lists(eighths, min_size=len(lengths), max_size=len(lengths)))
    return lengths, logprobs, advantages


@given(mini_batches(), st.sampled_from([0.001, 0.1, 1 / 3, 0.5, 1.0]), st.booleans(), st.randoms(use_true_random=False))
def test_against_a_sort(mini_batch, fraction, masked, random):
    lengths, logprobs, advantages = mini_batch
    keep = [not masked or random.random() < 0.7 for _ in logprobs]
    token_advantages = [a for a, length in zip(advantages, lengths, strict=True) for _ in range(length)]
    chosen = covariant_tokens(
        torch.tensor(logprobs), torch.tensor(advantages), torch.tensor(lengths), fraction,
        torch.tensor(keep) if masked else None,
    )  # fmt: skip
    places = set(chosen.nonzero().flatten().tolist())
    expected = plain_choice(logprobs, token_advantages, fraction, keep)
    assert len(places) == len(expected)
    assert all(keep[t] for t in places)
    if places != expected:
        # The means of two ways to add may differ in the last digit: then the two choices cost the same.
        mean_a = sum(a for a, k in zip(token_advantages, keep, strict=True) if k) / sum(keep)
        mean_l = sum(x for x, k in zip(logprobs, keep, strict=True) if k) / sum(keep)
        costs = [
            sorted((token_advantages[t] - mean_a) * (logprobs[t] - mean_l) for t in group)
            for group in (places, expected)
        ]
        assert costs[0] == pytest.approx(costs[1], abs=1e-12)


def test_by_hand():
    # mean A = 0, mean log-prob = -2: covariances 1, -1, 1.5, -1.5, so that the third comes first
    logprobs, advantages = torch.tensor([-1.0, -3.0, -3.5, -0.5]), torch.tensor([1.0, -1.0])
    lengths = torch.tensor([2, 2])
    assert covariant_tokens(logprobs, advantages, lengths, 0.25).tolist() == [False, False, True, False]
    assert covariant_tokens(logprobs, advantages, lengths, 0.5).tolist() == [True, False, True, False]


def test_equal_covariances_go_by_position():
    chosen = covariant_tokens(torch.full((10_000,), -1.0), torch.ones(2), torch.tensor([4000, 6000]), 0.3)
    assert chosen[:3000].all()
    assert not chosen[3000:].any()


@pytest.mark.parametrize(
    ("num_tokens", "fraction", "num_chosen"),
    [(3, 0.1, 1), (30, 0.1, 3), (31, 0.1, 4), (100, 0.07, 7), (4999, 2e-4, 1), (5001, 2e-4, 2)],
)
def test_how_many_are_chosen(num_tokens, fraction, num_chosen):
    logprobs = torch.randn(num_tokens, generator=torch.Generator().manual_seed(0))
    chosen = covariant_tokens(logprobs, torch.tensor([1.0, -1.0]), torch.tensor([2, num_tokens - 2]), fraction)
    assert int(chosen.sum()) == num_chosen


def test_nothing_is_chosen_where_everything_is_masked():
    keep = torch.zeros(3, dtype=torch.bool)
    assert not covariant_tokens(torch.zeros(3), torch.ones(1), torch.tensor([3]), 0.5, keep).any()
