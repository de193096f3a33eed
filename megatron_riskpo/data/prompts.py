"""Questions as token ids."""

from collections.abc import Sequence
from string import Formatter
from typing import Any

from transformers import PreTrainedTokenizerBase

from megatron_riskpo.config import PromptConfig
from megatron_riskpo.data.prompt_config import load_prompt_config
from megatron_riskpo.data.questions import Question
from megatron_riskpo.errors import UsageError

Messages = list[dict[str, str]]


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


def prompt_messages(questions: Sequence[Question], config: PromptConfig) -> list[Messages]:
    """The chat messages of each question: by config.prompt_config, else the template's text as the user's message.

    Raises UsageError: a wrong template or file, or both at once.
    """
    if not config.prompt_config:
        check_template(config.prompt_template, "problem")
        texts = [prompt_text(question.problem, config.strip_prefix, config.prompt_template) for question in questions]
        return [[{"role": "user", "content": text}] for text in texts]
    if config.prompt_template != PromptConfig.prompt_template:
        raise UsageError(
            f"data.prompt_config = {config.prompt_config} and data.prompt_template are both set; take one of them out"
        )
    prompt = load_prompt_config(config.prompt_config)
    return [
        prompt.messages({**question.fields, "problem": question.problem.removeprefix(config.strip_prefix)})
        for question in questions
    ]


def encode_all(
    questions: Sequence[Question], tokenizer: PreTrainedTokenizerBase, config: PromptConfig
) -> list[list[int]]:
    """Token ids of each question's prompt, whatever its length.

    With config.chat_template through the tokenizer's template; without it the messages' texts, a blank line between
    them. Raises UsageError: see prompt_messages; or no chat template.
    """
    if config.chat_template and tokenizer.chat_template is None:
        raise UsageError("data.chat_template is true, but the tokenizer has no chat template; set it to false")
    messages = prompt_messages(questions, config)
    if config.chat_template:
        return [_chat_ids(own, tokenizer) for own in messages]
    return _plain_ids(["\n\n".join(message["content"] for message in own) for own in messages], tokenizer)


def encode_prompts(
    questions: Sequence[Question], tokenizer: PreTrainedTokenizerBase, config: PromptConfig
) -> tuple[list[list[int]], list[int]]:
    """(token ids of each prompt, the index of its question): prompts over max_prompt_tokens are left out, so
    len(questions) - len(ids) were. Raises UsageError: see encode_all; or no prompt is left.
    """
    prompts = encode_all(questions, tokenizer, config)
    kept = [index for index, ids in enumerate(prompts) if 0 < len(ids) <= config.max_prompt_tokens]
    if prompts and not kept:
        raise UsageError(
            f"all {len(prompts)} prompts are longer than data.max_prompt_tokens = {config.max_prompt_tokens} "
            f"(the shortest has {min(map(len, prompts))} tokens); raise it"
        )
    return [prompts[index] for index in kept], kept


def _plain_ids(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    return [list(ids) for ids in tokenizer(texts)["input_ids"]] if texts else []


def _chat_ids(messages: Messages, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    ids: Any = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False)
    return list(ids)
