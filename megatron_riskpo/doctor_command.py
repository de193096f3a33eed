"""`riskpo doctor`: is this machine fit to train? Imports nothing heavy before it is needed."""

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any


def add_doctor(commands: Any) -> None:
    """Add the command to argparse's subparsers."""
    text = (
        "Examine this machine: packages, GPUs, memory, limits, disk. Each line says ok, warn or fail, and the remedy."
    )
    doctor = commands.add_parser("doctor", help=text, description=f"{text} Exit code 1 if a line fails.")
    doctor.add_argument("--run-dir", type=Path, default=Path("runs"), help="where runs will be written; runs without")
    doctor.add_argument("--json", action="store_true", help="print JSON")


def run_doctor(args: argparse.Namespace, arguments: list[str]) -> int:
    """The exit code: 0 nothing failed."""
    from megatron_riskpo.doctor.examine import examine
    from megatron_riskpo.doctor.line import exit_code

    lines = examine(args.run_dir)
    if args.json:
        print(json.dumps([dataclasses.asdict(line) for line in lines], indent=1))
    else:
        print("\n".join(str(line) for line in lines))
    return exit_code(lines)
