"""New weights for servers over the network: all ranks of the trainer send slices to all workers of the servers.

Rank 0 makes the calls. Ranks and workers are one process group as long as the servers are the same and no push fails.
Where one fails, the servers whose fault it is are given up, and the others, with a new group, get all of it again.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_riskpo.config import TrainConfig
from megatron_riskpo.errors import RunError
from megatron_riskpo.resharding.actor_shards import ActorShards, served_layout
from megatron_riskpo.resharding.network_receiver import report_key
from megatron_riskpo.resharding.open_modules import OpenModules
from megatron_riskpo.resharding.plan import plan_rank
from megatron_riskpo.resharding.push import WeightPush
from megatron_riskpo.resharding.schedule import BridgeLayout
from megatron_riskpo.resharding.transports.meeting import GroupTransport, Meeting, call_off, join, leave
from megatron_riskpo.rollout.joint_calls import PushLead
from megatron_riskpo.rollout.loop_thread import LoopThread
from megatron_riskpo.rollout.push_ranks import Problem, PushRanks, problem_of
from megatron_riskpo.rollout.server_pool import Server
from megatron_riskpo.rollout.server_push import ServerUpdate


class _NoSink:
    """ShardSink of a rank that only sends."""

    open_modules = OpenModules()

    def parameter(self, name: str) -> Tensor:
        raise RunError(f"weight push: {name} was sent to a rank of the trainer")

    def arrived(self, name: str, numel: int) -> None:
        self.parameter(name)


class NetworkPush:
    """Made once a run; every method but `leave` is collective over the trainer's ranks, `open` the first."""

    def __init__(self, config: TrainConfig, shards: ActorShards, group: ProcessGroup, loop: LoopThread) -> None:
        """Servers are called in `loop`; they need not be up yet. Raises UsageError for layouts that cannot be."""
        self._config, self._shards, self._loop = config, shards, loop
        self._timeout_s = config.bridge.timeout_s
        num_servers = len(config.rollout.server_urls) or config.rollout.servers
        plan_rank(self._layout(num_servers), group.rank())  # its errors now, not once servers are up
        self._ranks = PushRanks(group, self._timeout_s, config.run.timeout_s)
        self._lead: PushLead | None = None
        """Rank 0's."""
        self._num_groups = 0
        self._members: list[str] = []
        """The servers of the group that there is."""
        self._transport: GroupTransport | None = None
        self._push: WeightPush | None = None
        self._problems: list[Problem] = []
        """What all ranks said of the last thing done together, the first to break off first."""
        self.reports: list[dict[str, Any]] = []
        """Rank 0's: what each worker said of the last push."""

    def open(self, hosts: Sequence[str]) -> None:
        """Have servers, once they are up, and ranks meet; `hosts` are the ranks' machines. Raises RunError, on every
        rank, where one is not reached."""
        self._ranks.open(hosts, self._config.rollout.server_urls)

    def _layout(self, num_servers: int) -> BridgeLayout:
        return served_layout(self._shards.layout_options(self._config, num_servers))

    def run(self, servers: Callable[[], Sequence[Server]], version: int) -> ServerUpdate | None:
        """Bring the weights as they are to all servers, which only rank 0 looks for; what became of them, on rank 0.
        Raises RunError, on every rank, where a rank of the trainer is lost."""
        phase, ranks = f"the push of version {version}", self._ranks
        ranks.agree_on_version(version)
        if not ranks.from_first(lambda: self._start(servers(), version), f"the search for servers for {phase}"):
            self.leave()
        while urls := ranks.from_first(lambda: [server.client.url for server in self._leading.waiting()], phase):
            is_group = urls == self._members or self._meet(urls)
            if is_group and ranks.from_first(lambda: self._leading.begin(), f"the servers' pause for {phase}"):
                self._send(urls, phase, version)
        ranks.from_first(lambda: self._leading.finish(), f"the end of {phase}")
        return None if self._lead is None else self._lead.update

    @property
    def _prefix(self) -> str:
        """Of the group's keys in the store."""
        return f"group/{self._num_groups}"

    @property
    def _leading(self) -> PushLead:
        assert self._lead is not None  # rank 0 only
        return self._lead

    def _start(self, servers: Sequence[Server], version: int) -> bool:
        """Whether a group that there is can be kept: a server that was started anew is not in it."""
        self.reports = []
        self._lead = PushLead(self._loop, ServerUpdate(servers, version, self._config.server.push_timeout_s))
        return all(server.usable for server in servers)

    def _meet(self, urls: list[str]) -> bool:
        """Make a group with the workers of these servers; whether all came. RunError where it is the ranks that cannot,
        twice."""
        self.leave()
        self._num_groups += 1
        layout, rank = self._layout(len(urls)), self._ranks.group.rank()
        num_ranks = layout.rollout.rank(len(urls), 0)
        meeting = Meeting(*self._ranks.address, self._prefix, num_ranks, self._timeout_s)
        store = self._ranks.store

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

        phase = "the group with the rollout servers"
        answers = self._together(urls, ask, work, phase)
        is_ranks_affair = self._push is None and not any(answers.values())
        if is_ranks_affair and not self._ranks.from_first(lambda: self._leading.try_again(), phase):
            raise RunError(f"weight push: {self._problems[0].message}")
        self._members = urls if self._push is not None else []
        return self._push is not None

    def _receiver_options(self, meeting: Meeting, layout: BridgeLayout, index: int) -> dict[str, Any]:
        """For server `index`, as its TransferEngine takes them."""
        options = {
            "meeting": asdict(meeting), "first_rank": layout.rollout.rank(index, 0),
            "layout": self._shards.layout_options(self._config, layout.rollout.replicas),
            "dtype": self._shards.dtype,
            "with_checksums": self._config.bridge.verify == "checksum",
        }  # fmt: skip
        return {"transport": "network", "options": options}

    def _send(self, urls: list[str], phase: str, version: int) -> None:
        """The push itself, as far as it comes."""
        body = {"update_info": {"content": {"version": version}}}
        answers = self._together(
            urls,
            lambda: self._leading.ask("/update_weights", [body] * len(urls), lambda reason: None),
            lambda: self._running().run(_NoSink(), version),
            phase,
        )
        if self._lead is not None:
            self._lead.note_updates(answers)
            self._read_reports(urls, answers, version)

    def _running(self) -> WeightPush:
        """Not to be kept: `leave` lets the last one go."""
        assert self._push is not None
        return self._push

    def _together(
        self, urls: Sequence[str], ask: Callable[[], None], work: Callable[[], object], what: str
    ) -> dict[str, str]:
        """Do `work` while the servers at `urls` do what rank 0 asks; their answers. Afterwards there is no group unless
        all of it went well. RunError names ranks of the trainer that do not come to the end of it, and those with an
        error of their own."""
        self._ranks.from_first(ask, what)
        problem = problem_of(work)
        if problem is not None:
            self.leave()  # before anything else: others see by it that they wait in vain
        is_failed = any(self._ranks.gather(problem is not None, what))
        if is_failed:
            self.leave()
        self._problems = self._ranks.problems(problem, what) if is_failed else []
        wait_s = self._timeout_s if is_failed else max(self._timeout_s, self._config.server.push_timeout_s)
        lost = self._first_lost(urls)
        answers = self._ranks.from_first(lambda: self._leading.settle(wait_s, lost), f"the servers' answers to {what}")
        if any(answers.values()):
            self.leave()
        return answers

    def _first_lost(self, urls: Sequence[str]) -> str:
        """The server to which a link of a rank broke before all others; empty where that is not known."""
        first = self._shards.layout.world_size
        peers = [of.peer for of in self._problems if of.peer >= first]
        return urls[(peers[0] - first) // self._config.rollout.tp] if peers else ""

    def _read_reports(self, urls: list[str], answers: Mapping[str, str], version: int) -> None:
        """Of the workers whose servers are complete; the store keeps none."""
        store, tp, first = self._ranks.store, self._config.rollout.tp, self._shards.layout.world_size
        for index, url in enumerate(urls):
            for tp_rank in range(tp):
                key = report_key(self._prefix, version, first + index * tp + tp_rank)
                if store.check([key]):
                    self.reports += [] if answers[url] else [json.loads(store.get(key))]
                    store.delete_key(key)

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
            "bridge/peak_open_mib": most["peak_open_bytes"] / 2**20,
        }

    def leave(self) -> None:
        """Let the group go, and its links with it."""
        if self._transport is not None:
            leave(self._transport)
        self._transport, self._push, self._members = None, None, []
