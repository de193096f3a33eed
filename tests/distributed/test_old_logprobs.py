"""The rollout engine's log-probs in the place of the trainer's: the same update where the two are equal, their ratio
in the loss where they are not.

On two data-parallel ranks with the built-in sampler in float32. Second ways: the forward pass that is saved, the loss
in python floats, and truncated importance sampling by the correction that it takes the place of.
"""

import math

import pytest
import torch

from megatron_riskpo.algorithms.token_inputs import TokenInputs
from tests.algorithms.plain_loss import Batch, plain_loss
from tests.distributed.compare import relative_error
from tests.distributed.old_logprobs_cases import ADVANTAGES, CASES, run
from tests.distributed.ranks import run_on_ranks
from tests.tiny_models import make_tiny_qwen2


@pytest.fixture(scope="module")
def by_rank(tmp_path_factory):
    folder = tmp_path_factory.mktemp("old_logprobs")
    make_tiny_qwen2(folder / "model", tied=True, seed=3, hidden_size=64)
    return run_on_ranks(f"{run.__module__}:{run.__name__}", 2, folder / "two")


@pytest.mark.parametrize("mini_batches", [1, 2])
def test_both_give_the_same_update_where_the_engines_agree(by_rank, mini_batches):
    for rank in by_rank:
        recompute, rollout = rank["recompute", mini_batches], rank["rollout", mini_batches]
        assert rollout["metrics"] == pytest.approx(recompute["metrics"], rel=1e-5, abs=1e-5)
        assert relative_error(rollout["weights"], recompute["weights"]) < 1e-5
        assert recompute["phases"] == ["logprobs"] * (mini_batches - 1)
        assert rollout["phases"] == []
        assert rollout["mismatch"]["mismatch/logprob_abs_max"] < 1e-5


@pytest.mark.parametrize("name", ["noisy ppo", "noisy gspo"])
def test_the_loss_is_that_of_the_sampling_policy(by_rank, name):
    for rank in by_rank:
        result, config = rank[name], CASES[name].loss
        rollouts = result["rollouts"]
        batch = Batch(
            result["before"].double(), ADVANTAGES.flatten(), TokenInputs(old_logprobs=rollouts.rollout_logprobs),
            lengths=rollouts.response_lengths,
        )  # fmt: skip
        assert result["metrics"]["actor/loss"] == pytest.approx(plain_loss(batch, config), rel=1e-5)
        own = Batch(batch.logprobs, batch.advantages, TokenInputs(old_logprobs=batch.logprobs), lengths=batch.lengths)
        assert abs(plain_loss(own, config) - plain_loss(batch, config)) > 1e-3
        assert result["metrics"]["actor/clip_fraction"] > 0.1


def test_cispo_on_rollout_logprobs_is_truncated_importance_sampling(by_rank):
    for rank in by_rank:
        tis, cispo, uncorrected = (rank[name]["weights"] for name in ("tis", "cispo", "uncorrected"))
        assert relative_error(cispo, tis) < 1e-6
        assert relative_error(uncorrected, tis) > 1e-4


@pytest.mark.parametrize("name", ["noisy ppo", "noisy, 2 mini-batches"])
def test_mismatch_is_measured_before_the_policy_moves(by_rank, name):
    for rank in by_rank:
        result = rank[name]
        num, lengths = result["num"], result["rollouts"].response_lengths
        assert num == int(lengths[: len(lengths) // CASES[name].mini_batches].sum())
        difference = (result["before"] - result["rollouts"].rollout_logprobs)[:num].double()
        mismatch = result["mismatch"]
        assert mismatch["mismatch/logprob_abs_mean"] == pytest.approx(float(difference.abs().mean()), rel=1e-5)
        assert mismatch["mismatch/perplexity_ratio"] == pytest.approx(math.exp(float(difference.mean())), rel=1e-5)


def test_the_steps_moved_the_weights(by_rank):
    weights = {name: by_rank[0][name]["weights"] for name in (("recompute", 1), ("recompute", 2))}
    first, second = weights.values()
    assert any(not torch.equal(first[name], second[name]) for name in first)
