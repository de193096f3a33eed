"""What advantages.py measures: rewards of a step, and every estimator with options that fit them."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Literal

import torch
from jaxtyping import Float64, Int64
from torch import Tensor

from megatron_riskpo.algorithms import AlgorithmConfig
from megatron_riskpo.algorithms.advantages import ESTIMATORS

GOAL = 300
"""Times as fast as the released code's loop: of every estimator, its metrics included."""
COMPLETE_GOAL = 100
"""The same with complete pairing."""
CREDITS = ("sum_mean", "uniform", "score", "std")
"""Of the released code; the first is its default for hard questions, and what estimators are compared with."""


@dataclass(frozen=True)
class Case:
    """An estimator with its options."""

    label: str
    config: AlgorithmConfig
    goal: int = GOAL
    rewards: Literal["binary", "continuous"] = "binary"

    @property
    def credit(self) -> str:
        """The loop to compare with: the one that does the same where there is one."""
        return self.config.reference_credit if self.config.estimator == "riskpo_reference" else CREDITS[0]


@dataclass(frozen=True)
class Batch:
    """One step's answers."""

    binary: Float64[Tensor, "num_prompts group_size"]
    """0 or 1, pass rates uniform between 0 and 1."""
    continuous: Float64[Tensor, "num_prompts group_size"]
    """Uniform between 0 and twice the pass rate: no two alike."""
    lengths: Int64[Tensor, "num_prompts group_size"]
    pass_rates: Float64[Tensor, " num_prompts"]
    """What as many answers of an earlier step scored."""

    @classmethod
    def draw(cls, num_prompts: int, group_size: int, seed: int = 0) -> "Batch":
        generator = torch.Generator().manual_seed(seed)

        def uniform(*shape: int) -> Tensor:
            return torch.rand(shape, dtype=torch.float64, generator=generator)

        shape, rates = (num_prompts, group_size), uniform(num_prompts, 1)
        return cls(
            binary=(uniform(*shape) < rates).double(),
            continuous=2 * rates * uniform(*shape),
            lengths=torch.randint(1, 3072, shape, generator=generator),
            pass_rates=(uniform(*shape) < rates).double().mean(dim=1),
        )

    def rewards(self, case: Case) -> Float64[Tensor, "num_prompts group_size"]:
        return self.binary if case.rewards == "binary" else self.continuous


def all_cases() -> list[Case]:
    """Every estimator of the registry."""
    others = [name for name in ESTIMATORS if name not in ("riskpo", "riskpo_reference")]
    return [
        *(_riskpo(*options) for options in product(*_RISKPO_OPTIONS.values())),
        _riskpo("permutation", "random", "global", spectrum="max_at_k"),
        _riskpo("permutation", "random", "global", baseline="leave_one_out"),
        _riskpo("permutation", "random", "global", baseline="mean", scale="batch_std"),
        *(_riskpo("complete", bundling, "global", "continuous") for bundling in _RISKPO_OPTIONS["bundling"]),
        *(_reference(credit) for credit in CREDITS),
        *(Case(name, AlgorithmConfig(estimator=name)) for name in others),
    ]


_RISKPO_OPTIONS: dict[str, Sequence[str]] = {
    "pairing": ("permutation", "complete"),
    "bundling": ("random", "sorted", "self"),
    "quantile_source": ("global", "tracked", "bundle"),
}


def _riskpo(
    pairing: str,
    bundling: str,
    source: str,
    rewards: Literal["binary", "continuous"] = "binary",
    **options: str,
) -> Case:
    config = AlgorithmConfig(pairing=pairing, bundling=bundling, quantile_source=source, **options)
    words = ["riskpo", pairing, bundling, source, *options.values()]
    words += [rewards] if rewards == "continuous" else []
    return Case(" ".join(words), config, COMPLETE_GOAL if pairing == "complete" else GOAL, rewards)


def _reference(credit: str) -> Case:
    return Case(f"riskpo_reference {credit}", AlgorithmConfig(estimator="riskpo_reference", reference_credit=credit))
