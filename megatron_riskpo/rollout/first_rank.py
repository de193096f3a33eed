"""What only the first rank can do, and all have to know."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from megatron_riskpo.errors import RunError

Result = TypeVar("Result")


def from_first(work: Callable[[], Result], group: dist.ProcessGroup) -> Result:
    """What the first rank finds, or its RunError, on every rank. Collective."""
    shared: list[Any] = [None, ""]
    if group.rank() == 0:
        try:
            shared[0] = work()
        except RunError as error:
            shared[1] = str(error)
    dist.broadcast_object_list(shared, group=group, group_src=0)
    if shared[1]:
        raise RunError(shared[1])
    return shared[0]
