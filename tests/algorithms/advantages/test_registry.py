"""What every entry of the registry owes: a line for the user, options that exist, finite advantages."""

from dataclasses import fields

import pytest
import torch

from megatron_riskpo.algorithms.advantages.registry import ESTIMATORS
from megatron_riskpo.algorithms.config import AlgorithmConfig
from tests.algorithms.advantages.cases import advantages_of, some_rewards


@pytest.mark.parametrize("name", ESTIMATORS)
def test_described_in_a_line_with_its_source(name: str) -> None:
    assert "\n" not in ESTIMATORS[name].description
    assert "(arXiv " in ESTIMATORS[name].description


def test_options_are_options_and_each_belongs_to_an_estimator() -> None:
    read = frozenset().union(*(entry.options for entry in ESTIMATORS.values()))
    assert read | {"estimator", "alpha", "beta", "omega"} == {item.name for item in fields(AlgorithmConfig)}


@pytest.mark.parametrize("name", ESTIMATORS)
def test_an_estimator_reads_no_option_that_it_does_not_name(name: str) -> None:
    others = {
        "spectrum": "mean", "k": 2, "bundle_size": 2, "bundling": "self", "remainder": "drop", "pairing": "complete",
        "baseline": "mean", "scale": "batch_std", "scale_floor": 0.5, "quantile_level": 0.7, "risk_temperature": 5.0,
        "pkpo_leave_one_out": False, "reference_credit": "std", "reference_mix_weight": 0.5,
        "reference_natural_baseline": False, "quantile_source": "bundle", "pass_rate_step": 0.9, "tracker_step": 0.7,
        "tracker_decay": 0.9,
    }  # fmt: skip
    rewards = some_rewards(10, 6, seed=0, kind="binary")
    lengths = torch.arange(1, 61).view(10, 6)
    unread = {option: value for option, value in others.items() if option not in ESTIMATORS[name].options}
    torch.manual_seed(0)
    expected = advantages_of(name, rewards, lengths)
    torch.manual_seed(0)
    assert torch.equal(advantages_of(name, rewards, lengths, **unread), expected)


@pytest.mark.parametrize("name", ESTIMATORS)
@pytest.mark.parametrize("kind", ["binary", "plus_minus_one", "equal"])
def test_finite_float64_of_the_shape_of_the_rewards(name: str, kind: str) -> None:
    rewards = torch.full((10, 6), 0.1, dtype=torch.float64) if kind == "equal" else some_rewards(10, 6, 0, kind)
    before = rewards.clone()
    advantages = advantages_of(name, rewards, torch.full((10, 6), 9))
    assert advantages.shape == rewards.shape
    assert advantages.dtype == torch.float64
    assert advantages.isfinite().all()
    assert torch.equal(rewards, before)
