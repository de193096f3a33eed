"""Unbiased pass@k (Chen et al. 2021, arXiv 2107.03374, equation 1)."""

from collections.abc import Iterable

import numpy as np
from numpy.typing import ArrayLike, NDArray

from megatron_riskpo.errors import UsageError


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """Probability that k of the n samples, drawn without replacement, hold a correct one: 1 - C(n-c, k) / C(n, k).

    As a product of c factors below 1, since the binomials overflow. Raises UsageError unless 1 <= k <= n, 0 <= c <= n.
    """
    if not (1 <= k <= num_samples and 0 <= num_correct <= num_samples):
        raise UsageError(
            f"pass@{k} of {num_samples} samples with {num_correct} correct does not exist; "
            "k must be between 1 and evaluation.num_samples"
        )
    if num_samples - num_correct < k:
        return 1.0
    return 1.0 - float(np.prod(1.0 - k / np.arange(num_samples - num_correct + 1, num_samples + 1)))


def question_pass_at_k(correct: ArrayLike, ks: Iterable[int]) -> NDArray[np.float64]:
    """[num_questions, len(ks)]: pass@k of each question, from correct bool [num_questions, num_samples]."""
    table = np.asarray(correct, dtype=bool)
    if table.ndim != 2 or 0 in table.shape:
        raise UsageError(f"pass@k needs a [questions, samples] table with entries; this one has shape {table.shape}")
    num_samples = table.shape[1]
    by_count = np.array([[pass_at_k(num_samples, c, k) for k in ks] for c in range(num_samples + 1)])
    return by_count[table.sum(axis=1)]
