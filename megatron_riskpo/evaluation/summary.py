"""What an evaluation says, with 95 % intervals over questions: intervals.json, and the table that is printed."""

import io
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table as RichTable

from megatron_riskpo.config_io import write_json
from megatron_riskpo.evaluation.intervals import mean_intervals, share_intervals
from megatron_riskpo.evaluation.nemo_metrics import question_majority_at_k
from megatron_riskpo.evaluation.passk import question_pass_at_k
from megatron_riskpo.evaluation.results import Results
from megatron_riskpo.rewards.reference import rows_by_source

INTERVALS_FILE = "intervals.json"
TABLE_WIDTH = 100


@dataclass(frozen=True)
class Estimate:
    """A mean over questions and the interval that it lies in."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Summary:
    """One benchmark."""

    num_questions: int
    num_samples: int
    shares: dict[str, Estimate]
    """pass@k for all k <= n, avg@n, majority@k from k = 2 on, no_answer, truncated: in [0, 1]."""
    response_length: Estimate | None
    """Mean tokens of a response."""
    errors: int
    """Responses that could not be graded. They count as not solved in `shares`."""
    if_errors_were_right: dict[str, float]
    """pass@k with them counted as solved, where there are any: how much they can matter."""
    sources: dict[str, "Summary"]
    """Of the questions of each data source; empty where there is only one."""


def summarize(results: Results) -> Summary:
    """All figures of one benchmark."""
    ks = range(1, results.num_samples + 1)
    columns = share_columns(results)
    lengths = None
    if results.lengths is not None:
        per_question = results.lengths.mean(axis=1, keepdims=True)
        lengths = estimates({"": per_question[:, 0]}, mean_intervals(per_question))[""]
    num_errors = int(results.errors.sum())
    best_case = question_pass_at_k(results.correct | results.errors, ks).mean(axis=0)
    return Summary(
        num_questions=results.num_questions,
        num_samples=results.num_samples,
        shares=estimates(columns, share_intervals(np.stack(list(columns.values()), axis=1))),
        response_length=lengths,
        errors=num_errors,
        if_errors_were_right=(
            {f"pass@{k}": float(value) for k, value in zip(ks, best_case, strict=True)} if num_errors else {}
        ),
        sources={source: summarize(results.take(rows)) for source, rows in rows_by_source(results.sources).items()},
    )


def share_columns(results: Results) -> dict[str, NDArray[np.float64]]:
    """{metric: its value for each question, in [0, 1]}; the metric is the mean over questions."""
    n = results.num_samples
    passed = question_pass_at_k(results.correct, range(1, n + 1))
    columns = {f"pass@{k}": passed[:, k - 1] for k in range(1, n + 1)}
    columns[f"avg@{n}"] = results.correct.mean(axis=1)
    if n > 1:
        votes = question_majority_at_k(results.correct, results.predicted)
        columns |= {f"majority@{k}": votes[:, k - 1] for k in range(2, n + 1)}
    columns["no_answer"] = np.array([np.mean([a is None for a in answers]) for answers in results.predicted])
    if results.truncated is not None:
        columns["truncated"] = results.truncated.mean(axis=1)
    return columns


def estimates(columns: dict[str, NDArray[np.float64]], intervals: NDArray[np.float64]) -> dict[str, Estimate]:
    """Mean and interval of each column. An interval always holds its mean."""
    found = {}
    for (name, values), (low, high) in zip(columns.items(), intervals.tolist(), strict=True):
        mean = float(values.mean())
        found[name] = Estimate(mean, min(low, mean), max(high, mean))
    return found


def write_intervals(folder: Path, summaries: dict[str, Summary]) -> Path:
    """Write folder/intervals.json, in one move; {benchmark: Summary}."""
    return write_json(folder / INTERVALS_FILE, {name: asdict(summary) for name, summary in summaries.items()})


def shown_ks(num_samples: int) -> list[int]:
    """Powers of two up to n, and n."""
    return sorted({2**i for i in range(num_samples.bit_length())} | {num_samples})


def table(summaries: dict[str, Summary]) -> str:
    """A line for each figure, a column for each benchmark; then the data sources of each that has several."""
    by_source = [source_table(name, summary) for name, summary in summaries.items() if summary.sources]
    return "\n".join([_figures(summaries), *by_source])


def source_table(name: str, summary: Summary) -> str:
    """A line for each data source, in few figures; intervals.json has all."""
    shown = list(dict.fromkeys(("pass@1", f"pass@{summary.num_samples}")))
    rich_table = RichTable(title=f"{name}, by source", title_justify="left")
    for column in ("", "questions", *shown, "not graded (errors)"):
        rich_table.add_column(column, justify="right" if column else "left")
    for source, own in summary.sources.items():
        rich_table.add_row(source, str(own.num_questions), *(percent(own.shares[k]) for k in shown), str(own.errors))
    return render(rich_table)


def _figures(summaries: dict[str, Summary]) -> str:
    rich_table = RichTable(title="mean [95 % interval over questions]", title_justify="left")
    rich_table.add_column("")
    for name in summaries:
        rich_table.add_column(name, justify="right")
    for label, cells in _rows(list(summaries.values())).items():
        rich_table.add_row(label, *cells)
    return render(rich_table)


def render(rich_table: RichTable) -> str:
    """As lines to print."""
    console = Console(file=io.StringIO(), width=TABLE_WIDTH, color_system=None, markup=False)
    with console.capture() as capture:
        console.print(rich_table)
    return capture.get().rstrip()


def percent(estimate: Estimate) -> str:
    """64.0 % [58.1, 69.6]."""
    return f"{100 * estimate.value:.1f} % [{100 * estimate.low:.1f}, {100 * estimate.high:.1f}]"


def _rows(summaries: Sequence[Summary]) -> dict[str, list[str]]:
    rows = {"questions x samples": [f"{s.num_questions} x {s.num_samples}" for s in summaries]}
    most = max(summary.num_samples for summary in summaries)
    ks = sorted({k for summary in summaries for k in shown_ks(summary.num_samples)})
    names = [f"pass@{k}" for k in ks] + [f"majority@{k}" for k in shown_ks(most)[1:]] + ["no_answer", "truncated"]
    for name in names:
        cells = [percent(s.shares[name]) if name in s.shares else "" for s in summaries]
        if any(cells):
            rows[name.replace("_", " ")] = cells
    rows["response tokens"] = [
        f"{s.response_length.value:.1f} [{s.response_length.low:.1f}, {s.response_length.high:.1f}]"
        if s.response_length
        else ""
        for s in summaries
    ]
    rows["not graded (errors)"] = [_errors(summary) for summary in summaries]
    return rows


def _errors(summary: Summary) -> str:
    if not summary.errors:
        return "0"
    return f"{summary.errors} (pass@1 {100 * summary.if_errors_were_right['pass@1']:.1f} % if all were right)"
