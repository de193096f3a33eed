"""Prompts: template, chat template, and the length limit."""

from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerBase

from megatron_riskpo.config import DataConfig
from megatron_riskpo.data.prompts import encode_prompts
from megatron_riskpo.data.questions import Question
from megatron_riskpo.data.tokenizer import load_tokenizer, train_sentencepiece
from megatron_riskpo.errors import UsageError

QUESTIONS = [Question(problem, "1", "here") for problem in ("1 + 1", "{x} + 2", "1 + " * 20 + "1", "3")]
TEMPLATE = "Solve {problem}, box it: \\boxed{{}}"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    path = tmp_path_factory.mktemp("spm") / "tokenizer.model"
    train_sentencepiece([TEMPLATE, "user: assistant 0123456789 + - {x}"] * 20, path, 64)
    return load_tokenizer(path)


def encode(questions, tokenizer, template, chat_template, max_tokens, strip_prefix=""):
    config = DataConfig(
        prompt_template=template, chat_template=chat_template, max_prompt_tokens=max_tokens, strip_prefix=strip_prefix
    )
    return encode_prompts(questions, tokenizer, config)


def test_prefix_is_stripped_where_it_stands(tokenizer: PreTrainedTokenizerBase):
    prompts, _ = encode(QUESTIONS, tokenizer, "{problem}", False, 100, strip_prefix="1 + ")
    assert [tokenizer.decode(ids) for ids in prompts] == ["1", "{x} + 2", "1 + " * 19 + "1", "3"]


def test_prompts_are_the_filled_template_and_long_ones_are_left_out(tokenizer: PreTrainedTokenizerBase):
    prompts, kept = encode(QUESTIONS, tokenizer, TEMPLATE, False, 40)
    assert kept == [0, 1, 3]
    assert [tokenizer.decode(ids) for ids in prompts] == [
        f"Solve {problem}, box it: \\boxed{{}}" for problem in ("1 + 1", "{x} + 2", "3")
    ]
    longest = max(map(len, prompts))
    assert encode(QUESTIONS, tokenizer, TEMPLATE, False, longest)[1] == kept
    assert len(encode(QUESTIONS, tokenizer, TEMPLATE, False, longest - 1)[1]) < 3
    assert encode([], tokenizer, TEMPLATE, False, 1) == ([], [])


def test_all_too_long_is_an_error_with_the_numbers(tokenizer: PreTrainedTokenizerBase):
    with pytest.raises(UsageError, match=r"all 4 prompts .*max_prompt_tokens = 2 \(the shortest has \d+ tokens\)"):
        encode(QUESTIONS, tokenizer, TEMPLATE, False, 2)


@pytest.mark.parametrize(
    "template",
    ["no field", "{question}", "{problem} \\boxed{}", "{problem", "{problem!r}", "{problem:>9}", "{problem[0]}"],
)
def test_a_wrong_template_is_refused(tokenizer: PreTrainedTokenizerBase, template: str):
    with pytest.raises(UsageError, match="template"):
        encode(QUESTIONS, tokenizer, template, False, 100)


def test_chat_template(tokenizer: PreTrainedTokenizerBase, tmp_path: Path):
    with pytest.raises(UsageError, match="no chat template"):
        encode(QUESTIONS, tokenizer, "{problem}", True, 100)
    tokenizer.save_pretrained(tmp_path)
    chatty = load_tokenizer(tmp_path)
    chatty.chat_template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %} assistant{% endif %}"
    )
    prompts, _ = encode(QUESTIONS[:1], chatty, "{problem}", True, 100)
    assert chatty.decode(prompts[0]) == "user: 1 + 1 assistant"
