"""Weights through a file: every bit arrives, or an error says that it did not."""

import errno
import os
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from megatron_riskpo.resharding.bucket_file import CorruptBucketError, read_bucket, write_bucket

BUCKET = [
    ("odd", torch.randn(3, 5, generator=torch.Generator().manual_seed(0))),
    ("bfloat16", torch.tensor([1.5, float("nan"), -0.0], dtype=torch.bfloat16)),
    ("transposed", torch.arange(12.0, dtype=torch.float64).view(3, 4).t()),
    ("scalar", torch.tensor(2.0)),
    ("empty", torch.empty(0, 4)),
    ("bytes", torch.arange(7, dtype=torch.uint8)),
]


@pytest.fixture(params=[True, False], ids=["in memory", "on a disk"])
def folder(request: pytest.FixtureRequest) -> Iterator[Path]:
    """One that is mapped, and one that is read."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if request.param else None) as name:
        if not request.param and os.stat(name).st_dev == os.stat("/dev/shm").st_dev:
            pytest.skip("temporary files are in memory here")
        yield Path(name)


def test_every_bit_arrives_and_the_file_may_be_deleted(folder):
    record = write_bucket(folder / "bucket", BUCKET)
    found = read_bucket(record)
    (folder / "bucket").unlink()
    for (name, tensor), (found_name, found_tensor) in zip(BUCKET, found, strict=True):
        assert (found_name, found_tensor.dtype, found_tensor.shape) == (name, tensor.dtype, tensor.shape)
        assert torch.equal(*(t.contiguous().view(-1).view(torch.uint8) for t in (found_tensor, tensor)))
        assert found_tensor.data_ptr() % found_tensor.element_size() == 0


def test_a_file_is_whole_before_it_is_called_written(folder, monkeypatch):
    synced = []
    monkeypatch.setattr(os, "fsync", lambda file: synced.append(os.fstat(file).st_size))
    record = write_bucket(folder / "bucket", BUCKET)
    assert synced == [record["size"]]


def test_empty_tensors_arrive(folder):
    ((name, tensor),) = read_bucket(write_bucket(folder / "bucket", [("empty", torch.empty(0, 4))]))
    assert (name, tensor.shape, tensor.dtype) == ("empty", (0, 4), torch.float32)


@pytest.mark.parametrize("position", [0, 57, -1])
def test_a_changed_byte_is_found(folder, position):
    record = write_bucket(folder / "bucket", BUCKET)
    content = bytearray((folder / "bucket").read_bytes())
    content[position] ^= 4
    (folder / "bucket").write_bytes(content)
    with pytest.raises(CorruptBucketError, match=r"bucket .*/bucket \(6 tensors from 'odd'\) has checksum .* was sent"):
        read_bucket(record)


def test_a_truncated_file_is_found(folder):
    record = write_bucket(folder / "bucket", BUCKET)
    (folder / "bucket").write_bytes((folder / "bucket").read_bytes()[:-1])
    with pytest.raises(CorruptBucketError, match=rf"has {record['size'] - 1} bytes, {record['size']} were sent"):
        read_bucket(record)


def test_a_full_file_system_is_an_error(tmp_path):
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", tmp_path], capture_output=True)
    if mounted.returncode:
        pytest.skip("may not mount a file system")
    try:
        with pytest.raises(OSError, match="space") as error:
            write_bucket(Path(tmp_path) / "bucket", [("large", torch.zeros(2**20))])
        assert error.value.errno == errno.ENOSPC
    finally:
        subprocess.run(["umount", "--lazy", tmp_path], check=True)
