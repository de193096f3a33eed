"""Several servers as one: balanced, retried within bounds, watched; who fails is given up. Runs in one event loop."""

import asyncio
import math
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from megatron_riskpo.config import ServerConfig
from megatron_riskpo.errors import RunError
from megatron_riskpo.rollout.server_client import Segment, ServerClient, ServerError
from megatron_riskpo.rollout.types import SamplingConfig
from megatron_riskpo.rollout.vllm_arguments import request_seeds

BACKOFF_S, LONGEST_BACKOFF_S = 0.25, 10.0
"""After the first failure of a server nothing is sent to it for so long; doubled with each further one, up to this."""


class NoServersError(Exception):
    """No server is left that may be used."""


@dataclass(eq=False)
class Server:
    """One server, as this rank sees it."""

    client: ServerClient
    usable: bool = False
    """It has the current weights, and did not fail."""
    version: int = -1
    """Of the weights that it was given last."""
    reason: str = "has no weights yet"
    """Why it may not be used."""
    outstanding: int = 0
    """Tokens, of prompts and still to come, of requests under way."""
    failures: int = 0
    """In a row; those of requests that were under way together count once."""
    failed_at: float = -1.0
    """When the last of them was counted (time.monotonic)."""
    calls: set[asyncio.Task[Any]] = field(default_factory=set)
    """Under way; cancelled when the server is given up."""

    @property
    def ready_at(self) -> float:
        """When something may be sent again (time.monotonic)."""
        if not self.failures:
            return 0.0
        return self.failed_at + min(BACKOFF_S * 2.0 ** min(self.failures - 1, 30), LONGEST_BACKOFF_S)

    def give_up(self, reason: str) -> None:
        """Use it no more, and wait no longer for what it was asked."""
        if self.usable:
            self.usable, self.reason = False, reason
            for call in self.calls:
                call.cancel()

    def admit(self, version: int) -> None:
        """It has the current weights, of this version."""
        self.usable, self.version, self.reason, self.failures = True, version, "", 0

    async def call(self, work: Coroutine[Any, Any, Any], *, cost: int = 0) -> Any:
        """The result of one call; ServerError also where the server is given up meanwhile."""
        task = asyncio.ensure_future(work)
        self.calls.add(task)
        self.outstanding += cost
        try:
            return await task
        except asyncio.CancelledError:
            if task.cancelled() and self.reason:
                raise ServerError(self.reason) from None
            task.cancel()
            raise
        finally:
            self.calls.discard(task)
            self.outstanding -= cost

    async def score_all(self, sequences: Sequence[Sequence[int]], timeout_s: float) -> list[list[float]]:
        """`ServerClient.prompt_logprobs` of each."""
        calls = (self.call(self.client.prompt_logprobs(sequence, timeout_s)) for sequence in sequences)
        return await asyncio.gather(*calls)


@dataclass
class Response:
    """One response, grown a segment at a time; a request that no server could finish stays as it is."""

    prompt: Sequence[int]
    seed: int
    oldest_version: int
    """Weights older than these are refused."""
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)
    reason: str = ""
    """Empty while unfinished."""

    def extend(self, segment: Segment, max_tokens: int) -> None:
        """Add a segment; an aborted one leaves the response unfinished, unless it is full."""
        self.tokens += segment.tokens
        self.logprobs += segment.logprobs
        self.versions += segment.versions
        if segment.reason != "abort":
            self.reason = segment.reason
        elif len(self.tokens) == max_tokens:
            self.reason = "length"


class ServerPool:
    """The servers of a run, those of the last push. `newest_version`: of the weights that were pushed last, or are
    being pushed."""

    def __init__(
        self, connect: Callable[[str], ServerClient], config: ServerConfig, log: Callable[[str], None]
    ) -> None:
        self.servers: list[Server] = []
        self.newest_version = -1
        self.pushed_at = -math.inf
        """When the last push ended (time.monotonic); infinity: one is under way."""
        self.obstacles: dict[str, str] = {}
        """Why servers could not take weights at the last look, by address."""
        self._were_ours: set[str] = set()
        """Addresses of servers that have had this run's weights."""
        self._connect = connect
        self._config, self._log = config, log
        self._slots = asyncio.Semaphore(config.max_concurrent)

    @property
    def usable(self) -> list[Server]:
        return [server for server in self.servers if server.usable]

    def _at(self, urls: Sequence[str]) -> list[Server]:
        """Those in use, and new ones for the other addresses."""
        known = {server.client.url: server for server in self.usable}
        return [known.get(url) or Server(self._connect(url)) for url in urls]

    async def ready_at(self, urls: Sequence[str], timeout_s: float) -> list[Server]:
        """Those in use, and the others that are ready for weights: also those that were in use, and are other processes
        since."""
        await asyncio.gather(*(self._recognise(server, timeout_s) for server in self.usable))
        servers = self._at(urls)
        self.obstacles = dict(await asyncio.gather(*(self._obstacle(server, timeout_s) for server in servers)))
        return [server for server in servers if not self.obstacles[server.client.url]]

    async def _obstacle(self, server: Server, timeout_s: float) -> tuple[str, str]:
        """The server's address, and why it cannot take weights. A server that another run took would be taken back and
        forth for ever: it is theirs until it is started anew."""
        url = server.client.url
        if server.usable:
            return url, ""
        return url, await server.client.obstacle(timeout_s, was_ours=url in self._were_ours)

    async def _recognise(self, server: Server, timeout_s: float) -> None:
        """Give up a server in use that no longer has what it was given. One that was started anew may have been away
        too shortly for a health check, and knows nothing of what the one before had been told."""
        try:
            label = await server.client.weight_label(timeout_s)
        except (ServerError, RunError):
            return  # what is wrong with it, the push will say
        labels = server.client.labels
        if server.usable and label != (given := labels.of(server.version)):
            cause = labels.cause(label)
            self.give_up(server, f"{server.client.url} has weights {label!r}, not {given!r} as it was given: {cause}")

    def begin_push(self, version: int) -> None:
        """What comes from the servers until `admit` may be of these weights already."""
        self.newest_version, self.pushed_at = version, math.inf

    async def admit(self, urls: Sequence[str]) -> None:
        """These servers, and no others, have the current weights."""
        for server in self.usable:
            if server.client.url not in urls:
                server.give_up(f"{server.client.url} did not take weights of version {self.newest_version}")
        self.servers = self._at(urls)
        for server in self.servers:
            server.admit(self.newest_version)
        self._were_ours |= set(urls)
        self.pushed_at = time.monotonic()

    async def give_up_for_all(self, reasons: Mapping[str, str]) -> None:
        """What failed for one rank is used by none; why, by address."""
        for server in self.usable:
            if server.client.url in reasons:
                self.give_up(server, reasons[server.client.url])

    def lost(self) -> dict[str, str]:
        """Why servers that had the current weights may not be used any more, by address."""
        return {server.client.url: server.reason for server in self.servers if not server.usable}

    def give_up(self, server: Server, reason: str) -> None:
        """Use a server no more, and say why."""
        if server.usable:
            self._log(f"rollout server given up: {reason}")
            server.give_up(reason)

    async def complete(self, response: Response, sampling: SamplingConfig) -> None:
        """Bring the response to its end. What is sampled when a push stops the servers is kept; the rest is sampled by
        the new weights. Raises NoServersError, the response then being what it was up to there, and RunError where
        server after server fails on it."""
        failures = 0
        async with self._slots:
            while not response.reason:
                server = await self._choose()
                started = time.monotonic()
                try:
                    segment = await self._segment(server, response, sampling)
                except ServerError as error:
                    failures += 1
                    if failures > self._config.max_retries + len(self.servers):
                        raise RunError(f"a request failed {failures} times, at last because {error}") from error
                    await self._note_failure(server, started, str(error))
                    continue
                server.failures = 0
                response.extend(segment, sampling.max_response_tokens)

    async def _segment(self, server: Server, response: Response, sampling: SamplingConfig) -> Segment:
        remaining = sampling.max_response_tokens - len(response.tokens)
        prompt = [*response.prompt, *response.tokens]
        parameters = sampling_parameters(sampling, continued_seed(response.seed, len(response.tokens)), remaining)
        call = server.client.generate(prompt, parameters, self._config.request_timeout_s)
        segment = await server.call(call, cost=len(prompt) + remaining)
        oldest, newest = response.oldest_version, self.newest_version
        wrong = {version for version in segment.versions if not oldest <= version <= newest}
        if wrong:
            label = segment.labels.get(min(wrong), "")
            sampled = f"{server.client.url} sampled with weights {label!r}, not {_weights(oldest, newest)}"
            self.give_up(server, f"{sampled}: {server.client.labels.cause(label)}")
            raise ServerError(server.reason)
        return segment

    async def _choose(self) -> Server:
        """The ready server with the fewest tokens under way; waits where all are backing off."""
        while True:
            usable = self.usable
            if not usable:
                raise NoServersError
            now = time.monotonic()
            ready = [server for server in usable if server.ready_at <= now]
            if ready:
                return min(ready, key=lambda server: server.outstanding)
            await asyncio.sleep(min(server.ready_at for server in usable) - now)

    async def _note_failure(self, server: Server, started: float, reason: str) -> None:
        # One failure however many requests were under way together.
        if not server.usable or started < server.failed_at:
            return
        server.failures, server.failed_at = server.failures + 1, time.monotonic()
        if server.failures > self._config.max_retries:
            self.give_up(server, reason if server.failures == 1 else f"{reason} ({server.failures} times in a row)")
        elif not await server.client.is_healthy(self._config.health_timeout_s):
            self.give_up(server, reason)


def _weights(oldest: int, newest: int) -> str:
    if newest < 0:
        return "its own"
    return f"of version {newest}" if oldest == newest else f"of versions {oldest} to {newest}"


def responses_to(
    prompts: Sequence[Sequence[int]], sampling: SamplingConfig, seeds: Sequence[int], version: int
) -> list[Response]:
    """Yet to be sampled, group_size a prompt, each with a seed of its own; `version`: the oldest weights for them."""
    return [
        Response(prompt, request_seed, version)
        for prompt, seed in zip(prompts, seeds, strict=True)
        for request_seed in request_seeds(seed, sampling.group_size)
    ]


def sampling_parameters(sampling: SamplingConfig, seed: int, max_tokens: int) -> dict[str, Any]:
    """vLLM's SamplingParams of one request."""
    return {
        "temperature": sampling.temperature,
        "seed": seed,
        "max_tokens": max_tokens,
        "stop_token_ids": list(sampling.stop_token_ids),
        "ignore_eos": True,  # only stop_token_ids stop
        "logprobs": 0,  # the sampled token's
        "detokenize": False,
    }


def continued_seed(seed: int, num_tokens: int) -> int:
    """The seed with which a response goes on after `num_tokens` tokens: those of its beginning must not come again."""
    if num_tokens == 0:
        return seed
    return int(np.random.SeedSequence([seed, num_tokens]).generate_state(1, np.uint64)[0] >> np.uint64(1))
