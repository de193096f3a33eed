"""How far the trainer's log-probs are from those the responses were sampled with."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64
from torch import Tensor


@dataclass(frozen=True)
class MismatchSums:
    """What adds up over micro-batches and ranks: reduce `sums` by SUM, `largest` by MAX."""

    sums: Float64[Tensor, " 4"]
    """Number of tokens, sum of |d|, of k1 and of k3."""
    largest: Float64[Tensor, ""]
    """Largest |d|."""

    def __add__(self, other: "MismatchSums") -> "MismatchSums":
        return MismatchSums(self.sums + other.sums, torch.maximum(self.largest, other.largest))

    def metrics(self) -> dict[str, float]:
        """mismatch/logprob_abs_mean, mismatch/logprob_abs_max, mismatch/k1, mismatch/k3, in nats a token."""
        num_tokens, absolute, k1, k3 = self.sums.tolist()
        num_tokens = max(num_tokens, 1)
        return {
            "mismatch/logprob_abs_mean": absolute / num_tokens,
            "mismatch/logprob_abs_max": float(self.largest),
            "mismatch/k1": k1 / num_tokens,
            "mismatch/k3": k3 / num_tokens,
        }


def mismatch_sums(rollout_logprobs: Float[Tensor, " T"], trainer_logprobs: Float[Tensor, " T"]) -> MismatchSums:
    """Sums over response tokens, with d = trainer - rollout.

    The tokens were sampled by the rollout engine, so k1 = -d and k3 = exp(d) - d - 1 both estimate
    KL(rollout || trainer) (http://joschu.net/blog/kl-approx.html). float64: differences of 1e-6 are what is measured.
    """
    difference = trainer_logprobs.detach().double() - rollout_logprobs.detach().double()
    absolute = difference.abs()
    k3 = difference.clamp(-20, 20).expm1() - difference.clamp(-20, 20)
    num_tokens = torch.tensor(float(difference.numel()), dtype=torch.float64, device=difference.device)
    sums = torch.stack([num_tokens, absolute.sum(), -difference.sum(), k3.sum()])
    return MismatchSums(sums, absolute.max() if absolute.numel() else num_tokens)
