"""Buckets in shared memory: what one process writes another reads, bit for bit, and nothing damaged is handed out."""

import multiprocessing
import os

import pytest
import torch

from megatron_riskpo.errors import RunError
from megatron_riskpo.resharding.transports.shared_memory import SharedBucket, read_bucket

TENSORS = [
    ("model.norm.weight", torch.arange(7, dtype=torch.float32)),
    ("a", torch.randn(3, 5, generator=torch.Generator().manual_seed(0)).bfloat16().t()),  # not contiguous
    ("scalar", torch.tensor(4.5, dtype=torch.float64)),
    ("empty", torch.empty(0, 4)),
]


def _sums(path, queue):
    content = read_bucket(path)
    queue.put(
        (content.version, content.bucket, [(name, tensor.double().sum().item()) for name, tensor in content.tensors])
    )


@pytest.fixture
def bucket(tmp_path):
    shared = SharedBucket(4096, directory=tmp_path)
    yield shared
    shared.close()
    assert not shared.path.exists()


def test_another_process_reads_what_was_written(bucket):
    bucket.fill(TENSORS, version=3, bucket=1)
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    reader = context.Process(target=_sums, args=(bucket.path, queue))
    reader.start()
    assert queue.get(timeout=60) == (3, 1, [(name, tensor.double().sum().item()) for name, tensor in TENSORS])
    reader.join()


def test_a_bucket_is_filled_again(bucket):
    for version in range(3):
        tensors = [(name, tensor + version) for name, tensor in TENSORS]
        bucket.fill(tensors, version, 0)
        content = read_bucket(bucket.path)
        assert content.version == version
        for (name, found), (expected_name, expected) in zip(content.tensors, tensors, strict=True):
            assert name == expected_name
            assert found.dtype == expected.dtype
            assert torch.equal(found, expected)


@pytest.mark.parametrize("place", ["header", "table", "payload"])
def test_a_changed_byte_is_found(bucket, place):
    bucket.fill(TENSORS[:1], 5, 2)
    start = {"header": 0, "table": 50, "payload": bucket.path.read_bytes().index(TENSORS[0][1].numpy().tobytes()) + 5}
    with bucket.path.open("r+b") as file:
        file.seek(start[place])
        byte = file.read(1)
        file.seek(start[place])
        file.write(bytes([byte[0] ^ 1]))
    message = r"bucket 2 of weight version 5 is corrupted.*'model.norm.weight'" if place == "payload" else "damaged"
    with pytest.raises(RunError, match=message):
        read_bucket(bucket.path)


def test_what_does_not_fit_is_refused_and_leaves_no_bucket(bucket):
    bucket.fill(TENSORS, 0, 0)
    with pytest.raises(RunError, match=r"bucket 7 of weight version 1: 1 tensors .* do not fit"):
        bucket.fill([("large", torch.zeros(2**20))], 1, 7)
    with pytest.raises(RunError, match="damaged or not whole"):
        read_bucket(bucket.path)


def test_too_little_shared_memory_is_said(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(RunError, match=r"no room for a bucket of \d+ MiB .*No space left.*bucket_mib"):
        SharedBucket(2**20, directory=tmp_path)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(RunError, match="cannot be read"):
        read_bucket(tmp_path / "missing")
