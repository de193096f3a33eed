"""How advantages.py measures: seconds of estimators, of their parts and of the released loop."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from statistics import median

import torch
from advantage_cases import CREDITS, Batch, Case
from released_loop import released_advantages
from torch import Tensor

from megatron_riskpo.algorithms import AlgorithmConfig, compute_advantages
from megatron_riskpo.algorithms.advantages import ESTIMATORS
from megatron_riskpo.algorithms.advantages.contract import AdvantageInputs
from megatron_riskpo.algorithms.advantages.validation import validate_algorithm, validated_rewards
from megatron_riskpo.algorithms.diagnostics import advantage_metrics, reward_metrics, risk_metrics

BUDGET_S = 2.0
"""A slow estimator is run until this much time is spent, a round."""


@dataclass
class Timing:
    """Seconds of each run."""

    processor: list[float] = field(default_factory=list)
    wall: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        return median(self.processor)

    @property
    def best(self) -> float:
        return min(self.processor)

    def run(self, function: Callable[[], object]) -> None:
        wall, processor = time.perf_counter(), time.process_time()
        function()
        self.processor.append(time.process_time() - processor)
        self.wall.append(time.perf_counter() - wall)


@dataclass
class CaseTimes:
    """An estimator on one batch."""

    case: Case
    alone: Timing = field(default_factory=Timing)
    whole: Timing = field(default_factory=Timing)


def time_case(case: Case, batch: Batch, repeats: int) -> CaseTimes:
    times = CaseTimes(case)
    run_case(times, batch, repeats)
    return times


def run_case(times: CaseTimes, batch: Batch, repeats: int) -> None:
    """Add runs of both in turn, after a first run of each that does not count."""
    alone, whole = callables(times.case, batch)
    alone()
    whole()
    start = time.perf_counter()
    for run in range(repeats):
        if run and time.perf_counter() - start > BUDGET_S:
            break
        times.alone.run(alone)
        times.whole.run(whole)


def callables(case: Case, batch: Batch) -> tuple[Callable[[], object], Callable[[], object]]:
    """The estimator, and `compute_advantages`; tracked quantiles are those after a step."""
    config, rewards, generator = case.config, batch.rewards(case), torch.Generator().manual_seed(0)
    extras = {"lengths": batch.lengths, "pass_rates": batch.pass_rates, "generator": generator}
    extras["tracker"] = compute_advantages(rewards, config, **extras).tracker
    inputs = AdvantageInputs(rewards, config, **extras)
    return (
        partial(ESTIMATORS[config.estimator].compute, inputs),
        partial(compute_advantages, rewards, config, **extras),
    )


def loop_advantages(rewards: Tensor, credit: str) -> Tensor:
    """By the loop, with riskpo_reference's defaults."""
    config = AlgorithmConfig()
    return released_advantages(
        rewards, config.alpha, config.beta, config.bundle_size, config.reference_mix_weight,
        config.reference_natural_baseline, credit,
    )  # fmt: skip


def largest_difference(batch: Batch) -> float:
    """Between riskpo_reference and the loop that it is compared with: they do the same."""
    config = AlgorithmConfig(estimator="riskpo_reference", reference_credit=CREDITS[0])
    advantages = compute_advantages(batch.binary, config).advantages
    return float((advantages - loop_advantages(batch.binary, CREDITS[0])).abs().max())


def time_shape(
    shape: tuple[int, int], cases: Sequence[Case], rounds: int, repeats: int
) -> tuple[dict[str, Timing], list[CaseTimes]]:
    """The loop by credit mode, and all cases, in turn: what else the machine does meanwhile meets all of them."""
    batch = Batch.draw(*shape)
    loops, results = {credit: Timing() for credit in CREDITS}, [CaseTimes(case) for case in cases]
    for _ in range(rounds):
        for credit, loop in loops.items():
            loop.run(partial(loop_advantages, batch.binary, credit))
        for times in results:
            run_case(times, batch, repeats)
    return loops, results


def time_parts(case: Case, batch: Batch, repeats: int) -> dict[str, Timing]:
    """What `compute_advantages` is made of."""
    config, rewards = case.config, batch.rewards(case)
    compute = partial(ESTIMATORS[config.estimator].compute, AdvantageInputs(rewards, config))
    estimate = compute()
    parts: dict[str, Callable[[], object]] = {
        "checks": lambda: (validated_rewards(rewards), validate_algorithm(config, *rewards.shape)),
        "estimator": compute,
        "reward_metrics": lambda: reward_metrics(rewards),
        "risk_metrics": lambda: risk_metrics(estimate.scores, estimate.quantiles, config),
        "advantage_metrics": lambda: advantage_metrics(rewards, estimate.advantages),
        "whole": lambda: compute_advantages(rewards, config),
    }
    timings = {name: Timing() for name in parts}
    for _ in range(repeats):
        for name, part in parts.items():
            timings[name].run(part)
    return timings
