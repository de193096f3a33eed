"""What the objective carries from step to step. Second way: the pure functions, called by hand."""

import json

import numpy as np
import pytest
import torch

from megatron_riskpo.algorithms import AlgorithmConfig, PolicyLossConfig, compute_advantages
from megatron_riskpo.algorithms.advantages import ESTIMATORS
from megatron_riskpo.algorithms.kl import kl_penalty
from megatron_riskpo.collect import Collected, Groups
from megatron_riskpo.errors import UsageError
from megatron_riskpo.objective import Objective, without_signal
from megatron_riskpo.rewards.scoring import Rewards
from tests.distributed.advantage_cases import rollouts_that_earn

NUM_QUESTIONS, NUM_PROMPTS, GROUP_SIZE = 12, 4, 4
SORTED = AlgorithmConfig(bundling="sorted", bundle_size=2, quantile_source="tracked", pass_rate_step=0.5)


def groups(rows: list[int], matrix: torch.Tensor) -> Groups:
    return Groups(
        rows,
        rollouts_that_earn(matrix),
        Rewards(matrix.double(), torch.zeros_like(matrix, dtype=torch.bool), torch.ones_like(matrix, dtype=torch.bool)),
    )


def steps(num: int) -> list[Collected]:
    """Each step draws 8 questions and trains on the last 4."""
    collected = []
    for step in range(num):
        g = torch.Generator().manual_seed(step)
        drawn = groups(
            torch.randperm(NUM_QUESTIONS, generator=g)[: 2 * NUM_PROMPTS].tolist(),
            torch.randint(0, 2, (2 * NUM_PROMPTS, GROUP_SIZE), generator=g).double(),
        )
        collected.append(Collected(drawn.select(range(NUM_PROMPTS, 2 * NUM_PROMPTS)), drawn, {}))
    return collected


def generator(step: int) -> torch.Generator:
    return torch.Generator().manual_seed(100 + step)


def test_pass_rates_are_those_of_earlier_steps_and_of_all_that_was_drawn():
    objective = Objective(SORTED, NUM_QUESTIONS)
    rates, tracker = torch.full((NUM_QUESTIONS,), torch.nan, dtype=torch.float64), None
    before = None
    for step, collected in enumerate(steps(5)):
        batch, drawn = collected.batch, collected.drawn
        shaped = batch.rewards.matrix - 0.25
        advantages, metrics = objective.advantages(collected, shaped, generator(step))
        expected = compute_advantages(
            shaped,
            SORTED,
            tracker=tracker,
            lengths=batch.lengths,
            pass_rates=rates[batch.rows],
            generator=generator(step),
        )
        tracker = expected.tracker
        assert torch.equal(advantages, expected.advantages)
        for row, mean in zip(drawn.rows, drawn.rewards.matrix.mean(1).tolist(), strict=True):
            rates[row] = mean if rates[row].isnan() else rates[row] + 0.5 * (mean - rates[row])
        assert metrics["reward/mean"] == float(drawn.rewards.matrix.mean())
        assert metrics["reward/shaped_mean"] == float(shaped.mean())
        assert metrics["risk/q_alpha"] == expected.metrics["risk/q_alpha"]
        if before is None:
            assert "risk/q_alpha_drift" not in metrics
        else:
            for name in ("risk/q_alpha", "risk/q_beta"):
                assert metrics[f"{name}_drift"] == metrics[name] - before[name]
        before = metrics


def test_effective_weights_are_by_graded_rewards_under_a_divergence_in_the_reward():
    """kl_in = reward shifts rewards by a divergence of either sign: right answers may end below 0, wrong ones above."""
    drawn = groups([0, 1], torch.tensor([[1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 0.0]]))
    num_tokens = int(drawn.lengths.sum())
    logprobs = torch.randn(num_tokens, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    loss = PolicyLossConfig(kl_coefficient=2.0, kl_in="reward", kl_estimator="k1")
    shaped = kl_penalty(drawn.rewards.matrix, logprobs, torch.zeros_like(logprobs), drawn.lengths.flatten(), loss)
    assert ((shaped > 0) != (drawn.rewards.matrix > 0)).any()
    config = AlgorithmConfig(estimator="dr_grpo")
    advantages, metrics = Objective(config, 2).advantages(Collected(drawn, drawn, {}), shaped, generator(0))
    # Of the one question with 1 of 4 right, and of the one with 3 of 4.
    slopes = [np.polyfit(r, a, 1)[0] for r, a in zip(drawn.rewards.matrix.numpy(), advantages.numpy(), strict=True)]
    weights = {key: value for key, value in metrics.items() if key.startswith("risk/effective_weight/")}
    assert weights == pytest.approx(
        {"risk/effective_weight/0.2-0.4": slopes[0], "risk/effective_weight/0.6-0.8": slopes[1]}
    )


def test_a_restored_objective_goes_on_bit_for_bit():
    whole, first = Objective(SORTED, NUM_QUESTIONS), Objective(SORTED, NUM_QUESTIONS)
    data = steps(5)
    expected = [whole.advantages(c, c.batch.rewards.matrix, generator(i)) for i, c in enumerate(data)]
    for i, collected in enumerate(data[:2]):
        first.advantages(collected, collected.batch.rewards.matrix, generator(i))
    second = Objective(SORTED, NUM_QUESTIONS)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    for i, collected in enumerate(data[2:], start=2):
        advantages, metrics = second.advantages(collected, collected.batch.rewards.matrix, generator(i))
        assert torch.equal(advantages, expected[i][0])
        assert metrics == expected[i][1]


def test_state_of_other_questions_is_refused():
    with pytest.raises(UsageError, match="12 questions, this run has 13"):
        Objective(SORTED, 13).load_state_dict(Objective(SORTED, 12).state_dict())


def test_pass_rates_are_kept_for_sorted_bundles_only():
    assert Objective(AlgorithmConfig(), NUM_QUESTIONS).state_dict() == {
        "tracker": None, "pass_rates": None, "quantiles": None,
    }  # fmt: skip


@pytest.mark.parametrize("estimator", sorted(ESTIMATORS))
@pytest.mark.parametrize(("reward", "questions"), [(0.0, "easier questions"), (1.0, "harder questions")])
def test_a_step_without_signal_is_said(estimator, reward, questions):
    """With all rewards equal every estimator has nothing to say, but for those that keep a natural baseline."""
    bundles = "bundle_size" in ESTIMATORS[estimator].options
    config = AlgorithmConfig(estimator=estimator, **({"bundle_size": 2} if bundles else {}))
    drawn = groups([0, 1, 2, 3], torch.full((4, GROUP_SIZE), reward))
    advantages, metrics = Objective(config, 4).advantages(
        Collected(drawn, drawn, {}), drawn.rewards.matrix, generator(0)
    )
    complaint = without_signal(metrics, config)
    if advantages.abs().max() > 0:
        assert complaint is None
        return
    assert complaint is not None
    assert f"use {questions}" in complaint
    assert ("larger bundles" in complaint) == bundles
    assert ("larger groups" in complaint) != bundles
