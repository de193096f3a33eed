"""scaling.html: the table of a sweep's runs, and its charts."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_riskpo.errors import UsageError
from megatron_riskpo.observability.charts import COLORS, Chart, finish, new_figure
from megatron_riskpo.observability.report import draw, render_page, save_page
from megatron_riskpo.observability.scaling import (
    ScalingRun,
    efficiencies,
    read_run,
    scaling_table,
    strong_groups,
    weak_groups,
)


def write_scaling_report(run_dirs: Sequence[Path], target: Path) -> str:
    """Write the page to `target`; the table as Markdown. Raises UsageError for a folder without a run that counts, and
    for two runs of one name."""
    runs = [read_run(run_dir) for run_dir in run_dirs]
    names = [run.name for run in runs]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice:
        raise UsageError(f"two runs have the name {twice}; give each run of a sweep its own run.name")
    charts = [chart for chart in (_speed_chart(runs), _phase_chart(runs), _mfu_chart(runs)) if chart is not None]
    page = render_page(
        "scaling.html.j2",
        runs=runs,
        strong=efficiencies(strong_groups(runs)),
        weak=efficiencies(weak_groups(runs)),
        charts=[(chart, draw(chart, f"chart-{index}")) for index, chart in enumerate(charts)],
    )
    save_page(target, page)
    return scaling_table(runs)


def _speed_chart(runs: Sequence[ScalingRun]) -> Chart | None:
    """Lines of runs that differ in ranks only; the others as points."""
    figure = new_figure("tokens / s a rank", "ranks")
    groups = [("strong", group) for group in strong_groups(runs)] + [("weak", group) for group in weak_groups(runs)]
    for index, (kind, group) in enumerate(groups):
        color = COLORS[index % len(COLORS)]
        line = {"color": color, "width": 2.5}
        _add_points(figure, group, name=f"{kind}: {group[0].layout}", mode="lines+markers", line=line)
    alone = [run for run in runs if not any(run in group for _, group in groups)]
    if alone:
        marker = {"color": COLORS[-1], "size": 9}
        _add_points(figure, alone, name="other layouts", mode="markers", marker=marker)
    figure.update_layout(showlegend=True, hovermode="closest")
    figure.update_yaxes(rangemode="tozero")
    caption = "Flat is ideal. Strong: the same work a step on more ranks; weak: the same work a rank."
    return finish("Speed", caption, figure)


def _add_points(figure: Any, runs: Sequence[ScalingRun], **style: Any) -> None:
    speeds = [run.tokens_per_second for run in runs]
    figure.add_scatter(x=[run.ranks for run in runs], y=speeds, text=[run.name for run in runs], **style)


def _phase_chart(runs: Sequence[ScalingRun]) -> Chart | None:
    figure = new_figure("seconds a step", "")
    names = list(dict.fromkeys(name for run in runs for name in run.phases))
    for index, name in enumerate(names):
        seconds = [run.step_s * run.phases.get(name, 0.0) for run in runs]
        figure.add_bar(
            x=[run.name for run in runs], y=seconds, name=name, marker={"color": COLORS[index % len(COLORS)]}
        )
    figure.update_layout(showlegend=True, barmode="stack")
    figure.update_xaxes(type="category")
    return finish("Where a step's time goes", "Medians over the steps that count.", figure)


def _mfu_chart(runs: Sequence[ScalingRun]) -> Chart | None:
    figure = new_figure("MFU of the update", "")
    known = [run for run in runs if run.mfu]
    if known:
        figure.add_bar(x=[run.name for run in known], y=[run.mfu for run in known], marker={"color": COLORS[0]})
    figure.update_xaxes(type="category")
    figure.update_yaxes(tickformat=".0%", rangemode="tozero")
    return finish("Model FLOPs utilisation", "Of the bfloat16 peak, in the update.", figure)
