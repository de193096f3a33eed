"""What each rank saw of its requests, brought to one view."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist


@dataclass(frozen=True)
class View:
    """Of one rank, or of all."""

    error: str
    """Ends the run; empty: none."""
    unfinished: int
    """Responses that no server could finish."""
    lost: Mapping[str, str]
    """Why servers may not be used any more, by address."""


def shared(own: View, group: dist.ProcessGroup) -> View:
    """That of all ranks. Collective."""
    views: list[Any] = [None] * group.size()
    dist.all_gather_object(views, own, group=group)
    return joined(views)


def joined(views: Sequence[View]) -> View:
    """One rank after the other: what the first of them says of a server counts."""
    lost: dict[str, str] = {}
    for rank, view in enumerate(views):
        for url, reason in view.lost.items():
            lost.setdefault(url, f"{reason} (rank {rank})")
    error = next((view.error for view in views if view.error), "")
    return View(error, sum(view.unfinished for view in views), lost)
