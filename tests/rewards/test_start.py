"""The pool of a run as `riskpo train` starts it."""

import contextlib

import pytest
import torch.distributed as dist

from megatron_riskpo.config import DataConfig, RewardConfig, TrainConfig
from megatron_riskpo.data.sources import Question
from megatron_riskpo.errors import UsageError
from megatron_riskpo.rewards.from_config import references_of
from megatron_riskpo.rewards.start import started_pool

SUMS = [Question(f"{n}+1=", str(n + 1), f"sums.jsonl:{n}", data_source="sums") for n in range(20)]
TESTS = {"tests": [{"input": "1", "output": "2"}], "grader": "code"}
PROGRAM = Question(
    "Print the next number.", "print(1 + int(input()))", "code.jsonl:1", data_source="code", fields=TESTS
)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    store = dist.FileStore(str(tmp_path_factory.mktemp("store") / "s"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


def start(questions: list[Question], config: TrainConfig, world) -> list[str]:
    """What is said."""
    lines: list[str] = []
    pairs = list(zip(questions, references_of(questions, config.rewards), strict=True))
    with contextlib.ExitStack() as stack:
        started_pool(config, pairs, world, lines.append, stack)
    return lines


def test_a_prompt_that_asks_for_what_the_grader_does_not_read_stops_the_run(world):
    data = DataConfig(prompt_template="{problem} End with #### and the answer.")
    with pytest.raises(UsageError, match=r"^5 of 5 expected .*sums.jsonl:0: '#### 1' gets 0 from math"):
        start(SUMS, TrainConfig(data=data, rewards=RewardConfig(answer_form="boxed", gold_checks=5)), world)
    start(SUMS, TrainConfig(data=data, rewards=RewardConfig(answer_form="boxed", gold_checks=0)), world)
    start(SUMS, TrainConfig(data=data, rewards=RewardConfig(answer_form="hash")), world)


def test_a_system_message_may_be_what_asks_for_the_form(world, tmp_path):
    (tmp_path / "boxed.yaml").write_text('system: "Put the answer within \\\\boxed{{}}."\nuser: "{problem}"\n')
    data = DataConfig(prompt_config=str(tmp_path / "boxed.yaml"))
    with pytest.raises(UsageError, match=r"20 of 20 expected .*boxed.* gets 0 from math"):
        start(SUMS, TrainConfig(data=data, rewards=RewardConfig(answer_form="hash", gold_checks=20)), world)
    start(SUMS, TrainConfig(data=data, rewards=RewardConfig(answer_form="boxed")), world)


def test_a_prompt_that_asks_in_words_is_said_where_one_form_counts(world):
    data = DataConfig(prompt_template="{problem} Put the answer into a box.")
    boxed = RewardConfig(answer_form="boxed", gold_checks=5)
    (line,) = start(SUMS, TrainConfig(data=data, rewards=boxed), world)
    assert line.startswith("warning: 5 of 5 prompts do not name \\boxed, and with ")
    assert "rewards.answer_form = boxed only \\boxed{ANSWER} is an answer: unless the model has learned it" in line
    assert line.endswith("for example '0+1= Put the answer into a box.'")
    assert start(SUMS, TrainConfig(data=data), world) == [], "any form counts"
    asks = DataConfig(prompt_template="{problem} Put the answer into \\boxed{{}}.")
    assert start(SUMS, TrainConfig(data=asks, rewards=boxed), world) == []


def test_only_questions_with_programs_need_a_sandbox(world, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PATH", "/nowhere")  # the workers look for bwrap there
    start(SUMS, TrainConfig(), world)
    with pytest.raises(
        UsageError,
        match=r"code cannot be used: programs .* no working sandbox .*: bubblewrap .* is not installed; install",
    ):
        start([*SUMS, PROGRAM], TrainConfig(), world)


def test_a_users_grader_that_is_not_there_stops_the_run(world):
    with pytest.raises(UsageError, match=r"the grader no\.such:grade cannot be used"):
        start(SUMS, TrainConfig(rewards=RewardConfig(grader="no.such:grade")), world)
