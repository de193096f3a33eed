"""Which ranks keep the others waiting in communication, from what each has told. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass

_MAX_NAMED = 16


@dataclass(frozen=True)
class Progress:
    """Where a rank is, as it tells."""

    stage: int = -1
    """Index of the stage that it has entered last; -1: none. One that is done is a stage further."""
    beats: int = 0
    """Times that it has told."""
    error: str = ""
    """With which its communication ended."""
    failed_as: int = 0
    """1: the first whose communication failed, 2: the second ..."""
    is_done: bool = False


def blame(
    before: Sequence[Progress], after: Sequence[Progress], stages: Sequence[str], hosts: Sequence[str], timeout_s: float
) -> str:
    """The first of these that is true of any rank: it tells nothing any more; its communication failed, of several the
    first that did; it is behind the others by a stage. `before` and `after`: of all ranks, seconds apart; `stages`:
    those that rank 0 has entered."""
    ranks = range(len(after))
    silent = [rank for rank in ranks if after[rank].beats == before[rank].beats]
    if silent:
        place = _stage(min(after[rank].stage for rank in silent), stages)
        return f"in {place} {_names(silent, hosts)} not answer any more: stopped, or lost with the node"
    failed = [rank for rank in ranks if after[rank].error]
    if failed:
        return _failure(min(failed, key=lambda rank: after[rank].failed_as), after, stages, hosts)
    behind = _behind(after, max(progress.stage for progress in after))
    place = _stage(min(progress.stage for progress in after), stages)
    if behind:
        return f"{_names(behind, hosts)} not get through {place} within {timeout_s:g} s, others do"
    return f"no rank gets through {place} within {timeout_s:g} s"


def _failure(first: int, after: Sequence[Progress], stages: Sequence[str], hosts: Sequence[str]) -> str:
    """With those that had not come as far: it may have failed because of them."""
    place = _stage(after[first].stage, stages)
    behind = [rank for rank in _behind(after, after[first].stage) if not after[rank].error]
    late = f"; behind it: {_list(behind, hosts)}" if behind else ""
    return f"{_names([first], hosts)} not get through {place}: {after[first].error}{late}"


def _behind(after: Sequence[Progress], stage: int) -> list[int]:
    return [rank for rank, progress in enumerate(after) if progress.stage < stage]


def _names(ranks: Sequence[int], hosts: Sequence[str]) -> str:
    return f"{_list(ranks, hosts)} {'do' if len(ranks) > 1 else 'does'}"


def _list(ranks: Sequence[int], hosts: Sequence[str]) -> str:
    named = ", ".join(f"{rank} ({hosts[rank]})" for rank in ranks[:_MAX_NAMED])
    more = f" and {len(ranks) - _MAX_NAMED} more" if len(ranks) > _MAX_NAMED else ""
    return f"rank{'s' * (len(ranks) > 1)} {named}{more}"


def _stage(index: int, stages: Sequence[str]) -> str:
    if index < 0:
        return "the start"
    return stages[index] if index < len(stages) else "a later stage"
