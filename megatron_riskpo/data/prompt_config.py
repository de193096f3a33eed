"""Prompts in nemo-skills' form: a YAML file with `user`, and perhaps `system` and `few_shot_examples`."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from megatron_riskpo.errors import UsageError

EXAMPLE_FIELDS = ("prefix", "template", "suffix", "examples")


@dataclass(frozen=True)
class ChatPrompt:
    """What a question's fields are filled into."""

    path: str
    """The file, for errors."""
    user: str
    """Filled by str.format with the question's fields and {examples}; braces of its own stand twice."""
    system: str | None = None
    """Sent as it is."""
    examples: str = ""
    """The few-shot examples, filled."""

    def messages(self, fields: Mapping[str, Any]) -> list[dict[str, str]]:
        """The chat messages of one question. Raises UsageError that names a field which the question lacks."""
        try:
            user = self.user.format(**{"examples": self.examples, **fields})
        except KeyError as error:
            raise UsageError(
                f"{self.path}: `user` asks for {{{error.args[0]}}}, which the question "
                f"{fields.get('problem', '')!r:.60} has not (it has: {', '.join(fields)})"
            ) from error
        except (ValueError, IndexError) as error:
            raise UsageError(f"{self.path}: `user`: {error}; write single braces twice: {{{{ and }}}}") from error
        system = [{"role": "system", "content": self.system}] if self.system else []
        return [*system, {"role": "user", "content": user}]


def load_prompt_config(path: str) -> ChatPrompt:
    """Raises UsageError: no such file, no YAML, no `user`, few-shot examples that do not fill their template."""
    try:
        # safe_load: a YAML file can otherwise name Python objects to make.
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(f"data.prompt_config = {path}: no such file") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"data.prompt_config = {path} is no YAML: {' '.join(str(error).split())[:200]}") from error
    if not isinstance(content, dict) or not isinstance(content.get("user"), str):
        raise UsageError(f"data.prompt_config = {path} has no text `user`; it needs one, with {{problem}} in it")
    system = content.get("system")
    if system is not None and not isinstance(system, str):
        raise UsageError(f"data.prompt_config = {path}: `system` is no text but {system!r:.60}")
    return ChatPrompt(path, content["user"], system, _examples(content.get("few_shot_examples"), path))


def _examples(block: Any, path: str) -> str:
    """prefix, the template filled with each example, suffix."""
    if block is None:
        return ""
    if not isinstance(block, dict) or block.keys() - set(EXAMPLE_FIELDS):
        raise UsageError(f"data.prompt_config = {path}: few_shot_examples may have {', '.join(EXAMPLE_FIELDS)} alone")
    examples = block.get("examples") or []
    if not isinstance(examples, list) or not all(isinstance(example, dict) for example in examples):
        raise UsageError(f"data.prompt_config = {path}: few_shot_examples.examples must be a list of tables of fields")
    if not examples:
        return ""
    try:
        filled = [str(block.get("template", "")).format(**example) for example in examples]
    except (KeyError, ValueError, IndexError) as error:
        raise UsageError(f"data.prompt_config = {path}: few_shot_examples.template asks for {error}") from error
    return f"{block.get('prefix', '')}{''.join(filled)}{block.get('suffix', '')}"
