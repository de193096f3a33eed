"""nemo-skills' prompt files: filled by hand here, and every mistake in them."""

from pathlib import Path

import pytest

from megatron_riskpo.config import DataConfig
from megatron_riskpo.data.prompts import prompt_messages
from megatron_riskpo.data.questions import Question
from megatron_riskpo.errors import UsageError

QUESTION = Question("Say: {x}?", "1", "here", fields={"topic": "sums"})
FEW_SHOT = r"""
system: Use {braces} as you like.
user: |-
  {examples}About {topic}, in \boxed{{}}:
  {problem}
few_shot_examples:
  prefix: "Examples:\n"
  template: "Q {problem} A {solution}\n"
  suffix: "Now:\n"
  examples:
    - {problem: "1", solution: "one"}
    - {problem: "2", solution: "two"}
"""


def messages(tmp_path: Path, text: str, **options) -> list[dict[str, str]]:
    path = tmp_path / "prompt.yaml"
    path.write_text(text)
    return prompt_messages([QUESTION], DataConfig(prompt_config=str(path), **options))[0]


def test_system_stays_as_it_is_and_user_is_filled(tmp_path: Path):
    assert messages(tmp_path, FEW_SHOT, strip_prefix="Say: ") == [
        {"role": "system", "content": "Use {braces} as you like."},
        {
            "role": "user",
            "content": "Examples:\nQ 1 A one\nQ 2 A two\nNow:\nAbout sums, in \\boxed{}:\n{x}?",
        },
    ]


def test_user_alone_is_enough(tmp_path: Path):
    assert messages(tmp_path, "user: '{problem}'") == [{"role": "user", "content": "Say: {x}?"}]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("user: [", "is no YAML"),
        ("system: x", "has no text `user`"),
        ("user: '{problem} {answer}'", r"asks for {answer}, which the question 'Say: {x}\?' has not"),
        ("user: '{problem} \\boxed{'", "write single braces twice"),
        ("user: '{problem}'\nsystem: [1]", "`system` is no text"),
        ("user: '{problem}'\nfew_shot_examples: {examples: [1]}", "must be a list of tables"),
        ("user: '{problem}'\nfew_shot_examples: {shots: 3}", "may have prefix, template, suffix, examples alone"),
        ("user: '{problem}'\nfew_shot_examples: {template: '{q}', examples: [{a: 1}]}", "template asks for 'q'"),
        ("user: !!python/object/apply:os.getcwd []", "is no YAML"),
    ],
)
def test_mistakes_are_usage_errors(tmp_path: Path, text: str, message: str):
    with pytest.raises(UsageError, match=message):
        messages(tmp_path, text)


def test_two_prompts_at_once_are_refused(tmp_path: Path):
    with pytest.raises(UsageError, match="are both set"):
        messages(tmp_path, "user: '{problem}'", prompt_template="{problem}!")
    with pytest.raises(UsageError, match="no such file"):
        prompt_messages([QUESTION], DataConfig(prompt_config=str(tmp_path / "absent.yaml")))
