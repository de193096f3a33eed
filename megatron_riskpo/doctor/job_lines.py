"""Lines of a whole job, from what its ranks and nodes found. Pure."""

from collections.abc import Mapping, Sequence

from megatron_riskpo.doctor.line import Line
from megatron_riskpo.doctor.machine import GIB, Disk

MAX_NAMED = 8


def version_lines(versions: Sequence[Mapping[str, str]], hosts: Sequence[str]) -> list[Line]:
    """A line for each package of which the ranks have different versions, or one that says they are alike.
    `versions` and `hosts`: of the ranks."""
    lines = []
    for package in sorted({name for of_rank in versions for name in of_rank}):
        ranks: dict[str, list[int]] = {}
        for rank, of_rank in enumerate(versions):
            ranks.setdefault(of_rank.get(package, "not installed"), []).append(rank)
        if len(ranks) > 1:
            usual = max(ranks, key=lambda version: (len(ranks[version]), -ranks[version][0]))
            others = "; ".join(
                f"{version} on {_named({hosts[rank] for rank in having})} (ranks {_numbers(having)})"
                for version, having in ranks.items()
                if version != usual
            )
            remedy = f"install {package} {usual} there, or start all ranks from one environment"
            lines.append(Line(f"{package} of all ranks", "fail", f"{usual} on most ranks, {others}", remedy))
    return lines or [Line("versions of all ranks", "ok", f"the same on {len(versions)} ranks")]


def fold(found: Mapping[str, Sequence[Line]]) -> list[Line]:
    """The lines of all nodes as one list: what is well once for all, everything else by its node. `found`: by host."""
    names = list(dict.fromkeys(line.name for lines in found.values() for line in lines))
    folded = []
    for name in names:
        by_host = {host: line for host, lines in found.items() for line in lines if line.name == name}
        bad = [(host, line) for host, line in by_host.items() if line.state != "ok"]
        folded += [Line(f"{host}: {name}", line.state, line.found, line.remedy) for host, line in bad]
        if not bad:
            texts = {line.found for line in by_host.values()}
            host, first = next(iter(by_host.items()))
            more = f" on {host}, and well" if len(texts) > 1 else ""
            nodes = f"{more} on {len(by_host)} nodes" if len(by_host) > 1 else ""
            folded.append(Line(name, "ok", f"{first.found}{nodes}"))
    return folded


def shared_folder_line(sees: Mapping[str, bool], folder: str) -> Line:
    """`sees`: by host, whether it found what rank 0 has written there."""
    blind = {host for host, seen in sees.items() if not seen}
    if blind:
        remedy = "set run.dir to a file system that all nodes share: checkpoints and the watchdog need it"
        return Line("run folder", "fail", f"{_named(blind)} does not see what rank 0 writes into {folder}", remedy)
    return Line("run folder", "ok", f"{folder}, seen by {len(sees)} node{'s' * (len(sees) > 1)}")


def checkpoint_lines(size: int, kept: int, disks: Mapping[str, Disk], timeout_s: float) -> list[Line]:
    """Room and time for checkpoints of `size` bytes, of which `kept` lie on the disk at a time, the one being written
    included. `disks`: by host, measured at the same time on all."""
    errors = [f"{host}: {disk.error}" for host, disk in disks.items() if disk.error]
    if errors:
        remedy = "set run.dir to a folder that all nodes can write"
        return [Line("checkpoints", "fail", f"the run folder cannot be written on {'; '.join(errors)}", remedy)]
    free, rate = min(disk.free for disk in disks.values()), sum(disk.write_rate for disk in disks.values())
    room = f"{free / GIB:.1f} GiB free, {kept} checkpoints of {size / GIB:.1f} GiB need {kept * size / GIB:.1f}"
    lines = [Line("room for checkpoints", "ok", room)]
    if free < kept * size:
        remedy = "free space, set run.dir to another disk, or lower checkpoint.keep"
        lines = [Line("room for checkpoints", "fail", room, remedy)]
    if not rate:
        return lines
    seconds = size / rate
    speed = f"{seconds:.0f} s at {rate / 1e6:.0f} MB/s of all nodes together"
    if seconds > timeout_s:
        remedy = "raise run.timeout_s, or set run.dir to a faster file system"
        found = f"{speed}, more than run.timeout_s = {timeout_s:g} s allows"
        return [*lines, Line("time of a checkpoint", "fail", found, remedy)]
    return [*lines, Line("time of a checkpoint", "ok", speed)]


def _numbers(ranks: Sequence[int]) -> str:
    return ", ".join(map(str, ranks[:MAX_NAMED])) + ", ..." * (len(ranks) > MAX_NAMED)


def _named(hosts: set[str]) -> str:
    names = sorted(hosts)
    return ", ".join(names[:MAX_NAMED]) + (f" and {len(names) - MAX_NAMED} more" if len(names) > MAX_NAMED else "")
