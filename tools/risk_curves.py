"""The numbers behind docs/risk.md: psi of a score, and how strongly an objective pushes questions of each pass rate."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float64
from torch import Generator, Tensor

from megatron_riskpo.algorithms import AlgorithmConfig, compute_advantages
from megatron_riskpo.algorithms.distribution import Distribution
from megatron_riskpo.algorithms.spectra import rule_weights, spectrum_of, step_weights

NUM_BLOCKS = 10
"""A simulation is cut into so many parts, whose spread gives the standard error."""


def binomial_scores(bundle_size: int, pass_rate: float) -> Distribution:
    """Scores of bundles of answers with rewards 0 and 1 that are all right with the same probability."""
    hits = range(bundle_size + 1)
    masses = [math.comb(bundle_size, n) * pass_rate**n * (1 - pass_rate) ** (bundle_size - n) for n in hits]
    atoms = torch.arange(bundle_size + 1, dtype=torch.float64)
    return Distribution.of_masses(atoms, torch.tensor([masses], dtype=torch.float64))


def spectrum_curve(config: AlgorithmConfig, levels: Float64[Tensor, " n"]) -> Float64[Tensor, " n"]:
    """phi at quantile levels 0 <= u < 1."""
    return spectrum_of(config).density(levels)


def weight_curve(config: AlgorithmConfig, scores: Distribution, values: Float64[Tensor, " n"]) -> Float64[Tensor, " n"]:
    """psi of each score under the distribution of scores (one row), as the estimator riskpo computes it."""
    spectrum = spectrum_of(config)
    if spectrum.steps is None:
        return rule_weights(values[None], scores, spectrum.density)[0]
    return step_weights(values[None], spectrum.steps, [scores.quantile(level) for level, _ in spectrum.steps])[0]


@dataclass(frozen=True)
class Batch:
    """Steps of one batch of questions, as a simulation draws them: rewards are 0 or 1, answers are independent."""

    pass_rates: tuple[float, ...] = tuple((n + 0.5) / 10 for n in range(10))
    """0.05, 0.15 ... 0.95."""
    num_questions: tuple[int, ...] = (50,) * 10
    """Of each pass rate."""
    group_size: int = 10
    num_steps: int = 600
    """A multiple of NUM_BLOCKS."""


@dataclass(frozen=True)
class EffectiveWeights:
    """Of each pass rate, relative to those next to 0.5."""

    weights: tuple[float, ...]
    standard_errors: tuple[float, ...]


def effective_weights(config: AlgorithmConfig, batch: Batch = Batch(), seed: int = 0) -> EffectiveWeights:
    """The coefficient of each question's own REINFORCE gradient, E[A | right] - E[A | wrong].

    A policy that answers right with probability p has the expected gradient E[A grad log pi] = (that coefficient) times
    grad p: 1 for the mean objective. The metrics risk/effective_weight/* estimate the same from one batch as long as
    what a question's advantages have in common does not depend on its own rewards: they are slopes within a question.
    Under the natural baseline the quantiles of the question alone (self bundles, quantile_source bundle) do depend on
    them. Bundling `sorted` gets the mean reward of as many answers of a step before as pass rate.
    """
    generator = torch.Generator().manual_seed(seed)
    sums = torch.stack([_one_step(config, batch, generator) for _ in range(batch.num_steps)])
    blocks = torch.stack([_relative(_slopes(block), batch) for block in sums.chunk(NUM_BLOCKS)])
    errors = blocks.std(dim=0) / math.sqrt(NUM_BLOCKS)
    return EffectiveWeights(tuple(_relative(_slopes(sums), batch).tolist()), tuple(errors.tolist()))


def _one_step(config: AlgorithmConfig, batch: Batch, generator: Generator) -> Float64[Tensor, "2 2 num_rates"]:
    """[number of answers, sum of advantages] x [wrong, right] x pass rate."""
    rates = torch.tensor(batch.pass_rates, dtype=torch.float64)
    kinds = torch.arange(len(rates)).repeat_interleave(torch.tensor(batch.num_questions))
    # In the order that a data set would have: the released code takes neighbours as they come.
    kinds = kinds[torch.randperm(len(kinds), generator=generator)]
    rewards, earlier = (
        (torch.rand(len(kinds), batch.group_size, generator=generator) < rates[kinds, None]).double() for _ in range(2)
    )
    outputs = compute_advantages(rewards, config, pass_rates=earlier.mean(dim=1), generator=generator)
    sums = torch.zeros(2, 2, len(rates), dtype=torch.float64)
    for outcome in (0, 1):
        chosen = rewards == outcome
        sums[0, outcome].index_add_(0, kinds, chosen.sum(dim=1).double())
        sums[1, outcome].index_add_(0, kinds, (outputs.advantages * chosen).sum(dim=1))
    return sums


def _slopes(sums: Float64[Tensor, "num_steps 2 2 num_rates"]) -> Float64[Tensor, " num_rates"]:
    counts, totals = sums.sum(dim=0)
    wrong, right = totals / counts
    return right - wrong


def _relative(slopes: Float64[Tensor, " num_rates"], batch: Batch) -> Float64[Tensor, " num_rates"]:
    middle = [abs(rate - 0.5) < 0.1 for rate in batch.pass_rates]
    return slopes / slopes[torch.tensor(middle)].mean()


def table(header: Sequence[str], rows: dict[str, Sequence[float]], digits: int = 2) -> str:
    """Markdown."""
    lines = [f"| {' | '.join(header)} |", "|" + "---|" * len(header)]
    lines += [f"| {name} | {' | '.join(f'{value:.{digits}f}' for value in values)} |" for name, values in rows.items()]
    return "\n".join(lines)
