"""Which tokens clip_cov and kl_cov hold back: those whose update would take the most entropy."""

import math

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from megatron_riskpo.algorithms.segments import spread


def covariant_tokens(
    old_logprobs: Float[Tensor, " T"],
    advantages: Float[Tensor, " n"],
    response_lengths: Int64[Tensor, " n"],
    fraction: float,
    keep: Bool[Tensor, " T"] | None = None,
) -> Bool[Tensor, " T"]:
    """True at the ceil(fraction T), at least 1, tokens of largest cov_t = (A_t - mean A)(logp_t - mean logp).

    logp are `old_logprobs`, A_t is the advantage of token t's response, means are over tokens. Over a WHOLE mini-batch:
    give it the tokens of all its micro-batches and ranks. Tokens with `keep` False are neither counted nor chosen. Of
    equal covariances the earlier token is taken, and all is computed in float64: any rank finds the same.

    https://arxiv.org/abs/2505.22617 takes the log-probs of the policy as it is by then; with the old ones the choice
    is known before the update and the same for any cut into micro-batches (both are equal until the first optimizer
    step). The paper's Clip-Cov draws at random from a band of covariances; here both methods take the largest, as its
    KL-Cov does.
    """
    num_tokens = old_logprobs.numel()
    chosen = torch.zeros(num_tokens, dtype=torch.bool, device=old_logprobs.device)
    candidates = chosen.logical_not() if keep is None else keep
    places = candidates.nonzero().squeeze(1)
    if not places.numel():
        return chosen
    logprobs = old_logprobs.double()[places]
    token_advantages = spread(advantages.double(), response_lengths, num_tokens)[places]
    covariance = (token_advantages - token_advantages.mean()) * (logprobs - logprobs.mean())
    # Rounded first: in floating point .1 * 3 is more than .3, and ceil() would take a token too many.
    num_chosen = max(math.ceil(round(fraction * places.numel(), 6)), 1)
    order = covariance.sort(descending=True, stable=True).indices
    chosen[places[order[:num_chosen]]] = True
    return chosen
