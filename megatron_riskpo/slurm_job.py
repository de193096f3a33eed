"""How a configuration becomes a Slurm job: nodes, ranks and servers, and the words of its sbatch command."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_riskpo.config import TrainConfig
from megatron_riskpo.errors import UsageError

LEAST_WARNING_S = 120
"""Before the time limit, in seconds, at least: Slurm's signal may come 30 s off its time."""
SAVE_S = 180
"""What a checkpoint may take, in seconds, beside the step under way."""
_TIME = re.compile(r"(?:(\d+)-)?(\d+)(?::(\d\d?))?(?::(\d\d?))?")


@dataclass(frozen=True)
class JobShape:
    """What the job is made of."""

    nodes: int
    """Of training and servers together."""
    ranks_per_node: int
    """Of a node that trains."""
    gpus_per_node: int
    """0: a job on CPUs."""
    server_nodes: int = 0
    servers_per_node: int = 0

    @property
    def world_size(self) -> int:
        """Ranks that train."""
        return (self.nodes - self.server_nodes) * self.ranks_per_node


def job_shape(
    config: TrainConfig, nodes: int, gpus_per_node: int, server_nodes: int = 0, ranks_per_node: int | None = None
) -> JobShape:
    """One rank a GPU, but for those of servers that the run starts beside its ranks. Raises UsageError."""
    rollout = config.rollout
    if nodes < 1:
        raise UsageError(f"--nodes {nodes}: give 1 or more")
    if gpus_per_node < 0:
        raise UsageError(f"--gpus-per-node {gpus_per_node}: give 0 (a job on CPUs) or more")
    if not 0 <= server_nodes < nodes:
        raise UsageError(f"--server-nodes {server_nodes} of --nodes {nodes}: give 0 to {nodes - 1}, one has to train")
    wants_servers = rollout.placement == "server" and not rollout.server_urls
    if server_nodes and not wants_servers:
        raise UsageError(
            f'--server-nodes {server_nodes} is for a run with rollout.placement = "server" that names no '
            "rollout.server_urls; change these options, or leave it out"
        )
    if wants_servers and nodes > 1 and not server_nodes:
        raise UsageError(
            f"servers that the run starts listen on one machine only, and there are --nodes {nodes}; give some of them "
            "to servers with --server-nodes, or name running ones in rollout.server_urls"
        )
    beside = rollout.servers * rollout.tp if wants_servers and not server_nodes else 0
    ranks = _ranks_of_node(gpus_per_node, beside, ranks_per_node)
    return JobShape(nodes, ranks, gpus_per_node, server_nodes, _servers_of_node(config, gpus_per_node, server_nodes))


def _ranks_of_node(gpus: int, beside: int, asked: int | None) -> int:
    """`beside`: GPUs of a node that its servers take."""
    if asked is not None and asked < 1:
        raise UsageError(f"--ranks-per-node {asked}: give 1 or more")
    if not gpus:
        return asked or 1
    free = gpus - beside
    if free < 1:
        raise UsageError(
            f"rollout.servers x rollout.tp = {beside} takes all of --gpus-per-node {gpus}, and no rank is left; lower "
            "one of them"
        )
    if asked is not None and asked > free:
        taken = f", {beside} of which are for servers" if beside else ""
        raise UsageError(f"--ranks-per-node {asked}: a node has {gpus} GPUs{taken}, one for each rank; give {free}")
    return asked or free


def _servers_of_node(config: TrainConfig, gpus: int, server_nodes: int) -> int:
    tp = config.rollout.tp
    if not server_nodes or not gpus:
        return 1 if server_nodes else 0
    if gpus % tp:
        raise UsageError(
            f"rollout.tp = {tp} does not divide --gpus-per-node {gpus}, which the servers of a node share; change one "
            "of them"
        )
    return gpus // tp


def seconds_of(time: str) -> int:
    """Of a time limit in Slurm's forms: M, M:S, H:M:S, D-H, D-H:M, D-H:M:S. Raises UsageError."""
    found = _TIME.fullmatch(time)
    if not found:
        raise UsageError(f"--time {time}: write minutes, H:M:S, or D-H:M:S")
    days, *parts = found.groups()
    numbers = [int(part) for part in parts if part is not None]
    units = (3600, 60, 1) if days is not None else {1: (60,), 2: (60, 1), 3: (3600, 60, 1)}[len(numbers)]
    seconds = 86400 * int(days or 0) + sum(n * unit for n, unit in zip(numbers, units, strict=False))
    if not seconds:
        raise UsageError(f"--time {time}: give more than nothing")
    return seconds


def warning_before(time: str, step_s: float) -> int:
    """Seconds before the time limit, whole minutes, at which the run has to be told: it ends its step, then saves.

    `step_s`: the predicted length of a step, which may be half as long again. Raises UsageError where so little would
    be left of the time that the run would make hardly a step between two requeues.
    """
    warning = max(LEAST_WARNING_S, 60 * math.ceil((1.5 * step_s + SAVE_S) / 60) if step_s else 0)
    limit = seconds_of(time)
    if limit < 2 * warning:
        raise UsageError(
            f"--time {time} is {limit} s, and {warning} s before its end the run has to be told to save (a step takes "
            f"about {step_s:.0f} s); give {math.ceil(2 * warning / 60)} minutes or more"
        )
    return warning


def sbatch_options(
    shape: JobShape, *, name: str, time: str, warning_s: int, cpus_per_rank: int, further: Sequence[str] = ()
) -> list[str]:
    """Options of sbatch, one word each; `further` ones of the user come last and win."""
    wrong = [word for word in further if not word.startswith("-")]
    if wrong:
        raise UsageError(f"--sbatch={wrong[0]}: write it as one word that begins with -, as --sbatch=--qos=high")
    options = [
        f"--job-name=riskpo-{name}", f"--nodes={shape.nodes}", f"--ntasks-per-node={shape.ranks_per_node}",
        f"--cpus-per-task={cpus_per_rank}", f"--time={time}", f"--signal=B:USR1@{warning_s}",
    ]  # fmt: skip
    if shape.gpus_per_node:
        options.append(f"--gpus-per-node={shape.gpus_per_node}")
    return [*options, *further]


def server_options(shape: JobShape) -> list[str]:
    """Options of train.sbatch."""
    if not shape.server_nodes:
        return []
    return [f"--server-nodes={shape.server_nodes}", f"--servers-per-node={shape.servers_per_node}"]
