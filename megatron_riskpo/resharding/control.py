"""Agreement of all ranks around a push, with a deadline that names who is missing."""

from collections.abc import Sequence
from datetime import timedelta

import torch
import torch.distributed as dist

from megatron_riskpo.errors import RunError
from megatron_riskpo.resharding.transports.base import reason_of


class Control:
    """Small CPU messages over a gloo group of all ranks."""

    def __init__(self, group: dist.ProcessGroup, timeout_s: float) -> None:
        self.group = group
        self.timeout_s = timeout_s

    def gather(self, value: int, phase: str) -> list[int]:
        """Every rank's value; RunError where a rank does not come to this point in time."""
        try:
            dist.monitored_barrier(self.group, timedelta(seconds=self.timeout_s), wait_all_ranks=True)
            own = torch.tensor([value], dtype=torch.int64)
            found = [torch.empty_like(own) for _ in range(self.group.size())]
            work = dist.all_gather(found, own, group=self.group, async_op=True)
            assert work is not None
            work.wait(timedelta(seconds=self.timeout_s))
        except RuntimeError as error:
            raise RunError(
                f"weight push: rank {self.group.rank()} waited {self.timeout_s:g} s for the other ranks ({phase}): "
                f"{reason_of(error)}; a rank is dead, stopped or unreachable (bridge.timeout_s is how long to wait)"
            ) from error
        return [int(entry) for entry in found]

    def agree(self, value: int, phase: str) -> None:
        """RunError on every rank unless all give the same value."""
        refuse_differences(self.gather(value, phase), phase)


def refuse_differences(values: Sequence[int], phase: str) -> None:
    """RunError unless the ranks' values are the same."""
    if len(set(values)) > 1:
        shown = ", ".join(f"rank {rank}: {found}" for rank, found in enumerate(values[:8]))
        raise RunError(f"weight push: the ranks do not agree on {phase} ({shown})")
