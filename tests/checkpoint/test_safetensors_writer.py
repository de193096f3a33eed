"""Files that are written as the tensors come: safetensors' own reader finds every bit, shards are bounded."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from megatron_riskpo.checkpoint import safetensors_writer
from megatron_riskpo.checkpoint.safetensors_writer import ShardWriter, name_shards


def read_back(folder):
    files = sorted(folder.glob("*.safetensors"))
    return files, {name: tensor for file in files for name, tensor in load_file(file).items()}


def assert_same_bits(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(found[name].reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_one_file_holds_every_bit(tmp_path, dtype):
    tensors = {
        "a.weight": torch.randn(7, 5).to(dtype).T,
        "nan": torch.tensor([float("nan"), float("inf"), -0.0]).to(dtype),
        "scalar": torch.tensor(2.5).to(dtype),
        "name with \N{GREEK SMALL LETTER PSI}": torch.randn(3, 2, 4).to(dtype)[:, 1],
    }
    writer = ShardWriter(tmp_path)
    for name, tensor in tensors.items():
        writer.add(name, tensor)
    name_shards(writer.finish())
    files, found = read_back(tmp_path)
    assert [file.name for file in files] == ["model.safetensors"]
    assert_same_bits(found, {name: tensor.contiguous() for name, tensor in tensors.items()})
    with safe_open(files[0], framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


@pytest.mark.parametrize(("limit", "value"), [("MAX_SHARD_BYTES", 1000), ("HEADER_BYTES", 1024)])
def test_full_file_or_full_table_begins_the_next(tmp_path, monkeypatch, limit, value):
    monkeypatch.setattr(safetensors_writer, limit, value)
    tensors = {f"layers.{i}.some.long.enough.name": torch.randn(10, 10) for i in range(20)}
    writer = ShardWriter(tmp_path)
    for name, tensor in tensors.items():
        writer.add(name, tensor)
    name_shards(writer.finish())
    files, found = read_back(tmp_path)
    assert_same_bits(found, tensors)
    assert len(files) > 3
    assert files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 20 * 400
    assert index["weight_map"].keys() == tensors.keys()
    for name, file in index["weight_map"].items():
        assert name in load_file(tmp_path / file)
