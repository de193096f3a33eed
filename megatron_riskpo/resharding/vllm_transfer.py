"""vLLM's official weight transfer (init, start, update, finish) by files that trainer and server map: vLLM's own
engines (nccl, ipc) move CUDA memory only.

Imported in vLLM's worker processes, as `worker_extension_cls`; that registers the engine before vLLM makes one.
"""

from dataclasses import dataclass, field
from typing import Any, cast

from vllm.distributed.weight_transfer.base import WeightTransferEngine, WeightTransferInitInfo, WeightTransferUpdateInfo
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

from megatron_riskpo.resharding.bucket_file import read_bucket
from megatron_riskpo.resharding.vllm_sink import begin_update, finish_update

BACKEND = "riskpo_file"


@dataclass
class InitInfo(WeightTransferInitInfo):
    """What a complete update brings."""

    num_tensors: int


@dataclass
class UpdateInfo(WeightTransferUpdateInfo):
    """One bucket: the record of `write_bucket`."""

    file: str
    size: int
    checksum: int
    tensors: list[dict[str, Any]] = field(default_factory=list)


class FileTransferEngine(WeightTransferEngine[InitInfo, UpdateInfo]):
    """The receiver. A failure anywhere between start and finish leaves the model half-updated: the server must go."""

    init_info_cls = InitInfo
    update_info_cls = UpdateInfo
    _num_expected = 0
    _num_received = 0

    def init_transfer_engine(self, init_info: InitInfo) -> None:
        """How many tensors an update has."""
        self._num_expected = init_info.num_tensors

    def start_weight_update(self) -> None:
        """Prepare the model for new weights."""
        self._num_received = 0
        begin_update(self.model)

    def receive_weights(self, update_info: UpdateInfo) -> None:
        """Load one bucket. Raises CorruptBucketError."""
        bucket = read_bucket(vars(update_info))
        cast(Any, self.model).load_weights(iter(bucket))
        self._num_received += len(bucket)

    def finish_weight_update(self) -> None:
        """Put the weights in use. Raises ValueError where some did not come (vLLM would keep the old ones)."""
        if self._num_received != self._num_expected:
            raise ValueError(f"{self._num_received} of {self._num_expected} tensors have come")
        finish_update(self.model, self.model_config)

    def shutdown(self) -> None:
        """Nothing is held between buckets."""


class ServerWorkerExtension:
    """Mixed into the server's workers; it is there so that this module is imported in them."""


if BACKEND not in WeightTransferEngineFactory._registry:
    WeightTransferEngineFactory.register_engine(BACKEND, FileTransferEngine)
