"""A run asked to stop by a signal stops cleanly, at the same step on every rank.

Imports no torch: the handlers must stand before torch, which takes seconds to import, is loaded.
"""

import os
import signal
from types import FrameType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class StopSignal:
    """Remembers the first stop signal of this process; a second SIGINT ends the process at once (code 130)."""

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        """The first signal; None while there was none."""
        self._interrupted = False

    @classmethod
    def install(cls) -> "StopSignal":
        """Take over SIGTERM, SIGINT and SIGUSR1. Main thread only."""
        stop = cls()
        for number in STOP_SIGNALS:
            signal.signal(number, stop._handle)
        return stop

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self._interrupted:
            # The user insists: no clean-up, which may be what hangs.
            os._exit(130)
        self._interrupted = self._interrupted or number == signal.SIGINT
        self.received = self.received or signal.Signals(number)


def agree(stop: StopSignal, group: "ProcessGroup | None" = None) -> bool:
    """True on every rank of `group` (None: all ranks) if any of them got a stop signal. Collective: each rank calls
    it at the same point, once a step, so that all leave at the same step."""
    import torch
    import torch.distributed as dist

    # An NCCL-only group moves GPU memory; every other group here takes CPU tensors. int32: NCCL reduces no bool.
    device = torch.device("cuda") if dist.get_backend(group) == "nccl" else torch.device("cpu")
    flag = torch.tensor([int(stop.received is not None)], dtype=torch.int32, device=device)
    dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=group)
    return bool(flag.item())
