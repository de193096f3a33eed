"""What each rank saw of its requests, brought to one view."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megatron_riskpo.resharding.control import Control


@dataclass(frozen=True)
class View:
    """Of one rank, or of all."""

    error: str
    """Ends the run; empty: none."""
    unfinished: int
    """Responses that no server could finish."""
    lost: Mapping[str, str]
    """Why servers may not be used any more, by address."""


def shared(own: View, control: Control, phase: str) -> View:
    """That of all ranks. Collective; RunError, which names `phase`, where a rank does not come."""
    return joined(control.gather_objects(own, phase))


def joined(views: Sequence[View]) -> View:
    """One rank after the other: what the first of them says of a server counts."""
    lost: dict[str, str] = {}
    for rank, view in enumerate(views):
        for url, reason in view.lost.items():
            lost.setdefault(url, f"{reason} (rank {rank})")
    error = next((view.error for view in views if view.error), "")
    return View(error, sum(view.unfinished for view in views), lost)
