"""`riskpo doctor`: is this machine, or are all machines of this job, fit to train? Imports nothing heavy before it is
needed."""

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_riskpo.distributed.launch import RankEnv, die_with_launcher, launch, process_env
from megatron_riskpo.errors import RunError, UsageError

if TYPE_CHECKING:
    from megatron_riskpo.doctor.job import JobOptions
    from megatron_riskpo.doctor.line import Line

_TIMEOUT_S = 120.0


def add_doctor(commands: Any, overrides_help: str) -> None:
    """Add the command to argparse's subparsers."""
    text = (
        "Examine this machine: packages, GPUs, memory, limits, disk. Each line says ok, warn or fail, and the remedy."
    )
    doctor = commands.add_parser("doctor", help=text, description=f"{text} Exit code 1 if a line fails.")
    doctor.add_argument("--run-dir", type=Path, help="where runs will be written; runs without")
    doctor.add_argument("--json", action="store_true", help="print JSON")
    doctor.add_argument(
        "--job", action="store_true", help="examine all ranks of a job and what joins them, under torchrun or srun"
    )
    doctor.add_argument("--ranks", type=int, metavar="N", help="bare --job: ranks on this machine; one a GPU without")
    doctor.add_argument(
        "--timeout", type=float, metavar="S", default=_TIMEOUT_S,
        help=f"--job: seconds in which each rank has to come, and to answer; {_TIMEOUT_S:g}",
    )  # fmt: skip
    for name, where in (("inside", "inside a node"), ("between", "between nodes")):
        doctor.add_argument(
            f"--expect-{name}", type=float, metavar="GB/S",
            help=f"--job: all-reduce bandwidth a rank {where}; without, 70 %% of the GPU's data sheet",
        )  # fmt: skip
    doctor.add_argument(
        "config", nargs="?", metavar="X.toml", help="--job: the run's configuration, for the size of its checkpoints"
    )
    doctor.add_argument("overrides", metavar="...", nargs=argparse.REMAINDER, help=overrides_help)


def run_doctor(args: argparse.Namespace, arguments: list[str]) -> int:
    """The exit code: 0 nothing failed."""
    _check_flags(args)
    if args.job:
        return _run_job(args, arguments)
    from megatron_riskpo.doctor.examine import examine
    from megatron_riskpo.doctor.line import exit_code

    lines = examine(args.run_dir or Path("runs"))
    _print(lines, args.json)
    return exit_code(lines)


def _check_flags(args: argparse.Namespace) -> None:
    if args.timeout <= 0 or (args.ranks is not None and args.ranks < 1):
        raise UsageError(f"--timeout {args.timeout:g}, --ranks {args.ranks}: both must be above 0")
    if not args.job:
        given = [
            f"--{name}" for name in ("ranks", "expect_inside", "expect_between") if getattr(args, name) is not None
        ]
        given += [args.config] if args.config else []
        if given:
            raise UsageError(f"riskpo doctor takes {given[0].replace('_', '-')} with --job only; add it")


def _run_job(args: argparse.Namespace, arguments: list[str]) -> int:
    """As a rank, take part; bare, start the ranks."""
    die_with_launcher()
    options = _job_options(args)
    env = process_env()
    if env is None:
        return launch([sys.executable, "-m", "megatron_riskpo.cli", *arguments], args.ranks or _num_gpus() or 1)
    return _examine(env, options, args.json)


def _examine(env: RankEnv, options: "JobOptions", as_json: bool) -> int:
    from megatron_riskpo.distributed.runtime import quieten_libraries
    from megatron_riskpo.doctor.job import examine_job
    from megatron_riskpo.doctor.meeting import SharedError

    quieten_libraries()
    # torchrun and srun print what each rank says; the launcher of a bare job says the same thing once.
    speaks = env.rank == 0 or env.self_launched
    try:
        lines = examine_job(env, options)
    except SharedError:
        if speaks:
            raise
        return 1
    if env.rank == 0:
        _print(lines, as_json)
    failed = [line.name for line in lines if line.state == "fail"]
    if failed and speaks:
        raise RunError(f"{len(failed)} of {len(lines)} lines fail: {', '.join(failed[:8])}; each has its remedy above")
    return int(bool(failed))


def _job_options(args: argparse.Namespace) -> "JobOptions":
    from megatron_riskpo.doctor.job import JobOptions

    options = JobOptions(
        run_dir=args.run_dir or Path("runs"),
        timeout_s=args.timeout,
        expect_inside=args.expect_inside and 1e9 * args.expect_inside,
        expect_between=args.expect_between and 1e9 * args.expect_between,
    )
    if args.config is None:
        return options
    from megatron_riskpo.config import TrainConfig
    from megatron_riskpo.config_io import load_config, load_model_config
    from megatron_riskpo.planning.model_size import checkpoint_bytes

    config = load_config(TrainConfig, args.config, args.overrides)
    checkpoint, steps = config.checkpoint, config.run.steps
    lasting = steps // checkpoint.keep_every if checkpoint.keep_every else 0
    return dataclasses.replace(
        options,
        run_dir=args.run_dir or Path(config.run.dir) / config.run.name,
        checkpoint_bytes=checkpoint_bytes(load_model_config(config.model.path), config.model.dtype),
        # And the one that is being written.
        checkpoints_kept=checkpoint.keep + bool(checkpoint.keep_best) + lasting + 1,
        write_timeout_s=config.run.timeout_s,
    )


def _num_gpus() -> int:
    import torch

    return torch.cuda.device_count()


def _print(lines: Sequence["Line"], as_json: bool) -> None:
    if as_json:
        print(json.dumps([dataclasses.asdict(line) for line in lines], indent=1))
    else:
        print("\n".join(str(line) for line in lines), flush=True)
