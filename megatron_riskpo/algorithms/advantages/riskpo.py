"""RiskPO: every response gets the risk weight of the scores of its bundles (arXiv 2510.00911)."""

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from megatron_riskpo.algorithms.advantages.baselines import scale_advantages, subtract_baseline
from megatron_riskpo.algorithms.advantages.contract import AdvantageInputs, Estimate
from megatron_riskpo.algorithms.complete_pairing import complete_blocks
from megatron_riskpo.algorithms.config import AlgorithmConfig
from megatron_riskpo.algorithms.distribution import Distribution
from megatron_riskpo.algorithms.quantiles import QuantileTracker
from megatron_riskpo.algorithms.score_blocks import ScoreBlock, pool, sampled_blocks
from megatron_riskpo.algorithms.spectra import Spectrum, rule_weights, spectrum_of, step_weights
from megatron_riskpo.errors import UsageError

BUNDLE_OPTIONS = frozenset(
    (
        *("bundle_size", "bundling", "remainder", "pairing", "quantile_source", "baseline", "scale", "scale_floor"),
        *("tracker_step", "tracker_decay", "pass_rate_step"),
    )
)
"""Options of every estimator with bundles; riskpo has `spectrum` and `k` as well."""


def riskpo(inputs: AdvantageInputs) -> Estimate:
    """A = psi(S), psi the gradient weight of the spectrum's risk measure, S the score of the response's bundle; with
    complete pairing the mean of psi over all bundles that the response could be in."""
    config, rewards = inputs.config, inputs.rewards
    make_blocks = complete_blocks if config.pairing == "complete" else sampled_blocks
    blocks = make_blocks(rewards, config, inputs.pass_rates, inputs.generator)
    pooled = pool(blocks)
    spectrum = spectrum_of(config)
    tracker = _tracked(pooled, spectrum, config, inputs.tracker)
    weights = torch.cat([block.spread(_psi(block, pooled, spectrum, config, tracker)) for block in blocks])
    weights = subtract_baseline(weights, config.baseline, siblings_of(config))
    score_stds = None
    if config.scale == "bundle_std":
        score_stds = torch.cat([block.rows().std()[block.row_of] for block in blocks])
    weights = scale_advantages(weights, config, pooled, score_stds)
    used = torch.cat([block.questions for block in blocks])
    advantages = torch.zeros_like(rewards).index_copy_(0, used, weights)
    return Estimate(advantages, pooled, _reported_quantiles(pooled, config, tracker), tracker or inputs.tracker)


def siblings_of(config: AlgorithmConfig) -> int:
    """Responses of one question that share a bundle."""
    return config.bundle_size if config.bundling == "self" else 1


def _psi(
    block: ScoreBlock, pooled: Distribution, spectrum: Spectrum, config: AlgorithmConfig,
    tracker: QuantileTracker | None,
) -> Tensor:  # fmt: skip
    """psi at the block's values, under the pooled distribution, each group's own, or the tracked quantiles."""
    scores, values = pooled, block.values()
    if config.quantile_source == "bundle":
        scores = block.rows()
        values = values.expand(scores.num_rows, -1)
    if spectrum.steps is None:
        return rule_weights(values, scores, spectrum.density)
    if tracker is not None:
        return step_weights(values, spectrum.steps, [tracker.quantile(level) for level, _ in spectrum.steps])
    return step_weights(values, spectrum.steps, [scores.quantiles(level) for level, _ in spectrum.steps])


def _tracked(
    scores: Distribution, spectrum: Spectrum, config: AlgorithmConfig, tracker: QuantileTracker | None
) -> QuantileTracker | None:
    """The tracker to use now and to hand to the next step: it moves before its use. None: nothing is tracked."""
    if config.quantile_source != "tracked":
        return None
    levels = tuple(sorted({config.alpha, config.beta, *(level for level, _ in spectrum.steps or ())} - {1.0}))
    if tracker is None:
        return QuantileTracker.start(scores, levels)
    if tracker.levels != levels:
        raise UsageError(
            f"the quantile tracker follows the levels {tracker.levels}, the configuration asks for {levels}: "
            "set algorithm.alpha and algorithm.beta back, or start a new run"
        )
    return tracker.update(scores, config.tracker_step, config.tracker_decay)


def _reported_quantiles(
    scores: Distribution, config: AlgorithmConfig, tracker: QuantileTracker | None
) -> tuple[float, float]:
    quantile = tracker.quantile if tracker is not None else scores.quantile
    return quantile(config.alpha), quantile(config.beta)


def _with_spectrum(spectrum: str) -> Callable[[AdvantageInputs], Estimate]:
    def estimate(inputs: AdvantageInputs) -> Estimate:
        config = dataclasses.replace(inputs.config, spectrum=spectrum)
        return riskpo(dataclasses.replace(inputs, config=config))

    return estimate


mean_bundle = _with_spectrum("mean")
"""riskpo with the mean of bundle scores: what bundles do without a risk measure."""
cvar_bundle = _with_spectrum("cvar")
"""riskpo with the lower tail only."""
risk_seeking = _with_spectrum("upper_tail")
"""riskpo with the upper tail: the opposite attitude to risk, whose entropy collapses in the paper's ablation."""


def check_riskpo(config: AlgorithmConfig, num_prompts: int, group_size: int) -> None:
    """Bundles that cannot be made, baselines that have nothing to be made of, quantiles that cannot be tracked."""
    spectrum = spectrum_of(config)
    if config.quantile_source == "tracked" and spectrum.steps is None:
        raise UsageError(
            f"algorithm.quantile_source = tracked follows quantiles at a few levels, but algorithm.spectrum = "
            f"{config.spectrum} needs all of them: use global"
        )
    if config.bundling != "self" and config.bundle_size > num_prompts:
        raise UsageError(
            f"algorithm.bundle_size = {config.bundle_size} questions a bundle, but a step has {num_prompts}: "
            "lower it, or raise data.prompts_per_step"
        )
    if config.bundling == "self":
        _check_self_bundles(config, group_size)
    siblings = siblings_of(config)
    if config.baseline == "leave_one_out" and group_size <= siblings:
        raise UsageError(
            f"algorithm.baseline = leave_one_out needs responses of the question in other bundles, but all "
            f"{group_size} are in one: raise rollout.group_size above {siblings}, or choose natural or mean"
        )


def _check_self_bundles(config: AlgorithmConfig, group_size: int) -> None:
    size = config.bundle_size
    if config.pairing == "complete" and size > group_size:
        raise UsageError(
            f"algorithm.bundling = self takes {size} of a question's responses, but rollout.group_size = {group_size}: "
            "lower algorithm.bundle_size"
        )
    if config.pairing == "permutation" and group_size % size:
        raise UsageError(
            f"algorithm.bundling = self cuts the {group_size} responses of a question into bundles of {size}, which "
            "does not divide: set algorithm.bundle_size to a divisor of rollout.group_size, or pairing to complete"
        )
