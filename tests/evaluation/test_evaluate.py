"""Periodic evaluations show the figures of `riskpo evaluate`, of all questions and of each source's."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from megatron_riskpo.evaluation.evaluate import metrics_of, pass_at_k_metrics
from megatron_riskpo.evaluation.summary import shown_ks, summarize, table
from megatron_riskpo.rewards.scoring import Rewards
from megatron_riskpo.rollout.types import Rollouts
from tests.evaluation.test_comparison import results


def test_metrics_of_a_step_are_those_of_the_command():
    correct = np.random.default_rng(2).random((40, 8)) < 0.3
    shares = summarize(results("aime", correct)).shares
    metrics = pass_at_k_metrics(correct, (1, 4, 8), "eval/aime")
    for k in (1, 4, 8):
        expected = shares[f"pass@{k}"]
        found = [metrics[f"eval/aime/pass@{k}{end}"] for end in ("", "_low", "_high")]
        assert found == pytest.approx([expected.value, expected.low, expected.high], abs=1e-12)
    assert len(metrics) == 9


def test_sources_are_summed_up_as_if_they_were_alone():
    correct = np.random.default_rng(4).random((30, 4)) < 0.4
    whole = replace(results("mixed", correct), sources=["sums" if row % 3 else "programs" for row in range(30)])
    rows = {"programs": range(0, 30, 3), "sums": [row for row in range(30) if row % 3]}
    summary = summarize(whole)
    assert list(summary.sources) == list(rows)
    for source, own in rows.items():
        assert summary.sources[source] == summarize(results(source, correct[list(own)]))
    shown = table({"mixed": summary})
    assert "mixed, by source" in shown
    for source in rows:
        value = summary.sources[source].shares["pass@4"]
        assert f"{100 * value.value:.1f} % [{100 * value.low:.1f}, {100 * value.high:.1f}]" in shown
    assert summarize(results("x", correct)).sources == {}


def test_metrics_of_some_questions_are_theirs_alone():
    """Second way: a plain loop over the questions."""
    solved, errors = (torch.rand(5, 4, generator=torch.Generator().manual_seed(seed)) < 0.5 for seed in (1, 2))
    lengths = torch.arange(1, 21)
    rollouts = Rollouts(torch.zeros(230), torch.ones(20), lengths, torch.zeros(210), lengths % 3 > 0)
    rewards = Rewards(solved.double(), errors, torch.ones(5, 4, dtype=torch.bool))
    found = metrics_of(rollouts, rewards, [4, 1], (1,), "eval/x/sums")
    right = [bool(solved[q, i] and not errors[q, i]) for q in (4, 1) for i in range(4)]
    own = [int(lengths[4 * q + i]) for q in (4, 1) for i in range(4)]
    assert found["eval/x/sums/pass@1"] == pytest.approx(sum(right) / 8)
    assert found["eval/x/sums/errors"] == int(errors[4].sum() + errors[1].sum())
    assert found["eval/x/sums/response_length"] == pytest.approx(sum(own) / 8)
    assert found["eval/x/sums/truncated"] == pytest.approx(sum(length % 3 == 0 for length in own) / 8)


@pytest.mark.parametrize(("num", "expected"), [(1, [1]), (2, [1, 2]), (6, [1, 2, 4, 6]), (8, [1, 2, 4, 8])])
def test_shown_ks_are_powers_of_two_and_n(num: int, expected: list[int]):
    assert shown_ks(num) == expected
