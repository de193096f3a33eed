"""Which questions each step gets, and how old the weights may be; the engine is one that only notes its calls."""

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch

from megatron_riskpo.data.stream import PromptStream, sample_seeds
from megatron_riskpo.errors import RunError
from megatron_riskpo.rollout.source import RolloutSource, staleness_metrics
from megatron_riskpo.rollout.types import OnFinished, Rollouts, SamplingConfig

NUM_QUESTIONS, BATCH, SEED, NUM_STEPS = 23, 4, 5, 9
SAMPLING = SamplingConfig(group_size=1, max_response_tokens=1, temperature=1.0, stop_token_ids=())


class NotingEngine:
    """Its weights have the version that the test says; a response is one token, the first prompt token."""

    def __init__(self) -> None:
        self.version = 0
        self.seeds: list[list[int]] = []
        self.num_under_way = 0
        self.num_gone_on = 0

    def submit(
        self, prompts: Sequence[Sequence[int]], sampling: SamplingConfig, seeds: Sequence[int],
        begun: Mapping[str, Any] | None = None,
    ) -> Any:  # fmt: skip
        assert sampling == SAMPLING
        self.seeds.append(list(seeds))
        self.num_under_way += 1
        tokens = [prompt[0] for prompt in prompts]
        if begun is None:
            return tokens, self.version
        assert begun["tokens"] == tokens
        self.num_gone_on += 1
        return tokens, begun["version"]

    def under_way(self, pending: Any) -> dict[str, Any]:
        return dict(zip(("tokens", "version"), pending, strict=True))

    def collect(self, pending: Any, on_finished: OnFinished) -> Rollouts:
        tokens, version = pending
        self.num_under_way -= 1
        for row in reversed(range(len(tokens))):
            on_finished(row, [tokens[row]])
        ones = torch.ones(len(tokens), dtype=torch.int64)
        versions = torch.zeros(len(tokens), dtype=torch.int32) + version
        flat = torch.tensor(tokens).repeat_interleave(2)
        return Rollouts(flat, ones, ones, torch.zeros(len(tokens)), ones.bool(), versions)

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: SamplingConfig, seeds: Sequence[int], on_finished: OnFinished
    ) -> Rollouts:
        return self.collect(self.submit(prompts, sampling, seeds), on_finished)


def source(engine: NotingEngine, max_staleness: int) -> RolloutSource:
    stream = PromptStream(NUM_QUESTIONS, BATCH, SEED, option="")
    prompts = [[100 + row] for row in range(NUM_QUESTIONS)]
    return RolloutSource(engine, stream, prompts, SAMPLING, SEED, max_staleness=max_staleness, num_steps=NUM_STEPS)  # type: ignore[arg-type]


def steps(engine: NotingEngine, one: RolloutSource, first: int, last: int, refills: dict[int, int]) -> dict[int, list]:
    """What a trainer does, with so many further draws in some steps: the rows of each step, draw after draw."""
    rows_of: dict[int, list] = {}
    for step in range(first, last + 1):
        engine.version = step - 1
        for draw in range(1 + refills.get(step, 0)):
            told: dict[int, tuple[int, Sequence[int]]] = {}
            rows, rollouts = one.draw(step, draw, lambda row, *rest, told=told: told.setdefault(row, rest))
            assert told == {row: (question, [100 + question]) for row, question in enumerate(rows)}
            assert rollouts.tokens.tolist() == [100 + row for row in rows for _ in range(2)]
            rows_of.setdefault(step, []).append(rows)
        one.prefetch(step)
    return rows_of


@pytest.mark.parametrize("max_staleness", [0, 1, 3])
@pytest.mark.parametrize("stop_at", [1, 4, 8])
@pytest.mark.parametrize("refills", [{}, {2: 1, 4: 2, 5: 1}])
@pytest.mark.parametrize("carried", [False, True])
def test_a_resume_loses_no_question_and_repeats_none(max_staleness, stop_at, refills, carried):
    whole_engine, engine, resumed_engine = NotingEngine(), NotingEngine(), NotingEngine()
    whole = steps(whole_engine, source(whole_engine, max_staleness), 1, NUM_STEPS, refills)
    one = source(engine, max_staleness)
    before = steps(engine, one, 1, stop_at, refills)
    resumed = source(resumed_engine, max_staleness)
    resumed.load_state_dict(one.state_dict(), one.under_way() if carried else {})
    after = steps(resumed_engine, resumed, stop_at + 1, NUM_STEPS, refills)
    # The first draws are the stream's, whenever they were begun.
    assert sorted(row for rows in (before | after).values() for draw in rows for row in draw) == sorted(
        row for rows in whole.values() for draw in rows for row in draw
    )
    if not refills or max_staleness <= 1:
        assert before | after == whole
    assert engine.num_under_way == min(max_staleness, NUM_STEPS - stop_at)
    assert resumed_engine.num_under_way == 0
    assert resumed_engine.num_gone_on == (engine.num_under_way if carried else 0)


def test_without_staleness_nothing_is_begun_early():
    engine = NotingEngine()
    one = source(engine, 0)
    steps(engine, one, 1, 3, {})
    assert engine.seeds == [sample_seeds(SEED, step, BATCH, "train") for step in (1, 2, 3)]
    assert one.state_dict()["ahead"] == {}


def test_seeds_are_those_of_the_step_that_trains_on_them():
    engine = NotingEngine()
    steps(engine, source(engine, 2), 1, NUM_STEPS, {})
    assert engine.seeds == [sample_seeds(SEED, step, BATCH, "train") for step in range(1, NUM_STEPS + 1)]


@pytest.mark.parametrize(("max_staleness", "expected"), [(1, [0, 1, 1, 1]), (3, [0, 1, 2, 3])])
def test_staleness_grows_up_to_its_bound(max_staleness, expected):
    engine = NotingEngine()
    one, found = source(engine, max_staleness), []
    for step in range(1, 5):
        engine.version = step - 1
        _, rollouts = one.draw(step, 0)
        metrics = staleness_metrics(step, rollouts)
        assert metrics["rollout/staleness_mean"] == metrics["rollout/staleness_max"]
        found.append(metrics["rollout/staleness_max"])
        one.prefetch(step)
    assert found == expected


@pytest.mark.parametrize("version", [2, 5])
def test_rollouts_of_wrong_weights_are_refused(version):
    engine = NotingEngine()
    one = source(engine, 1)
    engine.version = version
    message = rf"step 5: a response was sampled with weights of version {version}, the step needs 3 to 4"
    with pytest.raises(RunError, match=message):
        one.draw(5, 0)


@pytest.mark.parametrize(("versions", "named"), [([3, 5], "5"), ([4, 2], "2"), ([5, 3, 2], "2, 5")])
def test_of_mixed_versions_those_that_are_wrong_are_named(versions, named):
    engine = NotingEngine()
    engine.version = torch.tensor(versions).repeat(BATCH)[:BATCH]  # type: ignore[assignment]
    message = rf"weights of version {named}, the step needs 3 to 4 "
    with pytest.raises(RunError, match=message):
        source(engine, 1).draw(5, 0)


def test_responses_of_two_versions_are_counted():
    ones = torch.ones(2, dtype=torch.int64)
    versions = torch.tensor([3, 4, 4], dtype=torch.int32)
    rollouts = Rollouts(torch.zeros(5), ones, torch.tensor([2, 1]), torch.zeros(3), ones.bool(), versions)
    assert staleness_metrics(5, rollouts) == {
        "rollout/staleness_mean": pytest.approx(1 / 3),
        "rollout/staleness_max": 1.0,
        "rollout/mixed_versions": 0.5,
    }
