"""Weights through a file: every bit arrives, or an error says that it did not."""

import errno
import subprocess
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


def test_every_bit_arrives_and_the_file_may_be_deleted(tmp_path):
    record = write_bucket(tmp_path / "bucket", BUCKET)
    found = read_bucket(record)
    (tmp_path / "bucket").unlink()
    for (name, tensor), (found_name, found_tensor) in zip(BUCKET, found, strict=True):
        assert (found_name, found_tensor.dtype, found_tensor.shape) == (name, tensor.dtype, tensor.shape)
        assert torch.equal(*(t.contiguous().view(-1).view(torch.uint8) for t in (found_tensor, tensor)))
        assert found_tensor.data_ptr() % found_tensor.element_size() == 0


@pytest.mark.parametrize("position", [0, 57, -1])
def test_a_changed_byte_is_found(tmp_path, position):
    record = write_bucket(tmp_path / "bucket", BUCKET)
    content = bytearray((tmp_path / "bucket").read_bytes())
    content[position] ^= 4
    (tmp_path / "bucket").write_bytes(content)
    with pytest.raises(CorruptBucketError, match=r"bucket .*/bucket \(6 tensors from 'odd'\) has checksum .* was sent"):
        read_bucket(record)


def test_a_truncated_file_is_found(tmp_path):
    record = write_bucket(tmp_path / "bucket", BUCKET)
    (tmp_path / "bucket").write_bytes((tmp_path / "bucket").read_bytes()[:-1])
    with pytest.raises(CorruptBucketError, match=rf"has {record['size'] - 1} bytes, {record['size']} were sent"):
        read_bucket(record)


def test_a_full_file_system_is_an_error_before_a_byte_is_written(tmp_path):
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", tmp_path], capture_output=True)
    if mounted.returncode:
        pytest.skip("may not mount a file system")
    try:
        with pytest.raises(OSError, match="space") as error:
            write_bucket(Path(tmp_path) / "bucket", [("large", torch.zeros(2**20))])
        assert error.value.errno == errno.ENOSPC
    finally:
        subprocess.run(["umount", "--lazy", tmp_path], check=True)
