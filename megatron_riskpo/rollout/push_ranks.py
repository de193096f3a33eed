"""The trainer's ranks among themselves in a push over the network: where they meet the servers, what the first of them
finds out for all, and who among them does not come or has failed."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch.distributed as dist

from megatron_riskpo.errors import RunError
from megatron_riskpo.resharding.control import Control
from megatron_riskpo.resharding.peer_parameters import VERSION_PHASE
from megatron_riskpo.resharding.transports.base import PeerError
from megatron_riskpo.resharding.transports.meeting import connect_store, is_link_error, open_store
from megatron_riskpo.rollout.joint_work import JointWork, Result
from megatron_riskpo.rollout.push_address import address_of_rank, store_address


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

    def __init__(self, group: dist.ProcessGroup, timeout_s: float, limit_s: float) -> None:
        """`timeout_s`: bridge.timeout_s; `limit_s`: run.timeout_s."""
        self.group, self._timeout_s = group, timeout_s
        # Ranks may notice a fault one after the other.
        self._control = Control.of_all(2 * timeout_s, option="2 * bridge.timeout_s")
        self._joint = JointWork(Control(self._control.group, timeout_s), limit_s)
        self._store: dist.Store | None = None
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
        found = self._control.gather_objects(address_of_rank(hosts[self.group.rank()]), "the ranks' addresses")
        others = {address for address, host in zip(found, hosts, strict=True) if host != hosts[0]}
        self.address = self.from_first(lambda: self._listen(store_address(urls, others)), "a store for the servers")
        self._joint.of_all(self._connect, "the store for the servers")

    def _connect(self) -> None:
        try:
            self._store = self._store or connect_store(*self.address, self._timeout_s)
        except RunError as error:
            raise RunError(f"rank {self.group.rank()}: {error}") from error

    def _listen(self, address: str) -> tuple[str, int]:
        store = open_store(address)
        self._store = store
        return address, store.port

    def from_first(self, work: Callable[[], Result], phase: str) -> Result:
        """What the first rank finds, or its RunError, on every rank."""
        return self._joint.of_first(work, phase)

    def agree_on_version(self, version: int) -> None:
        """RunError, on every rank, unless all push the same."""
        self._control.agree(version, VERSION_PHASE)

    def gather(self, value: bool, what: str) -> list[int]:
        """Every rank's; RunError, on every rank, names those that do not come."""
        return self._control.gather(value, what)

    def problems(self, problem: Problem | None, what: str) -> list[Problem]:
        """Every rank's, the first to break off first. RunError where one is a rank's own."""
        found = self._control.gather_objects(problem, what)
        problems = sorted((of for of in found if of is not None), key=lambda of: of.seconds)
        own = [of.message for of in problems if not of.is_link]
        if own:
            raise RunError(own[0])
        return problems
