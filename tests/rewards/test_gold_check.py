"""A prompt that asks for one form of answer and a grader that reads another are found before the run."""

import pytest
import torch.distributed as dist

from megatron_riskpo.errors import UsageError
from megatron_riskpo.rewards.gold_check import check_gold, gold_answers, spread, unasked_form
from megatron_riskpo.rewards.options import GraderOptions
from megatron_riskpo.rewards.pool import GraderPool
from megatron_riskpo.rewards.reference import Reference
from tests.sandboxes import needs_sandbox


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    store = dist.FileStore(str(tmp_path_factory.mktemp("store") / "s"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


def check(world, prompts: list[str], references: list[Reference], form: str = "any") -> None:
    graders = list({reference.grader for reference in references})
    answers = gold_answers(prompts, [f"my.jsonl:{i + 1}" for i in range(len(prompts))], references, form)
    with GraderPool(graders, 1, GraderOptions(answer_form=form)) as pool:
        check_gold(pool, answers, form, world)


def gold(prompt: str, reference: Reference, form: str) -> str:
    """The response that is taken for right, of a single prompt."""
    return gold_answers([prompt], ["here"], [reference], form)[0].response


@pytest.mark.parametrize(
    ("prompt", "response"),
    [
        ("2+5? Put the answer in \\boxed{}.", "\\boxed{7}"),
        ("2+5? End with #### and the answer.", "#### 7"),
        ("2+5? Answer in <answer></answer>.", "<answer>7</answer>"),
        ("2+5=", "\\boxed{7}"),
    ],
)
def test_the_prompt_says_how_a_right_response_looks(prompt: str, response: str):
    assert gold(prompt, Reference("7"), "any") == response


def test_without_a_hint_it_is_the_form_that_the_grader_reads():
    assert gold("2+5=", Reference("7"), "hash") == "#### 7"
    code = Reference("print(7)", "code", fields={"tests": []})
    assert gold("Print 7.", code, "boxed") == "```\nprint(7)\n```"
    template = Reference("x+1", "code", fields={"tests": [], "program_template": "{program}"})
    assert gold("1:2", template, "boxed") == "x+1"
    assert gold("1:2 #### or \\boxed{}", template, "boxed") == "x+1", "programs have their own"


def test_a_form_in_a_questions_own_text_is_not_asked_for():
    boxes = "Simplify $\\boxed{3}+4$."
    assert gold(f"{boxes} End with ####.", Reference("7"), "hash") == "#### 7"
    prompts = [boxes, "2+5=", "1+6="]
    given = gold_answers(prompts, ["", "", ""], [Reference("7")] * 3, "hash")
    assert [answer.response for answer in given] == ["#### 7"] * 3
    said = unasked_form(prompts, [Reference("7")] * 3, "hash")
    assert said is not None
    assert said.startswith("3 of 3 prompts do not name ####, and with rewards.answer_form = hash")
    assert unasked_form([f"{boxes} End with ####."], [Reference("7")], "hash") is None


def test_each_source_asks_in_its_own_form():
    prompts = ["1+6? In \\boxed{}.", "2+5? After ####.", "3+4? After ####."]
    sources = [Reference("7", source=name) for name in ("a", "b", "b")]
    given = gold_answers(prompts, ["", "", ""], sources, "any")
    assert [answer.response for answer in given] == ["\\boxed{7}", "#### 7", "#### 7"]


def test_agreement_passes(world):
    check(world, ["Box it: \\boxed{}", "then ####"], [Reference("\\frac{1}{2}"), Reference("12 cm")])
    check(world, ["#### please"], [Reference("7")], form="hash")


def test_the_prompt_asks_for_one_form_and_the_grader_reads_another(world):
    with pytest.raises(UsageError) as caught:
        check(world, ["End with #### and the answer."] * 5, [Reference(str(i)) for i in range(5)], form="boxed")
    message = str(caught.value)
    assert message.startswith("5 of 5 expected answers, given as the prompt asks for them, do not grade 1: ")
    assert "my.jsonl:1: '#### 0' gets 0 from math (answer form boxed); my.jsonl:2" in message
    assert "my.jsonl:4" not in message, "a few examples do"
    assert "; make the prompt ask for what the grader reads" in message
    assert "\n" not in message


def test_expected_answers_that_cannot_be_graded_stop_the_run(world):
    with pytest.raises(
        UsageError,
        match=r"1 of 2 .*my.jsonl:2: .*gets ValueError: the expected answer 'a lot' is no number.*; all were errors",
    ):
        check(world, ["?", "?"], [Reference("7", "numeric"), Reference("a lot", "numeric")])


@needs_sandbox
def test_wrong_tests_stop_the_run_and_programs_without_a_solution_are_left_out(world):
    right = {"tests": [{"input": "3", "output": "6"}]}
    wrong = {"tests": [{"input": "3", "output": "7"}]}
    program = "print(2 * int(input()))"
    check(world, ["?", "?"], [Reference(program, "code", fields=right), Reference("", "code", fields=wrong)])
    with pytest.raises(UsageError, match=r"1 of 1 expected answers, .* gets 0 from code"):
        check(world, ["?"], [Reference(program, "code", fields=wrong)])


@pytest.mark.parametrize(
    ("num", "limit", "expected"), [(3, 5, [0, 1, 2]), (10, 4, [0, 2, 5, 7]), (5, 5, [0, 1, 2, 3, 4])]
)
def test_the_checked_ones_are_spread_over_all(num: int, limit: int, expected: list[int]):
    assert spread(num, limit) == expected
