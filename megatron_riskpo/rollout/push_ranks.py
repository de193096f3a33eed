"""The trainer's ranks among themselves in a push over the network: where they meet the servers, what the first of them
finds out for all, and who among them does not come or has failed."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist

from megatron_riskpo.errors import RunError
from megatron_riskpo.resharding.control import Control
from megatron_riskpo.resharding.transports.base import PeerError
from megatron_riskpo.resharding.transports.meeting import connect_store, is_link_error, open_store
from megatron_riskpo.rollout.first_rank import Result, from_first
from megatron_riskpo.rollout.push_address import address_of_rank, store_address

_LATE_S = 1.0
"""Ranks do not fail at the same instant: one that is well comes so much later at most."""


@dataclass(frozen=True)
class Problem:
    """Why a rank did not come to the end of what all do together."""

    message: str
    is_link: bool
    """To another member of the group; else it is this rank's own."""
    peer: int
    """Whose link it is; -1: not known."""
    seconds: float
    """From the beginning. Who breaks off first has the cause, the others see that it did."""


def problem_of(work: Callable[[], object]) -> Problem | None:
    """What its RunError says, whose traceback is gone then, and the group with it."""
    start = time.monotonic()
    try:
        work()
    except RunError as error:
        peer = error.__cause__.peer if isinstance(error.__cause__, PeerError) else -1
        return Problem(str(error), is_link_error(error), peer, time.monotonic() - start)
    return None


class PushRanks:
    """Made once a run; every method is collective, `open` the first."""

    def __init__(self, group: dist.ProcessGroup, timeout_s: float) -> None:
        """`timeout_s`: bridge.timeout_s."""
        self.group, self._timeout_s = group, timeout_s
        # Ranks may notice a fault one after the other.
        self._control = Control(dist.new_group(backend="gloo"), 2 * timeout_s)  # type: ignore[arg-type]
        self._store: dist.Store | None = None
        self._num_gathers = 0
        self.address = ("", 0)
        """Of the store, as all reach it."""

    @property
    def store(self) -> dist.Store:
        """Of ranks and servers."""
        assert self._store is not None
        return self._store

    def open(self, hosts: Sequence[str], urls: Sequence[str]) -> None:
        """Have ranks on the machines `hosts`, and servers, once they are up, meet. Raises RunError, on every rank,
        where one does not reach the store."""
        found = [""] * self.group.size()
        dist.all_gather_object(found, address_of_rank(hosts[self.group.rank()]), group=self.group)
        others = {address for address, host in zip(found, hosts, strict=True) if host != hosts[0]}
        self.address = self.from_first(lambda: self._listen(store_address(urls, others)))
        error = ""
        try:
            self._store = self._store or connect_store(*self.address, self._timeout_s)
        except RunError as failure:
            error = f"rank {self.group.rank()}: {failure}"
        dist.all_gather_object(found, error, group=self.group)
        if any(found):
            raise RunError(next(filter(None, found)))

    def _listen(self, address: str) -> tuple[str, int]:
        store = open_store(address)
        self._store = store
        return address, store.port

    def from_first(self, work: Callable[[], Result]) -> Result:
        """See first_rank.py."""
        return from_first(work, self.group)

    def agree_on_version(self, version: int) -> None:
        """RunError, on every rank, unless all push the same."""
        self._control.agree(version, "the version of the weights")

    def gather(self, value: bool, what: str) -> list[int]:
        """As Control's; a broken link to a dead rank does not say whose it is, the store does."""
        self._num_gathers += 1
        keys = [f"gather/{self._num_gathers}/{rank}" for rank in range(self.group.size())]
        self.store.set(keys[self.group.rank()], "")
        try:
            found = self._control.gather(value, what)
        except RunError as error:
            raise RunError(f"{error}; {_who_is_missing(self.store, keys)}") from error
        if self._num_gathers > 1:  # nobody looks for who came to the one before
            self.store.delete_key(f"gather/{self._num_gathers - 1}/{self.group.rank()}")
        return found

    def problems(self, problem: Problem | None) -> list[Problem]:
        """Every rank's, the first to break off first. RunError where one is a rank's own."""
        found: list[Problem | None] = [None] * self.group.size()
        dist.all_gather_object(found, problem, group=self.group)
        problems = sorted((of for of in found if of is not None), key=lambda of: of.seconds)
        own = [of.message for of in problems if not of.is_link]
        if own:
            raise RunError(own[0])
        return problems


def _who_is_missing(store: dist.Store, keys: Sequence[str]) -> str:
    """Of the ranks that set the keys, in order."""
    missing = []
    for rank, key in enumerate(keys):
        try:
            store.wait([key], timedelta(seconds=_LATE_S))
        except dist.DistStoreError:
            missing.append(rank)
        except RuntimeError:
            return "rank 0, which has the store, is gone"
    return f"who has not come is {missing or 'unknown'}"
