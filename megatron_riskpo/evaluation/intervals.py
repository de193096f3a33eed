"""95 % intervals by the bootstrap over questions: what would come out with other questions of the same kind.

All columns of a table are resampled together, so that metrics of one evaluation, and two evaluations of the same
questions, are paired. The resamples depend on the number of questions only: the same table gives the same interval.

Which bootstrap: docs/evaluation.md has the measured coverage. With few questions the plain percentile interval of a
share covers the truth too rarely near 0 and 1: where all questions have one value it is a single point. Each of the
three has its own remedy.
"""

from collections.abc import Iterator
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from megatron_riskpo.errors import UsageError

LEVEL = 0.95
NUM_RESAMPLES = 2000
RESAMPLING_SEED = 95

Table = NDArray[np.float64]


def share_intervals(values: Table) -> Table:
    """[num_columns, 2]: low and high of the mean of each column, for values in [0, 1] [num_questions, num_columns].

    The Bayesian bootstrap (Rubin, The Annals of Statistics 9, 1981), with half a question of value 0 and half a one of
    value 1 beside those that were asked. Where all values are 0 or 1 this is Jeffreys' interval of a proportion (Brown,
    Cai and DasGupta, Statistical Science 16, 2001): with q questions that are all solved about [1 - 2.5 / q, 1].
    """
    return _percentiles(bayesian_means(values), (1 - LEVEL) / 2)


def difference_intervals(differences: Table) -> Table:
    """The same for differences in [-1, 1] between two shares of the same question: the percentile bootstrap over the
    questions and two more, of differences -1/2 and 1/2 (for matched pairs: Agresti and Min, Statistics in Medicine 24,
    2005)."""
    more = np.array([[-0.5], [0.5]]).repeat(differences.shape[1], axis=1)
    return _percentiles(bootstrap_means(np.vstack([differences, more])), (1 - LEVEL) / 2)


def mean_intervals(values: Table) -> Table:
    """The same for values without bounds: the expanded percentile bootstrap (Hesterberg, The American Statistician
    69, 2015, section 5.3), as much wider than the percentile one as Student's t with the unbiased variance is wider
    than the normal distribution."""
    num = len(values)
    if num < 2:
        return np.stack([values.mean(axis=0)] * 2, axis=1)
    width = student_quantile(0.5 + LEVEL / 2, num - 1) * (num / (num - 1)) ** 0.5
    return _percentiles(bootstrap_means(values), NormalDist().cdf(-width))


def bootstrap_means(values: Table) -> Table:
    """[NUM_RESAMPLES, num_columns]: column means of as many questions, drawn with replacement from the table's rows."""
    num = len(values)
    even = np.full(num, 1 / num)
    return np.vstack([generator.multinomial(num, even, size=size) @ values for generator, size in _blocks(num)]) / num


def bayesian_means(values: Table) -> Table:
    """The same with weights drawn for the questions: Dirichlet, 1 each and 1/2 for a value of 0 and for one of 1."""
    means = []
    for generator, size in _blocks(len(values)):
        weights = generator.standard_exponential((size, len(values)))
        zero, one = generator.gamma(0.5, size=(2, size, 1))
        means.append((weights @ values + one) / (weights.sum(axis=1, keepdims=True) + zero + one))
    return np.vstack(means)


def _blocks(num: int) -> Iterator[tuple[np.random.Generator, int]]:
    """The generator, and how many of the NUM_RESAMPLES to draw at a time: 128 MiB of weights."""
    if num == 0:
        raise UsageError("there is no question to make an interval of")
    generator = np.random.default_rng([RESAMPLING_SEED, num])
    block = max(1, 2**24 // num)
    return ((generator, min(block, NUM_RESAMPLES - start)) for start in range(0, NUM_RESAMPLES, block))


def student_quantile(probability: float, degrees: int) -> float:
    """Quantile of Student's t by its expansion around the normal one (Abramowitz and Stegun, 26.7.5); for .975 within
    .2 % from 5 degrees of freedom on."""
    z = NormalDist().inv_cdf(probability)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum(term / degrees ** (power + 1) for power, term in enumerate(terms))


def _percentiles(means: Table, tail: float) -> Table:
    return np.quantile(means, (tail, 1 - tail), axis=0).T
