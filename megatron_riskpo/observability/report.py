"""What a run did: report.html, one page that needs no network and no other file, and a table for the terminal."""

import io
import json
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader
from plotly.offline import get_plotlyjs
from rich.console import Console
from rich.table import Table

from megatron_riskpo.errors import UsageError
from megatron_riskpo.observability.charts import Chart, build_charts
from megatron_riskpo.observability.metrics import read_metrics
from megatron_riskpo.observability.samples import read_samples, sample_steps
from megatron_riskpo.observability.summary import changes, phase_seconds

# Questions shown of a step, and responses of a question.
MAX_QUESTIONS = 4
MAX_RESPONSES = 8
# Columns of the printed table.
SUMMARY_WIDTH = 100


def write_report(run_dir: Path) -> Path:
    """Write run_dir/report.html from metrics.jsonl, config.json and rollouts/ (the last two where they are there).

    Everything that came out of a model or a file is escaped; the page may load nothing (its content security policy
    says so). Raises UsageError where the run has no metrics.
    """
    rows = read_metrics(run_dir)
    seconds = phase_seconds(rows)
    page = render_page(
        "report.html.j2",
        name=run_dir.resolve().name,
        steps=rows[-1]["step"],
        step_seconds=sum(seconds.values()),
        changes=changes(rows),
        seconds=seconds,
        charts=[(chart, draw(chart, f"chart-{index}")) for index, chart in enumerate(build_charts(rows))],
        samples=shown_samples(run_dir),
        config=read_config(run_dir),
    )
    return save_page(run_dir / "report.html", page)


def render_page(template: str, **values: Any) -> str:
    """A page out of one of this folder's templates, with plotly in it."""
    # autoescape: responses are a model's, questions a data set's; both may hold markup.
    environment = Environment(
        loader=PackageLoader(__package__, "."), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template(template).render(plotly=get_plotlyjs(), **values)


def save_page(path: Path, page: str) -> Path:
    path.write_text(page, encoding="utf-8", errors="backslashreplace")
    return path


def summary_table(run_dir: Path) -> str:
    """What a run changed and what its steps cost, as lines to print. Raises UsageError where there are no metrics."""
    rows = read_metrics(run_dir)
    table = Table(title=f"{run_dir.name}: {rows[-1]['step']} steps", title_justify="left")
    table.add_column("")
    for heading in ("before", "after", "change"):
        table.add_column(heading, justify="right")
    for change in changes(rows):
        table.add_row(change.label, *change.shown())
    table.add_section()
    seconds = phase_seconds(rows)
    for phase, mean in seconds.items():
        table.add_row(f"{phase} (s a step)", "", f"{mean:.2f}", f"{mean / max(sum(seconds.values()), 1e-12):.0%} of it")
    console = Console(file=io.StringIO(), width=SUMMARY_WIDTH, color_system=None, markup=False)
    with console.capture() as capture:
        console.print(table)
    return capture.get().rstrip()


def draw(chart: Chart, div_id: str) -> str:
    """The chart's element and script; plotly escapes < > / in the names inside."""
    config = {"responsive": True, "displaylogo": False, "displayModeBar": False}
    return chart.figure.to_html(full_html=False, include_plotlyjs=False, div_id=div_id, config=config)


def shown_samples(run_dir: Path) -> list[tuple[int, list[list[dict[str, Any]]]]]:
    """Of the last and the first step with samples: (step, questions, each a list of rows)."""
    steps = sample_steps(run_dir)
    return [(step, group_by_question(read_samples(run_dir, step))) for step in dict.fromkeys(steps[-1:] + steps[:1])]


def group_by_question(rows: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Rows of the same question together, in the order of the file, cut at the maxima."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(row["problem"], []).append(row)
    return [group[:MAX_RESPONSES] for group in list(groups.values())[:MAX_QUESTIONS]]


def read_config(run_dir: Path) -> str:
    """config.json, indented; empty where there is none."""
    path = run_dir / "config.json"
    if not path.is_file():
        return ""
    try:
        return json.dumps(json.loads(path.read_text(encoding="utf-8")), indent=2, ensure_ascii=False)
    except json.JSONDecodeError as error:
        raise UsageError(
            f"{path} is no JSON ({error}); remove it or bring it back, then write the report again"
        ) from error
