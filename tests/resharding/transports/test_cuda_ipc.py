"""What torch is asked when a GPU's memory is shared and opened. Torch's part is played: there is no GPU here."""

import json
from typing import Any, cast

import pytest
import torch

from megatron_riskpo.errors import RunError
from megatron_riskpo.resharding.transports import cuda_ipc

SHARED = (3, b"\x00memory\xff", 4096, 512, b"counter", 7, b"event", True)
"""As UntypedStorage._share_cuda_ returns it: device, memory, size, offset, counter, its offset, event, is it needed."""


class PlayedStorage:
    """Takes the place of UntypedStorage."""

    def _share_cuda_(self) -> tuple[Any, ...]:
        return SHARED


def test_the_same_arguments_arrive_in_another_process(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Any, ...]] = []

    def new(*arguments: Any) -> torch.UntypedStorage:
        asked.append(arguments)
        raise RuntimeError("invalid device context")

    handle = json.loads(json.dumps(cuda_ipc.share(cast(torch.UntypedStorage, PlayedStorage()))))
    monkeypatch.setattr(torch.cuda, "_lazy_init", lambda: None)
    monkeypatch.setattr(torch.UntypedStorage, "_new_shared_cuda", new, raising=False)
    with pytest.raises(RunError, match="cannot be opened on cuda:1 by CUDA IPC: invalid device context"):
        cuda_ipc.open_shared(handle, torch.device("cuda", 1))
    assert asked == [(1, *SHARED[1:])]  # this process's number of the GPU, not the owner's
    with pytest.raises(RunError, match="on another machine"):
        cuda_ipc.open_shared(handle | {"machine": "another"}, torch.device("cuda", 1))
