"""A policy small enough to enumerate: questions that are answered right with given probabilities, rewards 1 and 0.

Its parameters are the logits of the pass rates: grad log pi of an answer with reward r is r - p.
"""

from dataclasses import dataclass
from itertools import product

import torch
from jaxtyping import Float64
from torch import Generator, Tensor

from megatron_riskpo.algorithms import AlgorithmConfig
from megatron_riskpo.algorithms.distribution import Distribution
from megatron_riskpo.algorithms.quantiles import QuantileTracker
from megatron_riskpo.algorithms.spectra import rule_weights, spectrum_of


@dataclass(frozen=True)
class BernoulliPolicy:
    """One bundle of questions."""

    pass_rates: tuple[float, ...]

    @property
    def rates(self) -> Float64[Tensor, " bundle_size"]:
        return torch.tensor(self.pass_rates, dtype=torch.float64)

    def outcomes(self) -> tuple[Float64[Tensor, "num_outcomes bundle_size"], Float64[Tensor, " num_outcomes"]]:
        """All rewards that a bundle can have, and their probabilities."""
        rewards = torch.tensor(list(product((0.0, 1.0), repeat=len(self.pass_rates))), dtype=torch.float64)
        return rewards, torch.where(rewards == 1, self.rates, 1 - self.rates).prod(dim=1)

    def scores(self) -> Distribution:
        """Of the bundle's sum of rewards."""
        rewards, probabilities = self.outcomes()
        atoms = torch.arange(len(self.pass_rates) + 1, dtype=torch.float64)
        masses = torch.zeros_like(atoms).index_add_(0, rewards.sum(dim=1).long(), probabilities)
        return Distribution.of_masses(atoms, masses[None])

    def gradient(self, config: AlgorithmConfig) -> Float64[Tensor, " bundle_size"]:
        """Of config's risk measure of the bundle's score with respect to the logits: E[psi(S) grad log pi], exact."""
        rewards, probabilities = self.outcomes()
        psi = rule_weights(rewards.sum(dim=1)[None], self.scores(), spectrum_of(config).density)[0]
        return (probabilities * psi) @ (rewards - self.rates)

    def tracker(self, config: AlgorithmConfig) -> QuantileTracker:
        """The true quantiles at alpha and beta."""
        return QuantileTracker.start(self.scores(), (config.alpha, config.beta))

    def answers(
        self, num_bundles: int, group_size: int, generator: Generator
    ) -> Float64[Tensor, "num_questions group_size"]:
        """Rewards of group_size answers to each question, num_bundles times over."""
        rates = self.rates.repeat(num_bundles)[:, None]
        uniform = torch.rand(len(rates), group_size, dtype=torch.float64, generator=generator)
        return (uniform < rates).double()

    def gradient_estimates(
        self, rewards: Float64[Tensor, "num_questions group_size"], advantages: Tensor
    ) -> Float64[Tensor, "num_bundles bundle_size"]:
        """(1/G) sum of A (r - p) over the answers to each question of each bundle."""
        shape = (-1, len(self.pass_rates), rewards.size(1))
        return (advantages.view(shape) * (rewards.view(shape) - self.rates[:, None])).mean(dim=2)

    def estimates_of_many_answers(
        self,
        rewards: Float64[Tensor, "num_questions group_size"],
        advantages: Tensor,
        num_wrong: int,
        generator: Generator,
    ) -> Float64[Tensor, "num_bundles parameters"]:
        """The same for a softmax over one right answer and num_wrong wrong ones, equally likely: a logit an answer,
        grad log pi = its one-hot vector less the probabilities. With one wrong answer this says what
        `gradient_estimates` says."""
        num_questions, group_size = rewards.shape
        chosen = torch.randint(1, num_wrong + 1, rewards.shape, generator=generator).masked_fill(rewards == 1, 0)
        sums = torch.zeros(num_questions, num_wrong + 1, dtype=torch.float64).scatter_add_(1, chosen, advantages)
        right = self.rates.repeat(num_questions // len(self.pass_rates))[:, None]
        probabilities = torch.cat([right, ((1 - right) / num_wrong).expand(-1, num_wrong)], dim=1)
        estimates = (sums - advantages.sum(dim=1, keepdim=True) * probabilities) / group_size
        return estimates.view(-1, len(self.pass_rates) * (num_wrong + 1))
