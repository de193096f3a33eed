"""New weights for servers over the network: all ranks of the trainer send slices to all workers of the servers.

Rank 0 makes the calls. Ranks and workers are one process group as long as the servers are the same and no push fails.
Where one fails, the servers whose fault it is are given up, and the others, with a new group, get all of it again.
"""

import ipaddress
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from datetime import timedelta
from typing import Any, TypeVar
from urllib.parse import urlsplit

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_riskpo.config import TrainConfig
from megatron_riskpo.errors import RunError
from megatron_riskpo.resharding.actor_shards import ActorShards
from megatron_riskpo.resharding.control import Control
from megatron_riskpo.resharding.network_receiver import fault_key, report_key
from megatron_riskpo.resharding.plan import plan_rank
from megatron_riskpo.resharding.push import WeightPush
from megatron_riskpo.resharding.schedule import BridgeLayout
from megatron_riskpo.resharding.transports.meeting import (
    LOST_PEER,
    GroupTransport,
    Meeting,
    address_towards,
    call_off,
    connect_store,
    join,
    leave,
    open_store,
)
from megatron_riskpo.rollout.joint_calls import PushLead
from megatron_riskpo.rollout.loop_thread import LoopThread
from megatron_riskpo.rollout.server_pool import Server
from megatron_riskpo.rollout.server_push import ServerUpdate

Result = TypeVar("Result")

_LOCAL = "127.0.0.1"
_LATE_S = 1.0
"""Ranks do not fail at the same instant: one that is well comes so much later at most."""


class _NoSink:
    """ShardSink of a rank that only sends."""

    def parameter(self, name: str) -> Tensor:
        raise RunError(f"weight push: {name} was sent to a rank of the trainer")

    def arrived(self, name: str, numel: int) -> None:
        self.parameter(name)


class NetworkPush:
    """Made once a run; every method but `leave` is collective over the trainer's ranks."""

    def __init__(
        self, config: TrainConfig, shards: ActorShards, group: dist.ProcessGroup, hosts: Sequence[str], loop: LoopThread
    ) -> None:
        """`hosts` of the ranks; servers are called in `loop`. Raises UsageError for layouts that cannot be, RunError
        where the ranks cannot be reached."""
        self._config, self._shards, self._group, self._loop = config, shards, group, loop
        self._timeout_s = config.bridge.timeout_s
        urls = config.rollout.server_urls
        plan_rank(self._layout(len(urls) or config.rollout.servers), group.rank())  # its errors now, not after a step
        # Ranks may notice a fault one after the other.
        self._control = Control(dist.new_group(backend="gloo"), 2 * self._timeout_s)  # type: ignore[arg-type]
        self._store: dist.Store | None = None
        self._where = self._from_first(lambda: self._open(store_address(urls, hosts)))
        if self._store is None:
            self._store = connect_store(*self._where, self._timeout_s)
        self._lead: PushLead | None = None
        """Rank 0's."""
        self._num_groups = self._num_gathers = 0
        self._members: list[str] = []
        """The servers of the group that there is."""
        self._transport: GroupTransport | None = None
        self._push: WeightPush | None = None
        self._problem = ""
        """What this rank said of the last thing done together."""
        self.reports: list[dict[str, Any]] = []
        """Rank 0's: what each worker said of the last push."""

    def _open(self, address: str) -> tuple[str, int]:
        store = open_store(address)
        self._store = store
        return address, store.port

    def _layout_options(self, num_servers: int) -> dict[str, Any]:
        """JSON-able, of BridgeLayout.served."""
        actor, bridge = self._shards.layout, self._config.bridge
        return {
            "hf_config": dict(self._shards.hf_config), "actor": asdict(actor), "tp": self._config.rollout.tp,
            "servers": num_servers, "item_size": self._shards.example.element_size(), "bucket_mib": bridge.bucket_mib,
            "node_size": torch.cuda.device_count() or actor.world_size,
        }  # fmt: skip

    def _layout(self, num_servers: int) -> BridgeLayout:
        return BridgeLayout.served(**self._layout_options(num_servers) | {"actor": self._shards.layout})

    def run(self, servers: Callable[[], Sequence[Server]], version: int) -> ServerUpdate | None:
        """Bring the weights as they are to all servers, which only rank 0 looks for; what became of them, on rank 0.
        Raises RunError, on every rank, where a rank of the trainer is lost."""
        self._from_first(lambda: self._start(servers(), version))
        self._control.agree(version, "the version of the weights")
        while urls := self._from_first(lambda: [server.client.url for server in self._leading.waiting()]):
            if (urls == self._members or self._meet(urls)) and self._from_first(lambda: self._leading.begin()):
                self._send(urls, version)
        self._from_first(lambda: self._leading.finish())
        return None if self._lead is None else self._lead.update

    @property
    def _leading(self) -> PushLead:
        assert self._lead is not None  # rank 0 only
        return self._lead

    def _start(self, servers: Sequence[Server], version: int) -> None:
        self.reports = []
        self._lead = PushLead(self._loop, ServerUpdate(servers, version, self._config.server.push_timeout_s))

    def _meet(self, urls: list[str]) -> bool:
        """Make a group with the workers of these servers; whether all came."""
        self.leave()
        self._num_groups += 1
        layout, rank = self._layout(len(urls)), self._group.rank()
        num_ranks = layout.rollout.rank(len(urls), 0)
        meeting = Meeting(*self._where, f"group/{self._num_groups}", num_ranks, self._timeout_s)
        store = self._store
        assert store is not None

        def ask() -> None:
            bodies = [{"init_info": self._receiver_options(meeting, layout, index)} for index in range(len(urls))]
            path = "/init_weight_transfer_engine"
            self._leading.ask(path, bodies, lambda reason: call_off(store, meeting, reason))

        def work() -> None:
            self._transport = join(store, meeting, rank, self._shards.example.device)
            self._push = WeightPush(
                plan_rank(layout, rank), self._shards.parameters, self._transport,
                timeout_s=self._timeout_s, with_checksums=self._config.bridge.verify == "checksum",
            )  # fmt: skip

        answers = self._together(ask, work, "the group with the rollout servers")
        if self._push is None and not any(answers.values()):
            raise RunError(f"weight push: {self._problem or 'another rank found no group with the rollout servers'}")
        self._members = urls if self._push is not None else []
        return self._push is not None

    def _receiver_options(self, meeting: Meeting, layout: BridgeLayout, index: int) -> dict[str, Any]:
        """For server `index`, as its TransferEngine takes them."""
        options = {
            "meeting": asdict(meeting), "first_rank": layout.rollout.rank(index, 0),
            "layout": self._layout_options(layout.rollout.replicas),
            "dtype": str(self._shards.example.dtype).removeprefix("torch."),
            "with_checksums": self._config.bridge.verify == "checksum",
        }  # fmt: skip
        return {"transport": "network", "options": options}

    def _send(self, urls: list[str], version: int) -> None:
        """The push itself, as far as it comes."""
        body = {"update_info": {"content": {"version": version}}}
        answers = self._together(
            lambda: self._leading.ask("/update_weights", [body] * len(urls), lambda reason: None),
            lambda: self._running().run(_NoSink(), version),
            f"the push of version {version}",
            lambda answers: self._with_faults(urls, answers, version),
        )
        if self._lead is not None:
            self._lead.note_updates(answers)
            self._read_reports(urls, answers, version)

    def _running(self) -> WeightPush:
        """Not to be kept: `leave` lets the last one go."""
        assert self._push is not None
        return self._push

    def _together(
        self, ask: Callable[[], None], work: Callable[[], object], what: str,
        explain: Callable[[dict[str, str]], dict[str, str]] = dict,
    ) -> dict[str, str]:  # fmt: skip
        """Do `work` while the servers do what rank 0 asks; their answers. Afterwards there is no group unless all of it
        went well. RunError names ranks of the trainer that do not come to the end of it."""
        self._from_first(ask)
        self._problem = _problem_of(work)
        if self._problem:
            self.leave()  # before anything else: others see by it that they wait in vain
        is_failed = any(self._gather(bool(self._problem), what))
        if is_failed:
            self.leave()
        wait_s = self._timeout_s if is_failed else max(self._timeout_s, self._config.server.push_timeout_s)
        answers = self._from_first(lambda: self._leading.settle(wait_s, explain))
        if any(answers.values()):
            self.leave()
        return answers

    def _gather(self, value: bool, what: str) -> list[int]:
        """As Control's; a broken link to a dead rank does not say whose it is, the store does."""
        assert self._store is not None
        self._num_gathers += 1
        keys = [f"gather/{self._num_gathers}/{rank}" for rank in range(self._group.size())]
        self._store.set(keys[self._group.rank()], "")
        try:
            return self._control.gather(value, what)
        except RunError as error:
            raise RunError(f"{error}; {_who_is_missing(self._store, keys)}") from error

    def _told(self, key: Callable[[int, int], str], version: int, index: int) -> list[str]:
        """What the workers of server `index` have left in the store, which is taken out."""
        store, found = self._store, []
        assert store is not None
        tp, first = self._config.rollout.tp, self._shards.layout.world_size
        for tp_rank in range(tp):
            name = key(version, first + index * tp + tp_rank)
            if store.check([name]):
                found.append(store.get(name).decode())
                store.delete_key(name)
        return found

    def _with_faults(self, urls: list[str], answers: dict[str, str], version: int) -> dict[str, str]:
        """The workers' own faults in place of answers that hand on another worker's."""
        faults = {url: self._told(fault_key, version, index) for index, url in enumerate(urls)}
        hidden = {url: of[0] for url, of in faults.items() if of and LOST_PEER in answers[url]}
        return answers | {url: f"{url}: {fault}" for url, fault in hidden.items()}

    def _read_reports(self, urls: list[str], answers: Mapping[str, str], version: int) -> None:
        """Of the workers whose servers are complete."""
        for index, url in enumerate(urls):
            if not answers[url]:
                self.reports += map(json.loads, self._told(report_key, version, index))

    @property
    def metrics(self) -> dict[str, float]:
        """Rank 0's, of the last push, of the worker with most."""
        if not self.reports:
            return {}
        most = {name: max(report[name] for report in self.reports) for name in self.reports[0]}
        return {
            "perf/pack_s": most["pack_seconds"],
            "bridge/received_mib": most["bytes_received"] / 2**20,
            "bridge/peak_extra_mib": most["peak_extra_bytes"] / 2**20,
        }

    def leave(self) -> None:
        """Let the group go, and its links with it."""
        if self._transport is not None:
            leave(self._transport)
        self._transport, self._push, self._members = None, None, []

    def _from_first(self, work: Callable[[], Result]) -> Result:
        """What rank 0 finds, or its RunError, on every rank."""
        shared: list[Any] = [None, ""]
        if self._group.rank() == 0:
            try:
                shared[0] = work()
            except RunError as error:
                shared[1] = str(error)
        dist.broadcast_object_list(shared, group=self._group, group_src=0)
        if shared[1]:
            raise RunError(shared[1])
        return shared[0]


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


def _problem_of(work: Callable[[], object]) -> str:
    """The message of its RunError, whose traceback is gone then, and the group with it."""
    try:
        work()
    except RunError as error:
        return str(error)
    return ""


def store_address(urls: Sequence[str], hosts: Sequence[str]) -> str:
    """Where the trainer's first rank can be reached by servers at `urls` and by the ranks, which are on `hosts`: the
    loopback address where all are on its machine. Raises RunError where there is no way to one of them."""
    others = [urlsplit(url).hostname or "" for url in urls] + sorted(set(hosts) - {hosts[0]})
    found = [address for address in map(address_towards, others) if not ipaddress.ip_address(address).is_loopback]
    return found[0] if found else _LOCAL
