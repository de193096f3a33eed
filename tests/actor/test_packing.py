"""Packing: nothing lost, nothing twice; targets and their predictors against a plain loop."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_riskpo.actor.attention import MAX_PADDING_SHARE, SequenceBuckets, length_buckets
from megatron_riskpo.actor.packing import pack
from megatron_riskpo.actor.sequence_split import SequenceSplit
from tests.distributed.layout_cases import ragged_rollouts

lengths_strategy = st.lists(st.integers(1, 300), min_size=1, max_size=60)


@settings(deadline=None)
@given(lengths=lengths_strategy)
def test_buckets_place_every_token_once_and_bound_padding(lengths):
    cu_seqlens = torch.nn.functional.pad(torch.tensor(lengths).cumsum(0), (1, 0))
    buckets = SequenceBuckets(cu_seqlens)
    places = torch.cat([rows.flatten() for rows in buckets.queries])
    assert torch.equal(places[buckets.place_of_query], torch.arange(sum(lengths)))
    assert places.numel() <= sum(lengths) / (1 - MAX_PADDING_SHARE) + 1e-9
    assert sorted(i for bucket in length_buckets(lengths) for i in bucket) == list(range(len(lengths)))


CPU = torch.device("cpu")


def test_pack_against_a_plain_loop():
    rollouts, _, _ = ragged_rollouts()
    rows = [5, 0, 11]
    batch = pack(rollouts, rows, SequenceSplit(sequence_parallel_size=4), CPU)
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


def zigzag_by_hand(cu_seqlens, cp_size, cp_rank):
    """Places in the pack of one rank's tokens: of each sequence the rank's early chunk, then its late one."""
    places = []
    for start, end in itertools.pairwise(cu_seqlens):
        chunk = (end - start) // (2 * cp_size)
        for index in (cp_rank, 2 * cp_size - 1 - cp_rank):
            places += range(start + index * chunk, start + (index + 1) * chunk)
    return places


@pytest.mark.parametrize("cp_size", [2, 3, 4])
@pytest.mark.parametrize("sequence_parallel_size", [1, 2])
def test_context_parallel_ranks_share_a_pack(cp_size, sequence_parallel_size):
    rollouts, _, _ = ragged_rollouts()
    rows = [5, 0, 11, 2]
    whole = pack(rollouts, rows, SequenceSplit(), CPU)
    parts = [pack(rollouts, rows, SequenceSplit(cp_size, rank, sequence_parallel_size), CPU) for rank in range(cp_size)]
    # Every target once, predicted by the token that stands before it in its own sequence.
    slots = torch.cat([part.slots for part in parts])
    assert torch.equal(slots.sort().values, torch.arange(whole.targets.numel()))
    assert torch.equal(torch.cat([part.targets for part in parts])[slots.argsort()], whole.targets)
    for field in ("input_ids", "position_ids"):
        before = torch.cat([getattr(part, field)[0][part.predictor] for part in parts])[slots.argsort()]
        assert torch.equal(before, getattr(whole, field)[0][whole.predictor])
    cu_seqlens = parts[0].packed.cu_seqlens_q.tolist()
    pack_of_sequences = torch.empty(cu_seqlens[-1], dtype=torch.long)
    for rank, part in enumerate(parts):
        assert part.input_ids.size(1) % sequence_parallel_size == 0
        places = zigzag_by_hand(cu_seqlens, cp_size, rank)
        pack_of_sequences[places] = part.input_ids[0]
    for row, (start, end) in zip(rows, itertools.pairwise(cu_seqlens), strict=False):
        sequence = rollouts.sequences()[row]
        assert torch.equal(pack_of_sequences[start : start + sequence.numel()], sequence)
        assert not pack_of_sequences[start + sequence.numel() : end].any()
