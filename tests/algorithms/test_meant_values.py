"""Numbers of low precision against the literals that they were made of."""

import pytest
import torch

from megatron_riskpo.algorithms import AlgorithmConfig, compute_advantages
from megatron_riskpo.algorithms.lattice import Lattice
from megatron_riskpo.algorithms.meant_values import as_meant

LOW = [torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", LOW)
def test_decimals_and_fractions_are_what_was_written(dtype: torch.dtype) -> None:
    written = [*(n / 100 for n in range(-100, 101)), *(n / 3 for n in range(-3, 4)), 0.001, 2e-5, 1e4, 2.5]
    values = torch.tensor(written, dtype=torch.float64)
    assert torch.equal(as_meant(values.to(dtype)), values)


@pytest.mark.parametrize("dtype", LOW)
def test_other_numbers_stay_within_their_rounding(dtype: torch.dtype) -> None:
    values = (10 ** torch.linspace(-4, 4, 250, dtype=torch.float64)).to(dtype)
    assert torch.equal(as_meant(values).to(dtype), values)
    many = torch.rand(400, dtype=torch.float32, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert torch.equal(as_meant(many).to(dtype), many)


@pytest.mark.parametrize(
    "values", [torch.tensor([0, 1]), torch.tensor([False, True]), torch.tensor([0.1, 1 / 3]).double()]
)
def test_whole_numbers_and_doubles_are_as_they_are(values: torch.Tensor) -> None:
    assert torch.equal(as_meant(values), values.double())


@pytest.mark.parametrize("bundling", ["random", "self"])
@pytest.mark.parametrize("steps", [10, 100])
@pytest.mark.parametrize("dtype", LOW)
def test_advantages_are_those_of_the_same_rewards_in_float64(dtype: torch.dtype, steps: int, bundling: str) -> None:
    """Tenths in float32 were off the lattice by 1e-8, and went through the one for continuous rewards."""
    rewards = torch.randint(steps + 1, (64, 10), generator=torch.Generator().manual_seed(0)).double() / steps
    assert Lattice.of(as_meant(rewards.to(dtype))).num_steps == steps
    config = AlgorithmConfig(bundling=bundling, bundle_size=4, pairing="complete", baseline="leave_one_out")
    found, expected = (
        compute_advantages(values, config, generator=torch.Generator().manual_seed(1))
        for values in (rewards.to(dtype), rewards)
    )
    assert torch.equal(found.advantages, expected.advantages)
    assert found.metrics == expected.metrics
