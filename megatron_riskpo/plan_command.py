"""`riskpo plan`: its arguments, and what it prints. Imports nothing heavy before it is needed."""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_riskpo.errors import RunError, UsageError

if TYPE_CHECKING:
    from megatron_riskpo.config import TrainConfig

GPU_NAMES = ("h100", "h200", "a100", "b200")


def add_plan(commands: Any, overrides_help: str) -> None:
    """Add the command to argparse's subparsers."""
    text = "Say whether a configuration fits on so many GPUs, with which memory and how fast; needs no GPU."
    plan = commands.add_parser("plan", help=text, description=f"{text} Exit code 1 if it does not fit.")
    plan.add_argument("config", metavar="X.toml", help="configuration file of riskpo train")
    plan.add_argument("--gpus", type=int, metavar="N", help="ranks, one a GPU; without, as many as riskpo train starts")
    plan.add_argument("--gpu", choices=GPU_NAMES, default="h100", help="which (SXM); h100 without")
    plan.add_argument("--model", metavar="DIR_OR_JSON", help="model folder or its config.json; without, model.path")
    plan.add_argument("--mean-response", type=float, metavar="T", help="tokens; without, half of the longest")
    plan.add_argument("--search", action="store_true", help="list the fastest layouts that fit")
    plan.add_argument("--dry-run", action="store_true", help="build one whole rank, and say what it holds to the byte")
    plan.add_argument("--bridge", action="store_true", help="show how weights travel from the actor to vLLM instead")
    plan.add_argument("--gpus-per-node", type=int, default=8, metavar="N", help="ranks of a machine (--bridge); 8")
    plan.add_argument("--rank", type=int, metavar="R", help="the rank that --dry-run builds (0), --bridge lists")
    plan.add_argument("--json", action="store_true", help="print JSON")
    plan.add_argument("overrides", metavar="...", nargs=argparse.REMAINDER, help=overrides_help)


def run_plan(args: argparse.Namespace, arguments: list[str]) -> int:
    """The exit code: 0 it fits, 1 it does not."""
    args, overrides = _with_late_flags(args)
    config, hf_config, world_size = _checked(args, overrides)
    _check_flags(args, world_size)
    if args.bridge:
        from megatron_riskpo.resharding.plan_text import bridge_text, planned_layout, remark

        print(bridge_text(planned_layout(config, hf_config, world_size, args.gpus_per_node), args.rank))
        if said := remark(config):
            print(said)
        return 0
    if args.dry_run:
        return _dry_run(args, config, hf_config, world_size)
    from megatron_riskpo.planning.gpus import GPUS
    from megatron_riskpo.planning.plan import make_plan
    from megatron_riskpo.planning.render import plan_json, plan_text, search_text
    from megatron_riskpo.planning.search import search

    quieten()
    gpu = GPUS[args.gpu]
    if args.search:
        plans = search(config, hf_config, world_size, gpu, args.mean_response)
        print(json.dumps([plan_json(plan) for plan in plans], indent=1) if args.json else search_text(plans))
        return 0 if plans else 1
    plan = make_plan(config, hf_config, world_size, gpu, args.mean_response)
    print(json.dumps(plan_json(plan), indent=1) if args.json else plan_text(plan))
    return 1 if plan.complaints else 0


def _check_flags(args: argparse.Namespace, world_size: int) -> None:
    if args.rank is not None and not 0 <= args.rank < world_size:
        raise UsageError(f"--rank {args.rank}: there are {world_size} ranks; give 0 to {world_size - 1}")
    if args.rank is not None and not (args.bridge or args.dry_run):
        raise UsageError(f"--rank {args.rank} is for --bridge and --dry-run; give one of them, or leave it out")
    if args.gpus_per_node < 1:
        raise UsageError(f"--gpus-per-node {args.gpus_per_node}: give 1 or more")
    clashing = [flag for flag in ("search", "dry_run", "json") if args.bridge and getattr(args, flag)]
    if clashing:
        raise UsageError(f"--bridge prints a text of its own, without --{clashing[0].replace('_', '-')}; leave one out")


def _dry_run(args: argparse.Namespace, config: "TrainConfig", hf_config: dict[str, Any], world_size: int) -> int:
    from megatron_riskpo.planning.gpus import GPUS
    from megatron_riskpo.planning.plan import make_plan
    from megatron_riskpo.planning.render import dry_run_text, plan_json

    quieten()
    plan = make_plan(config, hf_config, world_size, GPUS[args.gpu], args.mean_response, [args.rank or 0])
    print(json.dumps(plan_json(plan), indent=1) if args.json else dry_run_text(plan.memory[0], world_size))
    return 1 if plan.complaints else 0


def _with_late_flags(args: argparse.Namespace) -> tuple[argparse.Namespace, list[str]]:
    """argparse leaves everything behind the file to the overrides; the command's own flags are taken out of them."""
    own = argparse.ArgumentParser(prog="riskpo plan", add_help=False, allow_abbrev=False, exit_on_error=False)
    kinds = {"--gpus": int, "--gpus-per-node": int, "--rank": int, "--model": str, "--mean-response": float}
    for name, kind in kinds.items():
        own.add_argument(name, type=kind, default=argparse.SUPPRESS)
    own.add_argument("--gpu", choices=GPU_NAMES, default=argparse.SUPPRESS)
    for name in ("--search", "--dry-run", "--bridge", "--json"):
        own.add_argument(name, action="store_true", default=argparse.SUPPRESS)
    try:
        late, overrides = own.parse_known_args(args.overrides)
    except argparse.ArgumentError as error:
        raise UsageError(f"{error}; see riskpo plan --help") from None
    return argparse.Namespace(**{**vars(args), **vars(late)}), overrides


def _checked(args: argparse.Namespace, overrides: list[str]) -> "tuple[TrainConfig, dict[str, Any], int]":
    """The configuration, refused where `riskpo train` refuses it, with the same words."""
    from megatron_riskpo.config import TrainConfig
    from megatron_riskpo.config_checks import check_plan
    from megatron_riskpo.config_io import load_config

    config = load_config(TrainConfig, args.config, overrides)
    if args.gpus is not None and args.gpus < 1:
        raise UsageError(f"--gpus {args.gpus}: give 1 or more")
    actor = config.actor
    world_size = args.gpus or config.run.ranks or actor.tp * actor.cp * actor.pp
    hf_config = model_config(args.model, config)
    check_plan(config, world_size, hf_config)
    return config, hf_config, world_size


def model_config(model: str | None, config: "TrainConfig") -> dict[str, Any]:
    """Weights are not looked at, so a config.json alone will do."""
    from megatron_riskpo.config_io import load_model_config, read_model_config

    if model is None:
        return load_model_config(config.model.path)
    return read_model_config(Path(model)) if model.endswith(".json") else load_model_config(model, "--model")


def quieten() -> None:
    """No process group and no GPU is what libraries warn of here, and what is meant."""
    import logging
    import os
    import warnings

    if os.environ.get("RANK") and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise RunError("riskpo plan runs as one process; start it without torchrun or srun")
    warnings.simplefilter("ignore")
    logging.getLogger("megatron").setLevel(logging.ERROR)
