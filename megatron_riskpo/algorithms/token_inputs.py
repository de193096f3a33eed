"""What the policy loss takes beside log-probs and advantages: values a response token that stay fixed in an update."""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor


@dataclass(frozen=True)
class TokenInputs:
    """T response tokens, flat, in the order of their responses; every field may be missing."""

    old_logprobs: Float[Tensor, " T"] | None = None
    """Of the policy before the update; None: of the policy itself, detached (one mini-batch a step)."""
    ref_logprobs: Float[Tensor, " T"] | None = None
    """Of the frozen reference model (KL)."""
    weights: Float[Tensor, " T"] | None = None
    """Factor of each token's surrogate objective (mismatch correction); None: 1."""
    keep: Bool[Tensor, " T"] | None = None
    """False: the token leaves the loss and its denominator (mismatch correction)."""
    penalised: Bool[Tensor, " T"] | None = None
    """Tokens of the largest covariance of log-prob and advantage (clip_cov, kl_cov)."""

    def select(self, response_lengths: Int64[Tensor, " n"], rows: Sequence[int]) -> "TokenInputs":
        """The tokens of the given responses, in the given order; `response_lengths` are those of all responses."""
        lengths = response_lengths.tolist()

        def chosen(values: Tensor | None) -> Tensor | None:
            if values is None:
                return None
            pieces = values.split(lengths)
            return torch.cat([pieces[row] for row in rows])

        return TokenInputs(**{item.name: chosen(getattr(self, item.name)) for item in fields(self)})

    def to(self, device: torch.device) -> "TokenInputs":
        """The same on a device."""
        values = {item.name: getattr(self, item.name) for item in fields(self)}
        return TokenInputs(**{name: value if value is None else value.to(device) for name, value in values.items()})
