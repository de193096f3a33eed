"""The tracker's recursion against its fixed point and its own saved state."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_riskpo.algorithms import QuantileTracker
from megatron_riskpo.algorithms.distribution import Distribution
from megatron_riskpo.errors import UsageError


def sample(values):
    return Distribution.of_sample(torch.as_tensor(values, dtype=torch.float64).flatten())


def test_starts_at_the_quantiles_of_the_first_batch():
    tracker = QuantileTracker.start(sample([4.0, 1.0, 2.0, 3.0, 0.0]), (0.2, 0.8))
    assert tracker.values == (0.0, 3.0)
    assert [tracker.quantile(level) for level in (0.2, 0.8, 1.0)] == [0.0, 3.0, 4.0]


def test_one_update_by_hand():
    tracker = QuantileTracker((0.5, 0.75), (1.0, 3.0), score_min=0.0, score_max=4.0, num_updates=3)
    moved = tracker.update(sample([0.0, 1.0, 2.0, 10.0]), step=0.1, decay=0.5)
    gamma = 0.1 * 10.0 / 2  # range of all scores seen, fourth update
    assert moved.values == pytest.approx((1.0 + gamma * (0.5 - 0.25), 3.0 + gamma * (0.75 - 0.75)))
    assert (moved.score_min, moved.score_max, moved.num_updates) == (0.0, 10.0, 4)


@pytest.mark.parametrize("binary", [True, False])
def test_converges_to_the_quantiles_of_a_distribution_it_did_not_start_at(binary):
    generator = torch.Generator().manual_seed(3)
    tracker = QuantileTracker((0.2, 0.8), (0.0, 0.0), 0.0, 5.0)
    for _ in range(3000):
        uniform = torch.rand(20, 5, dtype=torch.float64, generator=generator)
        scores = (uniform < 0.5).double().sum(1) if binary else uniform.sum(1)
        tracker = tracker.update(sample(scores), step=0.3, decay=0.6)
    # Binomial(5, 1/2): F = .031 .19 .5 .81; sum of 5 uniforms: normal within .01, sd sqrt(5/12)
    expected = (2.0, 3.0) if binary else (2.5 - 0.8416 * 0.6455, 2.5 + 0.8416 * 0.6455)
    assert tracker.values == pytest.approx(expected, abs=0.06)


@given(st.lists(st.lists(st.integers(0, 5), min_size=1, max_size=8), min_size=2, max_size=12), st.floats(0.01, 3))
def test_stays_ordered_and_within_the_scores_seen(batches, step):
    tracker = QuantileTracker.start(sample(batches[0]), (0.4, 0.5))
    for batch in batches[1:]:
        tracker = tracker.update(sample(batch), step, 0.0)
        assert tracker.score_min <= tracker.values[0] <= tracker.values[1] <= tracker.score_max


@given(st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=20))
def test_saved_as_json_and_restored_it_goes_on_bit_for_bit(scores):
    tracker = QuantileTracker.start(sample(scores), (0.2, 0.8)).update(sample(scores[1:]), 0.1, 0.5)
    restored = QuantileTracker.from_state_dict(json.loads(json.dumps(tracker.state_dict())))
    assert restored == tracker
    assert restored.update(sample(scores), 0.1, 0.5) == tracker.update(sample(scores), 0.1, 0.5)


def test_a_state_of_something_else_is_refused():
    with pytest.raises(UsageError, match="checkpoint"):
        QuantileTracker.from_state_dict({"values": [1.0]})
