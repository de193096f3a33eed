"""From a step's rewards to its advantages, with all that the objective carries from step to step."""

from dataclasses import dataclass
from typing import Any

from torch import Generator, Tensor

from megatron_riskpo.algorithms import AlgorithmConfig, QuantileTracker, compute_advantages
from megatron_riskpo.algorithms.advantages import ESTIMATORS
from megatron_riskpo.algorithms.diagnostics import EFFECTIVE_WEIGHT, effective_weights, reward_metrics
from megatron_riskpo.algorithms.pass_rates import PassRates
from megatron_riskpo.collect import Collected

DRIFTING = ("risk/q_alpha", "risk/q_beta")


@dataclass
class Objective:
    """Mutable: `advantages` moves it on by one step. Every rank holds the same."""

    config: AlgorithmConfig
    num_questions: int
    tracker: QuantileTracker | None = None
    pass_rates: PassRates | None = None
    """Kept for bundling = sorted."""
    quantiles: dict[str, float] | None = None
    """The quantiles that the last step used, by metric."""

    def __post_init__(self) -> None:
        if self.config.bundling == "sorted":
            self.pass_rates = PassRates.start(self.num_questions, self.config.pass_rate_step)

    def advantages(self, collected: Collected, shaped: Tensor, generator: Generator) -> tuple[Tensor, dict[str, float]]:
        """Float64 [num_prompts, group_size] of the batch, from its shaped rewards; metrics reward/* and risk/*.

        reward/* but for reward/shaped_mean are those of the graders, of all responses that were sampled.
        risk/effective_weight/* are by the graded rewards, too: a penalty does not make a right answer wrong.
        """
        batch, drawn = collected.batch, collected.drawn
        # From the steps before: a question's own rewards must not choose the bundle that they are weighed in.
        pass_rates = self.pass_rates.of(batch.rows) if self.pass_rates is not None else None
        estimate = compute_advantages(
            shaped, self.config, tracker=self.tracker, lengths=batch.lengths, pass_rates=pass_rates, generator=generator
        )
        self.tracker = estimate.tracker
        if self.pass_rates is not None:
            self.pass_rates = self.pass_rates.update(drawn.rows, drawn.rewards.matrix)
        metrics = {key: value for key, value in estimate.metrics.items() if not key.startswith(EFFECTIVE_WEIGHT)}
        metrics |= reward_metrics(drawn.rewards.matrix) | effective_weights(batch.rewards.matrix, estimate.advantages)
        metrics |= {
            "reward/errors": float(drawn.rewards.errors.sum()),
            "reward/shaped_mean": float(shaped.mean()),
            **self._drift(estimate.metrics),
        }
        return estimate.advantages, metrics

    def _drift(self, metrics: dict[str, float]) -> dict[str, float]:
        """How far the quantiles in use moved since the last step; nothing at the first."""
        before, self.quantiles = self.quantiles, {key: metrics[key] for key in DRIFTING}
        return {f"{key}_drift": metrics[key] - before[key] for key in DRIFTING} if before is not None else {}

    def state_dict(self) -> dict[str, Any]:
        """JSON-able, bit-exact."""
        return {
            "tracker": self.tracker.state_dict() if self.tracker is not None else None,
            "pass_rates": self.pass_rates.state_dict() if self.pass_rates is not None else None,
            "quantiles": self.quantiles,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken; what is None there starts anew. Raises UsageError if it is of another number
        of questions."""
        self.tracker = QuantileTracker.from_state_dict(state["tracker"]) if state["tracker"] is not None else None
        if self.pass_rates is not None and state["pass_rates"] is not None:
            self.pass_rates = PassRates.from_state_dict(
                state["pass_rates"], self.num_questions, self.config.pass_rate_step
            )
        self.quantiles = state["quantiles"]


def without_signal(metrics: dict[str, float], config: AlgorithmConfig) -> str | None:
    """What to say of a step that has nothing to learn from: a run in that state may not leave it by itself."""
    if metrics["risk/zero_advantage_share"] < 1:
        return None
    questions = "harder questions" if metrics["reward/solve_all"] > metrics["reward/solve_none"] else "easier questions"
    has_bundles = "bundle_size" in ESTIMATORS[config.estimator].options
    # Sparse rewards: all scores at or below q_beta are 0, of which a larger bundle has fewer.
    remedy = "larger bundles, or a larger algorithm.beta" if has_bundles else "or larger groups"
    return (
        f"all advantages are 0, nothing to learn (mean reward {metrics['reward/mean']:.3f}, "
        f"q_beta {metrics['risk/q_beta']:g}); use {questions}, {remedy}"
    )
