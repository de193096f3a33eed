"""The arguments of `riskpo plan --bridge`; imports nothing heavy."""

import argparse
from typing import Any


def add_plan(commands: Any) -> None:
    """The subcommand's parser."""
    text = "Show how a run's weights travel from the actor to vLLM: rounds, bytes, sources. Starts no rank."
    command = commands.add_parser("plan", help=text, description=text)
    command.add_argument("--bridge", action="store_true", required=True, help="the plan of the weight bridge")
    command.add_argument("--gpus", type=int, metavar="N", help="ranks of the run (default: as `riskpo train` would)")
    command.add_argument("--gpus-per-node", type=int, metavar="N", default=8, help="ranks of a machine (8)")
    command.add_argument("--rank", type=int, metavar="R", help="list what this rank sends and receives")
    command.add_argument("config", metavar="X.toml", help="configuration file of `riskpo train`")
    command.add_argument("overrides", metavar="...", nargs=argparse.REMAINDER, help="--section.key value, as there")
