"""Random numbers and token choice of the built-in sampler: a function of seed, response and position, nothing else."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def response_uniforms(seeds: Sequence[int], group_size: int, num_tokens: int) -> NDArray[np.float64]:
    """float64 [len(seeds) * group_size, num_tokens] in [0, 1): row p*G+g is the stream of response g to prompt p.

    Philox is counter-based and (seed, g) is its key: streams of neighbouring seeds have nothing in common, and a
    response's numbers depend neither on its batch nor on the layout (https://doi.org/10.1145/2063384.2063405).
    """
    keys = [np.array([seed, g], dtype=np.uint64) for seed in seeds for g in range(group_size)]
    rows = [np.random.Generator(np.random.Philox(key=key)).random(num_tokens) for key in keys]
    return np.stack(rows) if rows else np.empty((0, num_tokens))


def choose_tokens(logits: Tensor, uniforms: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Token ids int64 [b] and their log-probs float32 [b], from logits [b, v] by inverting the CDF at `uniforms`
    (float64 [b], in [0, 1)).

    The log-probs are those of softmax(logits / temperature). Temperature 0 takes the largest logit (the first of
    equals) and reports its log-prob at temperature 1.
    """
    if temperature == 0:
        logprobs = logits.float().log_softmax(-1)
        ids = logits.argmax(-1, keepdim=True)
    else:
        logprobs = (logits.float() / temperature).log_softmax(-1)
        # float64: over a large vocabulary a float32 sum could skip tokens of small probability.
        cdf = logprobs.exp().cumsum(-1, dtype=torch.float64)
        # right=True: the first entry above the threshold, so one with probability 0 is never taken.
        ids = torch.searchsorted(cdf, uniforms[:, None] * cdf[:, -1:], right=True).clamp_(max=logits.size(1) - 1)
    return ids[:, 0], logprobs.gather(-1, ids)[:, 0]
