"""How long a rank's resharding plan takes, and how long the planned syncs would take on given links and on this host.

Beside the dense case stands the planner of megatron.core.resharding, run in the same process on the same layout. Times
are of the processor, medians: other jobs on the machine count little. A sync is predicted from the plan's bytes: of
every rank what goes over its network card and what over NVLink, both ways at once, at the links' full speed; the
slowest rank counts. Neither latency nor vLLM's packing is in it. Round by round is what it would take if after each
round all ranks waited for the slowest one; they do not, so that the truth lies between. Beside it stands the host's
time for as many slices as the busiest rank gives and takes, measured on this machine (reshard_host.py); last, the
memory of a push (reshard_memory.py).
Usage: python tools/benchmark/reshard_plan.py [--json reshard_plan.json] [--skip-megatron]
"""

import argparse
import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from markdown_table import markdown_table
from megatron_planner import seconds_for_all_ranks
from reshard_cases import PLAN_CASES, SYNC_CASES, Case
from reshard_host import microseconds_a_slice
from reshard_memory import report_memory

from megatron_riskpo.resharding.plan import plan_rank, transfer_items
from megatron_riskpo.resharding.schedule import BridgeLayout, make_schedule

NIC_BYTES_S = 400e9 / 8
"""A 400 Gb/s card a GPU."""
NVLINK_BYTES_S = 450e9
"""Each way, of an H100's 900 GB/s."""
HOST_CASES = {False: SYNC_CASES[2], True: SYNC_CASES[6]}
"""By whether the model has experts: whose slices are timed."""


def plan_milliseconds(layout: BridgeLayout, num_ranks: int) -> list[float]:
    """Of ranks spread over the world, each from nothing."""
    times = []
    for rank in np.linspace(0, layout.actor.world_size - 1, num_ranks).astype(int).tolist():
        make_schedule.cache_clear()
        plan_rank.cache_clear()
        start = time.process_time()
        plan_rank(layout, rank)
        times.append(1e3 * (time.process_time() - start))
    return times


@dataclass(frozen=True)
class Sync:
    """Bytes, seconds and slices of one push."""

    largest_shard_gb: float
    far_gb: float
    """Most that a rank gets or gives over its network card."""
    near_gb: float
    """The same over NVLink."""
    seconds: float
    seconds_by_round: float
    """If all ranks waited for each other after each round."""
    ideal_seconds: float
    """If every rank got its whole shard over its card, and nothing else held it up."""
    slices_in: int
    """Most that a rank gets, from itself too."""
    slices_out: int
    """Most that a rank gives others."""
    slices: int
    """Most that a rank gives and gets."""


def predict(layout: BridgeLayout) -> Sync:
    """From all ranks' receives; what a rank sends is what others get from it."""
    num_ranks = max(layout.actor.world_size, layout.rollout.rank(layout.rollout.replicas, 0))
    moved = np.zeros((4, make_schedule(layout).num_rounds, num_ranks))  # far in, far out, near in, near out
    slices = np.zeros((2, num_ranks), dtype=np.int64)  # in, out
    largest = 0
    for rank in range(layout.rollout.first_rank, layout.rollout.rank(layout.rollout.replicas, 0)):
        receives = plan_rank.__wrapped__(layout, rank).receives
        num_bytes = transfer_items(receives) * layout.item_size
        largest = max(largest, int(num_bytes.sum()))
        is_near = receives["source"] // layout.node_size == rank // layout.node_size
        is_other = receives["source"] != rank
        slices[0, rank] = len(receives)
        np.add.at(slices[1], receives["source"][is_other], 1)
        for row, chosen in ((0, is_other & ~is_near), (2, is_other & is_near)):
            number, source = receives["round"][chosen], receives["source"][chosen]
            np.add.at(moved[row], (number, rank), num_bytes[chosen])
            np.add.at(moved[row + 1], (number, source), num_bytes[chosen])
    far, near = moved.sum(axis=1)[:2].max(), moved.sum(axis=1)[2:].max()
    busiest = moved.max(axis=2)
    by_round = np.maximum(busiest[:2].max(axis=0) / NIC_BYTES_S, busiest[2:].max(axis=0) / NVLINK_BYTES_S).sum()
    seconds = max(far / NIC_BYTES_S, near / NVLINK_BYTES_S)
    most_in, most_out = slices.max(axis=1).tolist()
    return Sync(
        largest / 1e9, far / 1e9, near / 1e9, seconds, float(by_round), largest / NIC_BYTES_S, most_in, most_out,
        int(slices.sum(axis=0).max()),
    )  # fmt: skip


def host_microseconds() -> dict[bool, float]:
    """A slice, by whether the model has experts."""
    found = {has_experts: microseconds_a_slice(case) for has_experts, case in HOST_CASES.items()}
    told = ", ".join(f"{us:.1f} ({HOST_CASES[has_experts].name})" for has_experts, us in found.items())
    print(f"Microseconds of the host a slice: {told}\n")
    return found


def host_seconds(case: Case, slices: int, microseconds: dict[bool, float]) -> float:
    return slices * microseconds[case.layout.model.shape.num_experts > 0] / 1e6


def report_plans(num_ranks: int, with_megatron: bool, microseconds: dict[bool, float]) -> dict[str, Any]:
    figures: dict[str, Any] = {}
    rows = []
    for case, goal in PLAN_CASES:
        times = plan_milliseconds(case.layout, num_ranks)
        plan = plan_rank(case.layout, 0)
        transfers = len(plan.receives) + len(plan.sends)
        figures[case.name] = {"ms": times, "transfers": transfers}
        rows.append([case.name, str(transfers), f"{median(times):.0f}", f"{max(times):.0f}", f"{goal}",
                     f"{host_seconds(case, transfers, microseconds):.3f}"])  # fmt: skip
    print("## A rank's plan\n")
    header = ["case", "transfers of rank 0", "ms, median", "ms, slowest rank", "goal", "host s of a sync"]
    print(markdown_table(header, rows))
    if with_megatron:
        figures["megatron"] = _megatron(PLAN_CASES[0][0], figures[PLAN_CASES[0][0].name]["ms"])
    return figures


def _megatron(case: Case, own_ms: list[float]) -> dict[str, float]:
    seconds, transfers = seconds_for_all_ranks(case.hf_config, case.actor, case.rollout)
    ratio = 1e3 * seconds / median(own_ms)
    print(
        f"\n{case.name}: megatron.core.resharding plans on rank 0 for all ranks, {seconds:.1f} s ({transfers} "
        f"transfers into rank 0); ours {median(own_ms):.0f} ms, on every rank at once: 1/{ratio:.0f}"
    )
    return {"seconds": seconds, "transfers": transfers, "ratio": ratio}


def report_syncs(cases: tuple[Case, ...], microseconds: dict[bool, float]) -> dict[str, Any]:
    rows, figures = [], {}
    for case in cases:
        sync = predict(case.layout)
        figures[case.name] = asdict(sync)
        rows.append([case.name, str(case.actor.world_size), f"{sync.largest_shard_gb:.2f}", f"{sync.far_gb:.2f}",
                     f"{sync.near_gb:.2f}", f"{sync.seconds:.3f}", f"{sync.seconds_by_round:.3f}",
                     f"{sync.ideal_seconds:.3f}", str(sync.slices_in), str(sync.slices_out),
                     f"{host_seconds(case, sync.slices, microseconds):.3f}"])  # fmt: skip
    header = ["model, rollout on", "actor ranks", "shard GB", "most over a card GB", "most over NVLink GB",
              "predicted s", "round by round s", "shard over card s", "slices into a rank", "out of a rank",
              "host s"]  # fmt: skip
    print("\n## Predicted syncs\n")
    print(markdown_table(header, rows))
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--ranks", type=int, default=9, help="ranks whose plans are timed")
    parser.add_argument("--syncs", type=int, default=len(SYNC_CASES), help="how many of the predictions to make")
    parser.add_argument("--skip-megatron", action="store_true")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    microseconds = host_microseconds()
    figures = report_plans(args.ranks, not args.skip_megatron, microseconds)
    figures["syncs"] = report_syncs(SYNC_CASES[: args.syncs], microseconds)
    figures["host_us"] = {("experts" if experts else "dense"): us for experts, us in microseconds.items()}
    figures["memory"] = report_memory([*SYNC_CASES[: args.syncs], *(case for case, _ in PLAN_CASES)])
    if args.json:
        args.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
