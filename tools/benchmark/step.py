"""Seconds a training step takes, by phase: this project against TRL's GRPOTrainer on the CPU.

Same checkpoint, prompts, group size, lengths, objective (GRPO), reward and number of cores; each trainer in processes
of its own, taking turns in one run. Needs TRL: pip install -c requirements/lock.txt -r requirements/benchmark.txt
The update phase alone, under several layouts, is update.py's.
Usage: python tools/benchmark/step.py [--cases tiny ragged] [--output step.json]
"""

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from step_cases import CASES, Case, write_inputs
from step_records import StepRecord, read_records
from step_report import case_report, print_report

from megatron_riskpo.distributed.launch import launch
from megatron_riskpo.errors import RunError, UsageError

HERE = Path(__file__).parent
WARMUP_STEPS = 1
TURN_TIMEOUT_S = 1800
ENVIRONMENT = {
    "CUDA_VISIBLE_DEVICES": "",  # both on the CPU
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}


def run_case(case: Case, folder: Path, objective: str) -> dict[str, list[StepRecord]]:
    """Measured steps of each trainer, over all rounds."""
    records: dict[str, list[StepRecord]] = {"trl": [], "riskpo": []}
    for turn in range(case.rounds):
        for trainer, runner in (("trl", run_trl), ("riskpo", run_riskpo)):
            print(f"{case.name}: round {turn + 1} of {case.rounds}, {trainer}", file=sys.stderr, flush=True)
            output = folder / f"{trainer}_{turn}.json"
            arguments = [case.name, str(folder), str(output), "--steps", str(case.steps), "--warmup", str(WARMUP_STEPS)]
            runner(case, arguments, objective)
            records[trainer] += read_records(output)
    return records


def run_trl(case: Case, arguments: list[str], objective: str) -> None:
    """TRL in one process with a thread a core; its output only if it fails. Always GRPO."""
    environment = os.environ | {"OMP_NUM_THREADS": str(case.num_cores), "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, str(HERE / "step_trl.py"), *arguments]
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=TURN_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        raise RunError(
            f"TRL needed more than {TURN_TIMEOUT_S} s for {case.steps} step(s) of {case.name}; free the machine's cores"
        ) from None
    if done.returncode:
        raise RunError(f"TRL's process ended with exit code {done.returncode}:\n{done.stderr[-4000:]}")


def run_riskpo(case: Case, arguments: list[str], objective: str) -> None:
    """This project with a rank a core, as `riskpo train` starts them."""
    command = [sys.executable, str(HERE / "step_riskpo.py"), *arguments, "--objective", objective]
    code = launch(command, case.num_cores)
    if code:
        raise RunError(f"this project's ranks ended with exit code {code}; see the output above")


def chosen_cases(arguments: argparse.Namespace) -> list[Case]:
    """The named cases, with the command line's changes."""
    changes = {name: value for name in ("steps", "rounds") if (value := getattr(arguments, name)) is not None}
    return [replace(CASES[name], **changes) for name in arguments.cases]


def positive(text: str) -> int:
    """A number of steps or rounds."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not at least 1")
    return number


def run(arguments: argparse.Namespace) -> None:
    if importlib.util.find_spec("trl") is None:
        raise UsageError("trl is not installed: pip install -c requirements/lock.txt -r requirements/benchmark.txt")
    os.environ.update(ENVIRONMENT)
    reports = []
    for case in chosen_cases(arguments):
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            num_parameters = write_inputs(case, folder, WARMUP_STEPS + case.steps)
            reports.append(case_report(case, num_parameters, run_case(case, folder, arguments.objective)))
        print_report(reports[-1], Console())
    text = json.dumps(reports, indent=1)
    if arguments.output:
        arguments.output.write_text(text + "\n")
    else:
        print(text)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), help="default: all")
    parser.add_argument(
        "--objective", choices=("grpo", "riskpo"), default="grpo", help="this project's (TRL's is grpo)"
    )
    parser.add_argument("--steps", type=positive, help="measured steps a round")
    parser.add_argument("--rounds", type=positive, help="how often the two take turns")
    parser.add_argument("--output", type=Path, help="write the JSON here instead of to stdout")
    try:
        run(parser.parse_args())
    except (UsageError, RunError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
