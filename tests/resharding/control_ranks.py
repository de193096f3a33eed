"""One of three ranks that agree with each other, first on the size of their nodes, which are not told the same, then
while one is lost; says how that ended in outcome_RANK.json.

As under riskpo and srun the store is in rank 0's process, and stops with it.
"""

import json
import os
import signal
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_riskpo.errors import RunError
from megatron_riskpo.resharding.control import Control
from megatron_riskpo.resharding.node import agreed_node_size

NUM_RANKS, TIMEOUT_S = 3, 1.0


def main(victim: int, how: str, phase: str, folder: Path, rank: int) -> None:
    """`how`: the signal that the victim gets. `phase`: gather, or export: within a collective of another group."""
    init_with_store_of_rank_0(folder, rank, NUM_RANKS)
    os.environ["LOCAL_WORLD_SIZE"] = str(7 + rank)
    assert agreed_node_size(dist.group.WORLD) == 7  # type: ignore[arg-type]
    control = Control.of_all(TIMEOUT_S)
    others = dist.new_group(backend="gloo", timeout=timedelta(seconds=TIMEOUT_S))
    assert control.gather(rank, "before") == list(range(NUM_RANKS))

    def items() -> Iterator[int]:
        for item in range(2):
            dist.all_reduce(torch.ones(1), group=others)
            yield item

    if rank == victim:
        os.kill(os.getpid(), getattr(signal, how))
    start, message = time.monotonic(), ""
    try:
        if phase == "gather":
            control.gather(rank, phase)
        else:
            list(control.guarded(items(), phase))
    except RunError as error:
        message = str(error)
    (folder / f"outcome_{rank}.json").write_text(json.dumps([message, time.monotonic() - start]))
    os._exit(0)


def init_with_store_of_rank_0(folder: Path, rank: int, num_ranks: int) -> None:
    port = folder / "port"
    if rank == 0:
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        (folder / "port.part").write_text(str(store.port))
        (folder / "port.part").replace(port)
    else:
        while not port.exists():
            time.sleep(0.01)
        store = dist.TCPStore("127.0.0.1", int(port.read_text()), is_master=False, wait_for_workers=False)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=num_ranks)
