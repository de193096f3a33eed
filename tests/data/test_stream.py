"""Order of the questions, exact resume, and seeds."""

import json
from collections import Counter
from functools import partial

import pytest

from megatron_riskpo.data.stream import PromptStream, sample_seeds
from megatron_riskpo.errors import UsageError

stream_of = partial(PromptStream, option="sft.batch_size")


def test_every_epoch_takes_each_question_once_across_batch_boundaries():
    stream = stream_of(num_questions=10, batch_size=4, seed=1)
    drawn = [index for _ in range(15) for index in stream.next_batch()]
    epochs = [drawn[start : start + 10] for start in range(0, 60, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 6
    assert stream.epoch == 6.0


def test_resume_is_exact_at_every_position_and_with_another_batch_size():
    whole = stream_of(7, 3, seed=5)
    expected = [whole.next_batch() for _ in range(12)]
    for done in range(12):
        first, second = (
            stream_of(7, 3, seed=5),
            stream_of(7, 3, seed=5),
        )
        for _ in range(done):
            first.next_batch()
        second.load_state_dict(json.loads(json.dumps(first.state_dict())))
        assert [second.next_batch() for _ in range(12 - done)] == expected[done:]
    one_by_one = stream_of(7, 1, seed=5)
    one_by_one.load_state_dict({**one_by_one.state_dict(), "position": 9})
    assert [one_by_one.next_batch()[0] for _ in range(27)] == [i for batch in expected for i in batch][9:]


def test_the_seed_decides_the_order():
    batches = [stream_of(50, 50, seed).next_batch() for seed in (1, 1, 2)]
    assert batches[0] == batches[1] != batches[2]


@pytest.mark.parametrize("batch_size", [0, 6])
def test_a_batch_must_fit_the_questions(batch_size: int):
    with pytest.raises(UsageError, match=f"sft.batch_size = {batch_size}, but there are 5"):
        stream_of(5, batch_size, 1)


@pytest.mark.parametrize(("num_questions", "seed", "change"), [(6, 1, "num_questions 5 -> 6"), (5, 2, "seed 1 -> 2")])
def test_a_position_in_other_data_is_refused(num_questions: int, seed: int, change: str):
    state = stream_of(5, 2, 1).state_dict()
    with pytest.raises(UsageError, match=change):
        stream_of(num_questions, 2, seed).load_state_dict(state)


def test_sample_seeds_are_reproducible_distinct_and_in_range():
    seeds = [
        seed
        for stream in ("train", "evaluation", "bundles")
        for run_seed in (0, 1, 2)
        for step in range(20)
        for draw in range(3)
        for seed in sample_seeds(run_seed, step, 30, stream, draw)
    ]
    assert max(Counter(seeds).values()) == 1
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert max(seeds) > 2**62
    assert sample_seeds(1, 2, 30, "train")[:10] == sample_seeds(1, 2, 10, "train")


def test_seeds_of_the_first_draw_are_what_they_have_always_been():
    # From the release before further draws: runs of that time can be repeated.
    assert sample_seeds(1, 2, 2, "train") == [4577980684254263135, 2695319899829522293]
