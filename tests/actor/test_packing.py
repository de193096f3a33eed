"""Packing: nothing lost, nothing twice; targets and their predictors against a plain loop."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_riskpo.actor.attention import MAX_PADDING_SHARE, SequenceBuckets, length_buckets
from megatron_riskpo.actor.packing import pack
from tests.distributed.layout_cases import ragged_rollouts

lengths_strategy = st.lists(st.integers(1, 300), min_size=1, max_size=60)


@settings(deadline=None)
@given(lengths=lengths_strategy)
def test_buckets_place_every_token_once_and_bound_padding(lengths):
    cu_seqlens = torch.nn.functional.pad(torch.tensor(lengths).cumsum(0), (1, 0))
    buckets = SequenceBuckets(cu_seqlens)
    places = torch.cat([rows.flatten() for rows in buckets.rows])
    assert torch.equal(places[buckets.place_of_token], torch.arange(sum(lengths)))
    assert places.numel() <= sum(lengths) / (1 - MAX_PADDING_SHARE) + 1e-9
    assert sorted(i for bucket in length_buckets(lengths) for i in bucket) == list(range(len(lengths)))


def test_pack_against_a_plain_loop():
    rollouts, _, _ = ragged_rollouts()
    rows = [5, 0, 11]
    batch = pack(rollouts, rows, pad_to_multiple=4, device=torch.device("cpu"))
    tokens, positions, predictor, targets = [], [], [], []
    for row in rows:
        sequence, prompt = rollouts.sequences()[row].tolist(), int(rollouts.prompt_lengths[row])
        predictor += [len(tokens) + i - 1 for i in range(prompt, len(sequence))]
        targets += sequence[prompt:]
        tokens += sequence
        positions += range(len(sequence))
    num_real = len(tokens)
    assert batch.input_ids[0, :num_real].tolist() == tokens
    assert batch.position_ids[0, :num_real].tolist() == positions
    assert batch.predictor.tolist() == predictor
    assert batch.targets.tolist() == targets
    assert batch.input_ids.numel() % 4 == 0
    assert batch.input_ids.numel() - num_real < 4
    assert batch.packed.cu_seqlens_q[-1] == batch.input_ids.numel()
