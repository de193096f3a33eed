"""Kill a training run again and again, by SIGKILL at random moments of chosen phases, and let it go on each time.

    python -m tests.crash.kills FOLDER --kills 30 --ranks 2 --seed 1 [--engine vllm]

Prints what each kill hit. In the end weights and metrics must be, bit for bit, those of the run that was not
interrupted, and no checkpoint that verified before a kill may be damaged after it. test_kills.py is the short form.
"""

import argparse
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from megatron_riskpo.checkpoint.manifest import damages, step_folders
from tests.crash.marked_run import DWELL_S, marks_file, pid_file
from tests.whole_runs import BASE, ROOT, metrics, weights, without_times

CONFIG = """
[model]
path = "runs/base/hf"
[run]
seed = 7
[data]
train = "reasoning_gym:chain_sum"
options = { min_terms = 2, max_terms = 2, min_digits = 1, max_digits = 1 }
train_size = 64
evaluation_size = 8
prompts_per_step = 4
[rollout]
group_size = 4
max_response_tokens = 6
[algorithm]
bundle_size = 2
quantile_source = "tracked"
bundling = "sorted"
[optimizer]
lr = 1e-3
schedule = "cosine"
[evaluation]
num_samples = 2
ks = [1]
[checkpoint]
every = 2
[logging]
tensorboard = false
"""
KEEP = 2
"""checkpoint.keep, at its default."""
STEPS_A_KILL = 3
PHASES = {
    "rollout": "training", "files": "writing", "update": "training", "manifest": "writing", "checkpoint": "training",
    "publish": "writing", "sync": "training", "retention": "writing",
}  # fmt: skip
"""What to aim at, in turn, and the thread that does it."""
LIMIT_S = 300


@dataclass(frozen=True)
class Kill:
    """One SIGKILL."""

    aimed_at: str
    victim: str
    asynchronous: bool
    training: str = ""
    """What rank 0's training loop was doing when it died ..."""
    writing: str = ""
    """... and the writer of its checkpoints."""
    num_whole: int = 0
    """Checkpoints that verified after it."""

    @property
    def hit(self) -> str:
        """The writer's phase if it was at work, else the loop's."""
        return self.training if self.writing in ("", "idle") else self.writing


class Run:
    """The run `name` of `folder`, in one process or one after the other."""

    def __init__(self, folder: Path, name: str, ranks: int, *options: object) -> None:
        self.folder, self.name, self.ranks, self.options = folder, name, ranks, options
        self.checkpoints = folder / "runs" / name / "checkpoints"

    def start(self, *options: object) -> subprocess.Popen:
        for old in self.folder.glob("*_[0-9]*"):
            old.unlink()
        command = [sys.executable, "-m", "tests.crash.marked_run", self.folder, self.ranks, "train", "crash.toml",
                   "--run.name", self.name, "--run.ranks", self.ranks, *self.options, *options]  # fmt: skip
        return _popen(self.folder, list(map(str, command)))

    def finish(self) -> None:
        output, _ = (process := self.start()).communicate(timeout=LIMIT_S)
        assert process.returncode == 0, output[-4000:]

    def marks(self, thread: str) -> list[str]:
        try:
            return marks_file(self.folder, 0, thread).read_text().splitlines()
        except FileNotFoundError:
            return []

    def whole(self) -> set[Path]:
        return {path for path in step_folders(self.checkpoints) if not damages(path)}

    def kill(self, plan: Kill, nth: int, delay_s: float) -> Kill:
        """Kill it `delay_s` seconds into the nth such phase of this process."""
        process = self.start("--checkpoint.asynchronous", str(plan.asynchronous).lower())
        deadline = time.monotonic() + LIMIT_S
        while self.marks(PHASES[plan.aimed_at]).count(plan.aimed_at) < nth:
            assert process.poll() is None, f"ended before {plan}: {process.communicate()[0][-4000:]}"
            assert time.monotonic() < deadline, f"{plan} never came"
            time.sleep(0.001)
        time.sleep(delay_s)
        pid = process.pid if plan.victim == "launcher" else int(pid_file(self.folder, int(plan.victim[-1])).read_text())
        os.kill(pid, signal.SIGKILL)
        process.communicate(timeout=60)
        last = {thread: (self.marks(thread) or [""])[-1] for thread in ("training", "writing")}
        return replace(plan, **last, num_whole=len(self.whole()))


def crash(folder: Path, num_kills: int, ranks: int, engine: str, seed: int) -> list[Kill]:
    """Raises AssertionError where anything is lost or different."""
    _popen(folder, [sys.executable, "-m", "megatron_riskpo.cli", "sft", "base.toml"], wait=True)
    options = ("--rollout.engine", engine, "--run.steps", str(num_kills * STEPS_A_KILL))
    Run(folder, "whole", ranks, *options).finish()
    run, kills, rng = Run(folder, "killed", ranks, *options), [], random.Random(seed)
    for number in range(num_kills):
        before = run.whole()
        kills.append(run.kill(_plan(rng, number, ranks), *_moment(rng, number)))
        print(f"kill {number + 1} of {num_kills}: {kills[-1]}", flush=True)
        _assert_nothing_lost(before, run.whole())
    run.finish()
    _assert_equal(folder)
    return kills


def _plan(rng: random.Random, number: int, ranks: int) -> Kill:
    """Phases take turns, all else is drawn."""
    victims = ["launcher", *(f"rank {rank}" for rank in range(ranks))]
    return Kill(list(PHASES)[number % len(PHASES)], rng.choice(victims), rng.random() < 0.7)


def _moment(rng: random.Random, number: int) -> tuple[int, float]:
    """Which such phase of the process, and how many seconds into it."""
    phase = list(PHASES)[number % len(PHASES)]
    if PHASES[phase] == "writing" or phase == "checkpoint":
        return 1, rng.uniform(0, DWELL_S)
    # The third has a checkpoint of this process before it.
    return rng.randint(1, 3), rng.uniform(0, 0.1)


def _assert_nothing_lost(before: set[Path], after: set[Path]) -> None:
    """What is gone had become old: enough newer ones are whole."""
    steps = sorted(int(path.name.removeprefix("step_")) for path in after)
    for path in before - after:
        num_newer = sum(step > int(path.name.removeprefix("step_")) for step in steps)
        assert num_newer >= KEEP, f"{path} is lost: {damages(path)}; whole are steps {steps}"


def _assert_equal(folder: Path) -> None:
    assert without_times(metrics(folder, "killed")) == without_times(metrics(folder, "whole"))
    expected = weights(folder, "whole")
    for name, tensor in weights(folder, "killed").items():
        assert torch.equal(tensor, expected[name]), name


def _popen(folder: Path, command: list[str], wait: bool = False) -> subprocess.Popen:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if wait:
        output, _ = process.communicate(timeout=LIMIT_S)
        assert process.returncode == 0, output[-4000:]
    return process


def write_configs(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "base.toml").write_text(BASE)
    (folder / "crash.toml").write_text(CONFIG)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="a new folder, for the runs")
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--engine", choices=("megatron", "vllm"), default="megatron")
    arguments = parser.parse_args()
    write_configs(arguments.folder)
    kills = crash(arguments.folder.resolve(), arguments.kills, arguments.ranks, arguments.engine, arguments.seed)
    print(f"{len(kills)} kills, the same weights and metrics bit for bit. What they hit:")
    for phase, count in Counter(kill.hit for kill in kills).most_common():
        print(f"{count:4}  {phase}")


if __name__ == "__main__":
    main()
