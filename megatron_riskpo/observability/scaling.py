"""Runs of a sweep side by side: tokens a second and rank, MFU, where the time goes, and what more ranks gain."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from megatron_riskpo.config_io import RUN_RECORD
from megatron_riskpo.config_layout import layout_words
from megatron_riskpo.errors import UsageError
from megatron_riskpo.observability.metrics import read_metrics

WARM_UP_STEPS = 2
"""First steps of a run that do not count: kernels are compiled, connections set up."""
NO_STEP_PHASES = ("evaluation", "checkpoint")
"""Phases that come every so many steps only."""


@dataclass(frozen=True)
class ScalingRun:
    """One run in numbers: medians over its steps after the warm-up."""

    name: str
    ranks: int
    layout: str
    """tp 8 pp 2 dp 4 ..., sizes of 1 left out."""
    replica: tuple[Any, ...]
    """What runs have in common that can be compared: model, lengths, and how one replica is laid out."""
    sequences: int
    """Of a step, over all ranks."""
    num_steps: int
    step_s: float
    tokens_per_second: float
    """Of a rank: tokens of the step's sequences, prompts included, over the seconds of the whole step."""
    mfu: float | None
    """Of the update; None where the device's peak is not known."""
    model_tflops: float
    """10^12 FLOP/s a rank, in the update."""
    phases: dict[str, float]
    """Phase -> share of the step, longest first."""


def read_run(run_dir: Path) -> ScalingRun:
    """Raises UsageError where the folder is no run, or has no step behind its warm-up."""
    record = _record(run_dir)
    config, ranks = record["config"], record["ranks"]
    rows = [row for row in read_metrics(run_dir) if row["step"] > WARM_UP_STEPS and row.get("time/update_s")]
    if not rows:
        raise UsageError(f"{run_dir} has no step behind the first {WARM_UP_STEPS}, which do not count; train longer")
    # Records of earlier versions have no etp.
    actor, rollout, data = {"etp": 1} | config["actor"], config["rollout"], config["data"]
    step_s = median(_step_seconds(row) for row in rows)
    phases = {name: median(_phases(row).get(name, 0.0) for row in rows) / step_s for name in _phases(rows[-1])}
    mfu = [row["perf/mfu"] for row in rows if row.get("perf/mfu")]
    return ScalingRun(
        name=config["run"]["name"],
        ranks=ranks,
        layout=layout_words(actor, ranks),
        replica=(
            config["model"]["path"], config["model"]["dtype"], data["max_prompt_tokens"],
            rollout["max_response_tokens"], rollout["tp"], rollout["placement"], json.dumps(actor, sort_keys=True),
        ),
        sequences=data["prompts_per_step"] * rollout["group_size"],
        num_steps=len(rows),
        step_s=step_s,
        tokens_per_second=median(_tokens(row) / _step_seconds(row) for row in rows) / ranks,
        mfu=median(mfu) if mfu else None,
        model_tflops=median(row["perf/model_tflops"] for row in rows),
        phases=dict(sorted(phases.items(), key=lambda item: -item[1])),
    )  # fmt: skip


def _record(run_dir: Path) -> dict[str, Any]:
    path = run_dir / RUN_RECORD
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(
            f"{path} is not readable as JSON ({error}); name the folder of a run of riskpo train"
        ) from error
    if not isinstance(record, dict) or "ranks" not in record or "rollout" not in record.get("config", {}):
        raise UsageError(
            f"{path} does not say on how many ranks riskpo train ran; name runs of this version, and not of riskpo sft"
        )
    return record


def _phases(row: dict[str, Any]) -> dict[str, float]:
    times = {key.removeprefix("time/").removesuffix("_s"): row[key] or 0.0 for key in row if key.startswith("time/")}
    return {name: seconds for name, seconds in times.items() if name not in NO_STEP_PHASES}


def _step_seconds(row: dict[str, Any]) -> float:
    return sum(_phases(row).values())


def _tokens(row: dict[str, Any]) -> float:
    return row["perf/update_tokens_per_second"] * row["time/update_s"]


def strong_groups(runs: Sequence[ScalingRun]) -> list[list[ScalingRun]]:
    """Runs with the same work a step on different numbers of ranks, each group by ranks."""
    return _groups(runs, lambda run: (run.replica, run.sequences))


def weak_groups(runs: Sequence[ScalingRun]) -> list[list[ScalingRun]]:
    """Runs with the same work a rank and step on different numbers of ranks, each group by ranks."""
    return _groups(runs, lambda run: (run.replica, run.sequences / run.ranks))


def _groups(runs: Sequence[ScalingRun], key: Callable[[ScalingRun], Any]) -> list[list[ScalingRun]]:
    groups: dict[Any, list[ScalingRun]] = {}
    for run in sorted(runs, key=lambda run: (run.ranks, run.name)):
        groups.setdefault(key(run), []).append(run)
    return [group for group in groups.values() if len({run.ranks for run in group}) > 1]


def efficiencies(groups: Sequence[Sequence[ScalingRun]]) -> dict[str, float]:
    """By run: its tokens a second and rank over those of its group's run on the fewest ranks; 1: nothing is lost."""
    return {run.name: run.tokens_per_second / group[0].tokens_per_second for group in groups for run in group}


def scaling_table(runs: Sequence[ScalingRun]) -> str:
    """Markdown, a row a run."""
    strong, weak = efficiencies(strong_groups(runs)), efficiencies(weak_groups(runs))
    has_peak = any(run.mfu for run in runs)
    speed = "MFU of the update" if has_peak else "TFLOP/s a rank in the update"
    heading = ["run", "ranks", "layout", "sequences a step", "s a step", "tokens/s a rank", speed, "strong", "weak"]
    rows = [[*heading, "phases"], ["---"] * (len(heading) + 1)]
    for run in runs:
        # A model that is too small for a TFLOP/s has digits all the same.
        rate = (f"{run.mfu:.1%}" if run.mfu else "") if has_peak else f"{run.model_tflops:.3g}"
        rows.append([
            run.name, str(run.ranks), run.layout, str(run.sequences), f"{run.step_s:.3g}",
            f"{run.tokens_per_second:.4g}", rate, _percent(strong.get(run.name)), _percent(weak.get(run.name)),
            ", ".join(f"{name} {share:.0%}" for name, share in run.phases.items() if share >= 0.005),
        ])  # fmt: skip
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.0%}"
