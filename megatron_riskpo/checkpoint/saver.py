"""When a run's checkpoints are written: at once, or by a thread of their own while the next steps go on."""

from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_riskpo.actor.actor import Actor
from megatron_riskpo.checkpoint.background import FAILED, RUNNING, BackgroundWrite
from megatron_riskpo.checkpoint.retention import Retention
from megatron_riskpo.checkpoint.snapshot import take_snapshot
from megatron_riskpo.checkpoint.training_state import save_checkpoint
from megatron_riskpo.checkpoint.writing import write_checkpoint
from megatron_riskpo.distributed.grid import RankGrid
from megatron_riskpo.errors import RunError


class CheckpointSaver:
    """Saves into `folder`. All methods but `close` are collective: every rank calls them at the same points.

    config: the resolved configuration, which goes into the checkpoints. asynchronous: `save` copies the state to host
    memory and returns; a thread on every rank writes it, and talks to the others over a process group of its own.
    timeout_s: a write that takes longer than this, in seconds, has failed.
    """

    def __init__(
        self, folder: Path, retention: Retention, config: dict[str, Any], grid: RankGrid, *, asynchronous: bool,
        timeout_s: float,
    ) -> None:  # fmt: skip
        self._folder, self._retention, self._config = folder, retention, config
        self._grid, self._timeout_s = grid, timeout_s
        # Two threads must not share a group: each would take the other's messages for its own.
        self._group: Any = (
            dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s)) if asynchronous else None
        )
        self._write: BackgroundWrite | None = None

    def save(
        self, step: int, actor: Actor, state: dict[str, Any], metrics: Mapping[str, float],
        rollouts: Mapping[str, Any] | None = None,
    ) -> None:  # fmt: skip
        """Save, or begin to, once the save before has ended. Raises RunError where either failed (see
        save_checkpoint for the arguments)."""
        self.wait()
        if self._group is None:
            save_checkpoint(self._folder, step, actor, state, self._config, self._retention, metrics, rollouts)
            return
        with actor.optimizer_state():
            snapshot = take_snapshot(step, actor, state, self._config, metrics, rollouts or {}, detached=True)
        folder, retention, group = self._folder, self._retention, self._group
        self._write = BackgroundWrite(
            lambda: write_checkpoint(folder, snapshot, retention, group),
            f"checkpoint step_{step} in {folder}",
            self._timeout_s,
        )

    def check(self) -> None:
        """Raise RunError, on every rank alike, if a write in the background has failed on one or takes too long."""
        if self._write is None:
            return
        status, complaint = self._write.status()
        flag = torch.tensor([status], dtype=torch.int32, device=self._grid.device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=self._grid.world)
        if flag.item() == RUNNING:
            return
        write, self._write = self._write, None
        if flag.item() == FAILED:
            write.leave_behind()
            complaints: list[str] = [""] * self._grid.world.size()
            dist.all_gather_object(complaints, complaint, group=self._grid.world)
            raise RunError(next(complaint for complaint in complaints if complaint))

    def wait(self) -> None:
        """Until nothing is being written any more; raises as `check` does."""
        while self._write is not None:
            self._write.join()
            self.check()

    def close(self) -> None:
        """Let a write end that another error has overtaken: it needs this process, not the training loop."""
        if self._write is not None:
            self._write.join()
            self._write.leave_behind()
