"""Plans of micro-batches: what every plan keeps, against the fewest micro-batches possible, and how even the work is.

Second way to the fewest: all ways to put a handful of sequences together. Not tested: any time.
"""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_riskpo.actor.flops import ModelFlops
from megatron_riskpo.actor.micro_batches import WorkModel, plan_micro_batches

LONG = WorkModel(1.0, 1e-4)
"""Attention costs as much as the linear layers at 10,000 tokens."""
SMALL_QWEN = {
    "vocab_size": 151936, "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24,
    "num_attention_heads": 14, "num_key_value_heads": 2,
}  # fmt: skip
lengths_strategy = st.lists(st.integers(1, 300), min_size=1, max_size=60)


def lognormal(num: int, median: int, sigma: float, seed: int = 0, longest: int = 16384) -> list[int]:
    drawn = np.random.default_rng(seed).lognormal(np.log(median), sigma, num)
    return drawn.astype(int).clip(16, longest).tolist()


def check(plan: list[list[list[int]]], lengths: list[int], num_ranks: int, max_tokens: int, multiple_of: int) -> None:
    """What every plan keeps."""
    assert len(plan) == num_ranks
    assert sorted(row for bins in plan for rows in bins for row in rows) == list(range(len(lengths)))
    (count,) = {len(bins) for bins in plan}
    assert count % multiple_of == 0
    for rows in (rows for bins in plan for rows in bins):
        assert rows
        assert len(rows) == 1 or sum(lengths[row] for row in rows) <= max_tokens


def fewest(lengths: list[int], max_tokens: int) -> int:
    """Micro-batches that hold these sequences: every sequence into every micro-batch that has room, in turn."""
    best = len(lengths)

    def place(index: int, free: list[int]) -> None:
        nonlocal best
        if len(free) >= best:
            return
        if index == len(lengths):
            best = len(free)
            return
        size = min(lengths[index], max_tokens)
        for place_of, room in enumerate(free):
            if size <= room:
                place(index + 1, [*free[:place_of], room - size, *free[place_of + 1 :]])
        place(index + 1, [*free, max_tokens - size])

    place(0, [])
    return best


def works_of_ranks(plan: list[list[list[int]]], lengths: list[int], work: WorkModel) -> np.ndarray:
    works = work.of(np.array(lengths, dtype=np.float64))
    return np.array([works[[row for rows in bins for row in rows]].sum() for bins in plan])


def spread(values: np.ndarray) -> float:
    return float((values.max() - values.min()) / values.mean())


@settings(deadline=None, max_examples=100)
@given(
    lengths=lengths_strategy, num_ranks=st.integers(1, 4), max_tokens=st.integers(600, 1000),
    multiple_of=st.integers(1, 3), quadratic=st.sampled_from([0.0, 0.01, 1.0]),
)  # fmt: skip
def test_a_plan_is_found_where_any_two_sequences_fit(lengths, num_ranks, max_tokens, multiple_of, quadratic):
    lengths = (lengths * 12)[: max(len(lengths), num_ranks * multiple_of)]
    plan = plan_micro_batches(lengths, num_ranks, max_tokens, WorkModel(1.0, quadratic), multiple_of)
    check(plan, lengths, num_ranks, max_tokens, multiple_of)
    assert plan == plan_micro_batches(lengths, num_ranks, max_tokens, WorkModel(1.0, quadratic), multiple_of)


@settings(deadline=None, max_examples=100)
@given(lengths=lengths_strategy, num_ranks=st.integers(1, 4), max_tokens=st.integers(50, 400), repeat=st.integers(1, 3))
def test_a_plan_is_found_where_shares_are_of_one_size(lengths, num_ranks, max_tokens, repeat):
    lengths = lengths * num_ranks * repeat
    check(plan_micro_batches(lengths, num_ranks, max_tokens, LONG, repeat), lengths, num_ranks, max_tokens, repeat)


@settings(deadline=None, max_examples=100)
@given(lengths=st.lists(st.integers(1, 12), min_size=1, max_size=8), max_tokens=st.integers(6, 20))
def test_micro_batches_of_one_rank_against_the_fewest(lengths, max_tokens):
    (bins,) = plan_micro_batches(lengths, 1, max_tokens)
    assert len(bins) <= fewest(lengths, max_tokens) * 11 / 9 + 6 / 9


@settings(deadline=None, max_examples=100)
@given(lengths=st.lists(st.integers(1, 12), min_size=6, max_size=8), max_tokens=st.integers(24, 40))
def test_two_ranks_need_one_micro_batch_more_at_most(lengths, max_tokens):
    plan = plan_micro_batches(lengths, 2, max_tokens)
    assert len(plan[0]) <= -(-fewest(lengths, max_tokens) // 2) + 1


@pytest.mark.parametrize("num", [5120, 16384])
@pytest.mark.parametrize(("median", "sigma"), [(1000, 1.0), (4000, 0.6)])
def test_packs_to_within_a_hundredth_of_the_lower_bound(num, median, sigma):
    lengths = lognormal(num, median, sigma)
    (bins,) = plan_micro_batches(lengths, 1, 32768, WorkModel.from_hf_config(SMALL_QWEN))
    assert len(bins) <= 1.01 * -(-sum(lengths) // 32768)


@pytest.mark.parametrize("num", [5120, 16384])
@pytest.mark.parametrize(("median", "sigma"), [(1000, 1.0), (4000, 0.6)])
@pytest.mark.parametrize("seed", range(3))
def test_ranks_have_the_same_work(num, median, sigma, seed):
    lengths, work = lognormal(num, median, sigma, seed), WorkModel.from_hf_config(SMALL_QWEN)
    plan = plan_micro_batches(lengths, 64, 32768, work, multiple_of=2)
    check(plan, lengths, 64, 32768, multiple_of=2)
    assert spread(works_of_ranks(plan, lengths, work)) < 0.02
    # By tokens alone, ranks differ more.
    of_tokens = plan_micro_batches(lengths, 64, 32768)
    assert spread(works_of_ranks(of_tokens, lengths, WorkModel())) < 0.02
    assert spread(works_of_ranks(of_tokens, lengths, work)) > spread(works_of_ranks(plan, lengths, work))


def test_micro_batches_of_a_rank_are_alike_and_the_heaviest_comes_first():
    lengths = lognormal(2048, 500, 0.8)
    for bins in plan_micro_batches(lengths, 8, 40_000, LONG):
        works = [sum(LONG.of(lengths[row]) for row in rows) for rows in bins]
        assert works == sorted(works, reverse=True)
        assert spread(np.array(works)) < 0.02


def test_uses_few_micro_batches():
    for bins in plan_micro_batches([30] * 64, 2, 300):
        assert len(bins) == 4  # 32 sequences of 30 tokens, 10 a micro-batch


def test_a_longer_sequence_goes_alone():
    plan = plan_micro_batches([500, 10, 10, 10], 1, 100)
    assert plan == [[[0], [1, 2, 3]]]


def test_a_heavy_sequence_leaves_the_rank_no_other_than_it_must_have():
    assert plan_micro_batches([90, 20, 20, 20, 20, 20], 2, 100) == [[[0]], [[1, 2, 3, 4, 5]]]


@pytest.mark.parametrize(
    ("lengths", "num_ranks", "multiple_of", "message"),
    [
        ([], 1, 1, "0 sequences cannot fill 1 micro-batches on each of 1 data-parallel ranks; give 1 or more"),
        ([5] * 7, 4, 2, "7 sequences cannot fill 2 micro-batches on each of 4 data-parallel ranks; give 8 or more"),
        ([60] * 5, 4, 1, "5 sequences need 5 micro-batches of 100 tokens, but cannot fill more than 1 .* give 8"),
        ([5, 0], 1, 1, "sequence 1 has 0 tokens"),
    ],
)
def test_too_few_sequences(lengths, num_ranks, multiple_of, message):
    with pytest.raises(ValueError, match=message):
        plan_micro_batches(lengths, num_ranks, 100, multiple_of=multiple_of)


def test_work_of_a_model_is_its_flops():
    flops = ModelFlops.from_hf_config(SMALL_QWEN)
    assert WorkModel.from_hf_config(SMALL_QWEN).of(1000) == pytest.approx(flops.forward([1000], 1000))
