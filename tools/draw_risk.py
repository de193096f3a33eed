"""Draws the pictures of docs/risk.md with this project's own code, and prints the numbers in them.

    python tools/draw_risk.py                  # into docs/risk/; two to five minutes
    python tools/draw_risk.py --steps 50       # quicker, noisier

Seeds are fixed: the same version draws the same pictures.
"""

import argparse
import dataclasses
from pathlib import Path

import matplotlib
import torch
from risk_curves import (
    NUM_BLOCKS,
    Batch,
    EffectiveWeights,
    binomial_scores,
    effective_weights,
    spectrum_curve,
    table,
    weight_curve,
)

from megatron_riskpo.algorithms import AlgorithmConfig

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

FOLDER = Path(__file__).parents[1] / "docs" / "risk"
BUNDLE_SIZE = 5

# Colours that the colour-blind tell apart (Okabe and Ito 2008), each with a dash and a marker of its own as well.
LOOKS = (
    {"color": "#000000", "linestyle": (0, (1, 1.5)), "marker": "x"},
    {"color": "#0072B2", "linestyle": "-", "marker": "o"},
    {"color": "#D55E00", "linestyle": (0, (5, 1.5)), "marker": "s"},
    {"color": "#009E73", "linestyle": (0, (4, 1, 1, 1)), "marker": "^"},
    {"color": "#CC79A7", "linestyle": (0, (2, 1)), "marker": "D"},
)

SPECTRA = {
    "averse to risk": {"mean": "mean", "mvar": "mvar (RiskPO)", "cvar": "cvar", "rvar": "rvar"},
    "seeking risk": {
        "mean": "mean", "upper_mvar": "upper_mvar", "upper_tail": "upper_tail", "max_at_k": "max_at_k, k = 4"
    },
}  # fmt: skip

HARD = tuple(range(95, 0, -10))
"""Questions of each pass rate, 500 in all: most of them are hard."""

FACT_1 = {
    "mvar, as many easy as hard questions": (AlgorithmConfig(), Batch()),
    "mvar, mostly hard questions": (AlgorithmConfig(), Batch(num_questions=HARD)),
    "mvar, mostly easy questions": (AlgorithmConfig(), Batch(num_questions=HARD[::-1])),
    "cvar": (AlgorithmConfig(spectrum="cvar"), Batch()),
    "upper_tail": (AlgorithmConfig(spectrum="upper_tail"), Batch()),
}
FACT_2 = {
    "mvar, as many easy as hard questions": (AlgorithmConfig(quantile_source="bundle"), Batch()),
    "mvar, mostly hard questions": (AlgorithmConfig(quantile_source="bundle"), Batch(num_questions=HARD)),
    "released code, credit uniform": (AlgorithmConfig(estimator="riskpo_reference"), Batch()),
    "released code, credit sum_mean": (
        AlgorithmConfig(estimator="riskpo_reference", reference_credit="sum_mean"), Batch()
    ),
}  # fmt: skip
BUNDLINGS = {
    "random": "random: B random questions",
    "sorted": "sorted: B questions of like difficulty",
    "self": "self: B answers to one question",
}
METHODS = {
    "riskpo, random bundles": AlgorithmConfig(),
    "riskpo, self bundles": AlgorithmConfig(bundling="self"),
    "riskpo, self bundles, beta = 1": AlgorithmConfig(bundling="self", beta=1.0),
    "riskpo, self bundles of 2": AlgorithmConfig(bundling="self", bundle_size=2),
    "cvar_bundle, self bundles": AlgorithmConfig(estimator="cvar_bundle", bundling="self"),
    "risk_seeking, self bundles": AlgorithmConfig(estimator="risk_seeking", bundling="self"),
    "riskpo_reference, uniform": AlgorithmConfig(estimator="riskpo_reference"),
    "dr_grpo, rloo, gpg, reinforce_pp": AlgorithmConfig(estimator="dr_grpo"),
    "grpo, dapo": AlgorithmConfig(estimator="grpo"),
    "qae, K = 0.4": AlgorithmConfig(estimator="qae"),
    "rs_grpo, b = 2": AlgorithmConfig(estimator="rs_grpo"),
    "pkpo, k = 4": AlgorithmConfig(estimator="pkpo"),
    "passk, k = 4": AlgorithmConfig(estimator="passk"),
}
"""Of docs/methods.md; opo's is dr_grpo's as long as lengths and rewards do not depend on each other."""

SOURCES = {"global": "global: quantiles of all bundles", "bundle": "bundle: quantiles of each group alone"}


def draw_psi(folder: Path) -> str:
    """phi and psi of every spectrum; psi on the scores of bundles of 5 answers, each right with probability 1/2."""
    scores = binomial_scores(BUNDLE_SIZE, 0.5)
    levels = torch.linspace(0, 1, 2001, dtype=torch.float64)[:-1]
    values = torch.linspace(0, BUNDLE_SIZE, 501, dtype=torch.float64)
    whole = torch.arange(BUNDLE_SIZE + 1, dtype=torch.float64)
    figure, axes = plt.subplots(2, 2, figsize=(9, 7), sharey="row", layout="constrained")
    rows = {}
    for column, (attitude, spectra) in enumerate(SPECTRA.items()):
        upper, lower = axes[0, column], axes[1, column]
        for look, (name, label) in zip(LOOKS, spectra.items(), strict=False):
            config = AlgorithmConfig(spectrum=name)
            line = {"color": look["color"], "linestyle": look["linestyle"]}
            upper.plot(levels, spectrum_curve(config, levels), label=label, **line)
            lower.plot(values, weight_curve(config, scores, values), **line)
            rows[name] = weight_curve(config, scores, whole).tolist()
            lower.plot(whole, rows[name], color=look["color"], marker=look["marker"], linestyle="none")
        upper.set(title=attitude, xlabel="quantile level u")
        lower.set(xlabel=f"score S of a bundle of {BUNDLE_SIZE} answers (right answers)", xticks=range(BUNDLE_SIZE + 1))
        upper.legend(loc="upper right" if column == 0 else "upper left", frameon=False)
    axes[0, 0].set_ylabel("spectrum φ(u): weight of the quantile")
    axes[1, 0].set_ylabel("ψ(S): advantage, before baseline and scale")
    for axis in axes.flat:
        axis.grid(alpha=0.3)
    _save(figure, folder / "psi.png")
    return table(["spectrum", *(f"S = {n}" for n in range(BUNDLE_SIZE + 1))], rows)


def draw_effective_weight(folder: Path, num_steps: int) -> str:
    """Effective weight by pass rate: three ways to bundle, quantiles of all bundles or of each group alone."""
    batch = Batch(num_steps=num_steps)
    figure, axes = _two_panels("effective weight, relative to pass rate 0.5")
    results = {}
    for axis, (source, title) in zip(axes, SOURCES.items(), strict=True):
        for look, (bundling, label) in zip(LOOKS[1:], BUNDLINGS.items(), strict=False):
            config = AlgorithmConfig(bundle_size=BUNDLE_SIZE, bundling=bundling, quantile_source=source)
            result = results[f"{bundling}, {source}"] = effective_weights(config, batch)
            _plot_weights(axis, batch, result, label, look)
        axis.set_title(title)
        axis.legend(loc="lower left" if source == "global" else "upper left", frameon=False)
    _save(figure, folder / "effective_weight.png")
    return _weights_table("bundling, quantiles", results)


def draw_facts(folder: Path, num_steps: int) -> str:
    """The two structural facts about random bundles."""
    figure, axes = _two_panels("effective weight, relative to pass rate 0.5")
    titles = (
        "Fact 1: random bundles, quantiles of all bundles",
        "Fact 2: random bundles, quantiles of each group alone",
    )
    results = {}
    for axis, title, cases in zip(axes, titles, (FACT_1, FACT_2), strict=True):
        for look, (label, (config, batch)) in zip(LOOKS[1:] + LOOKS[:1], cases.items(), strict=False):
            batch = dataclasses.replace(batch, num_steps=num_steps)
            result = results[f"{title[:6]}: {label}"] = effective_weights(config, batch)
            _plot_weights(axis, batch, result, label, look)
        axis.set_title(title, fontsize="medium")
        axis.legend(loc="upper left", frameon=False)
    _save(figure, folder / "facts.png")
    return _weights_table("objective", results)


def weigh_methods(num_steps: int) -> str:
    """The same numbers for the other estimators."""
    batch = Batch(num_steps=num_steps)
    return _weights_table("estimator", {name: effective_weights(config, batch) for name, config in METHODS.items()})


def _two_panels(ylabel: str) -> tuple[plt.Figure, list[Axes]]:
    figure, axes = plt.subplots(1, 2, figsize=(10, 4.4), sharey=True, layout="constrained")
    for axis in axes:
        axis.axhline(1, color="0.6", linewidth=1, zorder=0)
        axis.set(xlabel="pass rate of the question", xlim=(0, 1), ylim=(0, 2.2))
        axis.grid(alpha=0.3)
    axes[0].set_ylabel(ylabel)
    return figure, list(axes)


def _plot_weights(axis: Axes, batch: Batch, result: EffectiveWeights, label: str, look: dict) -> None:
    axis.errorbar(
        batch.pass_rates, result.weights, yerr=[2 * error for error in result.standard_errors], label=label,
        markersize=4, linewidth=1.5, **look,
    )  # fmt: skip


def _weights_table(first: str, results: dict[str, EffectiveWeights]) -> str:
    rows = {name: result.weights for name, result in results.items()}
    worst = max(max(result.standard_errors) for result in results.values())
    rates = [f"{rate:.2f}" for rate in Batch().pass_rates]
    return f"{table([first, *rates], rows)}\n\nlargest standard error: {worst:.3f}"


def _save(figure: plt.Figure, path: Path) -> None:
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where the pictures go")
    parser.add_argument("--steps", type=int, default=2000, help=f"simulated steps a curve, a multiple of {NUM_BLOCKS}")
    arguments = parser.parse_args()
    if arguments.steps < NUM_BLOCKS or arguments.steps % NUM_BLOCKS:
        parser.error(f"--steps {arguments.steps} must be a multiple of {NUM_BLOCKS}, {NUM_BLOCKS} or more")
    arguments.folder.mkdir(parents=True, exist_ok=True)
    print(f"psi.png\n\n{draw_psi(arguments.folder)}\n")
    print(f"effective_weight.png\n\n{draw_effective_weight(arguments.folder, arguments.steps)}\n")
    print(f"facts.png\n\n{draw_facts(arguments.folder, arguments.steps)}\n")
    print(f"docs/methods.md\n\n{weigh_methods(arguments.steps)}")


if __name__ == "__main__":
    main()
