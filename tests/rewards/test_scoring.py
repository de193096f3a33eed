"""From finished responses to rewards on one rank: errors apart from wrong answers; the many-rank case is in
tests/distributed/test_global_advantages.py."""

import pytest
import torch
import torch.distributed as dist

from megatron_riskpo.config import EvaluationConfig, RewardConfig
from megatron_riskpo.errors import RunError
from megatron_riskpo.evaluation.evaluate import evaluate
from megatron_riskpo.rewards.pool import Grade
from megatron_riskpo.rewards.reference import Reference
from megatron_riskpo.rewards.scoring import Rewards, Scoring, mean_by_source
from megatron_riskpo.rollout.types import Rollouts, SamplingConfig
from tests.distributed.advantage_cases import DigitTokenizer, rollouts_that_earn, score_rollouts, tell_share

NAN = float("nan")
# Of a user's own grader, so that equal responses are graded one by one.
OWN = Reference("1", "own.py:grade")


class ScriptedPool:
    """Gives the scores it was made with, in the order in which responses come; NaN is an error."""

    def __init__(self, scores: list[float]) -> None:
        self.grades = iter([Grade(score, "timed out" if score != score else None) for score in scores])

    def submit(self, response: str, reference: Reference) -> Grade:
        return next(self.grades)

    def gather(self, grades: list[Grade]) -> list[Grade]:
        return grades


class ScriptedEngine:
    def __init__(self, rollouts: Rollouts) -> None:
        self.rollouts = rollouts

    def generate(self, prompts, sampling, seeds, on_finished) -> Rollouts:
        tell_share(self.rollouts, dist.group.WORLD, on_finished)
        return self.rollouts


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    store = dist.FileStore(str(tmp_path_factory.mktemp("store") / "s"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


def test_errors_are_kept_apart(world):
    rollouts = rollouts_that_earn(torch.zeros(2, 4))
    pool = ScriptedPool([1, 1, 0, NAN, 0, 0, 0, 0])
    rewards = score_rollouts(rollouts, [OWN] * 2, DigitTokenizer(), pool, RewardConfig(), world)
    assert rewards.errors.tolist() == [[False, False, False, True], [False] * 4]
    assert rewards.matrix[0].tolist() == pytest.approx([1, 1, 0, 2 / 3])


def test_nothing_gradable_ends_the_run(world):
    rollouts = rollouts_that_earn(torch.zeros(1, 4))
    with pytest.raises(
        RunError, match=r"failed on 4 of 4 responses .* = 0.25; for example: timed out \(response '0'\)"
    ):
        score_rollouts(rollouts, [OWN], DigitTokenizer(), ScriptedPool([NAN] * 4), RewardConfig(), world)


@pytest.mark.parametrize(("limit", "raises"), [(0.25, True), (0.5, False)])
def test_more_errors_than_the_run_accepts_end_it(world, limit, raises):
    rollouts = rollouts_that_earn(torch.zeros(1, 4))
    arguments = (
        [OWN],
        DigitTokenizer(),
        ScriptedPool([1, NAN, 0, NAN]),
        RewardConfig(max_error_share=limit),
    )
    if raises:
        with pytest.raises(RunError, match=r"2 of 4 responses of the batch, more than rewards.max_error_share = 0.25"):
            score_rollouts(rollouts, *arguments, world)
        return
    rewards = score_rollouts(rollouts, *arguments, world)
    assert rewards.matrix.tolist() == [[1, 0.5, 0, 0.5]]


def test_responses_may_come_in_any_order(world):
    grading = Scoring(DigitTokenizer(), ScriptedPool([3, 1, NAN, 0, 2, 5]))
    for row in (3, 1, 5, 0, 2, 4):
        grading.submit(row, [row], OWN)
    rewards = grading.rewards(2, 3, RewardConfig(), world)
    assert rewards.matrix.tolist() == [[0, 1, 2], [3, 5, 4]]
    assert rewards.errors.tolist() == [[False] * 3, [False, False, True]]


def test_a_response_that_no_rank_grades_ends_the_run(world):
    grading = Scoring(DigitTokenizer(), ScriptedPool([1]))
    grading.submit(2, [0], OWN)
    with pytest.raises(RunError, match="3 of 4 responses of the batch were handed to no grader"):
        grading.rewards(2, 2, RewardConfig(), world)


def test_rewards_of_any_range_arrive_as_they_are(world):
    scores = [-2.5, 0.0, 1e6, 0.125]
    pool = ScriptedPool(scores)
    rewards = score_rollouts(rollouts_that_earn(torch.ones(1, 4)), [OWN], DigitTokenizer(), pool, RewardConfig(), world)
    assert rewards.matrix.tolist() == [scores]


def test_means_of_sources_are_kept_apart_and_left_out_where_there_is_one():
    matrix = torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, -1.0]], dtype=torch.float64)
    errors = torch.tensor([[False, True], [False, False], [False, False]])
    rewards = Rewards(matrix, errors, torch.ones(3, 2, dtype=torch.bool))
    assert mean_by_source(rewards, ["sums", "code", "sums"]) == {
        "reward/code/mean": 1.0, "reward/code/errors": 0.0, "reward/sums/mean": 0.0, "reward/sums/errors": 1.0,
    }  # fmt: skip
    assert mean_by_source(rewards, ["sums"] * 3) == {}


def test_an_ungradable_response_is_not_counted_as_solved(world):
    rollouts = rollouts_that_earn(torch.zeros(1, 4))
    metrics = evaluate(
        ScriptedEngine(rollouts), [[7]], [OWN], SamplingConfig(4, 1, 1.0, (2,)), [0],
        EvaluationConfig(num_samples=4, ks=(1,)), DigitTokenizer(), ScriptedPool([1, 1, NAN, NAN]),
        RewardConfig(max_error_share=1.0), world,
    )  # fmt: skip
    assert metrics["eval/heldout/pass@1"] == pytest.approx(0.5)
    assert metrics["eval/heldout/errors"] == 2


def test_responses_in_the_answer_form_are_marked(world):
    class BoxingTokenizer:
        def batch_decode(self, sequences, skip_special_tokens):
            return [f"\\boxed{{{int(s[0])}}}" if int(s[0]) else "0" for s in sequences]

    rewards = score_rollouts(
        rollouts_that_earn(torch.tensor([[1, 0, 1, 0]])), [OWN], BoxingTokenizer(),
        ScriptedPool([1, 0, 1, 0]), RewardConfig(answer_form="boxed"), world,
    )  # fmt: skip
    assert rewards.formatted.tolist() == [[True, False, True, False]]
