"""SDPACoreAttention against attention written out, packed and with a KV cache; packed neighbours never leak."""

import math

import torch
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_riskpo.actor.attention import SDPACoreAttention
from megatron_riskpo.actor.packing import PackedSequences

HEADS, GROUPS, SIZE = 4, 2, 8


def make_attention() -> SDPACoreAttention:
    config = TransformerConfig(
        num_layers=1, hidden_size=HEADS * SIZE, num_attention_heads=HEADS, num_query_groups=GROUPS, kv_channels=SIZE
    )
    return SDPACoreAttention(config, 1, AttnMaskType.causal, "self")


def qkv(num_tokens: int, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(num_tokens, n, SIZE, generator=generator) for n in (HEADS, GROUPS, GROUPS))


def written_out(query, key, value):
    """[s, n, h] -> [s, n*h], by the formula; query rows are the last positions."""
    key, value = (t.repeat_interleave(HEADS // GROUPS, dim=1) for t in (key, value))
    scores = torch.einsum("inh,jnh->nij", query, key) / math.sqrt(SIZE)
    offset = key.size(0) - query.size(0)
    visible = torch.ones(query.size(0), key.size(0)).tril(offset).bool()
    probs = scores.masked_fill(~visible, -torch.inf).softmax(-1)
    return torch.einsum("nij,jnh->inh", probs, value).flatten(1)


def packed(lengths):
    cu = torch.nn.functional.pad(torch.tensor(lengths).cumsum(0), (1, 0)).int()
    return PackedSequences(
        qkv_format="thd", cu_seqlens_q=cu, cu_seqlens_kv=cu, max_seqlen_q=max(lengths), max_seqlen_kv=max(lengths)
    )


def test_packed_equals_each_sequence_alone():
    lengths = [7, 1, 30, 6, 29, 2]
    tensors = qkv(sum(lengths))
    out = make_attention()(*tensors, packed_seq_params=packed(lengths))
    expected = [written_out(*piece) for piece in zip(*(t.split(lengths) for t in tensors), strict=True)]
    torch.testing.assert_close(out, torch.cat(expected), rtol=0, atol=2e-6)


def test_a_changed_sequence_leaves_its_neighbours_bit_for_bit():
    lengths = [9, 12, 10]
    attention = make_attention()

    def outputs_and_gradients(first_seed):
        pieces = [qkv(n, seed) for n, seed in zip(lengths, (first_seed, 1, 2), strict=True)]
        tensors = [torch.cat(parts).requires_grad_() for parts in zip(*pieces, strict=True)]
        out = attention(*tensors, packed_seq_params=packed(lengths))
        out.square().sum().backward()
        return [out[9:].detach()] + [t.grad[9:] for t in tensors]

    for a, b in zip(outputs_and_gradients(0), outputs_and_gradients(77), strict=True):
        assert torch.equal(a, b)


def test_batched_and_cached_decoding():
    attention, (query, key, value) = make_attention(), qkv(12)
    whole = written_out(query, key, value)
    for num_queries in (12, 5, 1):
        out = attention(query[-num_queries:, None], key[:, None], value[:, None])
        torch.testing.assert_close(out[:, 0], whole[-num_queries:], rtol=0, atol=2e-6)
