"""A server's worker as a member of the group in which the trainer's ranks send weights: it gets its shard, by plan."""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from megatron_riskpo.errors import RunError
from megatron_riskpo.resharding.actor_shards import layout_for_server
from megatron_riskpo.resharding.plan import plan_rank
from megatron_riskpo.resharding.push import PushReport, ShardSink, WeightPush
from megatron_riskpo.resharding.transports.meeting import LOST_PEER, Meeting, connect_store, is_link_error, join, leave

Result = TypeVar("Result")


class ShardReceiver:
    """Made for each group. A failure of `receive` breaks the group."""

    def __init__(self, options: Mapping[str, Any], tp_rank: int, tp: int, device: torch.device) -> None:
        """`options` are those of NetworkPush. Joins the group of the trainer's ranks and all workers. Raises RunError,
        which says LOST_PEER where others are at fault."""
        self.layout = layout_for_server(options["layout"], tp)
        self.tp_rank, self._rank = tp_rank, options["first_rank"] + tp_rank
        meeting = Meeting(**options["meeting"])
        self._prefix = meeting.prefix
        self._store: dist.Store = _told(lambda: connect_store(meeting.address, meeting.port, meeting.timeout_s))
        self._transport = _told(lambda: join(self._store, meeting, self._rank, device))
        # A rank that only receives has no parameters: this one says which dtype the buckets have.
        example = {"": torch.empty(0, dtype=getattr(torch, options["dtype"]), device=device)}
        self._push: WeightPush | None = WeightPush(
            plan_rank(self.layout, self._rank), example, self._transport,
            timeout_s=meeting.timeout_s, with_checksums=options["with_checksums"],
        )  # fmt: skip

    def receive(self, sink: ShardSink, version: int, prepare: Callable[[], None] = lambda: None) -> PushReport:
        """This worker's part of a push, after `prepare`. Raises RunError, which says LOST_PEER where others are at
        fault. After any error the others see by the links' end that they wait in vain."""
        try:
            prepare()
            return _told(lambda: self._running().run(sink, version))
        except BaseException:
            self.close()
            raise

    def _running(self) -> WeightPush:
        """Not to be kept: `close` lets the last one go."""
        if self._push is None:
            raise RunError("the group for weights is broken: it has to be made anew before another push")
        return self._push

    def tell(self, report: PushReport, pack_seconds: float, version: int) -> None:
        """Have the trainer know how a push went."""
        record = asdict(report) | {"pack_seconds": pack_seconds}
        self._store.set(report_key(self._prefix, version, self._rank), json.dumps(record))

    def close(self) -> None:
        """Leave the group."""
        if self._push is not None:
            leave(self._transport)
            del self._transport
        self._push = None


def report_key(prefix: str, version: int, rank: int) -> str:
    """Where in the store a worker of the group with this prefix tells of a push."""
    return f"{prefix}/report/{version}/{rank}"


def _told(work: Callable[[], Result]) -> Result:
    """Its result, or its error anew: the first one's traceback would keep the group, and links on which others wait,
    for as long as somebody keeps the error."""
    try:
        return work()
    except RunError as error:
        problem = f"{LOST_PEER} {error}" if is_link_error(error) else str(error)
    raise RunError(problem)
