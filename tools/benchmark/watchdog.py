"""What the watchdog costs a rank: `python tools/benchmark/watchdog.py`.

A phase of an Observer with the watchdog beside one without it (run.stall_limit_s = 0), in the same run; and what the
guard process takes meanwhile.
"""

import argparse
import tempfile
import time
from pathlib import Path

import psutil

from megatron_riskpo.config import LoggingConfig, RunConfig
from megatron_riskpo.distributed.launch import RankEnv
from megatron_riskpo.observability.observer import Observer
from megatron_riskpo.watchdog.watch import Watchdog


def phase_seconds(folder: str, limit_s: float, num_phases: int, idle_s: float) -> float:
    """Seconds a phase, the least of five rounds; prints what the guard, if any, takes in `idle_s` seconds."""
    run = RunConfig(dir=folder, name=f"limit_{limit_s:g}", stall_limit_s=limit_s)
    with Watchdog(run, RankEnv(0, 1, 0)) as watchdog:
        observer = Observer(Path(folder) / run.name, LoggingConfig(tensorboard=False), 1, 0, watchdog, is_writer=False)
        rounds = []
        for _ in range(5):
            started = time.perf_counter()
            for _ in range(num_phases):
                with observer.phase("update"):
                    pass
            rounds.append((time.perf_counter() - started) / num_phases)
        if limit_s:
            describe_guard(idle_s)
    return min(rounds)


def describe_guard(seconds: float) -> None:
    """Print what the child process takes."""
    (guard,) = psutil.Process().children()
    before = _on_processor(guard.pid)
    time.sleep(seconds)
    used = (_on_processor(guard.pid) - before) / seconds
    print(f"guard: {1000 * used:.2f} ms of processor time a second, {guard.memory_info().rss / 2**20:.0f} MiB resident")


def _on_processor(pid: int) -> float:
    """Seconds (Documentation/scheduler/sched-stats.rst: nanoseconds, the first number)."""
    return int(Path(f"/proc/{pid}/schedstat").read_text().split()[0]) / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--phases", type=int, default=2000, help="entered a round")
    parser.add_argument("--seconds", type=float, default=10.0, help="that the guard is watched")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        without = phase_seconds(folder, 0.0, args.phases, args.seconds)
        watched = phase_seconds(folder, 1800.0, args.phases, args.seconds)
    print(f"a phase: {1e6 * watched:.1f} us with it, {1e6 * without:.1f} us without: ratio {watched / without:.2f}")


if __name__ == "__main__":
    main()
