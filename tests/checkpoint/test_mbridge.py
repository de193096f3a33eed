"""mbridge, a converter by others, as the second way: its names and fused tensors are what `riskpo convert` stores, its
parts of a tensor-parallel split are what the actor loads.

Of mbridge the tables and the functions on tensors are used. Its loading and export are not: they build models with
TransformerEngine's modules, from transformers 4's configuration (`rope_theta`). It knows no mistral.
"""

import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from megatron_riskpo.checkpoint.convert import write_megatron
from megatron_riskpo.checkpoint.from_hf import megatron_slices
from megatron_riskpo.checkpoint.hf_folder import HfReader
from megatron_riskpo.checkpoint.rows import RowReader, Rows
from megatron_riskpo.checkpoint.team import Team
from megatron_riskpo.checkpoint.torch_dist import TorchDistReader
from megatron_riskpo.checkpoint.weight_map import family_of, head_dim_of, shape_of
from tests.tiny_models import make_tiny

pytest.importorskip("mbridge", reason="requirements/dev.txt installs it")
from mbridge.core.bridge import _MODEL_REGISTRY

FAMILIES = ("qwen2", "qwen3", "qwen3_moe", "llama", "mixtral")
TP_SIZE = 2


@pytest.fixture(scope="module", params=FAMILIES)
def case(request, tmp_path_factory):
    """A folder with the model, what was converted of it, and mbridge's tables and functions for it."""
    folder = tmp_path_factory.mktemp(request.param)
    make_tiny(folder / "model", request.param, tied=False, seed=3)
    hf_config = json.loads((folder / "model" / "config.json").read_text())
    write_megatron(Team(), folder / "model", hf_config, folder / "megatron", None, lambda _: None)
    # Without its constructor, which makes Megatron's configuration.
    bridge = object.__new__(_MODEL_REGISTRY[request.param])
    bridge.hf_config = SimpleNamespace(**{**hf_config, "head_dim": head_dim_of(hf_config)})
    bridge.dtype = bridge.make_vocab_size_divisible_by = None
    bridge.mpu, bridge.config = SimpleNamespace(tp_size=TP_SIZE), SimpleNamespace(gated_linear_unit=True)
    return folder, hf_config, bridge


def their_name(key: str, at: tuple[int, ...], is_sparse: bool) -> str:
    """TransformerEngine's name of a parameter, which is mbridge's."""
    if is_sparse:
        key = key.replace("mlp.linear_fc1.layer_norm_weight", "pre_mlp_layernorm.weight")
    key = key.replace("mlp.experts.experts.", "mlp.experts.")
    layer, expert = (*at, None, None)[:2]
    name = key if layer is None else key.replace("decoder.layers.", f"decoder.layers.{layer}.")
    return name if expert is None else f"{name}{expert}"


def read(stored) -> torch.Tensor:
    rows = Rows(stored.name, stored.runs())
    content = b"".join(block.tobytes() for block in RowReader().blocks(rows))
    return torch.frombuffer(bytearray(content), dtype=rows.dtype).reshape(rows.shape)


def test_names_and_fused_tensors(case):
    folder, hf_config, bridge = case
    tensors, reader = load_file(folder / "model" / "model.safetensors"), TorchDistReader(folder / "megatron")
    seen = []
    for part in megatron_slices(HfReader(folder / "model"), hf_config):
        name = their_name(part.key, part.at, shape_of(hf_config).num_experts > 0)
        names = bridge._weight_name_mapping_mcore_to_hf(name)
        stored = read(reader.stored(part.key, part.at))
        assert torch.equal(stored, bridge._weight_to_mcore_format(name, [tensors[n] for n in names])), name
        back = dict(zip(*bridge._weight_to_hf_format(name, stored), strict=True))
        assert all(torch.equal(tensors[n], tensor) for n, tensor in back.items())
        seen += back
    assert sorted(seen) == sorted(tensors)


def test_parts_of_a_tensor_parallel_split(case):
    folder, hf_config, bridge = case
    shape, reader = shape_of(hf_config), HfReader(folder / "model")
    tensors, num_split = load_file(folder / "model" / "model.safetensors"), 0
    for rule in family_of(hf_config).rules(shape):
        if rule.shard_dim is None:
            continue
        name = rule.megatron
        whole = bridge._weight_to_mcore_format(name, [tensors[n] for n in rule.hf])
        sizes = [size // TP_SIZE if dim == rule.shard_dim else size for dim, size in enumerate(whole.shape)]
        theirs = bridge._weight_split_across_tp(name, whole, torch.empty(sizes), TP_SIZE)
        for rank in range(TP_SIZE):
            pieces = [reader.read(n, rule.shard_dim, rank, TP_SIZE, None) for n in rule.hf]
            assert torch.equal(rule.fusion.fuse(pieces, shape), theirs[rank]), name
        num_split += 1
    assert num_split >= 2 * shape.num_layers + 2
