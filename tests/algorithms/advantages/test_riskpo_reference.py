"""riskpo_reference against a loop over bundles, papers and responses that was written apart from it."""

import random

import pytest
import torch
from torch import Tensor

from tests.algorithms.advantages.cases import advantages_of, some_rewards
from tools.benchmark.released_loop import released_advantages

CREDITS = ["uniform", "score", "std", "sum_mean"]


def both(rewards: Tensor, credit: str, alpha: float, beta: float, bundle_size: int, mix: float, natural: bool):
    fast = advantages_of(
        "riskpo_reference", rewards, alpha=alpha, beta=beta, bundle_size=bundle_size,
        reference_credit=credit, reference_mix_weight=mix, reference_natural_baseline=natural,
    )  # fmt: skip
    return fast, released_advantages(rewards, alpha, beta, bundle_size, mix, natural, credit)


@pytest.mark.parametrize("credit", CREDITS)
@pytest.mark.parametrize("kind", ["binary", "plus_minus_one", "continuous"])
@pytest.mark.parametrize("natural", [True, False])
def test_against_the_loop(credit: str, kind: str, natural: bool) -> None:
    """24 cases of 9 batches each: over 200, of every bundle size from 1 to more than there are questions."""
    choose = random.Random(f"{credit} {kind} {natural}")
    for seed in range(9):
        num_prompts, group_size = choose.randint(1, 11), choose.choice([1, 2, 3, 5, 10])
        rewards = some_rewards(num_prompts, group_size, seed, kind)
        alpha = choose.uniform(0.05, 0.5)
        beta = choose.uniform(alpha + 0.05, 1)
        fast, slow = both(rewards, credit, alpha, beta, choose.randint(1, 6), choose.uniform(0, 3), natural)
        torch.testing.assert_close(fast, slow, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("credit", CREDITS)
@pytest.mark.parametrize("group_size", [1, 4])
@pytest.mark.parametrize("value", [0.1, 1.0, 0.0])
def test_equal_rewards_give_finite_advantages(credit: str, group_size: int, value: float) -> None:
    fast, slow = both(torch.full((7, group_size), value, dtype=torch.float64), credit, 0.2, 0.8, 3, 1.5, True)
    assert fast.isfinite().all()
    torch.testing.assert_close(fast, slow, rtol=1e-6, atol=1e-6)


def test_one_bundle_by_hand() -> None:
    """Two questions, three papers of scores 0, 1, 2: q_a = .4, q_b = 1.6, std 1."""
    rewards = torch.tensor([[0.0, 1.0, 1.0], [0.0, 0.0, 1.0]], dtype=torch.float64)
    fast, _ = both(rewards, "uniform", 0.2, 0.8, 2, 1.5, natural=False)
    of_papers = [1.5 * (-0.4 / 0.2) / 2.5, (0.6 / 0.6) / 2.5, (1.2 / 0.6) / 2.5]
    torch.testing.assert_close(fast, torch.tensor([of_papers, of_papers], dtype=torch.float64), rtol=1e-5, atol=0)


def test_a_paper_whose_deviations_cancel_is_shared_equally_by_the_questions_of_its_bundle() -> None:
    """Two of bundle_size 3: the middle paper's deviations are -1/3 and 1/3, its advantage 1 / 2.5."""
    rewards = torch.tensor([[0.0, 0.0, 1.0], [0.0, 1.0, 1.0]], dtype=torch.float64)
    for advantages in both(rewards, "sum_mean", 0.2, 0.8, 3, 1.5, natural=False):
        torch.testing.assert_close(advantages[:, 1], torch.full((2,), 0.2, dtype=torch.float64), rtol=1e-5, atol=0)


def test_the_order_of_the_questions_matters_here() -> None:
    """Papers are made by row order, without a permutation: the comparison would be of something else if it did not."""
    rewards = some_rewards(6, 5, seed=0)
    fast, _ = both(rewards, "uniform", 0.2, 0.8, 2, 1.5, True)
    moved, _ = both(rewards[[0, 2, 1, 3, 4, 5]], "uniform", 0.2, 0.8, 2, 1.5, True)
    assert not torch.allclose(moved[[0, 2, 1, 3, 4, 5]], fast)
