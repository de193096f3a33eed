"""Which transport CPU ranks take, in one rank; what goes through it: test_faults, test_in_process."""

import errno
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megatron_riskpo.resharding.transports import shared_memory
from megatron_riskpo.resharding.transports.gloo import GlooTransport
from megatron_riskpo.resharding.transports.shared_memory import SharedMemoryTransport, cpu_transport
from tests.vllm_engines import single_rank


def no_room(descriptor: int, offset: int, size: int) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_buckets_are_shared_and_leave_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_memory, "_MEMORY", tmp_path)
    with single_rank():
        transport = cpu_transport(dist.group.WORLD, [12, 0])  # type: ignore[arg-type]
        assert isinstance(transport, SharedMemoryTransport)
        first, second = transport.buckets([3, 0], torch.empty(0))
        assert (first.dtype, first.shape, second.shape) == (torch.float32, (3,), (0,))
        place = transport.place(first[1:])
        assert place is not None
        assert place.tolist() == [0, 4]
        assert transport.place(torch.empty(3)) is None
        first.fill_(7)
        assert torch.equal(transport.buckets([3, 0], torch.empty(0))[0], torch.full((3,), 7.0))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("reason", ["missing", "full"])
def test_without_shared_memory_it_is_gloo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reason: str) -> None:
    monkeypatch.setattr(shared_memory, "_MEMORY", tmp_path / "none" if reason == "missing" else tmp_path)
    if reason == "full":
        monkeypatch.setattr(shared_memory.os, "posix_fallocate", no_room)
    with single_rank():
        assert isinstance(cpu_transport(dist.group.WORLD, [12, 8]), GlooTransport)  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())
