"""`riskpo slurm`: its arguments, and the job that they become. Imports nothing heavy before it is needed."""

import argparse
import os
import shlex
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_riskpo.errors import RunError, UsageError
from megatron_riskpo.plan_command import GPU_NAMES, model_config, quieten
from megatron_riskpo.sweep import read_sweep

if TYPE_CHECKING:
    from megatron_riskpo.config import TrainConfig
    from megatron_riskpo.slurm_job import JobShape

_CHECKOUT = Path(__file__).parents[1] / "slurm"
SUBMIT_TIMEOUT_S = 120
"""For sbatch: with a dead controller it hangs for minutes."""


def add_slurm(commands: Any) -> None:
    """Add the command to argparse's subparsers."""
    text = "Submit a training run to Slurm, if riskpo plan has nothing against it."
    slurm = commands.add_parser(
        "slurm",
        help=text,
        description=f"{text} Options of the cluster (account, partition, container ...) stand in slurm/env.sh.",
        epilog="Options of the run follow in its form, --section.key value. docs/slurm.md has the rest.",
    )
    slurm.add_argument("config", metavar="X.toml", help="configuration file of riskpo train")
    slurm.add_argument("--nodes", type=int, required=True, metavar="N", help="nodes of the job, servers' included")
    slurm.add_argument("--time", required=True, metavar="T", help="time limit: minutes, H:M:S or D-H:M:S; the run is "
                       "saved and requeued before it")  # fmt: skip
    slurm.add_argument("--gpus-per-node", type=int, default=8, metavar="N", help="8; 0: a job on CPUs")
    slurm.add_argument("--ranks-per-node", type=int, metavar="N", help="without, one a GPU (on CPUs 1)")
    slurm.add_argument("--cpus-per-rank", type=int, default=12, metavar="N", help="12")
    slurm.add_argument("--server-nodes", type=int, default=0, metavar="N", help="of the nodes, serve rollouts "
                       "(rollout.placement = server); 0")  # fmt: skip
    slurm.add_argument("--gpu", choices=GPU_NAMES, default="h100", help="for the plan; h100 without")
    slurm.add_argument("--model", metavar="DIR_OR_JSON", help="for the plan; without, model.path")
    slurm.add_argument("--sweep", type=Path, metavar="FILE", help="an array of runs, one for each line of options")
    slurm.add_argument("--at-a-time", type=int, metavar="N", help="runs of the sweep that run together; all")
    slurm.add_argument("--sbatch", action="append", default=[], metavar="OPTION",
                       help="another option of sbatch, in one word: --sbatch=--qos=high; may be repeated")  # fmt: skip
    what = slurm.add_mutually_exclusive_group()
    what.add_argument("--print", dest="only_print", action="store_true", help="only print the command")
    what.add_argument("--test-only", action="store_true", help="only ask Slurm whether it would take the job")
    slurm.add_argument("--overrides", nargs=argparse.REMAINDER, default=[], help=argparse.SUPPRESS)


def run_slurm(args: argparse.Namespace, arguments: list[str]) -> int:
    """The exit code: 0 submitted (or printed), 1 it does not fit or Slurm refuses."""
    if args.cpus_per_rank < 1:
        raise UsageError(f"--cpus-per-rank {args.cpus_per_rank}: give 1 or more")
    command = _command(args)
    if args.only_print:
        print(shlex.join(command))
        return 0
    _submit(command)
    return 0


def _command(args: argparse.Namespace) -> list[str]:
    """Words, never a line for a shell: what stands in the configuration is data."""
    from megatron_riskpo.slurm_job import sbatch_options, server_options, warning_before

    runs = _runs(args)
    step_s = max(run.step_s for run in runs)
    further = [f"--array={_array(args, len(runs))}"] if args.sweep else []
    options = sbatch_options(
        runs[0].shape, name=runs[0].config.run.name if not args.sweep else args.sweep.stem, time=args.time,
        warning_s=warning_before(args.time, step_s), cpus_per_rank=args.cpus_per_rank,
        further=[*(["--test-only"] if args.test_only else []), *further, *args.sbatch],
    )  # fmt: skip
    scripts = _scripts()
    if args.sweep:
        script = [str(scripts / "sweep.sbatch"), args.config, str(args.sweep)]
    else:
        script = [str(scripts / "train.sbatch"), *server_options(runs[0].shape), args.config]
    return [str(scripts / "submit.sh"), *options, *script, *args.overrides]


@dataclass(frozen=True)
class _Run:
    config: "TrainConfig"
    shape: "JobShape"
    step_s: float
    """Predicted seconds a step; 0: not known."""


def _runs(args: argparse.Namespace) -> list[_Run]:
    """The run, or those of the sweep; refused where `riskpo plan` refuses."""
    if args.sweep is None:
        if args.at_a_time is not None:
            raise UsageError(f"--at-a-time {args.at_a_time} is for --sweep; give that as well, or leave it out")
        return [_planned(args, args.overrides)]
    if args.server_nodes:
        raise UsageError("--sweep and --server-nodes do not go together; submit such runs one by one")
    runs = []
    for number, words in enumerate(read_sweep(args.sweep), start=1):
        named = ["--run.name", f"{args.sweep.stem}_{number}", *args.overrides, *words]
        try:
            runs.append(_planned(args, named))
        except (UsageError, RunError) as error:
            raise type(error)(f"{args.sweep}, line {number} of options: {error}") from error
    other = next((number for number, run in enumerate(runs, start=1) if run.shape != runs[0].shape), None)
    if other:
        raise UsageError(
            f"{args.sweep}: the run of line {other} needs other ranks a node than that of line 1, and all jobs of an "
            "array are of one size; put it into another file"
        )
    names = [run.config.run.name for run in runs]
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise UsageError(f"{args.sweep}: {names.count(twice[0])} lines have run.name = {twice[0]}; give each its own")
    return runs


def _array(args: argparse.Namespace, num: int) -> str:
    if args.at_a_time is not None and args.at_a_time < 1:
        raise UsageError(f"--at-a-time {args.at_a_time}: give 1 or more")
    return f"1-{num}" + (f"%{args.at_a_time}" if args.at_a_time else "")


def _planned(args: argparse.Namespace, overrides: Sequence[str]) -> _Run:
    """Raises UsageError for a broken rule, RunError for what does not fit."""
    from megatron_riskpo.config import TrainConfig
    from megatron_riskpo.config_checks import check_plan
    from megatron_riskpo.config_io import load_config
    from megatron_riskpo.slurm_job import job_shape

    config = load_config(TrainConfig, args.config, overrides)
    shape = job_shape(config, args.nodes, args.gpus_per_node, args.server_nodes, args.ranks_per_node)
    hf_config = model_config(args.model, config)
    check_plan(config, shape.world_size, hf_config)
    if not args.gpus_per_node:
        return _Run(config, shape, 0.0)

    from megatron_riskpo.planning.gpus import GPUS
    from megatron_riskpo.planning.plan import make_plan

    quieten()
    plan = make_plan(config, hf_config, shape.world_size, GPUS[args.gpu])
    if plan.complaints:
        raise RunError(f"does not fit: {plan.complaints[0]}")
    return _Run(config, shape, plan.time.seconds)


def _scripts() -> Path:
    """The folder of the job scripts: RISKPO_SLURM, that of the checkout, or ./slurm."""
    named = os.environ.get("RISKPO_SLURM")
    for folder in [Path(named)] if named else [_CHECKOUT, Path("slurm")]:
        if (folder / "submit.sh").is_file():
            return folder.resolve()
    raise UsageError(
        f"no submit.sh in {named or f'{_CHECKOUT} or ./slurm'}; set RISKPO_SLURM to the folder slurm/ of the sources"
    )


def _submit(command: list[str]) -> None:
    try:
        done = subprocess.run(command, timeout=SUBMIT_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        raise RunError(f"sbatch did not answer within {SUBMIT_TIMEOUT_S} s; is the controller up (sinfo)?") from None
    except OSError as error:
        raise RunError(f"{command[0]} cannot be started: {error.strerror}") from error
    if done.returncode:
        raise RunError(f"sbatch refused the job (exit code {done.returncode}, see above): {shlex.join(command)}")
