"""Medians, shares and ratios of the measured steps, as JSON-able data and as a table."""

from collections.abc import Sequence
from statistics import fmean, median
from typing import Any

from rich.console import Console
from rich.table import Table
from step_cases import Case, expected_response_tokens
from step_records import StepRecord

PHASES = ("rollout", "reward", "advantage", "update", "sync")


def case_report(case: Case, num_parameters: int, records: dict[str, list[StepRecord]]) -> dict[str, Any]:
    """Everything that is known of a case."""
    summaries = {trainer: _summary(steps) for trainer, steps in records.items()}
    trl, riskpo = summaries["trl"], summaries["riskpo"]
    return {
        "case": case.name,
        "num_parameters": num_parameters,
        "num_responses": case.num_responses,
        "group_size": case.group_size,
        "max_response_tokens": case.max_response_tokens,
        "expected_response_tokens": expected_response_tokens(case),
        "num_cores": case.num_cores,
        "ratio": trl["seconds"] / riskpo["seconds"],
        "phase_ratios": {
            phase: trl["phases"][phase] / riskpo["phases"][phase] for phase in trl["phases"] if riskpo["phases"][phase]
        },
        "trainers": summaries,
    }


def _summary(steps: Sequence[StepRecord]) -> dict[str, Any]:
    """Medians over steps; lengths over all responses."""
    lengths = [length for step in steps for length in step.response_lengths]
    phases = {phase: median(step.phases[phase] for step in steps) for phase in PHASES if phase in steps[0].phases}
    seconds = median(step.seconds for step in steps)
    return {
        "num_steps": len(steps),
        "seconds": seconds,
        "seconds_of_each_step": [step.seconds for step in steps],
        "phases": phases,
        "phase_shares": {phase: value / seconds for phase, value in phases.items()},
        "response_tokens_per_second": median(sum(step.response_lengths) / step.seconds for step in steps),
        "response_tokens_per_step": sum(lengths) / len(steps),
        "prompt_tokens_per_step": fmean(step.prompt_tokens for step in steps),
        "response_length_mean": fmean(lengths),
        "response_length_median": median(lengths),
        "response_length_max": max(lengths),
        "reward_mean": fmean(step.mean_reward for step in steps),
    }


def print_report(report: dict[str, Any], console: Console) -> None:
    """One table a case."""
    trl, riskpo = report["trainers"]["trl"], report["trainers"]["riskpo"]
    table = Table(
        title=f"{report['case']}: {report['num_parameters']:,} parameters, {report['num_responses']} responses of at "
        f"most {report['max_response_tokens']} tokens, group {report['group_size']}, {report['num_cores']} core(s)"
    )
    table.add_column("seconds, median", no_wrap=True)
    for heading in ("TRL", "share", "this project", "share", "ratio"):
        table.add_column(heading, justify="right", no_wrap=True)
    for phase in PHASES:
        table.add_row(phase, *_phase(trl, phase), *_phase(riskpo, phase), _times(report["phase_ratios"].get(phase)))
    table.add_section()
    table.add_row("step", f"{trl['seconds']:.3f}", "", f"{riskpo['seconds']:.3f}", "", _times(report["ratio"]))
    for label, key, form in (
        ("measured steps", "num_steps", "d"),
        ("response tokens/s", "response_tokens_per_second", ",.0f"),
        ("response tokens/step", "response_tokens_per_step", ",.0f"),
        ("prompt tokens/step", "prompt_tokens_per_step", ",.0f"),
        ("length, mean", "response_length_mean", ".1f"),
        ("length, median", "response_length_median", ".1f"),
        ("length, longest", "response_length_max", "d"),
        ("reward, mean", "reward_mean", ".3f"),
    ):
        table.add_row(label, f"{trl[key]:{form}}", "", f"{riskpo[key]:{form}}", "", "")
    console.print(table)


def _phase(summary: dict[str, Any], phase: str) -> tuple[str, str]:
    if phase not in summary["phases"]:
        return "-", "-"
    return f"{summary['phases'][phase]:.4f}", f"{summary['phase_shares'][phase]:.1%}"


def _times(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.2f}"
