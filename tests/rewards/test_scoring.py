"""From rollouts to rewards on one rank: errors apart from wrong answers; the many-rank case is in
tests/distributed/test_global_advantages.py."""

import pytest
import torch
import torch.distributed as dist

from megatron_riskpo.config import EvaluationConfig
from megatron_riskpo.errors import RunError
from megatron_riskpo.evaluation.evaluate import evaluate
from megatron_riskpo.rewards.pool import Grade
from megatron_riskpo.rewards.scoring import score_rollouts
from megatron_riskpo.rollout.types import Rollouts, SamplingConfig
from tests.distributed.advantage_cases import DigitTokenizer, rollouts_that_earn

NAN = float("nan")


class ScriptedPool:
    """Gives the scores it was made with; NaN is an error."""

    def __init__(self, scores: list[float]) -> None:
        self.scores = scores
        self.seen: list[str] = []

    def score(self, responses: list[str], answers: list[str]) -> list[Grade]:
        self.seen = responses
        return [Grade(score, "timed out" if score != score else None) for score in self.scores]


class ScriptedEngine:
    def __init__(self, rollouts: Rollouts) -> None:
        self.rollouts = rollouts

    def generate(self, prompts, sampling, seeds) -> Rollouts:
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
    rewards = score_rollouts(rollouts, ["1", "1"], DigitTokenizer(), pool, "any", world)
    assert rewards.errors.tolist() == [[False, False, False, True], [False] * 4]
    assert rewards.matrix[0].tolist() == pytest.approx([1, 1, 0, 2 / 3])


def test_nothing_gradable_ends_the_run(world):
    rollouts = rollouts_that_earn(torch.zeros(1, 4))
    with pytest.raises(RunError, match="all 4 responses of the batch, for example: timed out"):
        score_rollouts(rollouts, ["1"], DigitTokenizer(), ScriptedPool([NAN] * 4), "any", world)


def test_an_ungradable_response_is_not_counted_as_solved(world):
    rollouts = rollouts_that_earn(torch.zeros(1, 4))
    metrics = evaluate(
        ScriptedEngine(rollouts), [[7]], ["1"], SamplingConfig(4, 1, 1.0, (2,)), [0],
        EvaluationConfig(num_samples=4, ks=(1,)), DigitTokenizer(), ScriptedPool([1, 1, NAN, NAN]), "any", world,
    )  # fmt: skip
    assert metrics["eval/heldout/pass@1"] == pytest.approx(0.5)
    assert metrics["eval/heldout/errors"] == 2


def test_boxed_only_hands_unboxed_text_on_as_no_answer(world):
    pool = ScriptedPool([0.0] * 4)
    score_rollouts(rollouts_that_earn(torch.ones(1, 4)), ["1"], DigitTokenizer(), pool, "boxed", world)
    assert pool.seen == [""] * 4
