"""Which ranks keep the others waiting, from what their guards wrote. Pure."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_riskpo.watchdog.heartbeat import Heartbeat

MAX_NAMED = 8
_COLLECTIVE = re.compile(r"torch/distributed/|pipeline_parallel/p2p_communication\.py")
_FRAME = re.compile(r'^ +File "', re.MULTILINE)
_THREAD = re.compile(r"^(?=(?:Current thread|Thread) 0x)", re.MULTILINE)


@dataclass(frozen=True)
class Sighting:
    """A rank, looked at twice."""

    rank: int
    before: Heartbeat | None
    """None: it has not written any in this attempt."""
    after: Heartbeat | None
    stacks: str = ""
    """Of its threads, as it wrote them last; without a frame where none are known."""

    @property
    def is_silent(self) -> bool:
        """Whether its guard has not written in between."""
        return self.before is not None and self.after is not None and self.before.beat == self.after.beat

    @property
    def has_stacks(self) -> bool:
        """They may come late, and a process that the kernel holds writes none."""
        return bool(_FRAME.search(self.stacks))

    @property
    def progress(self) -> tuple[int, int]:
        return (self.after.steps_done, self.after.phases) if self.after else (0, 0)


def laggards(ranks: Sequence[Sighting]) -> dict[int, str]:
    """Rank -> what is the matter with it; empty where no rank differs from the others.

    In this order, the first that is true of any: ranks that have not started, whose guard is silent, or that are
    stopped; those that are behind the others by a phase; those in the same phase whose main thread is not in a
    collective while that of others is, as far as stacks are known.
    """
    return _gone_or_behind(ranks) or _busy(ranks)


def _gone_or_behind(ranks: Sequence[Sighting]) -> dict[int, str]:
    gone = {seen.rank: complaint for seen in ranks if (complaint := _out_of_action(seen))}
    if gone:
        return gone
    first = max(seen.progress for seen in ranks)
    return {seen.rank: _where(seen) for seen in ranks if seen.progress < first}


def _busy(ranks: Sequence[Sighting]) -> dict[int, str]:
    known = [seen for seen in ranks if seen.has_stacks]
    busy = {seen.rank: f"{_where(seen)}, in no collective" for seen in known if not waits_for_others(seen.stacks)}
    return busy if len(busy) < len(known) else {}


def _out_of_action(seen: Sighting) -> str:
    if seen.after is None:
        return f"rank {seen.rank} has not started"
    if seen.is_silent:
        return f"{_where(seen)}, and silent since: its node is down or does not reach the run folder"
    if seen.after.is_stopped:
        return f"{_where(seen)}, stopped by a signal (SIGSTOP)"
    return ""


def _where(seen: Sighting) -> str:
    assert seen.after is not None
    return whereabouts(seen.after)


def whereabouts(at: Heartbeat) -> str:
    """Rank, node, phase, step and time in it."""
    return f"{at} is in {at.phase} after step {at.steps_done} for {at.phase_s:.0f} s"


def waits_for_others(stacks: str) -> bool:
    """Whether the main thread is in a collective or waits for a pipeline stage. `stacks`: as faulthandler writes them,
    which puts the main thread last; or one traceback."""
    return bool(_COLLECTIVE.search(_THREAD.split(stacks)[-1]))


def summary(ranks: Sequence[Sighting], cause: str, folder: str, remedy: str) -> str:
    """One line for the user."""
    late = laggards(ranks)
    unknown = [] if _gone_or_behind(ranks) else [seen.rank for seen in ranks if not seen.has_stacks]
    if not late:
        where = _where(ranks[0])
        found = f"no rank is behind the others; {where}" if len(ranks) > 1 else where
    else:
        found = "; ".join(list(late.values())[:MAX_NAMED])
        if len(late) > MAX_NAMED:
            rest = list(late)[MAX_NAMED:]
            found += f"; and {len(rest)} more (ranks {_numbers(rest)})"
        waiting = len(ranks) - len(late) - len(unknown)
        found += f"; {waiting} of {len(ranks)} ranks wait for {'it' if len(late) == 1 else 'them'}" if waiting else ""
    if unknown:
        found += f"; stacks unknown of rank{'s' * (len(unknown) > 1)} {_numbers(unknown)}"
    return f"{cause}: {found}; stacks: {folder}; {remedy}"


def _numbers(ranks: Sequence[int]) -> str:
    return ", ".join(map(str, ranks[:64])) + ", ..." * (len(ranks) > 64)
