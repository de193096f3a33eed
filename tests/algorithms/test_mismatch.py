"""Mismatch sums: additive, and estimates of a KL divergence that is known."""

import pytest
import torch

from megatron_riskpo.algorithms import mismatch_sums


def test_parts_add_up_to_the_whole():
    rollout, trainer = torch.randn(2, 50, generator=torch.Generator().manual_seed(0))
    parts = mismatch_sums(rollout[:20], trainer[:20]) + mismatch_sums(rollout[20:], trainer[20:])
    assert parts.metrics() == pytest.approx(mismatch_sums(rollout, trainer).metrics())
    assert parts.metrics()["mismatch/logprob_abs_max"] == pytest.approx(float((rollout - trainer).abs().max()))


def test_k1_and_k3_estimate_the_divergence_of_the_sampler_from_the_trainer():
    rollout, trainer = torch.randn(2, 6, generator=torch.Generator().manual_seed(1)).log_softmax(dim=1)
    tokens = torch.multinomial(rollout.exp(), 200_000, replacement=True, generator=torch.Generator().manual_seed(2))
    divergence = float((rollout.exp() * (rollout - trainer)).sum())
    metrics = mismatch_sums(rollout[tokens], trainer[tokens]).metrics()
    assert metrics["mismatch/k1"] == pytest.approx(divergence, rel=0.05)
    assert metrics["mismatch/k3"] == pytest.approx(divergence, rel=0.05)


def test_a_rank_without_tokens_adds_nothing():
    empty = mismatch_sums(torch.empty(0), torch.empty(0))
    some = mismatch_sums(torch.tensor([0.0, 1.0]), torch.tensor([0.5, 1.0]))
    assert (empty + some).metrics() == some.metrics()
    assert set(empty.metrics().values()) == {0.0}
