"""Noise of the advantage estimators, on policies that can be enumerated, and which questions they push.

Each replicate is one bundle of questions with a group of answers each. Quantiles are fixed at the true ones (tracked,
with a step of 0) and bundles do not mix replicates (sorted, the number of the replicate for a pass rate), so that the
expected gradient is known exactly. Signal to noise is |mean| / standard deviation of the gradient estimate over the
replicates; of all questions together the norm of the mean over the root of the summed variances. A policy whose wrong
answers are of several kinds is a softmax with a logit for each.
Usage: python tools/benchmark/estimators.py [--json estimators.json]
"""

import argparse
import json
import math
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from advantage_cases import Batch
from bernoulli_policy import BernoulliPolicy
from gradient_noise import (
    BASELINES,
    NUM_BLOCKS,
    PAIRINGS,
    Noise,
    Simulation,
    jackknife,
    methods,
    noise_ratio,
    signal_to_noise_ratio,
)
from markdown_table import markdown_table
from torch import Tensor

from megatron_riskpo.algorithms import AlgorithmConfig, compute_advantages
from megatron_riskpo.algorithms.diagnostics import effective_weights

GOAL = 2.0
"""Signal to noise of complete pairing with the leave-one-out baseline over that of one permutation, mixed bundle."""
GOAL_RATIOS = {
    "the same baseline": "complete / permutation, leave_one_out",
    "the paper's natural baseline": "complete leave_one_out / permutation natural",
}
"""What the permutation may have for a baseline."""
WRONG_ANSWERS = (1, 4, 16, 64)
POLICIES = {
    "mixed": BernoulliPolicy((0.05, 0.2, 0.5, 0.8, 0.95)),
    "very hard": BernoulliPolicy((0.02, 0.04, 0.06, 0.08, 0.1)),
}
WEIGHT_PREFIX = "risk/effective_weight/"
MIDDLE_BIN = "0.4-0.6"


def noise_table(policy: BernoulliPolicy, samples: Mapping[str, Tensor]) -> str:
    header = ["method", *(f"p = {rate}" for rate in policy.pass_rates), "all", "off its target, SE", "cosine to MVaR"]
    compared, rows = methods(len(policy.pass_rates)), []
    for name, estimates in samples.items():
        noise, target = Noise.of(estimates), compared[name].target
        cosine = torch.cosine_similarity(estimates.mean(dim=0), policy.gradient(AlgorithmConfig()), dim=0)
        rows.append([
            name,
            *(f"{value:.3f}" for value in (*noise.signal_to_noise, noise.overall)),
            f"{noise.deviation(policy.gradient(target)):.1f}" if target else "-",
            f"{float(cosine):.3f}",
        ])  # fmt: skip
    return markdown_table(header, rows)


def compared_pairs() -> dict[str, tuple[str, str]]:
    """Complete pairing against one permutation, and the baselines against each other."""
    pairings = {
        f"complete / permutation, {baseline}": (f"riskpo complete {baseline}", f"riskpo permutation {baseline}")
        for baseline in BASELINES
    }
    baselines = {
        f"leave_one_out / natural, {pairing}": (f"riskpo {pairing} leave_one_out", f"riskpo {pairing} natural")
        for pairing in PAIRINGS
    }
    both = {
        GOAL_RATIOS["the paper's natural baseline"]: ("riskpo complete leave_one_out", "riskpo permutation natural")
    }
    return pairings | baselines | both


def comparisons(samples: Mapping[str, Tensor]) -> dict[str, dict[str, Any]]:
    """Ratios of signal to noise, and whether the means agree."""
    found = {}
    for name, (first, second) in compared_pairs().items():
        of_questions = [Noise.of(samples[method]).signal_to_noise for method in (first, second)]
        difference = samples[first] - samples[second]
        found[name] = {
            "questions": [a / b for a, b in zip(*of_questions, strict=True)],
            "signal_to_noise": jackknife(signal_to_noise_ratio, samples[first], samples[second]),
            "noise": jackknife(noise_ratio, samples[first], samples[second]),
            "difference": Noise.of(difference).deviation(torch.zeros(difference.size(1))),
        }
    return found


def comparison_table(policy: BernoulliPolicy, found: Mapping[str, Mapping[str, Any]]) -> str:
    header = ["ratio", *(f"p = {rate}" for rate in policy.pass_rates), "all", "noise alone", "means differ by, SE"]
    rows = [
        [
            name,
            *(f"{value:.2f}" for value in ratios["questions"]),
            *("{:.2f} ± {:.3f}".format(*ratios[key]) for key in ("signal_to_noise", "noise")),
            f"{ratios['difference']:.1f}",
        ]
        for name, ratios in found.items()
    ]
    return markdown_table(header, rows)


def many_answers_table(signal_to_noise: Mapping[str, Mapping[int, float]]) -> str:
    """Each method, then the ratios."""
    rows = [[name, *(f"{value:.3f}" for value in of_kinds.values())] for name, of_kinds in signal_to_noise.items()]
    for name, (first, second) in compared_pairs().items():
        of_kinds = zip(signal_to_noise[first].values(), signal_to_noise[second].values(), strict=True)
        rows.append([name, *(f"{a / b:.2f}" for a, b in of_kinds)])
    return markdown_table(["kinds of wrong answers", *map(str, next(iter(signal_to_noise.values())))], rows)


def weight_cases() -> dict[str, AlgorithmConfig]:
    """Bundling x source of the quantiles x pairing, the released code, and grpo."""
    bundled = {
        f"{bundling} {source} {pairing}": AlgorithmConfig(bundling=bundling, quantile_source=source, pairing=pairing)
        for source in ("global", "bundle")
        for bundling in ("random", "sorted", "self")
        for pairing in PAIRINGS
    }
    return bundled | {
        "riskpo_reference": AlgorithmConfig(estimator="riskpo_reference"),
        "grpo": AlgorithmConfig(estimator="grpo"),
    }


def relative_weights(config: AlgorithmConfig, batch: Batch) -> dict[str, float]:
    """Effective weight by pass-rate bin, that of the middle bin taken as 1 (NaN where it is 0: one bundle a question
    has no quantiles that differ)."""
    generator = torch.Generator().manual_seed(0)
    outputs = compute_advantages(batch.binary, config, pass_rates=batch.pass_rates, generator=generator)
    weights = effective_weights(batch.binary, outputs.advantages)
    middle = weights[WEIGHT_PREFIX + MIDDLE_BIN] or math.nan
    return {name.removeprefix(WEIGHT_PREFIX): weight / middle for name, weight in weights.items()}


def weight_table(weights: Mapping[str, Mapping[str, float]]) -> str:
    bins = list(next(iter(weights.values())))
    rows = [[name, *(f"{of_bins[name_of_bin]:.2f}" for name_of_bin in bins)] for name, of_bins in weights.items()]
    return markdown_table(["riskpo, or", *bins], rows)


def report_policy(name: str, group_size: int, replicates: int) -> dict[str, Any]:
    policy = POLICIES[name]
    simulation = Simulation.run(policy, group_size, replicates)
    samples = simulation.estimates()
    found = comparisons(samples)
    many = {
        method: {num_wrong: simulation.with_many_answers(method, num_wrong) for num_wrong in WRONG_ANSWERS}
        for method in samples
    }
    print(f"## Signal to noise, {name} bundle: {group_size} answers a question, {replicates:,} replicates\n")
    for table in (noise_table(policy, samples), comparison_table(policy, found), many_answers_table(many)):
        print(f"{table}\n")
    if name == "mixed":
        print("\n".join(verdicts(found)) + "\n", flush=True)
    noise = {method: asdict(Noise.of(sample)) for method, sample in samples.items()}
    return {"noise": noise, "ratios": found, "signal_to_noise_with_many_answers": many}


def verdicts(found: Mapping[str, Mapping[str, Any]]) -> list[str]:
    lines = [f"Goal: complete pairing with leave_one_out at least {GOAL} times one permutation, which has"]
    for baseline, name in GOAL_RATIOS.items():
        ratio, error = found[name]["signal_to_noise"]
        lines.append(f"- {baseline}: {ratio:.2f} ± {error:.3f}, {'met' if ratio >= GOAL else 'missed'}")
    return lines


def report_weights(num_questions: int, group_size: int) -> dict[str, dict[str, float]]:
    batch = Batch.draw(num_questions, group_size)
    weights = {name: relative_weights(config, batch) for name, config in weight_cases().items()}
    print(f"## Effective weight by observed pass rate: {num_questions:,} questions, {group_size} answers each\n")
    print(weight_table(weights))
    return weights


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--replicates", type=int, default=20_000, help=f"at least {2 * NUM_BLOCKS}")
    parser.add_argument("--group-size", type=int, default=10, help="answers a question, a multiple of 5")
    parser.add_argument("--questions", type=int, default=40_000, help="of the batch for effective weights")
    parser.add_argument("--json", type=Path, help="write all figures here as well")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    report = {name: report_policy(name, arguments.group_size, arguments.replicates) for name in POLICIES}
    report["effective_weights"] = report_weights(arguments.questions, arguments.group_size)
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
