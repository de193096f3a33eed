"""pkpo and passk against enumeration: of all subsets of k responses, and of all samples of a small policy."""

import itertools
import math
import statistics
from fractions import Fraction

import pytest
import torch
from torch import Tensor

from megatron_riskpo.algorithms.advantages.pass_at_k import shares_within
from tests.algorithms.advantages.cases import advantages_of, some_rewards


def best_of_tries(row: list[float], k: int, leave_one_out: bool) -> list[float]:
    """pkpo's definition, subset by subset."""
    weights = [0.0] * len(row)
    for chosen in itertools.combinations(range(len(row)), k):
        for i in chosen:
            others = max(row[j] for j in chosen if j != i) if leave_one_out else 0.0
            weights[i] += max(row[j] for j in chosen) - others
    return [weight / math.comb(len(row), k) for weight in weights]


def standardised_groups(row: list[float], k: int) -> list[float]:
    """passk's definition, group by group."""
    groups = list(itertools.combinations(range(len(row)), k))
    rewards = [max(row[i] for i in group) for group in groups]
    mean, std = statistics.mean(rewards), statistics.pstdev(rewards)
    if std == 0:
        return [0.0] * len(row)
    return [
        statistics.mean((reward - mean) / std for group, reward in zip(groups, rewards, strict=True) if i in group)
        for i in range(len(row))
    ]


@pytest.mark.parametrize("kind", ["binary", "plus_minus_one", "continuous"])
@pytest.mark.parametrize(
    ("k", "leave_one_out"), [(k, loo) for k in (1, 2, 3, 6, 7) for loo in (False, True) if k > 1 or not loo]
)
def test_pkpo_against_all_subsets(k: int, leave_one_out: bool, kind: str) -> None:
    rewards = some_rewards(12, 7, seed=k, kind=kind)
    expected = torch.tensor([best_of_tries(row, k, leave_one_out) for row in rewards.tolist()], dtype=torch.float64)
    actual = advantages_of("pkpo", rewards, k=k, pkpo_leave_one_out=leave_one_out)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("values", [[0.0, 1.0, 0.0, 1.0], [-1.0, -1.0, 1.0, -1.0], [0.3, -1.2, 2.0, 0.3]])
@pytest.mark.parametrize("leave_one_out", [False, True])
@pytest.mark.parametrize(("n", "k"), [(4, 2), (5, 3), (4, 4)])
def test_pkpo_is_unbiased_for_the_gradient_of_the_best_of_k(
    values: list[float], leave_one_out: bool, n: int, k: int
) -> None:
    of_action = torch.tensor(values, dtype=torch.float64)
    logits = torch.tensor([0.5, -1.0, 0.2, 0.9], dtype=torch.float64, requires_grad=True)
    (expected,) = torch.autograd.grad(mean_of_best(logits, of_action, k), logits)

    samples = torch.cartesian_prod(*[torch.arange(4)] * n)
    log_probs = logits.log_softmax(0)[samples]
    chances = log_probs.detach().sum(dim=1).exp()
    weights = advantages_of("pkpo", of_action[samples], k=k, pkpo_leave_one_out=leave_one_out)
    (actual,) = torch.autograd.grad((chances * (weights * log_probs).sum(dim=1)).sum(), logits)
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-12)


def mean_of_best(logits: Tensor, of_action: Tensor, k: int) -> Tensor:
    tries = torch.cartesian_prod(*[torch.arange(len(of_action))] * k)
    return (logits.softmax(0)[tries].prod(dim=1) * of_action[tries].amax(dim=1)).sum()


@pytest.mark.parametrize(("n", "c", "k"), [(8, 3, 2), (16, 1, 16), (1024, 5, 4), (1024, 100, 512), (1024, 1000, 24)])
def test_pkpo_of_binary_rewards_is_the_published_formula_for_any_group_size(n: int, c: int, k: int) -> None:
    rewards = torch.zeros(1, n, dtype=torch.float64)
    rewards[0, :c] = 1
    actual = advantages_of("pkpo", rewards, k=k, pkpo_leave_one_out=False)[0]
    if_wrong = Fraction(k, n) * (1 - Fraction(math.comb(n - 1 - c, k - 1), math.comb(n - 1, k - 1)))
    assert torch.equal(actual[:c], torch.full((c,), k / n, dtype=torch.float64))
    torch.testing.assert_close(
        actual[c:], torch.full((n - c,), float(if_wrong), dtype=torch.float64), rtol=1e-12, atol=0
    )


@pytest.mark.parametrize("k", [1, 2, 4, 7])
def test_passk_against_all_groups(k: int) -> None:
    rewards = torch.tensor(list(itertools.product([0.0, 1.0], repeat=7)), dtype=torch.float64)
    expected = torch.tensor([standardised_groups(row, k) for row in rewards.tolist()], dtype=torch.float64)
    torch.testing.assert_close(advantages_of("passk", rewards, k=k), expected, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(advantages_of("passk", 2 * rewards - 1, k=k), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("n", "c", "k"), [(1024, 1, 512), (1024, 30, 300), (1024, 512, 500)])
def test_passk_is_the_published_formula_in_large_groups_too(n: int, c: int, k: int) -> None:
    rewards = torch.zeros(1, n, dtype=torch.float64)
    rewards[0, :c] = 1
    fail = Fraction(math.comb(n - c, k), math.comb(n, k))
    fail_of_wrong = Fraction(math.comb(n - c - 1, k - 1), math.comb(n - 1, k - 1))
    sigma = math.sqrt(fail * (1 - fail))
    of_wrong = torch.tensor(float(fail - fail_of_wrong) / sigma, dtype=torch.float64)
    expected = torch.where(rewards > 0, float(fail) / sigma, of_wrong)
    actual = advantages_of("passk", rewards, k=k)
    assert actual.isfinite().all()
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=0)


@pytest.mark.parametrize("k", [1, 2, 4, 6])
def test_passk_of_any_rewards_against_all_groups(k: int) -> None:
    rewards = torch.rand(40, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(k))
    rewards[::2] = (3 * rewards[::2]).round() / 3
    expected = torch.tensor([standardised_groups(row, k) for row in rewards.tolist()], dtype=torch.float64)
    torch.testing.assert_close(advantages_of("passk", rewards, k=k), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("size", [1e-300, 1e-200, 1e100])
def test_passk_does_not_depend_on_the_unit_of_the_rewards(size: float) -> None:
    rewards = torch.tensor([[0.0, 1.0, 0.5, 0.0, 1.0]], dtype=torch.float64)
    expected = advantages_of("passk", rewards, k=2)
    torch.testing.assert_close(advantages_of("passk", size * rewards, k=2), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize(("total", "size"), [(0, 0), (5, 0), (5, 2), (5, 5), (1023, 17), (1023, 900)])
def test_shares_are_ratios_of_binomial_coefficients(total: int, size: int) -> None:
    expected = [float(Fraction(math.comb(m, size), math.comb(total, size))) for m in range(total + 1)]
    actual = shares_within(total, size)
    torch.testing.assert_close(actual, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=0)
