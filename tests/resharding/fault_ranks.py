"""One of three ranks of a push in which something goes wrong; says how it ended in outcome_RANK.json.

No Megatron, no vLLM: parameters are made up, the sink is plain memory; process group, plan, buckets, transport and
agreement are the real ones.
"""

import json
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch.distributed as dist
from torch import Tensor

from megatron_riskpo.errors import RunError
from megatron_riskpo.resharding.control import Control
from megatron_riskpo.resharding.layouts import ActorLayout, RolloutLayout
from megatron_riskpo.resharding.memory_sink import MemorySink
from megatron_riskpo.resharding.pieces import Model
from megatron_riskpo.resharding.plan import plan_rank
from megatron_riskpo.resharding.push import WeightPush
from megatron_riskpo.resharding.rounds import bucket_sizes, make_rounds
from megatron_riskpo.resharding.schedule import BridgeLayout
from megatron_riskpo.resharding.transports.base import Parcel, PendingRound, Transport
from megatron_riskpo.resharding.transports.gloo import GlooTransport
from megatron_riskpo.resharding.transports.shared_memory import SharedMemoryTransport, cpu_transport
from tests.resharding.whole_model import actor_parameters, rollout_parameters

NUM_RANKS = 3
TIMEOUT_S = 3.0
VICTIM = 1
FAULT_AT = 4
"""The round, in order of work, in which it happens."""
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

    def buckets(self, sizes: Sequence[int], like: Tensor) -> list[Tensor]:
        return self.inner.buckets(sizes, like)

    def start(self, sends: Sequence[Parcel], receives: Sequence[Parcel]) -> PendingRound:
        self.count += 1
        now = self.count >= FAULT_AT and self.rank == VICTIM and bool(receives) and not self.is_done
        self.is_done |= now
        if now and self.fault in ("SIGKILL", "SIGSTOP"):
            end_here(self.folder, self.fault)
        pending = self.inner.start(sends, receives)
        return _Faulty(pending, self.fault, self.folder) if now else pending


class _Faulty:
    """Changes a number of a message after it has come, as a broken link would; or the process ends then, while peers
    read what it has sent."""

    def __init__(self, pending: PendingRound, fault: str, folder: Path) -> None:
        self.release, self.drain = pending.release, pending.drain
        self.pending, self.fault, self.folder = pending, fault, folder

    def receive(self, deadline: float) -> Sequence[Tensor]:
        contents = self.pending.receive(deadline)
        if self.fault == "corruption":
            contents[0][3] += 1
        elif self.fault == "late":
            end_here(self.folder, "SIGKILL")
        return contents


def end_here(folder: Path, name: str) -> None:
    (folder / "fault_time").write_text(str(time.time()))
    os.kill(os.getpid(), getattr(signal, name))


def push(group: dist.ProcessGroup, case: str, folder: Path) -> str:
    """What became of a push: "" if it went well. The case is a fault, over gloo where it says so."""
    layout, rank, (fault, *over) = fault_layout(), group.rank(), case.split(" over ")
    plan = plan_rank(layout, rank)
    shared = cpu_transport(group, [8 * size for size in bucket_sizes(make_rounds(plan))])
    assert isinstance(shared, SharedMemoryTransport)
    inner = GlooTransport(group) if over else shared
    parameters, control = actor_parameters(layout, rank), Control(group, TIMEOUT_S)
    sink = MemorySink(layout, 0, next(iter(parameters.values())))
    run = WeightPush(
        plan, parameters, FaultyTransport(inner, rank, fault, folder), timeout_s=TIMEOUT_S,
        with_checksums=fault == "corruption",
    )  # fmt: skip
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
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=NUM_RANKS)
    outcomes = {}
    for fault in faults:
        group = dist.new_group(backend="gloo")
        start = time.time()
        message = push(group, fault, folder)  # type: ignore[arg-type]
        outcomes[fault] = {"message": message, "seconds": time.time() - start, "end": time.time()}
    (folder / f"outcome_{rank}.json").write_text(json.dumps(outcomes))
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1].split(","), Path(sys.argv[2]), int(sys.argv[3]))
