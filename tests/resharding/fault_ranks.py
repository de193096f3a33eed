"""One of three ranks of a push in which something goes wrong; says how it ended in outcome_RANK.json.

No Megatron, no vLLM: parameters are made up, the sink is plain memory; process group, plan, buckets, transport and
agreement are the real ones.
"""

import json
import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_riskpo.errors import RunError
from megatron_riskpo.resharding.control import Control
from megatron_riskpo.resharding.layouts import ActorLayout, RolloutLayout
from megatron_riskpo.resharding.memory_sink import MemorySink
from megatron_riskpo.resharding.peer_parameters import share_among
from megatron_riskpo.resharding.pieces import Model
from megatron_riskpo.resharding.plan import plan_rank
from megatron_riskpo.resharding.pull import WeightPull
from megatron_riskpo.resharding.push import WeightPush
from megatron_riskpo.resharding.schedule import BridgeLayout
from megatron_riskpo.resharding.transports.base import Parcel, PendingRound, Transport
from megatron_riskpo.resharding.transports.gloo import GlooTransport
from tests.resharding.whole_model import actor_parameters, rollout_parameters

NUM_RANKS = 3
TIMEOUT_S = 3.0
VICTIM = 1
OF_FIRST = " of rank 0"
"""At the end of a fault: that one is the victim."""
FAULT_AT = 4
"""The round, in order of work, in which it happens."""
FAULT_AT_SLICE = 5
"""Of a push without messages: odd, so that with checksums it is a copy, not a comparison."""
MODEL = {
    "model_type": "qwen2", "hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 6,
    "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 256, "tie_word_embeddings": True,
}  # fmt: skip


def fault_layout() -> BridgeLayout:
    """Every rank gets two thirds of its weights from the other two."""
    actor, rollout = ActorLayout(NUM_RANKS, pp=NUM_RANKS), RolloutLayout(1, NUM_RANKS)
    return BridgeLayout(Model.of(MODEL), actor, rollout, item_size=8, bucket_bytes=2**17)


class FaultyTransport:
    """A transport, and on the victim, at its first message from then on, the fault."""

    def __init__(self, inner: Transport, rank: int, fault: str, folder: Path) -> None:
        self.inner, self.rank, self.fault, self.folder = inner, rank, fault, folder
        self.count, self.is_done = 0, False

    def start(self, sends: Sequence[Parcel], receives: Sequence[Parcel]) -> PendingRound:
        self.count += 1
        now = self.count >= FAULT_AT and self.rank == VICTIM and bool(receives) and not self.is_done
        self.is_done |= now
        if now and self.fault in ("SIGKILL", "SIGSTOP"):
            end_here(self.folder, self.fault)
        pending = self.inner.start(sends, receives)
        return _Faulty(pending, receives, self.fault, self.folder) if now else pending


class _Faulty:
    """Changes a number of a message after it has come, as a broken link would; or the process ends then."""

    def __init__(self, pending: PendingRound, receives: Sequence[Parcel], fault: str, folder: Path) -> None:
        self.drain = pending.drain
        self.pending, self.receives, self.fault, self.folder = pending, receives, fault, folder

    def receive(self, deadline: float) -> None:
        self.pending.receive(deadline)
        if self.fault == "corruption":
            self.receives[0].buffer[3] += 1
        elif self.fault == "late":
            end_here(self.folder, "SIGKILL")


class FaultySink(MemorySink):
    """At one slice the fault: what is copied is lost, or the process ends."""

    def __init__(self, layout: BridgeLayout, tp_rank: int, like: Tensor, fault: str, folder: Path) -> None:
        super().__init__(layout, tp_rank, like)
        self.fault, self.folder = fault, folder
        self.count = 0

    def parameter(self, name: str) -> Tensor:
        self.count += 1
        found = super().parameter(name)
        if self.count != FAULT_AT_SLICE or self.fault not in ("SIGKILL", "SIGSTOP", "corruption"):
            return found
        if self.fault == "corruption":
            return found.clone()
        end_here(self.folder, self.fault)
        return found


def end_here(folder: Path, name: str) -> None:
    (folder / "fault_time").write_text(str(time.time()))
    os.kill(os.getpid(), getattr(signal, name))


def make_push(
    group: dist.ProcessGroup, fault: str, folder: Path, *, over_gloo: bool
) -> tuple[WeightPush | WeightPull, MemorySink]:
    layout, rank = fault_layout(), group.rank()
    plan, parameters = plan_rank(layout, rank), actor_parameters(layout, rank)
    like, with_checksums = next(iter(parameters.values())), fault == "corruption"
    if over_gloo:
        transport = FaultyTransport(GlooTransport(group), rank, fault, folder)
        run = WeightPush(plan, parameters, transport, timeout_s=TIMEOUT_S, with_checksums=with_checksums)
        return run, MemorySink(layout, 0, like)
    peers = share_among(parameters, group)
    assert peers is not None
    run = WeightPull(plan, peers.of_rank, with_checksums=with_checksums)
    victim = 0 if fault.endswith(OF_FIRST) else VICTIM
    return run, FaultySink(layout, 0, like, fault.removesuffix(OF_FIRST) if rank == victim else "none", folder)


def push(group: dist.ProcessGroup, case: str, folder: Path) -> str:
    """What became of a push: "" if it went well. The case is a fault, over gloo where it says so."""
    layout, rank, (fault, *over) = fault_layout(), group.rank(), case.split(" over ")
    run, sink = make_push(group, fault, folder, over_gloo=bool(over))
    control = Control(group, TIMEOUT_S)
    version = 7 + (fault == "version" and rank == VICTIM)
    try:
        control.agree(version, "the version of the weights")
        run.run(sink, version)
        control.agree(version, "the version that the engines hold")
    except RunError as error:
        return str(error)
    expected = rollout_parameters(layout, 0)
    assert all((tensor == expected[name][: len(tensor)]).all() for name, tensor in sink.parameters.items())
    assert not any(sink.missing.values())
    return ""


def main(faults: list[str], folder: Path, rank: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=NUM_RANKS)
    outcomes = {}
    for fault in faults:
        group = dist.new_group(backend="gloo")
        start = time.time()
        message = push(group, fault, folder)  # type: ignore[arg-type]
        outcomes[fault] = {"message": message, "seconds": time.time() - start, "end": time.time()}
    (folder / f"outcome_{rank}.json").write_text(json.dumps(outcomes))
    os._exit(0)
