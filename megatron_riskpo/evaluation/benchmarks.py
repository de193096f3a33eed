"""The question files of an evaluation."""

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from megatron_riskpo.config import PromptConfig
from megatron_riskpo.data.prompts import encode_all
from megatron_riskpo.data.sources import Question, read_source
from megatron_riskpo.errors import UsageError
from megatron_riskpo.evaluation.outputs import Line, read_lines


@dataclass(frozen=True)
class Benchmark:
    """One question file, ready to be asked."""

    name: str
    """The file's name without its ending."""
    lines: list[Line]
    """The questions' own fields, which go to the outputs; each has an `id`."""
    questions: list[Question]
    prompts: list[list[int]]
    """Token ids."""
    digest: str
    """SHA-256 of the file."""


def load_benchmarks(
    files: Sequence[Path], tokenizer: PreTrainedTokenizerBase, config: PromptConfig
) -> dict[str, Benchmark]:
    """By name, in order. Raises UsageError: two files of one name, an id twice, a prompt over max_prompt_tokens, or
    what read_source raises."""
    names = Counter(file.stem for file in files)
    twice = [name for name, count in names.items() if count > 1]
    if twice:
        raise UsageError(f"{names[twice[0]]} files are named {twice[0]}; outputs are kept apart by name: rename one")
    return {file.stem: _load(file, tokenizer, config) for file in files}


def _load(file: Path, tokenizer: PreTrainedTokenizerBase, config: PromptConfig) -> Benchmark:
    questions = read_source(str(file), size=0, seed=0, options={})
    lines = [{"id": f"{file.stem}-{index}", **line} for index, line in enumerate(read_lines(file))]
    identifier, count = Counter(str(line["id"]) for line in lines).most_common(1)[0]
    if count > 1:
        raise UsageError(f"{file} has the id {identifier!r:.60} {count} times; every question needs an id of its own")
    prompts = encode_all(questions, tokenizer, config)
    longest = max(map(len, prompts))
    if longest > config.max_prompt_tokens:
        num_long = sum(len(prompt) > config.max_prompt_tokens for prompt in prompts)
        raise UsageError(
            f"{num_long} of {len(prompts)} prompts of {file} are longer than data.max_prompt_tokens = "
            f"{config.max_prompt_tokens}; set it to {longest}: an evaluation leaves no question out"
        )
    with file.open("rb") as content:
        digest = hashlib.file_digest(content, "sha256").hexdigest()
    return Benchmark(file.stem, lines, questions, prompts, digest)
