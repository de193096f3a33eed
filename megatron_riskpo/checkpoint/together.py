"""Work that may fail on one rank, agreed on by all, so that no rank waits for one that has left."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch.distributed as dist
from torch.distributed import ProcessGroup
from torch.distributed.checkpoint.api import CheckpointException

T = TypeVar("T")


@dataclass(frozen=True)
class Failure:
    """Why one rank failed."""

    rank: int
    reason: str
    """One line."""
    is_io: bool
    """The system refused a read or write."""
    is_unnamed_io: bool = False
    """... but which of its errors it was got lost on the way."""


class GroupFailureError(Exception):
    """Raised on every rank of a group when one or more have failed."""

    def __init__(self, failures: list[Failure]) -> None:
        super().__init__("; ".join(f"rank {failure.rank}: {failure.reason}" for failure in failures))
        self.first = next((failure for failure in failures if failure.is_io), failures[0])


def run_together(group: ProcessGroup, work: Callable[[], T]) -> T:
    """work() on every rank; GroupFailureError on every rank if it failed on one."""
    failure, cause, result = None, None, None
    try:
        result = work()
    # Whatever it is, the others have to hear of it before this rank leaves. CheckpointException is a BaseException.
    except (Exception, CheckpointException) as error:
        cause, failure = error, describe_failure(error, group.rank())
    failures: list[Failure | None] = [None] * group.size()
    dist.all_gather_object(failures, failure, group=group)
    known = [failure for failure in failures if failure is not None]
    if known:
        raise GroupFailureError(known) from cause
    return result  # type: ignore[return-value]


def from_first(value: Any, group: ProcessGroup) -> Any:
    """Rank 0's value, on every rank."""
    box = [value]
    dist.broadcast_object_list(box, group_src=0, group=group)
    return box[0]


def describe_failure(error: BaseException, rank: int) -> Failure:
    """The system error behind `error` if there is one, however it was wrapped."""
    for cause, origin in _causes(error, rank):
        if isinstance(cause, OSError) and cause.errno is not None:
            return Failure(origin, cause.strerror or str(cause), is_io=True)
    cause, origin = list(_causes(error, rank))[-1]
    line = (str(cause).strip().splitlines() or [""])[0]
    # torch's file writer is C++ and loses the system's error on its way.
    is_io = "PytorchStreamWriter" in str(cause) or "inline_container" in str(cause)
    return Failure(origin, f"{type(cause).__name__}: {line}", is_io, is_io)


def _causes(error: BaseException, rank: int) -> Iterator[tuple[BaseException, int]]:
    """error, and what it wraps or came from, with the rank where each arose."""
    yield error, rank
    if isinstance(error, CheckpointException):
        for origin, (wrapped, _) in error.failures.items():
            yield from _causes(wrapped, origin)
    elif (inner := error.__cause__ or error.__context__) is not None:
        yield from _causes(inner, rank)
