"""`riskpo data prepare`: its arguments. Imports nothing heavy before it is needed."""

import argparse
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_riskpo.errors import UsageError, check_out_file

_GYM_PREFIX = "reasoning_gym:"


def add_data(commands: Any) -> None:
    """Add the command to argparse's subparsers."""
    text = "Make question files."
    actions = commands.add_parser("data", help=text, description=text).add_subparsers(
        dest="action", required=True, metavar="ACTION"
    )
    text = "A published data set, or a reasoning-gym task, as a JSONL question file; says what was left out."
    prepare = actions.add_parser("prepare", help=text, description=text)
    prepare.add_argument("name", metavar="NAME", help="gsm8k, math, dapo_math_17k ..., or reasoning_gym:TASK")
    prepare.add_argument("--out", type=Path, required=True, metavar="FILE.jsonl", help="the question file to write")
    prepare.add_argument("--from", dest="files", type=Path, nargs="+", default=[], metavar="FILE",
                         help="local .parquet, .jsonl or .json files as published; without, the hub")  # fmt: skip
    prepare.add_argument("--split", help="of the hub's data set")
    prepare.add_argument("--exclude", type=Path, nargs="+", default=[], metavar="FILE",
                         help="question files whose questions are left out, however typeset")  # fmt: skip
    prepare.add_argument("--tokenizer", type=Path, metavar="DIR", help="with --max-prompt-tokens: counts by it")
    prepare.add_argument("--max-prompt-tokens", type=int, metavar="N", help="leave longer prompts out")
    prepare.add_argument("--config", metavar="FILE.toml",
                         help="with --max-prompt-tokens: counts a run's prompts; without, bare problems")  # fmt: skip
    prepare.add_argument("--size", type=int, default=1000, metavar="N", help="questions of a task (1000)")
    prepare.add_argument("--seed", type=int, default=1234, metavar="S", help="of a task (1234)")
    prepare.add_argument("--level", type=int, metavar="L", help="of a task's curriculum, 0 the easiest")
    prepare.add_argument("--options", nargs="+", default=[], metavar="NAME=VALUE", help="options of a task")
    prepare.add_argument("--held-out", action="store_true",
                         help="of a task: the questions that runs never train on, for evaluations")  # fmt: skip


def run_data(args: argparse.Namespace, arguments: list[str]) -> int:
    """Write the file, print the counts; the exit code."""
    if (args.tokenizer is None) != (args.max_prompt_tokens is None):
        raise UsageError("--tokenizer and --max-prompt-tokens go together; give both or none")
    if args.config is not None and args.tokenizer is None:
        raise UsageError("--config says what --max-prompt-tokens counts; give --tokenizer and --max-prompt-tokens, too")
    _check_target(args)
    from megatron_riskpo.config import PromptConfig, TrainConfig
    from megatron_riskpo.config_io import load_config
    from megatron_riskpo.data.prepare.checks import Tally
    from megatron_riskpo.data.prepare.prepare import Limits, checked, published_entries, write_questions

    tally = Tally()
    if args.name.startswith(_GYM_PREFIX):
        entries, name = _task_entries(args), args.name.removeprefix(_GYM_PREFIX)
    else:
        entries, name = published_entries(args.name, args.files, args.split, tally), args.name
    prompt = load_config(TrainConfig, args.config).data if args.config is not None else PromptConfig()
    limits = Limits(tuple(args.exclude), args.tokenizer, prompt, args.max_prompt_tokens or 0)
    kept = checked(entries, limits, tally)
    write_questions(args.out, name, kept)
    print(f"{args.name}: {len(kept) + tally.counts.total()} rows, {len(kept)} questions in {args.out}")
    for line in tally.lines():
        print(line)
    if args.tokenizer is not None and args.config is None:
        print("--max-prompt-tokens counted bare problems; a run counts prompts with their template: --config FILE.toml")
    return 0


def _check_target(args: argparse.Namespace) -> None:
    check_out_file(args.out)
    read = [file for file in (*(args.files or ()), *args.exclude) if file.resolve() == args.out.resolve()]
    if read:
        raise UsageError(f"--out {args.out} would overwrite {read[0]}, which is read; choose another file")


def _task_entries(args: argparse.Namespace) -> list[dict[str, Any]]:
    from megatron_riskpo.data.prepare.tasks import gym_entries

    if args.files:
        raise UsageError(f"{args.name} is a task, which makes its questions; take --from out")
    if args.size < 1 or args.seed < 0:
        raise UsageError(f"--size {args.size} --seed {args.seed}: the size must be >= 1, the seed >= 0")
    name = args.name.removeprefix(_GYM_PREFIX)
    return gym_entries(name, args.size, args.seed, args.level, _options(args.options), args.held_out)


def _options(words: Sequence[str]) -> dict[str, Any]:
    """NAME=VALUE pairs; a value is a TOML number, true or false, else a text."""
    options = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not equals:
            raise UsageError(f"--options {word!r} is not NAME=VALUE")
        try:
            options[name] = tomllib.loads(f"value = {value}")["value"]
        except tomllib.TOMLDecodeError:
            options[name] = value
    return options
