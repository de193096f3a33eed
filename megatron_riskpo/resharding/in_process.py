"""From the actor into vLLM engines in the same processes, by plan: each rank gets its own shard and no more."""

import zlib
from collections.abc import Callable
from datetime import timedelta

import torch.distributed as dist

from megatron_riskpo.actor.actor import Actor
from megatron_riskpo.actor.model import named_parameters
from megatron_riskpo.config import BridgeConfig
from megatron_riskpo.resharding.control import Control
from megatron_riskpo.resharding.golden import GoldenCopy
from megatron_riskpo.resharding.layout_check import Placement
from megatron_riskpo.resharding.node import agreed_node_size
from megatron_riskpo.resharding.peer_parameters import VERSION_PHASE, share_among
from megatron_riskpo.resharding.placements import checked_placements, expected_numbers
from megatron_riskpo.resharding.plan import plan_rank
from megatron_riskpo.resharding.pull import WeightPull
from megatron_riskpo.resharding.push import PushReport, WeightPush
from megatron_riskpo.resharding.schedule import BridgeLayout
from megatron_riskpo.resharding.transports.gloo import GlooTransport
from megatron_riskpo.resharding.transports.nccl import NcclTransport
from megatron_riskpo.rollout.vllm_engine import VllmEngine


class InProcessPush:
    """Made once a run; every method is collective."""

    def __init__(self, actor: Actor, engine: VllmEngine, config: BridgeConfig) -> None:
        """Plans, and makes a process group of its own for what the ranks say to each other about a push."""
        self._actor, self._engine = actor, engine
        grid = actor.grid
        parameters = dict(named_parameters(actor.chunks))
        self.layout = _layout(actor, engine, config)
        group = dist.new_group(backend="gloo", timeout=timedelta(seconds=config.timeout_s))
        self._control = Control(group, config.timeout_s)  # type: ignore[arg-type]
        self._control.agree(_fingerprint(self.layout), "the bridge's layout")
        plan = plan_rank(self.layout, grid.rank)
        with_checksums = config.verify == "checksum"
        on_gpu = grid.device.type == "cuda"
        self._peers = None if on_gpu else share_among(parameters, group)  # type: ignore[arg-type]
        if self._peers is not None:
            self.push = WeightPull(plan, self._peers.of_rank, with_checksums=with_checksums)
        else:
            transport = NcclTransport(grid.world) if on_gpu else GlooTransport(group)  # type: ignore[arg-type]
            self.push = WeightPush(
                plan, parameters, transport, timeout_s=config.timeout_s, with_checksums=with_checksums
            )
        self._tp_rank = grid.rank % engine.tp
        self.sink = engine.shard_sink(expected_numbers(self.layout, self._tp_rank))
        self._traced: dict[str, list[Placement]] = {}
        self.report: PushReport | None = None
        """Of the last push."""

    @property
    def in_shared_memory(self) -> bool:
        """Whether ranks read each other's parameters where they lie."""
        return self._peers is not None

    def run(self, version: int, check: Callable[[], None] = lambda: None) -> None:
        """Bring the engine to the actor's weights, and `check` what has arrived. RunError leaves it unusable."""
        if self._peers is None:
            self._control.agree(version, VERSION_PHASE)
        else:
            self._peers.own.agree(self._control, version)

        def confirm(found: int) -> None:
            self._control.agree(found, "the version that the engines hold")
            check()

        self._engine.update_shards(self.sink, lambda: self._move(version), version, confirm)

    def run_golden(self, version: int) -> int:
        """`run`, then every number compared with tensors gathered whole by another way; how many numbers. RunError, on
        every rank, where one differs."""
        golden = GoldenCopy()

        def check() -> None:
            phase = f"the comparison of version {version}"
            weights = self._control.guarded(self._actor.export_weights(), phase)
            golden.compare(weights, self._traced, self.sink.model)
            golden.refuse(version, self._control.gather(len(golden.differences), phase))

        self.sink.keep = golden.keep
        try:
            self.run(version, check)
        finally:
            self.sink.keep = None
        return golden.num_compared

    def give_up(self, version: int) -> None:
        """What this push brought has turned out to be wrong."""
        self._engine.refuse_weights(version)

    def _move(self, version: int) -> None:
        if not self._traced:
            self._traced = checked_placements(self.sink.model, self.layout, self._tp_rank)
        self.report = self.push.run(self.sink, version)


def _layout(actor: Actor, engine: VllmEngine, config: BridgeConfig) -> BridgeLayout:
    num_ranks = actor.grid.world.size()
    dtype = next(iter(named_parameters(actor.chunks)))[1].dtype
    return BridgeLayout.colocated(
        actor.hf_config, actor.config, num_ranks, engine.tp, dtype.itemsize, config.bucket_mib,
        agreed_node_size(actor.grid.world), expert_parallel=engine.expert_parallel,
    )  # fmt: skip


def _fingerprint(layout: BridgeLayout) -> int:
    numbers = (layout.actor, layout.rollout, layout.model.shape, layout.item_size, layout.bucket_bytes)
    return zlib.crc32(repr((*numbers, layout.node_size)).encode())
