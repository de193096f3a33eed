"""How often the 95 % intervals of an evaluation cover the truth, beside those of the plain percentile bootstrap.

    python tools/benchmark/intervals.py

Each line: 2,000 simulated evaluations, of questions whose pass rates follow a beta distribution, n answers each. The
truth is the expected pass@k over all such questions; covered: the share of intervals that hold it; width: their mean.
Where k = n a question counts 0 or 1, and the coverage is printed once more, summed over what can come out; beside it,
how often all questions are solved.
"""

import argparse
from math import exp, lgamma, log, log1p

import numpy as np

from megatron_riskpo.evaluation.intervals import bootstrap_means, share_intervals
from megatron_riskpo.evaluation.passk import pass_at_k

KINDS = {"spread": (0.5, 0.5), "hard": (1.0, 3.0), "very hard": (0.2, 1.8), "easy": (3.0, 1.5), "very easy": (9.0, 1.0)}
ASKED = ((1, 1), (8, 1), (8, 8))
NUM_EVALUATIONS = 2000


def simulate(kind: str, num_questions: int, num_samples: int, k: int, seed: int) -> tuple[np.ndarray, float]:
    """(pass@k of each question [num_questions, NUM_EVALUATIONS], the truth)."""
    generator = np.random.default_rng([seed, num_questions, num_samples, k])
    a, b = KINDS[kind]
    by_count = np.array([pass_at_k(num_samples, c, k) for c in range(num_samples + 1)])
    observed = by_count[generator.binomial(num_samples, generator.beta(a, b, (num_questions, NUM_EVALUATIONS)))]
    return observed, float((1 - (1 - generator.beta(a, b, 2_000_000)) ** k).mean())


def percentile_intervals(values: np.ndarray) -> np.ndarray:
    """The plain bootstrap, for comparison."""
    return np.quantile(bootstrap_means(values), (0.025, 0.975), axis=0).T


def exact(num_questions: int, truth: float) -> str:
    """Coverage, and how often all questions are solved, where a question counts 1 with the chance `truth`, else 0."""
    solved = np.tri(num_questions + 1, num_questions, -1).T  # column c: an evaluation in which c questions are solved
    low, high = share_intervals(solved).T
    chances = np.array([_binomial(num_questions, c, truth) for c in range(num_questions + 1)])
    covered = chances @ ((low <= truth) & (truth <= high))
    return f" | exactly {100 * covered:.1f} %, all solved in {100 * truth**num_questions:.1f} %"


def _binomial(num: int, count: int, share: float) -> float:
    """The chance of `count` of `num`."""
    ways = lgamma(num + 1) - lgamma(count + 1) - lgamma(num - count + 1)
    return exp(ways + count * log(share) + (num - count) * log1p(-share))


def described(intervals: np.ndarray, truth: float) -> str:
    """Coverage and mean width, in per cent and points."""
    covered = (intervals[:, 0] <= truth) & (truth <= intervals[:, 1])
    return f"{100 * covered.mean():9.1f} % {100 * (intervals[:, 1] - intervals[:, 0]).mean():7.1f}"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=int, nargs="+", default=[30, 100, 500])
    args = parser.parse_args()
    print("questions kind        n  k   truth |     covered   width | of the percentile bootstrap")
    for num_questions in args.questions:
        for seed, kind in enumerate(KINDS):
            for num_samples, k in ASKED:
                values, truth = simulate(kind, num_questions, num_samples, k, seed)
                ours, plain = described(share_intervals(values), truth), described(percentile_intervals(values), truth)
                line = f"{num_questions:9} {kind:10} {num_samples:2} {k:2} {100 * truth:5.1f} % | {ours} | {plain}"
                print(line + (exact(num_questions, truth) if k == num_samples else ""), flush=True)


if __name__ == "__main__":
    main()
