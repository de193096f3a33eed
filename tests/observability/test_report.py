"""The report: self-contained, escapes what a model wrote, draws what the metrics hold."""

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from megatron_riskpo.errors import UsageError
from megatron_riskpo.observability.charts import build_charts, moving_average
from megatron_riskpo.observability.metrics import MetricsWriter, read_metrics
from megatron_riskpo.observability.report import write_report
from megatron_riskpo.observability.samples import FIELDS, write_samples

ATTACK = "</pre></script><img src=x onerror=alert(1)><script>alert(2)</script>"


class Page(HTMLParser):
    """Elements with their attributes, and the text outside of scripts and styles."""

    def __init__(self, html: str):
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self._inside = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._inside = tag

    def handle_data(self, data: str) -> None:
        if self._inside not in ("script", "style"):
            self.words.append(data)


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    folder = tmp_path / "quickstart"
    with MetricsWriter(folder, False) as writer:
        writer.write(0, {"eval/heldout/pass@1": 0.12, f"eval/{ATTACK}/pass@1": 0.5})
        for step in range(1, 31):
            row = {"reward/mean": step / 30, "actor/entropy": math.nan if step == 7 else 1 / step}
            row |= {"risk/effective_weight/0.0-0.2": step / 10, "time/rollout_s": 0.5, "time/update_s": 0.25}
            writer.write(step, row)
        writer.write(30, {"eval/heldout/pass@1": 0.52})
    (folder / "config.json").write_text(json.dumps({"run": {"name": ATTACK}}))
    rows = [dict(zip(FIELDS, (ATTACK, ATTACK, f"{ATTACK} {i}", i % 2, i > 0, 0.5), strict=True)) for i in range(12)]
    write_samples(folder, 30, rows)
    return folder


def test_page_needs_nothing_else(run_dir: Path) -> None:
    html = write_report(run_dir).read_text()
    page = Page(html)
    loading = [
        e for e in page.elements if e[1].keys() & {"src", "href", "srcset", "data"} or e[0] in ("link", "iframe")
    ]
    assert loading == []
    assert "default-src 'none'" in html
    assert html.count("Plotly.newPlot(") >= 5


def test_markup_of_a_model_stays_text(run_dir: Path) -> None:
    clean = Page(write_report(run_dir).read_text())
    assert not [e for e in clean.elements if e[0] == "img" or "onerror" in e[1]]
    # plotly.js, and one script a chart: no other came in.
    num_charts = len(build_charts(read_metrics(run_dir)))
    assert sum(tag == "script" for tag, _ in clean.elements) == num_charts + 1
    text = "".join(clean.words)
    # Shown as it was: question, answer, the first 8 responses, configuration.
    assert text.count(ATTACK) >= 10
    assert f"{ATTACK} 7" in text
    assert f"{ATTACK} 8" not in text


def test_page_says_what_changed(run_dir: Path) -> None:
    text = re.sub(r"\s+", " ", "".join(Page(write_report(run_dir).read_text()).words))
    assert "12.0% \u2192 52.0%" in text
    assert "+40.0 points" in text
    assert "30 steps, 0.75 seconds each" in text


def test_charts_hold_the_metrics(run_dir: Path) -> None:
    charts = {chart.title: chart.figure for chart in build_charts(read_metrics(run_dir))}
    assert list(charts) == [
        "Held-out questions",
        "Training reward",
        "Entropy",
        "Effective weight by difficulty",
        "Time per phase",
    ]
    evaluation = {trace.name: (trace.x, trace.y) for trace in charts["Held-out questions"].data}
    assert evaluation["pass@1 heldout"] == ((0, 30), (0.12, 0.52))
    raw = charts["Training reward"].data[0]
    assert raw.x == tuple(range(1, 31))
    assert raw.y == tuple(step / 30 for step in range(1, 31))
    assert charts["Entropy"].data[0].y[6] is None
    first, last = charts["Effective weight by difficulty"].data
    assert (first.y[0], last.y[0]) == (pytest.approx(0.2), pytest.approx(2.9))
    assert {trace.stackgroup for trace in charts["Time per phase"].data} == {"phases"}


def test_sources_have_a_chart_of_their_rewards() -> None:
    rows = [
        {"step": step, "reward/mean": 0.5, "reward/a/b/mean": step / 4, "reward/sums/mean": 0.25} for step in (1, 2)
    ]
    charts = {chart.title: chart.figure for chart in build_charts(rows)}
    lines = {trace.name: trace.y for trace in charts["Training reward by source"].data if trace.showlegend is False}
    assert lines == {"a/b": (0.25, 0.5), "sums": (0.25, 0.25)}


def test_moving_average_leaves_out_gaps() -> None:
    assert moving_average([1.0, None, 3.0, 5.0], 2) == [1.0, 1.0, 3.0, 4.0]
    assert moving_average([None, 2.0], 1) == [None, 2.0]


def test_without_samples_and_config(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path, False) as writer:
        writer.write(0, {"eval/heldout/pass@1": 0.12})
    assert "Configuration" not in "".join(Page(write_report(tmp_path).read_text()).words)


def test_wrong_folders(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"has no metrics\.jsonl"):
        write_report(tmp_path / "absent")
    with MetricsWriter(tmp_path, False) as writer:
        writer.write(0, {"a": 1.0})
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UsageError, match=r"config\.json is no JSON"):
        write_report(tmp_path)
