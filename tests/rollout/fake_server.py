"""A server that speaks the part of vLLM's protocol that the client uses, and fails as a test wants it to."""

import asyncio
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

from megatron_riskpo.rollout.loop_thread import LoopThread
from megatron_riskpo.rollout.weight_labels import WeightLabels

VOCAB_SIZE = 96
LABELS = WeightLabels("0123abcd")
"""Of the run whose weights it has."""


def token_at(seed: int, position: int) -> int:
    """What the fake samples: no stop token, another sequence for each seed."""
    return 10 + (seed * 7 + position * 13) % (VOCAB_SIZE - 10)


@dataclass
class FakeServer:
    """Tests change the fields while it runs."""

    version: str = LABELS.of(0)
    """What it calls its weights."""
    fail_next: int = 0
    """Generate calls answered with 500."""
    fails_for: set[int] = field(default_factory=set)
    """First tokens of prompts; generate calls for these are always answered with 500."""
    holds: dict[int, int] = field(default_factory=dict)
    """By first token of the prompt: no more than so many tokens are sampled before the next pause."""
    failing_calls: set[str] = field(default_factory=set)
    """Paths that are always answered with 500."""
    refused_calls: set[str] = field(default_factory=set)
    """Paths that are always answered with 400."""
    silent: bool = False
    """Answer nothing at all, as a stopped process."""
    hangs: bool = False
    """Answer only what needs no engine."""
    delay_s: float = 0.0
    """Of generate calls."""
    call_delay_s: float = 0.0
    """Of the others, but health checks."""
    abort_after: int = 0
    """End the next response after so many tokens, as a pause does; 0: none."""
    garbled: bool = False
    """Answer generate calls with something else."""
    spoiled: dict[str, Any] = field(default_factory=dict)
    """Parts of the answer of generate calls that are others."""
    binary: bool = False
    """Answer generate calls with bytes that are no text."""
    health_status: int = 200
    model: str = "model"
    max_model_len: int = 64
    requests: list[dict[str, Any]] = field(default_factory=list)
    """Bodies of the generate calls."""
    calls: list[str] = field(default_factory=list)
    """Paths of the others, but health checks."""
    busiest: int = 0
    """Most generate calls at a time."""
    is_told: bool = False
    """How weights will come."""
    is_paused: bool = False
    num_pauses: int = 0
    url: str = ""
    _busy: int = 0

    def restart(self) -> None:
        """It crashed and is back at its address, with weights of its own."""
        self.version, self.is_told, self.is_paused = "default", False, False

    async def handle(self, request: web.Request) -> web.StreamResponse:
        while self.silent:
            await asyncio.sleep(0.02)
        while self.hangs and request.path not in ("/health", "/v1/models"):
            await asyncio.sleep(0.02)
        if request.path in self.failing_calls:
            return web.json_response({"error": {"message": "made to fail"}}, status=500)
        if request.path in self.refused_calls:
            return web.json_response({"error": {"message": "made to refuse"}}, status=400)
        if request.path == "/health":
            return web.Response(status=self.health_status)
        if request.path == "/inference/v1/generate":
            return await self._generate(await request.json())
        if request.path == "/v1/models":
            return web.json_response({"data": [{"root": self.model, "max_model_len": self.max_model_len}]})
        self.calls.append(request.path)
        self.is_told |= request.path == "/init_weight_transfer_engine"
        self.num_pauses += request.path == "/pause"
        self.is_paused = (self.is_paused or request.path == "/pause") and request.path != "/resume"
        if request.path == "/start_weight_update" and not self.is_told:
            return web.json_response({"error": {"message": "it was not said how weights come"}}, status=500)
        await asyncio.sleep(self.call_delay_s)
        body = await request.json() if request.can_read_body else {}
        if request.path == "/weight_info":
            return web.json_response({"weight_version": self.version})
        self.version = body.get("weight_version") or body.get("new_version") or self.version
        return web.json_response({})

    async def _generate(self, body: dict[str, Any]) -> web.Response:
        self.requests.append(body)
        while self.is_paused:
            await asyncio.sleep(0.005)
        self._busy += 1
        self.busiest = max(self.busiest, self._busy)
        await asyncio.sleep(self.delay_s)
        self._busy -= 1
        first, pauses = body["token_ids"][0], self.num_pauses
        if self.fail_next or first in self.fails_for:
            self.fail_next = max(self.fail_next - 1, 0)
            return web.json_response({"error": {"message": "made to fail"}}, status=500)
        if self.binary:
            return web.Response(body=b"\xff\xfe", content_type="application/json")
        if self.garbled:
            return web.json_response({"choices": [{"token_ids": [1, 2]}]})
        if max(body["token_ids"]) >= VOCAB_SIZE:
            return web.json_response({"error": {"message": "token id out of vocabulary"}}, status=400)
        sampling = body["sampling_params"]
        num, reason = sampling["max_tokens"], "length"
        if self.abort_after:
            num, reason, self.abort_after = min(self.abort_after, num), "abort", 0
        version = self.version
        if self.holds.get(first, num) < num:
            while first in self.holds and self.num_pauses == pauses:
                await asyncio.sleep(0.005)
            num, reason = (self.holds[first], "abort") if first in self.holds else (num, reason)
        tokens = [token_at(sampling["seed"], position) for position in range(num)]
        content = [{"token_id": token, "logprob": -token / 10} for token in tokens]
        spans = [{"version": version, "start": 0, "end": num}]
        choice = {"token_ids": tokens, "logprobs": {"content": content}, "finish_reason": reason}
        return web.json_response({"choices": [{**choice, "weight_versions": spans, **self.spoiled}]})


@contextmanager
def fake_server(server: FakeServer | None = None, **state: Any) -> Iterator[FakeServer]:
    """A running one, this one or one in that state."""
    server, thread = server or FakeServer(**state), LoopThread()
    listener = socket.create_server(("127.0.0.1", 0))
    server.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    runner = thread.run(_start(server, listener))
    try:
        yield server
    finally:
        server.silent = server.hangs = False
        thread.run(runner.cleanup())
        thread.close()


async def _start(server: FakeServer, listener: socket.socket) -> web.AppRunner:
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", server.handle)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    await web.SockSite(runner, listener).start()
    return runner
