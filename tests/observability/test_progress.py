"""Progress lines, read back from the console's text."""

import io
import re

import pytest
from rich.console import Console

from megatron_riskpo.observability import progress as progress_module
from megatron_riskpo.observability.progress import Progress
from megatron_riskpo.observability.timing import PhaseTimer

METRICS = {
    "reward/mean": 0.41,
    "actor/entropy": 0.834,
    "rollout/tokens_per_second": 1234.4,
    "time/rollout_s": 0.31,
    "time/update_s": 0.42,
}


def make_console(terminal: bool, width: int = 160) -> Console:
    return Console(file=io.StringIO(), force_terminal=terminal, width=width, highlight=False, color_system=None)


def text_of(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_quiet_lines_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([0.0, 0.0, 50.0, 52.0, 56.0])
    monkeypatch.setattr(progress_module.time, "perf_counter", lambda: next(now))
    console = make_console(terminal=False)
    with Progress(150, True, console) as progress:
        progress.step(0, {"eval/heldout/pass@1": 0.12})
        progress.step(1, METRICS)
        progress.phase("rollout")
        progress.log("saved [bold] checkpoint")
        progress.step(2, METRICS | {"eval/heldout/pass@1": 0.25})
    learning = "reward 0.410 entropy 0.834 | 1234 tok/s | rollout 0.31 s update 0.42 s"
    # Step 0 took 50 s and does not count; then 2 s and 4 s: 149 * 2 s, 148 * 3 s.
    assert text_of(console).splitlines() == [
        "step 0/150 heldout/pass@1 0.120",
        f"step 1/150 {learning} | ETA 04:58",
        "saved [bold] checkpoint",
        f"step 2/150 {learning} | heldout/pass@1 0.250 | ETA 07:24",
    ]


@pytest.mark.parametrize("width", [80, 160])
def test_live_line_shows_step_and_phase(width: int) -> None:
    console = make_console(True, width)
    with Progress(150, True, console, start_step=11) as progress:
        timer = PhaseTimer(on_phase=progress.phase)
        with timer("rollout"):
            assert "rollout" in text_of(console)
        progress.step(12, METRICS | {"eval/heldout/pass@1": 0.25})
        progress.phase("update")
        progress.log("a note")
    shown = text_of(console)
    assert " 12/150" in shown
    assert "11/150" in shown
    # Whole, also on 80 columns.
    assert re.search(r"reward 0\.410 entropy 0\.834 \| 1234 tok/s \| ETA \d\d:\d\d\s+update", shown)
    assert "step 12/150 heldout/pass@1 0.250" in shown
    assert "a note" in shown


def test_other_ranks_are_silent() -> None:
    console = make_console(terminal=True)
    with Progress(10, False, console) as progress:
        progress.phase("rollout")
        progress.log("x")
        progress.step(1, METRICS)
    assert text_of(console) == ""


def test_a_line_every_ten_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([0.0, 0.0, 20.0])
    monkeypatch.setattr(progress_module.time, "perf_counter", lambda: next(now))
    console = make_console(terminal=False)
    with Progress(100, True, console) as progress:
        progress.step(10, {"sft/loss": 0.5})
    # 2 s a step, 90 to go.
    assert text_of(console) == "step 10/100 loss 0.500 | ETA 03:00\n"
