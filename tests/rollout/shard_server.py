"""A server for pushes by plan, as a process: HTTP and receivers are real, the model is plain memory.

Its two workers are threads. What goes wrong in it is told by the version of a push.
"""

import asyncio
import time
from pathlib import Path
from typing import Any

import torch
from aiohttp import web

from megatron_riskpo.errors import RunError
from megatron_riskpo.resharding.memory_receiver import MemoryReceiver
from megatron_riskpo.resharding.memory_sink import MemorySink
from megatron_riskpo.resharding.network_receiver import ShardReceiver
from megatron_riskpo.resharding.schedule import BridgeLayout
from megatron_riskpo.resharding.transports.meeting import LOST_PEER
from tests.resharding.fault_ranks import VICTIM, FaultySink, FaultyTransport
from tests.resharding.whole_model import rollout_parameters
from tests.rollout.fake_server import FakeServer, fake_server

TP = 2
LAYOUT = "layout"
"""One worker finds before the push that vLLM stores the model otherwise."""
RESTART = "restart"
"""What the server knew of the group is gone; its address is the same."""


class ShardServer(FakeServer):
    """`faults`: SIGKILL, SIGSTOP, corruption or LAYOUT, by version; RESTART after it."""

    def __init__(self, folder: Path, faults: dict[int, str], tp: int = TP) -> None:
        super().__init__(version="default")
        self.folder, self.faults, self.tp = folder, faults, tp
        self.compares = True
        """With the made-up parameters of whole_model.py."""
        self.receivers: list[ShardReceiver | MemoryReceiver] = []
        self.sinks: list[MemorySink] = []

    def restart(self) -> None:
        super().restart()
        for receiver in self.receivers:
            receiver.close()
        self.receivers = []

    async def handle(self, request: web.Request) -> web.StreamResponse:
        work = {"/init_weight_transfer_engine": self.join, "/update_weights": self.receive}.get(request.path)
        if work is None:
            return await super().handle(request)
        body = await request.json()
        calls = (asyncio.to_thread(work, body, rank) for rank in range(self.tp))
        results = await asyncio.gather(*calls, return_exceptions=True)
        errors = [result for result in results if isinstance(result, BaseException)]
        if errors:  # one of a worker's own first, as from WorkersExecutor
            error = min(map(str, errors), key=lambda message: LOST_PEER in message)
            return web.json_response({"error": {"message": error}}, status=500)
        if request.path == "/init_weight_transfer_engine":
            self.receivers, self.is_told = results, True  # type: ignore[assignment]
        return web.json_response({})

    def join(self, body: dict[str, Any], rank: int) -> ShardReceiver | MemoryReceiver:
        kind = {"network": ShardReceiver, "shared_memory": MemoryReceiver}[body["init_info"]["transport"]]
        return kind(body["init_info"]["options"], rank, self.tp, torch.device("cpu"))

    def receive(self, body: dict[str, Any], rank: int) -> None:
        if not self.receivers:
            raise RunError("weights came before it was said how they come")
        version, receiver = body["update_info"]["content"]["version"], self.receivers[rank]
        fault = self.faults.get(version)
        is_victim = rank == self.tp - 1
        if isinstance(receiver, MemoryReceiver):
            like = torch.empty(0, dtype=torch.int64)
            sink = FaultySink(receiver.layout, rank, like, (is_victim and fault) or "none", self.folder)
            receiver.receive(sink, version)
            self.compare(receiver.layout, rank, sink, version)
            self.receivers = [] if fault == RESTART else self.receivers
            return
        if fault in ("SIGKILL", "SIGSTOP", "corruption") and is_victim:
            # No name for the push here: who keeps it keeps its links.
            receiver._running()._transport = FaultyTransport(receiver._running()._transport, VICTIM, fault, self.folder)
        sink = MemorySink(receiver.layout, rank, receiver._running()._parameters[""])
        try:
            report = receiver.receive(sink, version, refuse if fault == LAYOUT and is_victim else lambda: None)
        except RunError:
            if receiver._push is not None:
                raise RuntimeError("it keeps links on which others wait") from None
            raise
        receiver.tell(report, 0.25, version)
        self.compare(receiver.layout, rank, sink, version)
        if fault == RESTART:
            receiver.close()

    def compare(self, layout: BridgeLayout, rank: int, sink: MemorySink, version: int) -> None:
        if self.compares and not is_whole(layout, rank, sink, version):
            raise RuntimeError("other numbers than the trainer has")


def refuse() -> None:
    raise RunError("stored otherwise")


def is_whole(layout: BridgeLayout, rank: int, sink: MemorySink, version: int) -> bool:
    expected = rollout_parameters(layout, rank)
    same = (torch.equal(tensor, expected[name][: len(tensor)] + version) for name, tensor in sink.parameters.items())
    return not any(sink.missing.values()) and all(same)


def main(folder: Path, faults: dict[int, str]) -> None:
    """Until it is killed; its address is in folder/url."""
    with fake_server(ShardServer(folder, faults)) as server:
        (folder / "url.part").write_text(server.url)
        (folder / "url.part").replace(folder / "url")
        time.sleep(600)
