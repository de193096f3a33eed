"""A comparison as tables and charts: printed, and as one page that needs no network."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table as RichTable

from megatron_riskpo.evaluation.comparison import Bin, Comparison, SignTest
from megatron_riskpo.evaluation.summary import Estimate, percent, render, shown_ks
from megatron_riskpo.observability.charts import COLORS, Chart, finish, new_figure
from megatron_riskpo.observability.report import draw, render_page, save_page


@dataclass(frozen=True)
class ShownTable:
    """A table of texts."""

    caption: str
    headings: list[str]
    rows: list[list[str]]

    def printed(self) -> str:
        """As lines to print."""
        table = RichTable()
        for index, heading in enumerate(self.headings):
            table.add_column(heading, justify="right" if index else "left")
        for row in self.rows:
            table.add_row(*row)
        # A title of the table would be broken at the table's width.
        return f"{self.caption}\n{render(table)}"


def tables_of(comparison: Comparison) -> list[ShownTable]:
    """The shares and their differences; the data sources, where there are several; the difficulty bins."""
    name, sources = comparison.name, comparison.sources
    by_source = [bins_table(f"{name}: pass@1 by source", "source", sources)] if sources else []
    by_difficulty = bins_table(f"{name}: by difficulty, the mean pass rate of both", "solved", comparison.bins)
    return [shares_table(comparison), *by_source, by_difficulty]


def shares_table(comparison: Comparison) -> ShownTable:
    """A, B and B - A, for pass@k at powers of two and what else both have."""
    names = [name for name in comparison.differences if _is_shown(name, comparison)]
    rows = [
        [name.replace("_", " "), percent(comparison.a.shares[name]), percent(comparison.b.shares[name]), points(own)]
        for name, own in ((name, comparison.differences[name]) for name in names)
    ]
    caption = f"{comparison.name}: {comparison.a.num_questions} questions; {sign_text(comparison.sign_test)}"
    return ShownTable(caption, ["", "A", "B", "B - A (points)"], rows)


def bins_table(caption: str, heading: str, bins: Sequence[Bin]) -> ShownTable:
    """Where the difference comes from."""
    rows = [
        [own.label, str(own.num_questions), f"{100 * own.a:.1f} %", f"{100 * own.b:.1f} %", points(own.difference)]
        for own in bins
    ]
    return ShownTable(caption, [heading, "questions", "A", "B", "B - A (points)"], rows)


def sign_text(test: SignTest) -> str:
    """The sign test in words."""
    return f"B better on {test.b_better}, A on {test.a_better}, equal {test.equal}; sign test p = {test.p_value:.2g}"


def points(estimate: Estimate) -> str:
    """+3.2 [+0.1, +6.3]."""
    return f"{100 * estimate.value:+.1f} [{100 * estimate.low:+.1f}, {100 * estimate.high:+.1f}]"


def write_page(path: Path, comparisons: Sequence[Comparison], a: str, b: str) -> Path:
    """Write the page; a, b: what the two are called."""
    sections: list[dict[str, Any]] = []
    for number, comparison in enumerate(comparisons):
        charts = [chart for chart in (pass_at_k_chart(comparison), bins_chart(comparison)) if chart is not None]
        drawn = [(chart, draw(chart, f"chart-{number}-{index}")) for index, chart in enumerate(charts)]
        sections.append({"name": comparison.name, "charts": drawn, "tables": tables_of(comparison)})
    return save_page(path, render_page("comparison.html.j2", a=a, b=b, sections=sections))


def pass_at_k_chart(comparison: Comparison) -> Chart | None:
    """pass@k of both over k, with their intervals as bands."""
    figure = new_figure("pass@k", "k")
    for color, name, summary in ((COLORS[0], "A", comparison.a), (COLORS[1], "B", comparison.b)):
        ks = list(range(1, summary.num_samples + 1))
        values = [summary.shares[f"pass@{k}"] for k in ks]
        band = {"x": ks, "mode": "lines", "line": {"width": 0}, "showlegend": False, "hoverinfo": "skip"}
        figure.add_scatter(y=[value.high for value in values], **band)
        figure.add_scatter(y=[value.low for value in values], fill="tonexty", fillcolor=_faint(color), **band)
        line = {"color": color, "width": 2.5}
        figure.add_scatter(x=ks, y=[value.value for value in values], name=name, mode="lines+markers", line=line)
    figure.update_yaxes(tickformat=".0%", range=[0, 1])
    most = max(comparison.a.num_samples, comparison.b.num_samples)
    figure.update_xaxes(type="log", tickvals=shown_ks(most), ticktext=[str(k) for k in shown_ks(most)])
    return finish("pass@k", "Unbiased, with 95 % intervals over questions.", figure)


def bins_chart(comparison: Comparison) -> Chart | None:
    """B - A in each difficulty bin."""
    figure = new_figure("B - A (points)", "solved, mean of both")
    values = [100 * own.difference.value for own in comparison.bins]
    figure.add_bar(
        x=[f"{own.label} ({own.num_questions})" for own in comparison.bins],
        y=values,
        marker={"color": COLORS[2]},
        error_y={
            "type": "data",
            "symmetric": False,
            "array": [100 * (own.difference.high - own.difference.value) for own in comparison.bins],
            "arrayminus": [100 * (own.difference.value - own.difference.low) for own in comparison.bins],
        },
    )
    figure.update_xaxes(type="category")
    return finish("Difference by difficulty", "Pass rate of B less that of A; number of questions in brackets.", figure)


def _is_shown(name: str, comparison: Comparison) -> bool:
    kind, _, k = name.partition("@")
    most = min(comparison.a.num_samples, comparison.b.num_samples)
    return kind != "avg" and (not k or int(k) in shown_ks(most))


def _faint(color: str) -> str:
    """The color at a fifth of its strength; plotly takes no alpha in hexadecimal."""
    red, green, blue = (int(color[start : start + 2], 16) for start in (1, 3, 5))
    return f"rgba({red},{green},{blue},0.2)"
