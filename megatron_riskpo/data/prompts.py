"""Questions as token ids."""

from collections.abc import Sequence
from string import Formatter
from typing import Any

from transformers import PreTrainedTokenizerBase

from megatron_riskpo.config import DataConfig
from megatron_riskpo.data.questions import Question
from megatron_riskpo.errors import UsageError


def check_template(template: str, field: str) -> None:
    """Raise UsageError unless {field} occurs, and nothing else in single braces."""
    try:
        parts = [(name, spec, conversion) for _, name, spec, conversion in Formatter().parse(template)]
    except ValueError as error:
        raise UsageError(f"template {template!r}: {error}; write single braces twice: {{{{ and }}}}") from error
    fields = [part for part in parts if part[0] is not None]
    if not fields or any(part != (field, "", None) for part in fields):
        found = ", ".join(f"{{{name}}}" for name, _, _ in fields) or "no field"
        raise UsageError(f"template {template!r} has {found}; it needs {{{field}}} alone, other braces twice")


def prompt_text(problem: str, strip_prefix: str, template: str) -> str:
    """The problem, without the prefix if it has it, in the (checked) template."""
    return template.format(problem=problem.removeprefix(strip_prefix))


def encode_prompts(
    questions: Sequence[Question], tokenizer: PreTrainedTokenizerBase, config: DataConfig
) -> tuple[list[list[int]], list[int]]:
    """(token ids of each prompt, the index of its question): prompts over max_prompt_tokens are left out, so
    len(questions) - len(ids) were. Raises UsageError: wrong template, no chat template, or no prompt is left.
    """
    check_template(config.prompt_template, "problem")
    texts = [prompt_text(question.problem, config.strip_prefix, config.prompt_template) for question in questions]
    if config.chat_template and tokenizer.chat_template is None:
        raise UsageError("data.chat_template is true, but the tokenizer has no chat template; set it to false")
    prompts = [_chat_ids(text, tokenizer) for text in texts] if config.chat_template else _plain_ids(texts, tokenizer)
    kept = [index for index, ids in enumerate(prompts) if 0 < len(ids) <= config.max_prompt_tokens]
    if prompts and not kept:
        raise UsageError(
            f"all {len(prompts)} prompts are longer than data.max_prompt_tokens = {config.max_prompt_tokens} "
            f"(the shortest has {min(map(len, prompts))} tokens); raise it"
        )
    return [prompts[index] for index in kept], kept


def _plain_ids(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    return [list(ids) for ids in tokenizer(texts)["input_ids"]] if texts else []


def _chat_ids(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    message = [{"role": "user", "content": text}]
    ids: Any = tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=True, return_dict=False)
    return list(ids)
