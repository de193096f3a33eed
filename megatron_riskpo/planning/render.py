"""A plan as a person reads it, and as a program does."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from megatron_riskpo.config_layout import layout_words
from megatron_riskpo.planning.gpus import GIB, TIGHT
from megatron_riskpo.planning.memory import RankMemory
from megatron_riskpo.planning.plan import Plan
from megatron_riskpo.planning.search import LAYOUT_OPTIONS


def plan_text(plan: Plan) -> str:
    """The tables of memory and time, and whether it fits."""
    lines = [headline(plan), "", *_memory_table(plan), "", *_time_table(plan), ""]
    if plan.complaints:
        return "\n".join([*lines, *(f"does not fit: {complaint}" for complaint in plan.complaints)])
    tight = plan.peak > TIGHT * plan.gpu.memory
    return "\n".join([*lines, f"fits{', but tightly' * tight}: {summary(plan)}"])


def summary(plan: Plan) -> str:
    """Memory and time in one line, as recipes state them."""
    phases = ", ".join(f"{name} {plan.time.phases[name].seconds:.0f}" for name in ("rollout", "logprobs", "update"))
    return (
        f"at most {plan.peak / GIB:.1f} of {plan.gpu.memory / GIB:.1f} GiB a GPU, {plan.time.seconds:.0f} s a step "
        f"({phases})"
    )


def headline(plan: Plan) -> str:
    """What is planned, in one line."""
    work = plan.work
    return (
        f"{plan.world_size} x {plan.gpu.name}, {_layout(plan)}; {work.num_prompts} questions x {work.group_size} "
        f"responses of {work.mean_response:.0f} tokens on average, {work.micro_batches} micro-batches a mini-batch and "
        "rank"
    )


def _layout(plan: Plan) -> str:
    return layout_words(dataclasses.asdict(plan.config.actor), plan.world_size)


def _memory_table(plan: Plan) -> list[str]:
    rows = [["rank", "stage", "phase", "GiB", "of which"]]
    for rank in plan.memory:
        for phase, items in rank.phases.items():
            parts = ", ".join(f"{name} {size / GIB:.1f}" for name, size in items.items() if size >= 0.05 * GIB)
            rows.append([str(rank.rank), str(rank.stage), phase, f"{sum(items.values()) / GIB:.1f}", parts])
    host = max(rank.host for rank in plan.memory)
    return [*_aligned(rows), *([f"host memory: {host / GIB:.1f} GiB a rank"] if host else [])]


def _time_table(plan: Plan) -> list[str]:
    rows = [["phase", "s a step", "most of it"]]
    rows += [[name, f"{phase.seconds:.1f}", phase.bound] for name, phase in plan.time.phases.items()]
    if plan.time.overlapped:
        rows.append(["overlap", f"-{plan.time.overlapped:.1f}", "servers sample while the trainer works"])
    rows.append(["step", f"{plan.time.seconds:.1f}", ""])
    speed = (
        f"{plan.time.tokens_per_second:.0f} response tokens/s a GPU, update at {100 * plan.time.mfu:.0f} % of the peak"
    )
    return [*_aligned(rows), speed]


def search_text(plans: Sequence[Plan]) -> str:
    """A line a plan, fastest first, and what to write into the file for the first."""
    if not plans:
        return "no layout fits: take more GPUs, or lower actor.micro_batch_tokens or rollout.gpu_memory_utilization"
    rows = [["s a step", "GiB", "tokens/s a GPU", "layout"]]
    for plan in plans:
        speed = f"{plan.time.tokens_per_second:.0f}"
        rows.append([f"{plan.time.seconds:.1f}", f"{plan.peak / GIB:.1f}", speed, _layout(plan)])
    return "\n".join([*_aligned(rows), "", "[actor]", *_actor_lines(plans[0])])


def _actor_lines(plan: Plan) -> list[str]:
    """TOML of the options that the search sets, where they are not the default."""
    actor, default = plan.config.actor, type(plan.config.actor)()
    lines = []
    for name in LAYOUT_OPTIONS:
        value = getattr(actor, name)
        if value != getattr(default, name):
            words = str(value).lower() if isinstance(value, bool) else f'"{value}"' if isinstance(value, str) else value
            lines.append(f"{name} = {words}")
    return lines


def dry_run_text(rank: RankMemory, world_size: int) -> str:
    """What one rank holds, to the byte."""
    state, activations = rank.state, rank.activations
    rows = [
        ["parameters", f"{state.parameters:,}", f"{state.num_parameters:,} of them"],
        ["gradients", f"{state.gradients:,}", "float32"],
        ["main weights", f"{state.main_weights:,}", "this rank's share"],
        ["moments", f"{state.moments:,}", "this rank's share"],
        ["activations, update", f"{activations.update:,}", f"in flight: {sum(activations.in_flight.values())}"],
        ["activations, log-probs", f"{activations.logprobs:,}", ""],
    ]
    return "\n".join(
        [f"rank {rank.rank} of {world_size}, pipeline stage {rank.stage}", *_aligned([["", "bytes", ""], *rows])]
    )


def plan_json(plan: Plan) -> dict[str, Any]:
    """The plan in JSON's types; sizes in bytes, times in seconds."""
    return {
        "gpu": plan.gpu.name,
        "gpus": plan.world_size,
        "actor": dataclasses.asdict(plan.config.actor),
        "fits": not plan.complaints,
        "complaints": plan.complaints,
        "peak_bytes": plan.peak,
        "ranks": [_rank_json(rank) for rank in plan.memory],
        "seconds": {name: phase.seconds for name, phase in plan.time.phases.items()},
        "bounds": {name: phase.bound for name, phase in plan.time.phases.items()},
        "overlapped_seconds": plan.time.overlapped,
        "step_seconds": plan.time.seconds,
        "mfu": plan.time.mfu,
        "response_tokens_per_second_per_gpu": plan.time.tokens_per_second,
    }


def _rank_json(rank: RankMemory) -> dict[str, Any]:
    return {**dataclasses.asdict(rank), "peak": rank.peak}


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
