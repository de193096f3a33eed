"""Parameters that another process reads where they lie, and what it says where it cannot. Not tested here: a GPU."""

import json
import os
import resource
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist

from megatron_riskpo.errors import RunError
from megatron_riskpo.resharding.control import Control
from megatron_riskpo.resharding.peer_parameters import SharedParameters, open_parameters, share_among, share_with_all
from megatron_riskpo.resharding.transports import shared_memory
from tests.vllm_engines import single_rank

CPU = torch.device("cpu")
READER = """
import json, sys, torch
from megatron_riskpo.resharding.peer_parameters import open_parameters
for line in sys.stdin:
    found = open_parameters(json.loads(line), torch.device("cpu"))
    print(json.dumps({name: [str(tensor.dtype), tensor.tolist()] for name, tensor in found.items()}), flush=True)
"""


def parameters() -> dict[str, torch.Tensor]:
    """Two views of one buffer, as Megatron's are, and one on its own, of another type."""
    buffer = torch.arange(12, dtype=torch.float32)
    return {
        "weight": buffer[2:8].view(3, 2).t(),
        "bias": buffer[9:12],
        "scale": torch.nn.Parameter(torch.tensor([1.5, -2.0], dtype=torch.bfloat16)),
    }


def test_another_process_sees_them_as_they_are_now():
    own = parameters()
    shared = SharedParameters(own)
    with subprocess.Popen([sys.executable, "-c", READER], stdin=-1, stdout=-1, text=True) as reader:
        assert reader.stdin is not None
        assert reader.stdout is not None
        for change in (0, 100):
            own["weight"] += change
            own["bias"] += change
            reader.stdin.write(json.dumps(shared.record) + "\n")
            reader.stdin.flush()
            found = json.loads(reader.stdout.readline())
            assert found == {name: [str(t.dtype), t.tolist()] for name, t in own.items()}
        assert found["weight"][1][0][0] == 102
        reader.stdin.close()
        assert reader.wait(timeout=60) == 0


def test_a_parameter_that_was_moved_is_noticed():
    own = {name: torch.nn.Parameter(tensor.detach()) for name, tensor in parameters().items()}
    with single_rank():
        shared, control = SharedParameters(own), Control(dist.group.WORLD, 30)  # type: ignore[arg-type]
        shared.agree(control, version=3)
        own["bias"].data = own["bias"].data.clone()
        with pytest.raises(RunError, match=r"ranks \[0\] have moved parameters"):
            shared.agree(control, version=4)


def test_what_is_out_of_reach_is_refused():
    shared = SharedParameters(parameters())
    record = shared.record

    def with_handle(**changes: object) -> dict[str, object]:
        return record | {"storages": [handle | changes for handle in record["storages"]]}

    with pytest.raises(RunError, match="are on another machine"):
        open_parameters(with_handle(machine="another"), CPU)
    with pytest.raises(RunError, match="cannot be opened as shared memory: No such file"):
        open_parameters(with_handle(descriptor=10**6), CPU)
    with pytest.raises(RunError, match="is it in another container"):
        open_parameters(with_handle(file=[1, 2]), CPU)
    with pytest.raises(RunError, match="all on GPUs, or all on CPUs"):
        open_parameters(record | {"on_gpu": True}, CPU)


def test_they_cannot_be_written_through():
    shared = SharedParameters(parameters())
    record = shared.record
    code = READER.replace("print(", "found['bias'].fill_(0); print(")
    ended = subprocess.run([sys.executable, "-c", code], input=json.dumps(record), capture_output=True, text=True)
    assert ended.returncode < 0  # SIGSEGV, of the reader


def test_others_of_the_same_user_may_open_it():
    shared = SharedParameters(parameters())
    handle = shared.record["storages"][0]
    assert shared_memory.is_open_to_others(handle)
    assert not shared_memory.is_open_to_others(handle | {"descriptor": 10**6})


OBSTACLES = {
    "missing": ("_MEMORY", "/none", "0 MiB of shared memory, 0 MiB are free in /dev/shm"),
    "full": ("room", lambda: 51, "of shared memory, 0 MiB are free in /dev/shm"),
    "files": ("open_files_left", lambda: 65, "the weights take 2 open files, and 1 are left"),
}


@pytest.mark.parametrize("reason", ["", *OBSTACLES])
def test_without_room_none_are_shared(monkeypatch: pytest.MonkeyPatch, reason: str) -> None:
    own = parameters()
    if reason:
        name, value, message = OBSTACLES[reason]
        monkeypatch.setattr(shared_memory, name, value)
    with single_rank():
        found = share_among(own, dist.group.WORLD)  # type: ignore[arg-type]
        if reason:
            with pytest.raises(RunError, match=message):
                share_with_all(own, dist.group.WORLD)  # type: ignore[arg-type]
    assert (found is None) == bool(reason)
    assert own["scale"].untyped_storage().is_shared() != bool(reason)


def test_sharing_that_fails_in_the_middle_is_said_by_all(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    own = {str(number): torch.ones(3) for number in range(8)}
    with single_rank():
        monkeypatch.setattr(shared_memory, "open_files_left", lambda: 100)  # so it was, when it was asked
        lowest_free = os.dup(0)
        os.close(lowest_free)
        resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free, limits[1]))
        try:
            with pytest.raises(
                RunError, match=r"rank 0: weights cannot be moved into shared memory: .*[Tt]oo many open"
            ):
                share_with_all(own, dist.group.WORLD)  # type: ignore[arg-type]
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
