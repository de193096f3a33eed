"""All-reduce bandwidth inside and between the nodes of a job."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_riskpo.doctor.line import Line

GPU_BYTES, CPU_BYTES = 256 * 2**20, 16 * 2**20
NUM_TIMES = 5
BROKEN_SHARE = 0.25
"""Of what is expected: less is another path (TCP in place of RDMA, PCIe in place of NVLink)."""


@dataclass(frozen=True)
class Groups:
    """This rank's; None where a group would have one rank."""

    node: Any
    """The ranks of its node."""
    across: Any
    """The ranks with its place on their nodes, one a node."""


def make_groups(hosts: Sequence[str], rank: int) -> Groups:
    """`hosts`: of the ranks. Collective."""
    import torch.distributed as dist

    nodes = list(ranks_by_host(hosts).values())
    width = min(len(ranks) for ranks in nodes)
    across = [[ranks[place] for ranks in nodes] for place in range(width)] if len(nodes) > 1 else []
    mine: dict[str, Any] = {"node": None, "across": None}
    for kind, all_ranks in (("node", nodes), ("across", across)):
        for ranks in all_ranks:
            if len(ranks) > 1:
                group = dist.new_group(ranks)
                mine[kind] = group if rank in ranks else mine[kind]
    return Groups(**mine)


def ranks_by_host(hosts: Sequence[str]) -> dict[str, list[int]]:
    """Host -> its ranks."""
    nodes: dict[str, list[int]] = {}
    for rank, host in enumerate(hosts):
        nodes.setdefault(host, []).append(rank)
    return nodes


def all_reduce_rate(group: Any, device: Any) -> float:
    """Bus bandwidth in bytes/s, the best of some all-reduces: 2 (n - 1) / n of the bytes over the seconds, which is
    what each link carries whatever the number of ranks (NVIDIA's nccl-tests, PERFORMANCE.md). 0 without a group."""
    import torch
    import torch.distributed as dist

    if group is None:
        return 0.0
    on_gpu = device.type == "cuda"
    num_bytes = GPU_BYTES if on_gpu else CPU_BYTES
    data = torch.zeros(num_bytes // 4, device=device)
    best = float("inf")
    for round in range(1 + NUM_TIMES):
        dist.barrier(group)
        started = time.perf_counter()
        dist.all_reduce(data, group=group)
        if on_gpu:
            torch.cuda.synchronize()
        # The first one sets connections up.
        best = min(best, time.perf_counter() - started) if round else best
    size = dist.get_world_size(group)
    return 2 * (size - 1) / size * num_bytes / best


def pair_rate(peer: int, device: Any) -> float:
    """Bytes/s to and from `peer` at the same time, the better of two; the peer calls it with this rank."""
    import torch
    import torch.distributed as dist

    on_gpu = device.type == "cuda"
    num_bytes = GPU_BYTES if on_gpu else CPU_BYTES
    out, into = torch.zeros(num_bytes, dtype=torch.uint8, device=device), None
    best = float("inf")
    for _ in range(3):
        into = torch.empty_like(out)
        started = time.perf_counter()
        for work in dist.batch_isend_irecv([dist.P2POp(dist.isend, out, peer), dist.P2POp(dist.irecv, into, peer)]):
            work.wait()
        if on_gpu:
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - started)
    return num_bytes / best


def neighbours(leaders: Sequence[int], rank: int) -> list[int | None]:
    """Whom `rank` measures with in the first and in the second round, so that most nodes have a neighbour on either
    side: pairs (0, 1), (2, 3), ..., then (1, 2), (3, 4), ... and, of an even number above two, (last, 0)."""
    if rank not in leaders:
        return []
    place, num = list(leaders).index(rank), len(leaders)
    first, second = place ^ 1, place + 1 if place % 2 else place - 1
    if num % 2 == 0 and num > 2:
        second %= num
    return [leaders[peer] if 0 <= peer < num else None for peer in (first, second)]


def inside_lines(rates: Mapping[str, float], expected: float | None) -> list[Line]:
    """`rates`: bytes/s by host, 0 of a node with one rank."""
    measured = {host: rate for host, rate in rates.items() if rate}
    if not measured:
        return [Line("all-reduce inside nodes", "ok", "one rank a node: nothing to measure")]
    remedy = "see nvidia-smi topo -m and nvidia-smi nvlink --status there, or leave the node out (sbatch --exclude)"
    return _rated("all-reduce inside nodes", measured, expected, remedy)


def between_lines(rate: float, pairs: Mapping[str, float], expected: float | None) -> list[Line]:
    """`rate`: of the slowest group across all nodes, bytes/s a rank; `pairs`: by host, of its better pair."""
    if not rate:
        return [Line("all-reduce between nodes", "ok", "one node: nothing to measure")]
    remedy = "see NCCL_DEBUG=INFO for the network that NCCL took (NET/IB, not NET/Socket), and ibstat there"
    lines = _rated("all-reduce between nodes", {"all nodes": rate}, expected, remedy)
    if lines[0].state != "ok" and pairs:
        slowest = min(pairs, key=lambda host: pairs[host])
        others = ", ".join(f"{host} {value / 1e9:.1f}" for host, value in sorted(pairs.items(), key=lambda p: p[1])[:4])
        found = f"{lines[0].found}; slowest with its neighbours: {slowest} ({others} GB/s)"
        lines = [Line(lines[0].name, lines[0].state, found, lines[0].remedy)]
    return lines


def _rated(name: str, rates: Mapping[str, float], expected: float | None, remedy: str) -> list[Line]:
    slowest = min(rates, key=lambda host: rates[host])
    found = f"{rates[slowest] / 1e9:.1f} GB/s a rank on {slowest}" + (", the slowest" if len(rates) > 1 else "")
    if expected is None:
        return [Line(name, "ok", f"{found} (no figure is expected of this device: --expect-inside, --expect-between)")]
    found = f"{found}, expected {expected / 1e9:.1f}"
    if rates[slowest] < BROKEN_SHARE * expected:
        return [Line(name, "fail", found, remedy)]
    return [Line(name, "warn", found, remedy) if rates[slowest] < expected else Line(name, "ok", found)]
