"""Mixed sources: shares, epochs and resumption against a count of what was drawn."""

import json
from collections import Counter

import pytest

from megatron_riskpo.config import DataConfig
from megatron_riskpo.data.mixture import MixedStream, make_stream
from megatron_riskpo.data.questions import load_evaluation_sets, load_split
from megatron_riskpo.data.stream import PromptStream
from megatron_riskpo.errors import UsageError
from tests.data.test_questions import write_jsonl

SIZES, WEIGHTS = (50, 7, 20), (2.0, 1.0, 0.5)


def stream(batch_size: int = 8, seed: int = 3) -> MixedStream:
    return MixedStream(SIZES, WEIGHTS, batch_size, seed, option="data.prompts_per_step")


def source_of(index: int) -> int:
    return 0 if index < 50 else 1 if index < 57 else 2


@pytest.mark.parametrize("weights", [WEIGHTS, (1.0, 1.0, 1.0), (100.0, 1.0, 1.0), (0.3, 0.3, 0.4), (9.0, 10.0, 1e-3)])
def test_any_number_of_questions_has_its_share_of_each_source(weights: tuple[float, ...]):
    own = MixedStream(SIZES, weights, 8, 3, option="x")
    drawn = [source_of(index) for _ in range(60) for index in own.next_batch()]
    for num in range(1, len(drawn) + 1):
        counts = Counter(drawn[:num])
        for source, weight in enumerate(weights):
            assert abs(counts[source] - num * weight / sum(weights)) < 1


def test_shares_hold_for_many_sources():
    weights = [1.0 + 0.37 * source for source in range(9)]
    own = MixedStream([10] * 9, weights, 5, 3, option="x")
    drawn = [index // 10 for _ in range(100) for index in own.next_batch()]
    for num in range(1, len(drawn) + 1):
        counts = Counter(drawn[:num])
        assert all(abs(counts[i] - num * weight / sum(weights)) < 1 for i, weight in enumerate(weights))


def test_no_question_comes_twice_before_all_others_of_its_source():
    own = stream(batch_size=7)
    drawn = [index for _ in range(100) for index in own.next_batch()]
    for source, size in enumerate(SIZES):
        indices = [index for index in drawn if source_of(index) == source]
        epochs = [indices[start : start + size] for start in range(0, len(indices) - size + 1, size)]
        assert len(epochs) >= 5
        assert all(len(set(epoch)) == size for epoch in epochs)
        assert epochs[0] != epochs[1]


def test_a_resumed_stream_goes_on_with_the_same_questions():
    own = stream()
    for _ in range(5):
        own.next_batch()
    other = stream(batch_size=4)
    other.load_state_dict(own.state_dict())
    assert [*other.next_batch(), *other.next_batch()] == own.next_batch()
    with pytest.raises(UsageError, match=r"restore data\.sources"):
        MixedStream(SIZES, (1.0, 1.0, 1.0), 8, 3, option="x").load_state_dict(own.state_dict())
    with pytest.raises(UsageError, match="other data"):
        stream(seed=4).load_state_dict(own.state_dict())


def test_any_number_of_ranks_sees_each_question_once():
    """Every rank holds the whole batch and takes rows rank, rank + size, ... of it (rewards/scoring.py)."""
    batches = [stream(batch_size=11).next_batch() for _ in range(3)]
    assert batches[0] == batches[1] == batches[2]
    for world_size in (1, 2, 3, 5, 11, 16):
        shares = [batches[0][rank::world_size] for rank in range(world_size)]
        assert Counter(index for share in shares for index in share) == Counter(batches[0])


def test_wrong_sizes_are_usage_errors():
    with pytest.raises(UsageError, match="a source has no training questions left"):
        MixedStream((5, 0), (1.0, 1.0), 2, 0, option="data.prompts_per_step")
    with pytest.raises(UsageError, match=r"data.prompts_per_step = 9, but there are 8 training questions"):
        MixedStream((5, 3), (1.0, 1.0), 9, 0, option="data.prompts_per_step")


def test_sources_become_one_list_with_a_stream_of_both(tmp_path):
    first, second = write_jsonl(tmp_path / "a.jsonl", 30), write_jsonl(tmp_path / "b.jsonl", 20, first=100)
    held_out = write_jsonl(tmp_path / "held.jsonl", 5, first=100)
    data = DataConfig(
        sources={first: 3.0, second: 1.0}, evaluation=held_out, evaluation_size=5, evaluation_sets={"held": held_out}
    )
    training, evaluation = load_split(data, 1)
    assert len(training) == 45
    assert not {question.problem for question in training} & {question.problem for question in evaluation}
    assert [question.problem for question in load_evaluation_sets(data)["held"]] == [q.problem for q in evaluation]
    batch = make_stream(training, data.sources, 8, 1, option="x").next_batch()
    assert Counter(training[index].data_source for index in batch) == {"a": 6, "b": 2}
    assert isinstance(make_stream(training, {}, 8, 1, option="x"), PromptStream)


def test_a_held_out_question_in_other_type_is_not_trained_on(tmp_path):
    train = tmp_path / "train.jsonl"
    problems = ["$1+1$ =", "1 - 1 =", "1+1!"]
    train.write_text("".join(json.dumps({"problem": problem, "expected_answer": "2"}) + "\n" for problem in problems))
    held_out = write_jsonl(tmp_path / "held.jsonl", 2)
    training, _ = load_split(DataConfig(train=str(train), evaluation=held_out, evaluation_size=2), 1)
    assert [question.problem for question in training] == ["1 - 1 =", "1+1!"], "a factorial is another question"
