"""The quick start with several objectives and seeds, as a table: the same base model, questions and optimizer a seed.

    python tools/compare_methods.py --seeds 1 2 3
    python tools/compare_methods.py --table-only      # of the runs that are there

Each run is `riskpo train examples/quickstart_cpu.toml` with other options, on one rank; runs that are finished are not
made again.
"""

import argparse
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

from megatron_riskpo.errors import UsageError
from megatron_riskpo.observability.metrics import read_metrics

ROOT = Path(__file__).parents[1]
ONE_RANK = ("--run.ranks", "1", "--actor.tp", "1")
LAST_STEPS = 5


@dataclass(frozen=True)
class Method:
    """What differs from examples/quickstart_cpu.toml."""

    label: str
    overrides: tuple[str, ...]


NO_BASELINE = ("--algorithm.baseline", "natural", "--algorithm.scale", "none")
RANDOM_BUNDLES = ("--algorithm.bundling", "random", "--algorithm.pairing", "permutation")
METHODS = {
    "self": Method("riskpo, self bundles, complete pairing", ("--algorithm.pairing", "complete")),
    "paper": Method(
        "riskpo as in the paper: random bundles, one permutation, tracked quantiles",
        (*RANDOM_BUNDLES, "--algorithm.quantile_source", "tracked", *NO_BASELINE),
    ),
    "grpo": Method(
        "grpo",
        (
            *("--algorithm.estimator", "grpo", *RANDOM_BUNDLES, "--algorithm.bundle_size", "5", *NO_BASELINE),
            *("--loss.kind", "ppo"),
        ),
    ),
    "seeking": Method(
        "risk_seeking, self bundles, complete pairing",
        ("--algorithm.estimator", "risk_seeking", "--algorithm.pairing", "complete"),
    ),
}


@dataclass(frozen=True)
class Outcome:
    """One finished run."""

    before: dict[int, float]
    """pass@k by k."""
    after: dict[int, float]
    entropy: tuple[float, float]
    """nats a token, means over the first and the last steps."""


def run(arguments: Sequence[str], folder: Path) -> None:
    """One riskpo command; its output goes beside the run. Raises UsageError with its last line where it fails."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    log = folder.with_suffix(".log")
    with log.open("w") as output:
        command = [sys.executable, "-m", "megatron_riskpo.cli", *arguments]
        done = subprocess.run(command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, check=False)
    if done.returncode:
        last = (log.read_text().strip().splitlines() or ["nothing was printed"])[-1]
        raise UsageError(f"{folder.name} ended with code {done.returncode}: {last}; see {log}")


def make_base(seed: int, runs: Path) -> None:
    """The base model of a seed."""
    folder = runs / f"base-{seed}"
    if not (folder / "hf" / "config.json").exists():
        options = ("--run.seed", str(seed), "--run.ranks", "1", "--run.dir", str(runs), "--run.name", folder.name)
        run(("sft", "examples/quickstart_sft.toml", *options), folder)


def make_run(name: str, seed: int, runs: Path, steps: int) -> None:
    """One method from one base model."""
    folder = runs / f"{name}-{seed}"
    if (folder / "hf" / "config.json").exists():
        return
    options = (
        *("--run.seed", str(seed), "--run.dir", str(runs), "--run.name", folder.name, "--run.steps", str(steps)),
        *("--model.path", str(runs / f"base-{seed}" / "hf"), "--evaluation.every", "0", *ONE_RANK),
    )
    run(("train", "examples/quickstart_cpu.toml", *options, *METHODS[name].overrides), folder)


def read_outcome(folder: Path) -> Outcome:
    """Raises UsageError where the run did not reach its last evaluation."""
    rows = read_metrics(folder)
    evaluated = [row for row in rows if any(key.startswith("eval/") for key in row)]
    if len(evaluated) < 2:
        raise UsageError(f"{folder} has not finished: run without --table-only")

    def pass_at(row: dict) -> dict[int, float]:
        return {int(key.rpartition("@")[2]): value for key, value in row.items() if "/pass@" in key}

    entropy = [row["actor/entropy"] for row in rows if "actor/entropy" in row]
    return Outcome(
        pass_at(evaluated[0]), pass_at(evaluated[-1]), (mean(entropy[:LAST_STEPS]), mean(entropy[-LAST_STEPS:]))
    )


def table(outcomes: dict[str, dict[int, Outcome]]) -> str:
    """Markdown: a line a run, and the mean over seeds of each method."""
    lines = [
        "| method | seed | pass@1 before | after | pass@8 before | after | entropy before | after |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, by_seed in outcomes.items():
        rows = [(str(seed), *_numbers(outcome)) for seed, outcome in sorted(by_seed.items())]
        means = [mean(column) for column in zip(*(row[1:] for row in rows), strict=True)]
        lines += [_line(METHODS[name].label, *row) for row in rows]
        lines.append(_line(f"**{METHODS[name].label}**", "**mean**", *means))
    return "\n".join(lines)


def _numbers(outcome: Outcome) -> tuple[float, ...]:
    before, after = outcome.before, outcome.after
    return before[1], after[1], before[8], after[8], *outcome.entropy


def _line(label: str, seed: str, *numbers: float) -> str:
    shares = [f"{100 * value:.1f} %" for value in numbers[:4]]
    entropies = [f"{value:.3f}" for value in numbers[4:]]
    return f"| {' | '.join([label, seed, *shares, *entropies])} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--steps", type=int, default=150, help="RL steps a run")
    parser.add_argument("--runs", type=Path, default=Path("runs/methods"), help="folder of the runs")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one core each")
    parser.add_argument("--table-only", action="store_true", help="only print the table of the runs that are there")
    args = parser.parse_args()
    runs = args.runs if args.runs.is_absolute() else ROOT / args.runs
    if not args.table_only:
        with ThreadPoolExecutor(args.jobs) as pool:
            list(pool.map(lambda seed: make_base(seed, runs), args.seeds))
            pairs = [(name, seed) for seed in args.seeds for name in args.methods]
            list(pool.map(lambda pair: make_run(pair[0], pair[1], runs, args.steps), pairs))
    print(table({n: {s: read_outcome(runs / f"{n}-{s}") for s in args.seeds} for n in args.methods}))


if __name__ == "__main__":
    try:
        main()
    except UsageError as error:
        raise SystemExit(f"error: {error}") from None
