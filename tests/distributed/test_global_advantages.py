"""Rewards graded in shares and joined by one all-reduce: the same advantages, bit for bit, on 1, 2 and 4 ranks.

Second way: the reward matrix written out here, without any process group.
"""

import torch

from megatron_riskpo.algorithms import AlgorithmConfig, compute_advantages
from tests.distributed.advantage_cases import ESTIMATORS, REWARDS, advantages_on_this_rank
from tests.distributed.ranks import run_on_ranks


def test_advantages_are_bit_equal_on_1_2_and_4_ranks(tmp_path):
    target = f"{advantages_on_this_rank.__module__}:{advantages_on_this_rank.__name__}"
    ranks = [result for n in (1, 2, 4) for result in run_on_ranks(target, n, tmp_path / str(n))]
    assert len(ranks) == 7
    for name, config in ESTIMATORS.items():
        tracker, generator = None, torch.Generator().manual_seed(3)
        for step in range(3):
            expected = compute_advantages(REWARDS[step], config, tracker=tracker, generator=generator)
            tracker = expected.tracker
            for result in ranks:
                advantages, metrics, num_errors = result[name][step]
                assert torch.equal(advantages, expected.advantages)
                assert metrics == expected.metrics
                assert num_errors == 0
        assert expected.advantages.abs().sum() > 0


def test_default_is_riskpo():
    assert AlgorithmConfig().estimator == "riskpo"
