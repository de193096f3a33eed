"""The weight tables: fuse and unfuse are inverse under any tensor-parallel size, and q, k, v stand where
Megatron's attention looks for them."""

import pytest
import torch

from megatron_riskpo.checkpoint.weight_map import FAMILIES, family_of
from megatron_riskpo.checkpoint.weight_map.base import QKV, STACKED, ModelShape, pad_vocab, padded_vocab_size
from megatron_riskpo.errors import UsageError

SHAPE = ModelShape(
    num_layers=3, num_attention_heads=8, num_key_value_heads=4, head_dim=2, vocab_size=97, tied_embeddings=False
)


def test_qkv_order_is_by_key_value_group():
    q, k, v = torch.arange(16.0), 100 + torch.arange(8.0), 200 + torch.arange(8.0)
    fused = QKV.fuse([q, k, v], SHAPE)
    first_group = [0, 1, 2, 3, 100, 101, 200, 201]  # two query heads of two rows, one key head, one value head
    assert fused[:8].tolist() == first_group
    for piece, original in zip(QKV.unfuse(fused, SHAPE), (q, k, v), strict=True):
        assert torch.equal(piece, original)


@pytest.mark.parametrize("tp_size", [1, 2, 4])
@pytest.mark.parametrize("fusion", [QKV, STACKED])
def test_pieces_of_all_ranks_make_the_whole(fusion, tp_size):
    rows = (16, 8, 8) if fusion is QKV else (12, 12)
    whole = [torch.randn(n, 5) for n in rows]
    per_rank = [
        fusion.unfuse(fusion.fuse([t.chunk(tp_size)[rank] for t in whole], SHAPE), SHAPE) for rank in range(tp_size)
    ]
    for i, tensor in enumerate(whole):
        assert torch.equal(torch.cat([pieces[i] for pieces in per_rank]), tensor)


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES.keys())
def test_no_name_comes_twice(family):
    for tied in (True, False):
        shape = ModelShape(3, 8, 4, 2, 97, tied)
        rules = list(family.rules(shape))
        hf_names = [name for rule in rules for name in rule.hf]
        assert len(set(hf_names)) == len(hf_names)
        assert len({rule.megatron for rule in rules}) == len(rules)
        assert ("lm_head.weight" in hf_names) is not tied


def test_vocabulary_padding():
    assert [padded_vocab_size(97, n) for n in (1, 2, 8)] == [97, 98, 104]
    padded = pad_vocab(torch.ones(3, 2), 5)
    assert padded.sum(1).tolist() == [2, 2, 2, 0, 0]


def test_unknown_model_type_names_the_known_ones():
    with pytest.raises(UsageError, match=r"'gpt2' .* known: qwen2"):
        family_of({"model_type": "gpt2"})
