"""The report's charts: which metrics stand together, and how they are drawn."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import cycle
from typing import Literal

import plotly.graph_objects as go

from megatron_riskpo.observability.summary import Rows, evaluation_keys, phase_seconds, values_of

# Told apart also by readers who do not see red and green alike (Okabe and Ito, "Color Universal Design").
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#666666")
EFFECTIVE_WEIGHT = "risk/effective_weight/"
# Width of the moving average, as a share of the run's steps.
SMOOTHING = 0.05


@dataclass(frozen=True)
class Chart:
    """A chart and the sentence below it."""

    title: str
    caption: str
    figure: go.Figure


@dataclass(frozen=True)
class Curves:
    """A line chart over steps; series is {metric key: name in the legend}."""

    title: str
    caption: str
    series: Mapping[str, str]
    unit: str
    scale: Literal["linear", "log"] = "linear"


CURVES = (
    Curves(
        "Training reward",
        "Mean reward of the step's responses; questions solved by all or by none of their responses.",
        {"reward/mean": "mean", "reward/solve_all": "solved by all", "reward/solve_none": "solved by none"},
        "share",
    ),
    Curves("Entropy", "Mean entropy of the policy per response token.", {"actor/entropy": "entropy"}, "nats"),
    Curves(
        "Risk quantiles",
        "Levels of the bundle scores between which the objective weighs the middle; below q(alpha) it weighs more.",
        {"risk/q_alpha": "q(alpha)", "risk/q_beta": "q(beta)"},
        "bundle score",
    ),
    Curves(
        "Risk measures",
        "Mixed value-at-risk (what is maximised), range value-at-risk and conditional value-at-risk of the bundles.",
        {"risk/mvar": "MVaR", "risk/rvar": "RVaR", "risk/cvar": "CVaR"},
        "bundle score",
    ),
    Curves(
        "Mismatch of rollout and trainer",
        "Difference of the log-probs that the rollout engine and the trainer give the same tokens.",
        {"mismatch/logprob_abs_mean": "mean |difference|", "mismatch/k3": "k3 estimate of the KL"},
        "nats",
        "log",
    ),
    Curves("Policy loss", "", {"actor/loss": "loss"}, "loss"),
    Curves("Gradient norm", "Before clipping.", {"actor/grad_norm": "gradient norm"}, "norm"),
    Curves("Clip fraction", "Share of ratios outside the clip range.", {"actor/clip_fraction": "clipped"}, "share"),
    Curves("Response length", "", {"rollout/response_length": "mean"}, "tokens"),
    Curves("Rollout speed", "", {"rollout/tokens_per_second": "generated"}, "tokens / s"),
)


def build_charts(rows: Rows) -> list[Chart]:
    """Every chart that the metrics have values for; evaluation first."""
    candidates = [evaluation_chart(rows), *(curves_chart(rows, curves) for curves in (*CURVES, source_curves(rows)))]
    candidates += [effective_weight_chart(rows), phase_chart(rows)]
    return [chart for chart in candidates if chart is not None]


def evaluation_chart(rows: Rows) -> Chart | None:
    """pass@k at the steps that were evaluated."""
    figure = new_figure("pass@k", "step")
    for color, key in zip(cycle(COLORS), evaluation_keys(rows), strict=False):
        points = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
        steps, values = zip(*points, strict=True) if points else ((), ())
        set_name, _, measure = key.removeprefix("eval/").rpartition("/")
        line = {"color": color, "width": 2.5}
        figure.add_scatter(
            x=steps, y=values, name=f"{measure} {set_name}", mode="lines+markers", line=line, error_y=_bars(rows, key)
        )
    figure.update_yaxes(tickformat=".0%", rangemode="tozero")
    return finish("Held-out questions", "Unbiased pass@k of the evaluations, 95 % intervals over questions.", figure)


def _bars(rows: Rows, key: str) -> dict[str, object] | None:
    """The interval of each point of the key; None where a run did not measure it."""
    points = [row for row in rows if row.get(key) is not None]
    if any(row.get(f"{key}_{end}") is None for row in points for end in ("low", "high")):
        return None
    return {
        "type": "data", "symmetric": False, "thickness": 1, "width": 2,
        "array": [row[f"{key}_high"] - row[key] for row in points],
        "arrayminus": [row[key] - row[f"{key}_low"] for row in points],
    }  # fmt: skip


def source_curves(rows: Rows) -> Curves:
    """The training reward of each data source; none where a run has one source."""
    keys = sorted({key for row in rows for key in row if re.fullmatch(r"reward/.+/mean", key)})
    names = {key: key.removeprefix("reward/").removesuffix("/mean") for key in keys}
    return Curves(
        "Training reward by source", "Mean reward of the responses to each source's questions.", names, "share"
    )


def curves_chart(rows: Rows, curves: Curves) -> Chart | None:
    """A faint line of the values and a strong one of their moving average, each metric."""
    figure = new_figure(curves.unit, "step")
    present = {key: name for key, name in curves.series.items() if values_of(rows, key)}
    for color, (key, name) in zip(cycle(COLORS), present.items(), strict=False):
        points = [(row["step"], row.get(key)) for row in rows if key in row]
        steps, values = [step for step, _ in points], [value for _, value in points]
        figure.add_scatter(
            x=steps, y=values, mode="lines", line={"color": color, "width": 1}, opacity=0.3, showlegend=False, name=name
        )
        width = max(1, round(SMOOTHING * len(values)))
        smooth = moving_average(values, width)
        # The label under the mouse shows the step's own value.
        figure.add_scatter(
            x=steps, y=smooth, mode="lines", line={"color": color, "width": 2.5}, name=name, hoverinfo="skip"
        )
    figure.update_yaxes(type=curves.scale)
    if curves.scale == "log":
        figure.update_yaxes(exponentformat="power", dtick=1)
    figure.update_layout(showlegend=len(present) > 1)
    return finish(curves.title, curves.caption, figure)


def effective_weight_chart(rows: Rows) -> Chart | None:
    """Effective weight by difficulty bin, mean of the last tenth of the steps beside that of the first."""
    keys = list(dict.fromkeys(key for row in rows for key in row if key.startswith(EFFECTIVE_WEIGHT)))
    figure = new_figure("effective weight", "bin")
    for color, name, last in ((COLORS[5], "first tenth of the run", False), (COLORS[0], "last tenth", True)):
        bins, means = [], []
        for key in keys:
            values = values_of(rows, key)
            size = max(1, len(values) // 10)
            if values:
                bins.append(key.removeprefix(EFFECTIVE_WEIGHT))
                means.append(sum(values[-size:] if last else values[:size]) / size)
        if bins:
            figure.add_bar(x=bins, y=means, name=name, marker={"color": color})
    # A bin's name such as "0.2" is a name.
    figure.update_xaxes(type="category")
    return finish("Effective weight by difficulty", "How strongly questions of each bin move the policy.", figure)


def phase_chart(rows: Rows) -> Chart | None:
    """Seconds a step, phases on top of each other."""
    figure = new_figure("seconds", "step")
    steps = [row for row in rows if row["step"] > 0]
    for index, phase in enumerate(phase_seconds(rows) if steps else {}):
        values = [row.get(f"time/{phase}_s") or 0.0 for row in steps]
        line = {"width": 0, "color": COLORS[index % len(COLORS)]}
        figure.add_scatter(
            x=[row["step"] for row in steps], y=values, name=phase, mode="lines", line=line, stackgroup="phases"
        )
    figure.update_layout(showlegend=True)
    return finish("Time per phase", "Seconds of each step, by what it was doing.", figure)


def moving_average(values: list[float | None], width: int) -> list[float | None]:
    """Mean of the last `width` values that are there."""
    windows = ([v for v in values[max(0, i + 1 - width) : i + 1] if v is not None] for i in range(len(values)))
    return [sum(window) / len(window) if window else None for window in windows]


def new_figure(y_title: str, x_title: str) -> go.Figure:
    figure = go.Figure()
    figure.update_layout(
        template="none",
        height=280,
        margin={"l": 56, "r": 12, "t": 8, "b": 40},
        font={"family": "system-ui, -apple-system, 'Segoe UI', sans-serif", "size": 12, "color": "#374151"},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        hovermode="x unified",
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
        xaxis={"title": {"text": x_title, "standoff": 6}, "showgrid": False, "zeroline": False, "linecolor": "#9ca3af"},
        yaxis={
            "title": {"text": y_title, "standoff": 8},
            "gridcolor": "#e5e7eb",
            "zeroline": False,
            "automargin": True,
        },
    )
    return figure


def finish(title: str, caption: str, figure: go.Figure) -> Chart | None:
    """None where nothing was drawn."""
    return Chart(title, caption, figure) if figure.data else None
