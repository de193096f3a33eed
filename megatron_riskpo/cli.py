"""The command line: riskpo train | sft | evaluate | compare | data | plan | doctor | report | checkpoint | convert |
serve | slurm. Imports nothing heavy before it is needed, so that wrong input is answered at once and signal handlers
stand before torch is loaded."""

import argparse
import errno
import sys
import traceback
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from megatron_riskpo import __version__
from megatron_riskpo.collector import lasting_imports
from megatron_riskpo.compare_command import add_compare, run_compare
from megatron_riskpo.convert_command import add_convert, run_convert
from megatron_riskpo.data_command import add_data, run_data
from megatron_riskpo.distributed.launch import RankEnv, die_with_launcher, launch, process_env, report_error
from megatron_riskpo.distributed.leave import leave
from megatron_riskpo.distributed.signals import StopSignal
from megatron_riskpo.doctor_command import add_doctor, run_doctor
from megatron_riskpo.errors import RiskpoError, UsageError, check_out_file, one_line
from megatron_riskpo.evaluate_command import add_evaluate, overrides_last, run_evaluate
from megatron_riskpo.plan_command import add_plan, run_plan
from megatron_riskpo.serve_command import add_serve, run_serve
from megatron_riskpo.slurm_command import add_slurm, run_slurm

if TYPE_CHECKING:
    from megatron_riskpo.config import TrainConfig
    from megatron_riskpo.config_sft import SftConfig

_REGISTRY_OPTIONS = ("--algorithm.estimator", "--algorithm.spectrum", "--loss.kind")

_OVERRIDES_HELP = (
    "change options of the file: --section.key value, for example --actor.tp 2 --data.options.max_terms 3; "
    "--help after the file lists all options with their meaning"
)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; see {self.prog} --help")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit code: 0 done or cleanly stopped, 1 failed, 2 bad input, 130 interrupted."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    # By hand: argparse would leave the flag to the overrides when it stands behind the file.
    debug = "--debug" in arguments
    plain = [argument for argument in arguments if argument != "--debug"]
    try:
        registry = _registry_asked_for(plain)
        if registry:
            return _print_registry(registry)
        args = _parser().parse_args(overrides_last(plain))
        return _COMMANDS[args.command](args, arguments)
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        if debug:
            traceback.print_exc()
        message, code = explain(error)
        report_error(message, code, expected=isinstance(error, RiskpoError) or _disk_full(error) is not None)
        return code


def explain(error: Exception) -> tuple[str, int]:
    """One line for the user, and the exit code."""
    if isinstance(error, RiskpoError):
        return one_line(error), error.exit_code
    full = _disk_full(error)
    if full is not None:
        where = f" while writing {full.filename}" if isinstance(full, OSError) and full.filename else ""
        return f"no space left on device{where}: {one_line(error)}; free space or set run.dir to another disk", 1
    return f"{type(error).__name__}: {one_line(error)} (use --debug for the traceback)", 1


def _disk_full(error: BaseException) -> BaseException | None:
    """The error in the chain of causes that says that the disk, or the user's quota, is full."""
    for cause in _causes(error):
        if isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT):
            return cause
        # safetensors (Rust) and torch.save (C++) carry the number or the text only.
        if "No space left on device" in str(cause) or "(os error 28)" in str(cause):
            return cause
    return None


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="riskpo", description="Risk-based RL post-training (RiskPO) on Megatron-Core and vLLM.")
    parser.add_argument("--version", action="version", version=f"megatron-riskpo {__version__}")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    signals = "SIGTERM, SIGINT (Ctrl-C) and SIGUSR1 end the run cleanly"
    for name, text, ending in (
        ("train", "Train a model by RL with verifiable rewards.", "checkpoint, exit code 0"),
        ("sft", "Warm-start a model on solved examples: the base model of an RL run.", "no model, exit code 1"),
    ):
        command = commands.add_parser(
            name,
            help=text,
            description=f"{text} Bare, it starts its own ranks on this machine; under torchrun or srun it uses those.",
            epilog=f"{signals}: {ending}.",
        )
        command.add_argument("config", metavar="X.toml", help="configuration file (examples/ has commented ones)")
        command.add_argument("overrides", metavar="...", nargs=argparse.REMAINDER, help=_OVERRIDES_HELP)
    text = "Write report.html (curves and tables, one file) into a run folder, or compare the speed of several runs."
    report = commands.add_parser("report", help=text, description=text)
    report.add_argument(
        "run_dirs", metavar="RUN_DIR", type=Path, nargs="+", help="a run folder, for example runs/quickstart"
    )
    report.add_argument(
        "--scaling", action="store_true", help="tokens/s a rank, MFU, phases of all RUN_DIRs: a table and a page"
    )
    report.add_argument("--out", type=Path, metavar="FILE", help="where --scaling writes its page; ./scaling.html")
    _add_checkpoint_parser(commands)
    add_convert(commands)
    add_plan(commands, _OVERRIDES_HELP)
    add_doctor(commands, _OVERRIDES_HELP)
    add_serve(commands, _OVERRIDES_HELP)
    add_slurm(commands)
    add_evaluate(commands)
    add_compare(commands)
    add_data(commands)
    return parser


def _add_checkpoint_parser(commands: Any) -> None:
    text = "List, verify or delete the training checkpoints of a run folder."
    actions = commands.add_parser("checkpoint", help=text, description=text).add_subparsers(
        dest="action", required=True, metavar="ACTION"
    )
    parsers = {}
    for name, text in (
        ("ls", "Show step, size, layout, state and date of each checkpoint, by manifests and file sizes."),
        ("verify", "Read all checksums and name every missing, truncated or changed file (exit code 1)."),
        ("prune", "Delete the checkpoints older than the newest N whole ones, oldest first. The newest that verifies "
                  "stays, as does what the run's checkpoint.keep_every and keep_best keep."),
    ):  # fmt: skip
        parsers[name] = actions.add_parser(name, help=text, description=text)
        parsers[name].add_argument(
            "run_dir", metavar="RUN", type=Path, help="a run folder, for example runs/quickstart"
        )
    parsers["verify"].add_argument("--step", type=int, metavar="N", help="only the checkpoint of step N")
    parsers["prune"].add_argument("--keep", type=int, metavar="N", required=True, help="newest checkpoints kept")
    parsers["prune"].add_argument("--dry-run", action="store_true", help="say what would be deleted, delete nothing")


def _run(args: argparse.Namespace, arguments: list[str]) -> int:
    """`train` and `sft`: as a rank, do it; bare, check the configuration and start the ranks."""
    die_with_launcher()
    stop = StopSignal.install()
    env = process_env()
    with lasting_imports():
        config, world_size = _checked_train(args, env) if args.command == "train" else _checked_sft(args, env)
    if stop.received:
        print(f"stopped by {stop.received.name} before the run had begun; nothing was written", file=sys.stderr)
        return 128 + stop.received
    if env is None:
        return launch([sys.executable, "-m", "megatron_riskpo.cli", *arguments], world_size)
    if args.command == "train":
        with lasting_imports():
            from megatron_riskpo.train import run_training
        return run_training(config, env, stop)
    with lasting_imports():
        from megatron_riskpo.sft import run_sft
    return run_sft(config, env, stop)


def _checked_train(args: argparse.Namespace, env: RankEnv | None) -> tuple["TrainConfig", int]:
    from megatron_riskpo.config import TrainConfig
    from megatron_riskpo.config_checks import check_train
    from megatron_riskpo.config_io import load_config, load_model_config

    config = load_config(TrainConfig, args.config, args.overrides)
    world_size = _world_size(config, env)
    check_train(config, world_size, load_model_config(config.model.path))
    return config, world_size


def _checked_sft(args: argparse.Namespace, env: RankEnv | None) -> tuple["SftConfig", int]:
    from megatron_riskpo.config_checks import check_sft, model_from_shape
    from megatron_riskpo.config_io import load_config, load_model_config
    from megatron_riskpo.config_sft import SftConfig

    config = load_config(SftConfig, args.config, args.overrides)
    world_size = _world_size(config, env)
    model = load_model_config(config.model.path) if config.model.path else model_from_shape(config.shape)
    check_sft(config, world_size, model)
    return config, world_size


def _world_size(config: Any, env: RankEnv | None) -> int:
    return env.world_size if env else config.run.ranks or config.actor.tp * config.actor.cp * config.actor.pp


def _registry_asked_for(arguments: list[str]) -> str | None:
    """The option of which `riskpo train [X.toml] ... --OPTION list` asks what it can be; no file is needed."""
    words = [word for argument in arguments for word in argument.split("=", 1)]
    asked = (first for first, second in pairwise(words) if second == "list" and first in _REGISTRY_OPTIONS)
    return next(asked, None) if arguments[:1] == ["train"] else None


def _print_registry(option: str) -> int:
    from megatron_riskpo.algorithms.advantages import ESTIMATORS
    from megatron_riskpo.algorithms.spectra import SPECTRA
    from megatron_riskpo.algorithms.surrogates import SURROGATES

    registries = dict(zip(_REGISTRY_OPTIONS, (ESTIMATORS, SPECTRA, SURROGATES), strict=True))
    for name, entry in sorted(registries[option].items()):
        print(f"{name}: {entry.description}")
    return 0


def _report(args: argparse.Namespace, arguments: list[str]) -> int:
    if args.scaling:
        from megatron_riskpo.observability.scaling_report import write_scaling_report

        target = args.out or Path("scaling.html")
        check_out_file(target)
        print(f"{write_scaling_report(args.run_dirs, target)}\n\n{target}")
        return 0
    from megatron_riskpo.observability.report import write_report

    if len(args.run_dirs) > 1 or args.out:
        raise UsageError("riskpo report takes one run folder, and --out with --scaling only; add --scaling")
    print(write_report(args.run_dirs[0]))
    return 0


def _checkpoint(args: argparse.Namespace, arguments: list[str]) -> int:
    from megatron_riskpo.checkpoint.commands import list_checkpoints, prune_checkpoints, verify_checkpoints

    if args.action == "ls":
        return list_checkpoints(args.run_dir)
    if args.action == "verify":
        return verify_checkpoints(args.run_dir, args.step)
    return prune_checkpoints(args.run_dir, args.keep, args.dry_run)


_COMMANDS = {
    "train": _run,
    "sft": _run,
    "plan": run_plan,
    "doctor": run_doctor,
    "report": _report,
    "checkpoint": _checkpoint,
    "convert": run_convert,
    "serve": run_serve,
    "slurm": run_slurm,
    "evaluate": run_evaluate,
    "compare": run_compare,
    "data": run_data,
}


def entry(argv: Sequence[str] | None = None) -> NoReturn:
    """`riskpo` as a process: `main`, and an end that no thread of torch disturbs."""
    try:
        code = main(argv)
    except SystemExit as stop:
        # --help, --version and signals during a conversion; text is a library's.
        if isinstance(stop.code, str):
            print(stop.code, file=sys.stderr)
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    leave(code)


if __name__ == "__main__":
    entry()
