"""Periodic evaluations show the figures of `riskpo evaluate`."""

import numpy as np
import pytest

from megatron_riskpo.evaluation.evaluate import pass_at_k_metrics
from megatron_riskpo.evaluation.summary import shown_ks, summarize
from tests.evaluation.test_comparison import results


def test_metrics_of_a_step_are_those_of_the_command():
    correct = np.random.default_rng(2).random((40, 8)) < 0.3
    shares = summarize(results("aime", correct)).shares
    metrics = pass_at_k_metrics(correct, (1, 4, 8), "aime")
    for k in (1, 4, 8):
        expected = shares[f"pass@{k}"]
        found = [metrics[f"eval/aime/pass@{k}{end}"] for end in ("", "_low", "_high")]
        assert found == pytest.approx([expected.value, expected.low, expected.high], abs=1e-12)
    assert len(metrics) == 9


@pytest.mark.parametrize(("num", "expected"), [(1, [1]), (2, [1, 2]), (6, [1, 2, 4, 6]), (8, [1, 2, 4, 8])])
def test_shown_ks_are_powers_of_two_and_n(num: int, expected: list[int]):
    assert shown_ks(num) == expected
