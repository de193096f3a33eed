"""`riskpo plan --bridge X.toml`: how the weights of a run would travel, without starting a rank."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from megatron_riskpo.config import TrainConfig
from megatron_riskpo.config_servers import transport_of
from megatron_riskpo.errors import UsageError
from megatron_riskpo.resharding.layouts import ActorLayout
from megatron_riskpo.resharding.plan import RankPlan, plan_rank
from megatron_riskpo.resharding.schedule import BridgeLayout, make_schedule
from megatron_riskpo.resharding.slices import source_slice, target_slice

MAX_ROWS = 32
"""Lines of a table; a plan of 2,048 ranks or 50,000 transfers is for programs to read."""
_ITEM_SIZE = {"float32": 4, "bfloat16": 2, "float16": 2}


def bridge_text(layout: BridgeLayout, rank: int | None) -> str:
    """The whole plan in short; with `rank` what that one sends and receives."""
    return "\n".join(summary(layout) if rank is None else describe_rank(plan_rank(layout, rank)))


def planned_layout(config: TrainConfig, hf_config: Mapping[str, Any], world_size: int, node_size: int) -> BridgeLayout:
    """What a run asks of the bridge, with engines in the training processes or on servers that get their weights by
    plan. Raises UsageError."""
    rollout, item_size, mib = config.rollout, _ITEM_SIZE[config.model.dtype], config.bridge.bucket_mib
    on_servers = rollout.placement == "server"
    if rollout.engine != "vllm" or (on_servers and transport_of(config) == "file"):
        raise UsageError(
            f'--bridge plans for vLLM in the training processes, or on servers with server.transport = "network" or '
            f'"shared_memory", not for rollout.engine = "{rollout.engine}" with rollout.placement = '
            f'"{rollout.placement}" and server.transport = "{config.server.transport}": there nothing moves between '
            "the ranks by plan"
        )
    if on_servers:
        actor, servers = ActorLayout.of(config.actor, world_size), len(rollout.server_urls) or rollout.servers
        return BridgeLayout.served(
            hf_config, actor, rollout.tp, servers, item_size, mib, node_size, expert_parallel=rollout.expert_parallel
        )
    return BridgeLayout.colocated(
        hf_config, config.actor, world_size, rollout.tp, item_size, mib, node_size,
        expert_parallel=rollout.expert_parallel,
    )  # fmt: skip


def remark(config: TrainConfig) -> str:
    """Where the configuration alone does not say whether the plan is used."""
    if config.rollout.placement == "colocated" or config.server.transport != "auto":
        return ""
    if transport_of(config) != "shared_memory":
        return ""
    return (
        'server.transport = "auto": on CPUs weights go by this plan, on GPUs through files; "network" or '
        '"shared_memory" takes the plan there, too'
    )


def summary(layout: BridgeLayout) -> list[str]:
    """The whole plan: a line a rank, the first ones."""
    actor, rollout, schedule = layout.actor, layout.rollout, make_schedule(layout)
    lines = [
        f"actor: {actor.world_size} ranks, tp {actor.tp}, pp {actor.pp}, vp {actor.vp}, cp {actor.cp}, ep {actor.ep}, "
        f"etp {actor.etp}; rollout: {rollout.replicas} engines, tp {rollout.tp}"
        f"{', expert-parallel' * rollout.expert_parallel}",
        f"{schedule.num_rounds} rounds, of at most {layout.bucket_bytes / 2**20:g} MiB sent and received a rank; "
        f"{sum(len(stream) for stream in schedule.streams)} tensors",
        "rank     receives MiB   from itself   from its node   from others   sends MiB   largest round MiB"
        "   two buckets MiB   open module MiB",
    ]
    num_ranks = max(actor.world_size, rollout.rank(rollout.replicas, 0))
    lines += [_rank_line(plan_rank(layout, rank)) for rank in range(min(num_ranks, MAX_ROWS))]
    if num_ranks > MAX_ROWS:
        lines.append(f"... and {num_ranks - MAX_ROWS} ranks more")
    return lines


def _rank_line(plan: RankPlan) -> str:
    receives, node = plan.receives, plan.layout.node_size
    is_own = receives["source"] == plan.rank
    is_near = ~is_own & (receives["source"] // node == plan.rank // node)
    sizes = [plan.num_bytes(part) / 2**20 for part in (receives, receives[is_own], receives[is_near])]
    rest = sizes[0] - sizes[1] - sizes[2]
    sends, peak = plan.num_bytes(plan.sends) / 2**20, plan.peak_round_bytes / 2**20
    extra = plan.bucket_bytes / 2**20, plan.peak_open_bytes / 2**20
    return (
        f"{plan.rank:<9}{sizes[0]:>12.2f}{sizes[1]:>14.2f}{sizes[2]:>16.2f}{rest:>14.2f}{sends:>12.2f}{peak:>20.2f}"
        f"{extra[0]:>18.2f}{extra[1]:>18.2f}"
    )


def describe_rank(plan: RankPlan) -> list[str]:
    """One rank's transfers, the first ones."""
    lines = [f"rank {plan.rank}: {len(plan.receives)} transfers in, {len(plan.sends)} out, digest {plan.digest[:16]}"]
    for title, transfers in (("receives", plan.receives), ("sends", plan.sends)):
        lines += [f"{title}:", *(_transfer_line(plan.layout, t) for t in transfers[:MAX_ROWS])]
        if len(transfers) > MAX_ROWS:
            lines.append(f"... and {len(transfers) - MAX_ROWS} more")
    return lines


def _transfer_line(layout: BridgeLayout, transfer: np.void) -> str:
    source = source_slice(layout, int(transfer["source"]), transfer)
    place = layout.rollout.place(int(transfer["destination"]))
    assert place is not None  # destinations are rollout ranks
    target = target_slice(layout, place[1], transfer)
    expert = f"[{target.expert}]" if target.expert >= 0 else ""
    return (
        f"  round {transfer['round']}: rank {transfer['source']} {source.parameter} "
        f"{_box(source.dim, (source.start, source.stop), (source.low, source.high))} -> rank {transfer['destination']} "
        f"{target.parameter}{expert} {_box(target.dim, (target.start, target.stop), (target.low, target.high))}"
    )


def _box(dim: int, cut: tuple[int, int], other: tuple[int, int]) -> str:
    rows, columns = (other, cut) if dim else (cut, other)
    return f"[{rows[0]}:{rows[1]}, {columns[0]}:{columns[1]}]"
