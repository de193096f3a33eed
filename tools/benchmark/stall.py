"""How long a run takes to end once a rank was stopped: `python tools/benchmark/stall.py`.

Two ranks that wait, with the watchdog, by each launcher; rank 1 gets SIGSTOP, alone or with its guard. Printed are the
seconds from the signal to the end of the ranks and of the command, and their ratio to the limit. srun is left out where
there is no Slurm.
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

RANK = """
import os, signal, sys, time
from types import SimpleNamespace
from megatron_riskpo.distributed.launch import die_with_launcher, process_env
from megatron_riskpo.watchdog.watch import Watchdog
die_with_launcher()
folder, limit_s, stops_guard = sys.argv[1], float(sys.argv[2]), sys.argv[3] == "True"
env = process_env()
run = SimpleNamespace(dir=folder, name="run", stall_limit_s=limit_s, timeout_s=limit_s)
with Watchdog(run, env) as watchdog:
    while not all(os.path.exists(f"{folder}/run/heartbeats/rank_{rank}.json") for rank in (0, 1)):
        time.sleep(0.05)
    watchdog.enter("rollout")
    if env.rank == 1:
        if stops_guard:
            os.kill(watchdog._guard.pid, signal.SIGSTOP)
        with open(f"{folder}/pid", "w") as file:
            file.write(str(os.getpid()))
        os.kill(os.getpid(), signal.SIGSTOP)
    watchdog.enter("reward")
    time.sleep(1000)
"""
OURS = "from megatron_riskpo.distributed.launch import launch\nraise SystemExit(launch({rank!r}, 2))"


def launchers() -> list[str]:
    """Those of this machine."""
    found = ["riskpo train", "torchrun"]
    if shutil.which("srun") and subprocess.run(["timeout", "5", "sinfo"], capture_output=True).returncode == 0:
        found.append("srun")
    return found


def command(launcher: str, script: list[str]) -> list[str]:
    """That starts two ranks."""
    rank = [sys.executable, *script]
    if launcher == "torchrun":
        return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *script]
    if launcher == "srun":
        return ["srun", "--ntasks=2", "--kill-on-bad-exit=0", *rank]
    return [sys.executable, "-c", OURS.format(rank=rank)]


def measure(command: list[str], folder: Path) -> tuple[float, float]:
    """Seconds from the stop to the end of the stopped rank, and of the command."""
    with (folder / "output").open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output)
    while not (file := folder / "pid").exists() or not file.read_text():
        assert process.poll() is None, (folder / "output").read_text()
        time.sleep(0.02)
    stopped, pid = file.stat().st_mtime, int(file.read_text())
    while psutil.pid_exists(pid):
        time.sleep(0.02)
    gone = time.time()
    process.wait()
    return gone - stopped, time.time() - stopped


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--limit", type=float, default=12.0, help="run.stall_limit_s")
    args = parser.parse_args()
    print("launcher | stopped | rank's end after | command's end after | beyond the limit | ratio to the limit")
    with tempfile.TemporaryDirectory() as root:
        script = Path(root) / "rank.py"
        script.write_text(RANK)
        for launcher in launchers():
            # Of a plain srun nobody ends a rank whose guard is stopped; slurm/train.sbatch does.
            for stops_guard in (False, True)[: 1 if launcher == "srun" else 2]:
                folder = Path(tempfile.mkdtemp(dir=root))
                words = command(launcher, [str(script), str(folder), str(args.limit), str(stops_guard)])
                rank_s, end_s = measure(words, folder)
                what = "rank and guard" if stops_guard else "rank"
                print(f"{launcher} | {what} | {rank_s:.1f} s | {end_s:.1f} s | {end_s - args.limit:.1f} s "
                      f"| {end_s / args.limit:.2f}", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
