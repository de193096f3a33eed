"""How hard each question is for the policy: a running mean of its rewards, by which bundles of like questions form."""

import base64
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float64
from torch import Tensor

from megatron_riskpo.errors import UsageError


@dataclass(frozen=True)
class PassRates:
    """A question's rate moves by new = old + step * (mean reward - old); its first observation sets it.

    Immutable: `update` gives the next one. Start with `PassRates.start`.
    """

    rates: Float64[Tensor, " num_questions"]
    """By question index, in the unit of the rewards; NaN: not seen yet."""
    step: float
    """Weight of the newest observation, 0 < step <= 1."""

    @classmethod
    def start(cls, num_questions: int, step: float) -> "PassRates":
        """Nothing seen."""
        return cls(torch.full((num_questions,), torch.nan, dtype=torch.float64), step)

    def of(self, rows: Sequence[int]) -> Float64[Tensor, " n"]:
        """The rates of the questions with these indices; NaN where there is none yet."""
        return self.rates[torch.as_tensor(rows, dtype=torch.int64)]

    def update(self, rows: Sequence[int], rewards: Float[Tensor, "n group_size"]) -> "PassRates":
        """Observe the rewards of the responses to question rows[i] in row i.

        The groups of a question that is there twice are one observation: the same policy answered all of them.
        """
        seen, group = torch.as_tensor(rows, dtype=torch.int64).unique(return_inverse=True)
        means = rewards.double().mean(dim=1)
        sums = torch.zeros(seen.numel(), dtype=torch.float64).index_add_(0, group, means)
        observed = sums / group.bincount(minlength=seen.numel())
        old = self.rates[seen]
        rates = self.rates.clone()
        rates[seen] = torch.where(old.isnan(), observed, old + self.step * (observed - old))
        return PassRates(rates, self.step)

    def state_dict(self) -> dict[str, Any]:
        """JSON-able, bit-exact: the rates as little-endian float64, compressed, in base 64."""
        content = zlib.compress(self.rates.numpy().astype("<f8").tobytes())
        return {"num_questions": self.rates.numel(), "rates": base64.b64encode(content).decode("ascii")}

    @classmethod
    def from_state_dict(cls, state: dict[str, Any], num_questions: int, step: float) -> "PassRates":
        """The inverse of `state_dict`. Raises UsageError where the state is that of another number of questions."""
        if state["num_questions"] != num_questions:
            raise UsageError(
                f"the checkpoint's pass rates are of {state['num_questions']} questions, this run has {num_questions}; "
                "restore the data, or start with run.resume never"
            )
        content = zlib.decompress(base64.b64decode(state["rates"]))
        return cls(torch.from_numpy(np.frombuffer(content, dtype="<f8").astype(np.float64)), step)
