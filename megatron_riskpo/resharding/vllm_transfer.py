"""vLLM's official weight transfer (init, start, update, finish) by ways that its own engines have not: files that
trainer and server map; or each worker gets its shard by plan, in a process group with the ranks, or reading it where
they have it. The trainer says which.

Imported in vLLM's worker processes, as `worker_extension_cls`; that registers the engine before vLLM makes one.
"""

from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol, cast

from torch import nn
from vllm.distributed.weight_transfer.base import WeightTransferEngine, WeightTransferInitInfo, WeightTransferUpdateInfo
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

from megatron_riskpo.errors import RunError
from megatron_riskpo.resharding.bucket_file import read_bucket
from megatron_riskpo.resharding.memory_receiver import MemoryReceiver
from megatron_riskpo.resharding.network_receiver import ShardReceiver
from megatron_riskpo.resharding.placements import checked_placements, expected_numbers
from megatron_riskpo.resharding.shard_sink import VllmShardSink
from megatron_riskpo.resharding.vllm_sink import begin_update, finish_update

BACKEND = "riskpo"


@dataclass
class InitInfo(WeightTransferInitInfo):
    """How weights will come."""

    transport: str
    """file, network or shared_memory."""
    options: dict[str, Any] = field(default_factory=dict)
    """Of the transport."""


@dataclass
class UpdateInfo(WeightTransferUpdateInfo):
    """A part of an update."""

    content: dict[str, Any]
    """By file: the record of `write_bucket`. Else: the version."""


class Receiver(Protocol):
    """One of the ways."""

    def start(self) -> None: ...

    def receive(self, content: dict[str, Any]) -> None: ...

    def finish(self) -> None: ...

    def close(self) -> None: ...


class FileReceiver:
    """Whole tensors, a bucket a call."""

    def __init__(self, engine: "TransferEngine", num_tensors: int) -> None:
        """`num_tensors`: of a complete update."""
        self._engine = engine
        self._num_expected, self._num_received = num_tensors, 0

    def start(self) -> None:
        self._num_received = 0
        begin_update(self._engine.model)

    def receive(self, content: dict[str, Any]) -> None:
        """Load one bucket. Raises CorruptBucketError."""
        bucket = read_bucket(content)
        cast(Any, self._engine.model).load_weights(iter(bucket))
        self._num_received += len(bucket)

    def finish(self) -> None:
        """Raises ValueError where some tensors did not come (vLLM would keep the old ones)."""
        if self._num_received != self._num_expected:
            raise ValueError(f"{self._num_received} of {self._num_expected} tensors have come")
        finish_update(self._engine.model, self._engine.model_config)

    def close(self) -> None:
        """Nothing is held between buckets."""


class ShardsReceiver:
    """This worker's shard, in one call. An update that broke off because of others may be started again."""

    def __init__(self, engine: "TransferEngine", kind: type[ShardReceiver | MemoryReceiver], **options: Any) -> None:
        from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size

        dtype = str(engine.model_config.dtype).removeprefix("torch.")
        if options["dtype"] != dtype:
            raise RunError(f"this server has model.dtype = {dtype}, the run {options['dtype']}; set both alike")
        whole, runs = engine.vllm_config.parallel_config.enable_expert_parallel, options["layout"]["expert_parallel"]
        if whole != runs:
            raise RunError(
                f"this server has rollout.expert_parallel = {str(whole).lower()}, the run that pushes weights "
                f"{str(runs).lower()}; set both alike"
            )
        rank, size = get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size()
        self._receiver = kind(options, rank, size, engine.device)
        self._sink = VllmShardSink(_Reload(engine), expected_numbers(self._receiver.layout, rank))
        self._engine, self._version = engine, -1

    def start(self) -> None:
        """`receive` does all of it, so that a group may be made anew between the two."""

    def receive(self, content: dict[str, Any]) -> None:
        """Raises RunError."""
        self._version = content["version"]
        report = self._receiver.receive(self._sink, self._version, self._prepare)
        if isinstance(self._receiver, ShardReceiver):
            self._receiver.tell(report, self._sink.pack_seconds, self._version)

    def _prepare(self) -> None:
        self._sink.begin()
        self._check_layout()

    def _check_layout(self) -> None:
        """Once: whether vLLM stores the model as the plan says. RunError where not."""
        if self._engine.is_layout_checked:
            return
        checked_placements(self._engine.model, self._receiver.layout, self._receiver.tp_rank)
        self._engine.is_layout_checked = True

    def finish(self) -> None:
        """Raises RunError where some numbers did not come."""
        self._sink.finish(self._version)

    def close(self) -> None:
        self._receiver.close()


class _Reload:
    """vLLM's model, as VllmShardSink asks a worker for it."""

    def __init__(self, engine: "TransferEngine") -> None:
        self._engine = engine
        self.vllm_config, self.model_runner = engine.vllm_config, self

    def get_model(self) -> nn.Module:
        return self._engine.model

    def riskpo_begin_update(self) -> None:
        begin_update(self._engine.model)

    def riskpo_finish_update(self, version: int) -> None:
        finish_update(self._engine.model, self._engine.model_config)


_RECEIVERS: dict[str, Any] = {
    "file": FileReceiver,
    "network": partial(ShardsReceiver, kind=ShardReceiver),
    "shared_memory": partial(ShardsReceiver, kind=MemoryReceiver),
}


class TransferEngine(WeightTransferEngine[InitInfo, UpdateInfo]):
    """The receiver. A failure anywhere between start and finish leaves the model half-updated: unless the update is
    started again and becomes complete, the server must go."""

    init_info_cls = InitInfo
    update_info_cls = UpdateInfo
    is_layout_checked = False
    _receiver: Receiver | None = None

    def init_transfer_engine(self, init_info: InitInfo) -> None:
        """Choose the way, in place of the one before."""
        self.shutdown()
        self._receiver = _RECEIVERS[init_info.transport](self, **init_info.options)

    def _chosen(self) -> Receiver:
        if self._receiver is None:
            raise ValueError("weights came before it was said how they come (init_weight_transfer_engine)")
        return self._receiver

    def start_weight_update(self) -> None:
        """Prepare the model for new weights."""
        self._chosen().start()

    def receive_weights(self, update_info: UpdateInfo) -> None:
        """Load a part."""
        self._chosen().receive(update_info.content)

    def finish_weight_update(self) -> None:
        """Put the weights in use; an error where some did not come."""
        self._chosen().finish()

    def shutdown(self) -> None:
        """Leave the group of the trainer, if there is one."""
        if self._receiver is not None:
            self._receiver.close()
        self._receiver = None


class ServerWorkerExtension:
    """Mixed into the server's workers; it is there so that this module is imported in them."""


if BACKEND not in WeightTransferEngineFactory._registry:
    WeightTransferEngineFactory.register_engine(BACKEND, TransferEngine)
