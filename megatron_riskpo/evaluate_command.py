"""`riskpo evaluate`: its arguments. Imports nothing heavy before it is needed."""

import argparse
import sys
from pathlib import Path
from typing import Any

from megatron_riskpo.collector import lasting_imports
from megatron_riskpo.distributed.launch import die_with_launcher, launch, process_env
from megatron_riskpo.distributed.signals import StopSignal
from megatron_riskpo.errors import UsageError, check_out_folder

_EPILOG = """Options of a run follow in its form, --section.key value: for example --rollout.max_response_tokens 1024,
--data.chat_template true, --rewards.answer_form boxed, --evaluation.temperature 0.6, --run.ranks 8. A run folder's own
are the defaults. SIGTERM, SIGINT (Ctrl-C) and SIGUSR1 end it after the batch under way; the same command goes on."""


def add_evaluate(commands: Any) -> None:
    """Add the command to argparse's subparsers."""
    text = "Ask a model questions n times each; pass@k, avg@n, majority@k with 95 % intervals, nemo-skills' files."
    command = commands.add_parser("evaluate", help=text, description=text, epilog=_EPILOG)
    command.add_argument("--model", type=Path, metavar="DIR", help="a Hugging Face model folder, or a run (its hf/)")
    command.add_argument(
        "--data", type=Path, nargs="+", metavar="FILE", help="JSONL question files, one engine for all"
    )
    command.add_argument("--num-samples", type=int, metavar="N", help="answers a question (1)")
    command.add_argument("--seed", type=int, metavar="S", help="seeds of the samples: S .. S + N - 1 (0)")
    command.add_argument(
        "--out", type=Path, metavar="DIR", help="folder of the results (evaluations/NAME, or RUN/evaluation)"
    )
    command.add_argument(
        "--server", dest="servers", nargs="+", default=[], metavar="URL",
        help="ask these servers (riskpo serve), which hold the model, in place of vLLM in this process",
    )  # fmt: skip
    command.add_argument("--from", dest="source", type=Path, metavar="DIR",
                         help="ask nothing; sum up the outputs in DIR, ours or nemo-skills', or a run's")  # fmt: skip
    command.add_argument("overrides", nargs="*", metavar="--section.key value", help="options of the run")


def overrides_last(arguments: list[str]) -> list[str]:
    """The command's arguments with its --section.key value pairs at the end, where argparse leaves them alone: behind a
    `--`, or where there is an argument before the flags, behind an option of their own."""
    separators = {"evaluate": "--", "slurm": "--overrides"}
    separator = separators.get(arguments[0]) if arguments else None
    if separator is None or separator in arguments:
        return arguments
    plain, overrides, target = [], [], None
    for token in arguments:
        if token.startswith("--"):
            target = overrides if "." in token.partition("=")[0] else plain
        (plain if target is None else target).append(token)
    return [*plain, separator, *overrides]


def run_evaluate(args: argparse.Namespace, arguments: list[str]) -> int:
    """One evaluation, or the summary of one; the exit code."""
    if args.source is not None:
        return _summarize(args)
    if args.model is None or not args.data:
        raise UsageError("an evaluation needs --model DIR and --data FILE (or --from DIR for outputs that are there)")
    num_samples, seed = _checked_numbers(args)
    missing = [str(file) for file in args.data if not file.is_file()]
    if missing:
        raise UsageError(f"no question file {missing[0]}; riskpo data prepare makes one")
    out = args.out or _default_out(args.model)
    check_out_folder(out)
    die_with_launcher()
    stop = StopSignal.install()
    env = process_env()

    with lasting_imports():
        from megatron_riskpo.evaluation.options import load_options

    config = load_options(args.model, num_samples, args.overrides, args.servers)
    if env is None:
        return launch([sys.executable, "-m", "megatron_riskpo.cli", *arguments], config.run.ranks or config.rollout.tp)

    with lasting_imports():
        from megatron_riskpo.evaluation.run import run_evaluation

    return run_evaluation(config, args.data, out, seed, env, stop)


def _summarize(args: argparse.Namespace) -> int:
    numbers = (args.num_samples, args.seed)
    if args.model or args.data or args.servers or args.overrides or numbers != (None, None):
        raise UsageError("--from sums up outputs that are there; of the other options only --out goes with it")

    if args.out is not None:
        check_out_folder(args.out)

    from megatron_riskpo.evaluation.outputs import evaluation_of
    from megatron_riskpo.evaluation.run import conclude

    conclude(evaluation_of(args.source), args.out)
    return 0


def _checked_numbers(args: argparse.Namespace) -> tuple[int, int]:
    """Samples a question and the first seed, 1 and 0 where they were not given."""
    num_samples = 1 if args.num_samples is None else args.num_samples
    seed = 0 if args.seed is None else args.seed
    if num_samples < 1:
        raise UsageError(f"--num-samples {num_samples} is out of range; it must be >= 1")
    if seed < 0:
        raise UsageError(f"--seed {seed} is out of range; it must be >= 0")
    return num_samples, seed


def _default_out(model: Path) -> Path:
    """Beside a run's other results; a model folder may be somebody else's."""
    return model / "evaluation" if (model / "hf").is_dir() else Path("evaluations") / model.resolve().name
