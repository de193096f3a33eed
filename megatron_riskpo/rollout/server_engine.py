"""RolloutEngine on vLLM servers: every rank asks for its share of the responses, rank 0 pushes the weights.

Requests run in a thread with an event loop of its own, so that they go on while the ranks train. Collectives, and the
start of server processes, are the calling thread's.
"""

import contextlib
import socket
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_riskpo.config import TrainConfig
from megatron_riskpo.config_checks import max_sequence_length
from megatron_riskpo.errors import RiskpoError, RunError
from megatron_riskpo.resharding.actor_shards import ActorShards
from megatron_riskpo.resharding.buckets import NamedTensor, bucketed
from megatron_riskpo.resharding.control import Control, LostRankError
from megatron_riskpo.resharding.vllm_sink import checked, checkpoint_shapes
from megatron_riskpo.rollout.asked import RESPONSES, Asked, ask, outcomes
from megatron_riskpo.rollout.attendance import Attendance
from megatron_riskpo.rollout.carried import go_on_from, packed
from megatron_riskpo.rollout.joint_work import JointWork
from megatron_riskpo.rollout.loop_thread import LoopThread
from megatron_riskpo.rollout.planned_push import PlannedPush, planned_push
from megatron_riskpo.rollout.prompt_checks import check_prompts
from megatron_riskpo.rollout.replicas import Responses, gather_responses, join_prompts, slice_of
from megatron_riskpo.rollout.server_client import ServerClient, ServerError
from megatron_riskpo.rollout.server_fleet import ServerFleet, transfer_folder
from megatron_riskpo.rollout.server_pool import Response, Server, ServerPool, responses_to
from megatron_riskpo.rollout.server_process import ServerProcess, server_processes
from megatron_riskpo.rollout.server_push import FilePush, ServerUpdate
from megatron_riskpo.rollout.server_watch import watch
from megatron_riskpo.rollout.types import OnFinished, Rollouts, SamplingConfig
from megatron_riskpo.rollout.views import View, shared
from megatron_riskpo.rollout.weight_labels import WeightLabels, new_run

Weights = Iterable[NamedTensor]

_PROBE_S = 5.0
"""A server that was given up is asked for so long whether it is back, each time that weights are pushed."""


@dataclass
class PendingRollouts:
    """A `submit` that was not collected yet."""

    prompts: list[list[int]]
    sampling: SamplingConfig
    responses: list[Response]
    """This rank's."""
    asked: Asked
    """Those of them that are waited for."""


@dataclass(frozen=True)
class PushOutcome:
    """What rank 0 tells the others."""

    urls: list[str]
    """Servers that have the weights."""
    error: str = ""
    """Ends the run."""


_KEEP_ALIVE_S = 2.0
"""An idle connection is used no more after so long. vLLM closes it after 5 s, and a request that is on its way then
fails as if the server were gone."""


class ServerEngine:
    """WholeWeightsEngine. `export`: the actor's weights as they are, collective, for servers that have to be given them
    again; whenever the engine is called they are those of the last `update_weights`. `shards`: this rank's own part of
    them, for servers that get them by plan (config_servers.transport_of)."""

    shares_weights = False

    def __init__(
        self,
        config: TrainConfig,
        *,
        vocab_size: int,
        world_group: ProcessGroup,
        folder: Path,
        export: Callable[[], Weights],
        log: Callable[[str], None],
        shards: ActorShards | None = None,
    ) -> None:
        """Start the servers, or look for those given; waits until they are healthy. `folder`: for their logs.
        Collective. Raises RunError, on every rank, where one does not start."""
        self._config, self._group, self._export, self._log = config, world_group, export, log
        self._vocab_size = vocab_size
        self._control = Control.of_all(config.run.timeout_s, subject="rollouts", option="run.timeout_s")
        self._attendance = Attendance(self._control)
        self._push_control = Control(self._control.group, config.bridge.timeout_s)
        self._max_model_len = max_sequence_length(config)
        self._weight_version = -1
        self._shapes = checkpoint_shapes(config.model.path)
        self._stack = contextlib.ExitStack()
        self._loop = LoopThread()
        self._stack.callback(self._loop.close)
        session = self._loop.run(open_session())
        self._stack.callback(lambda: self._loop.run(session.close()))
        says = log if world_group.rank() == 0 else _say_nothing
        labels = WeightLabels(self._control.gather_objects(new_run(), "the name of the run")[0])
        self._pool = ServerPool(lambda url: ServerClient(url, session, labels, vocab_size), config.server, says)
        self._loop.submit(watch(self._pool, config.server))
        self._fleet: ServerFleet | None = None
        hosts = [""] * world_group.size()
        dist.all_gather_object(hosts, socket.gethostname(), group=world_group)
        self._planned: PlannedPush | None = None
        try:
            if shards is not None:  # before the servers: its errors are to be told at once
                self._planned = planned_push(config, shards, world_group, self._loop, log)
            if self._planned is not None:
                self._stack.callback(self._planned.leave)
            joint = JointWork(self._push_control, config.run.timeout_s)
            joint.of_first(lambda: self._start_fleet(folder, hosts), "the start of the rollout servers")
            if self._planned is not None:
                self._planned.open(hosts)
        except RiskpoError:
            self.close()
            raise
        # First of all at the end: requests under way would take the end of the servers for a failure.
        self._stack.callback(self._loop.cancel_all)

    def _start_fleet(self, folder: Path, hosts: list[str]) -> None:
        """Rank 0's. `hosts`: of the ranks."""
        urls = [url.rstrip("/") for url in self._config.rollout.server_urls]
        try:
            self._folder = self._stack.enter_context(transfer_folder(self._config.server.transfer_dir))
            processes = [] if urls else server_processes(self._config, folder, hosts)
            self._fleet = ServerFleet(processes, urls, self._log)
            self._stack.callback(self._fleet.close)
            self._fleet.wait_for_all()
        except OSError as error:
            raise RunError(str(error)) from error
        self._check_given(urls)

    def _check_given(self, urls: Sequence[str]) -> None:
        """RunError for given servers that do not answer, or cannot take weights."""
        self._loop.run(self._pool.ready_at(urls, self._config.server.health_timeout_s))
        if obstacles := "; ".join(filter(None, self._pool.obstacles.values())):
            raise RunError(f"rollout.server_urls: {obstacles}; start servers anew with riskpo serve")

    @property
    def processes(self) -> dict[str, ServerProcess]:
        """Rank 0's: the servers that it started and that are up, by address."""
        return {} if self._fleet is None else self._fleet.processes

    @property
    def weight_version(self) -> int:
        """Version of the last complete push; -1 before the first."""
        return self._weight_version

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: SamplingConfig, seeds: Sequence[int],
        on_finished: OnFinished | None = None,
    ) -> Rollouts:  # fmt: skip
        """See RolloutEngine. Seeds fix the tokens whichever server answers; the batches that it forms may change the
        last bits of log-probs."""
        return self.collect(self.submit(prompts, sampling, seeds), on_finished)

    def submit(
        self, prompts: Sequence[Sequence[int]], sampling: SamplingConfig, seeds: Sequence[int],
        begun: Mapping[str, Any] | None = None,
    ) -> PendingRollouts:  # fmt: skip
        """Ask for responses to this rank's share of the prompts (all ranks call it with the same); does not wait.
        `begun`: what `under_way` had of the same responses."""
        check_prompts(prompts, sampling.max_response_tokens, self._max_model_len, self._vocab_size)
        mine = slice_of(len(prompts), self._group.size(), self._group.rank())
        responses = responses_to(prompts[mine], sampling, seeds[mine], self._weight_version)
        if begun is not None and (anew := len(responses) - go_on_from(begun, responses)):
            self._log(f"{anew} of {len(responses)} responses under way begin anew: they were asked otherwise")
        asked = ask(self._loop, self._pool, responses, range(len(responses)), sampling)
        return PendingRollouts([list(prompt) for prompt in prompts], sampling, responses, asked)

    def under_way(self, pending: PendingRollouts) -> dict[str, Any]:
        """What has come so far of this rank's responses. What a server samples at this moment is not in it."""

        async def copied() -> dict[str, Any]:
            return packed(pending.responses)

        # In the thread that lets them grow.
        return self._loop.run(copied())

    def collect(self, pending: PendingRollouts, on_finished: OnFinished | None = None) -> Rollouts:
        """The rollouts, whole on every rank; the rank that asked for a response tells `on_finished` of it as soon as it
        is there. Collective. Servers that fail meanwhile are started again and given the weights again, where no other
        can take over. Raises RunError, on every rank, where that does not help."""
        unfinished = 0
        for attempt in range(1 + self._config.server.max_restarts):
            if attempt:
                self.update_weights(self._export(), self._weight_version)
            errors = self._finish_local(pending, on_finished)
            unfinished = self._settle(pending, errors)
            if not unfinished:
                local = to_responses(pending.responses)
                gathered = gather_responses(local, len(pending.prompts), pending.sampling.group_size, 1, self._group)
                return join_prompts(pending.prompts, pending.sampling.group_size, gathered)
        raise RunError(
            f"{unfinished} responses could not be sampled, with {self._config.server.max_restarts} restarts of the "
            f"servers ({self._reasons()})"
        )

    def _finish_local(self, pending: PendingRollouts, on_finished: OnFinished | None) -> list[str]:
        """Wait; what servers that failed before left undone is asked for once more. The errors that end the run."""
        errors = self._wait(pending, on_finished)
        left = [row for row, response in enumerate(pending.responses) if not response.reason]
        if left and self._pool.usable:
            pending.asked = ask(self._loop, self._pool, pending.responses, left, pending.sampling)
            errors = self._wait(pending, on_finished)
        return errors

    def _wait(self, pending: PendingRollouts, on_finished: OnFinished | None) -> list[str]:
        """Until nothing is asked any more; of responses that no server could finish there is no error."""
        first = slice_of(len(pending.prompts), self._group.size(), self._group.rank()).start
        errors = []
        for row, failure in outcomes(pending.asked, self._attendance):
            if isinstance(failure, RunError):
                errors.append(str(failure))
            elif failure is None and on_finished is not None:
                on_finished(first * pending.sampling.group_size + row, pending.responses[row].tokens)
        pending.asked = {}
        return errors

    def _settle(self, pending: PendingRollouts, errors: Sequence[str]) -> int:
        """Bring the ranks to one view: who failed for one is used by none. The number of unfinished responses over all
        ranks; RunError, on every rank, for an error of any."""
        self._attendance.until_all_are_done(RESPONSES)
        unfinished = sum(not response.reason for response in pending.responses)
        view = shared(View(next(iter(errors), ""), unfinished, self._pool.lost()), self._control, RESPONSES)
        self._loop.run(self._pool.give_up_for_all(view.lost))
        if self._fleet is not None:
            self._fleet.restart(list(view.lost))
        if view.error:
            raise RunError(view.error)
        return view.unfinished

    def update_weights(self, weights: Weights, version: int) -> dict[str, float]:
        """See WholeWeightsEngine; by plan `weights` is not read, each rank gives what it has. Requests under
        way stop, keep their tokens, and go on with the new weights. A server that fails is not used until it has been
        started, and given the weights, again. Collective. Raises RunError, on every rank, where no server is left."""
        self._pool.begin_push(version)
        while not (outcome := self._push(weights, version)).urls:
            weights = self._export()
        self._loop.run(self._pool.admit(outcome.urls))
        self._weight_version = version
        return {} if self._planned is None else self._planned.metrics

    def _push(self, weights: Weights, version: int) -> PushOutcome:
        """Rank 0 makes the calls, the others take part in the export, or send as well. Raises RunError, on every rank,
        where the run cannot go on."""
        own, phase = PushOutcome([]), f"the push of version {version}"
        weights = self._push_control.guarded(weights, phase)
        if self._planned is not None:
            update = self._planned.run(self._candidates, version)
            if self._fleet is not None and update is not None:
                own = self._outcome(self._fleet, update, "")
        elif self._fleet is None:
            for _ in weights:
                pass
        else:
            own = self._push_files(self._fleet, weights, version)
        outcome = self._control.gather_objects(own, phase)[0]
        if outcome.error:
            raise RunError(outcome.error)
        return outcome

    def _candidates(self) -> list[Server]:
        """Rank 0's: the servers that can take weights. RunError where there are none any more. Those that cannot, and
        would not be missed by a push, are started again."""
        assert self._fleet is not None
        found = self._loop.run(self._pool.ready_at(self._fleet.addresses(), _PROBE_S))
        given_up = [server.client.url for server in self._pool.servers if not server.usable]
        self._fleet.restart_unready([server.client.url for server in found], given_up)
        return found

    def _push_files(self, fleet: ServerFleet, weights: Weights, version: int) -> PushOutcome:
        error = ""
        push = None
        try:
            timeout_s = self._config.server.push_timeout_s
            push = FilePush(self._candidates(), version, len(self._shapes), self._folder, timeout_s)
            self._loop.run(push.start())
            for bucket in bucketed(checked(weights, self._shapes), int(self._config.bridge.bucket_mib * 2**20)):
                self._loop.run(push.send(bucket))
            self._loop.run(push.finish())
        except LostRankError:
            raise
        except (RunError, OSError) as failure:
            error = f"weights of version {version} could not be pushed: {failure}"
            # The other ranks are in the export, which is collective.
            for _ in weights:
                pass
        if push is None:
            return PushOutcome([], error)
        if error:
            self._loop.run(push.abandon())
        return self._outcome(fleet, push, error)

    def _outcome(self, fleet: ServerFleet, update: ServerUpdate, error: str) -> PushOutcome:
        """Rank 0's: give up the servers that failed, and start them again."""
        for reason in update.failed.values():
            self._log(f"rollout server given up: {reason}")
        fleet.restart(list(update.failed))
        urls = [server.client.url for server in update.alive]
        if not urls and not error and not fleet.has_processes:
            # Why a server was given up says more than that it cannot take weights either.
            reasons = self._pool.obstacles | self._pool.lost() | update.failed
            error = f"no rollout server is left: {'; '.join(filter(None, reasons.values()))}"
        return PushOutcome(urls, error)

    def token_logprobs(self, sequences: Sequence[Sequence[int]]) -> list[Tensor]:
        """Teacher-forced log-probs at temperature 1, as ScoringEngine, of one server: another one for each rank and
        each version, so that all have their turn."""
        check_prompts(sequences, 1, self._max_model_len, self._vocab_size)
        usable = self._pool.usable
        if not usable:
            raise RunError(f"no rollout server is left: {self._reasons()}")
        first = (self._group.rank() + self._weight_version) % len(usable)
        failures = []
        for server in [*usable[first:], *usable[:first]]:  # all have the same weights
            try:
                scores = self._loop.run(server.score_all(sequences, self._config.server.request_timeout_s))
                return [torch.tensor(row, dtype=torch.float32) for row in scores]
            except ServerError as error:
                failures.append(str(error))
        raise RunError(f"bridge.verify: {'; '.join(failures)}")

    def release(self) -> None:
        """The servers have memory of their own, and may be at work on the next step."""

    def close(self) -> None:
        """End the requests under way, and the servers that the run started."""
        self._stack.close()

    def _reasons(self) -> str:
        return "; ".join(self._pool.lost().values())


def _say_nothing(message: str) -> None:
    """Rank 0 speaks for all."""


async def open_session() -> aiohttp.ClientSession:
    """For ServerClient; to be closed in the same event loop."""
    # The pool bounds the number of requests.
    return aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=_KEEP_ALIVE_S))


def to_responses(responses: Sequence[Response]) -> Responses:
    """Finished ones as one message."""
    flat = {name: [v for r in responses for v in getattr(r, name)] for name in ("tokens", "logprobs", "versions")}
    return Responses(
        lengths=torch.tensor([len(r.tokens) for r in responses], dtype=torch.int32),
        finished=torch.tensor([r.reason == "stop" for r in responses], dtype=torch.int32),
        tokens=torch.tensor(flat["tokens"], dtype=torch.int32),
        logprobs=torch.tensor(flat["logprobs"], dtype=torch.float32),
        versions=torch.tensor(flat["versions"], dtype=torch.int32),
    )
