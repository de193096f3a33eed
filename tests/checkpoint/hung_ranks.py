"""What two ranks do in test_background: one's write never ends, the other's waits for it in a collective.

python -m tests.checkpoint.hung_ranks
"""

import os
import sys
import threading
import time

import torch.distributed as dist

from megatron_riskpo.checkpoint.background import FAILED, BackgroundWrite
from megatron_riskpo.distributed.launch import init_process_group, launch, process_env, report_error
from megatron_riskpo.errors import RunError


class SlowToGo:
    """Keeps Python finalizing until the peer has gone, as large programs do: then the write's collective fails."""

    def __del__(self) -> None:
        time.sleep(3)


def run_rank() -> int:
    env = process_env()
    assert env is not None
    init_process_group(env, timeout_s=60, on_cpu=True)
    group = dist.new_group(backend="gloo")
    if env.rank == 0:
        sys.modules["slow_to_go"] = SlowToGo()  # type: ignore[assignment]
    work = threading.Event().wait if env.rank else lambda: dist.barrier(group)
    write = BackgroundWrite(work, "checkpoint step_2", timeout_s=1.0)
    write.join()
    dist.barrier()
    status, complaint = write.status()
    assert status == FAILED
    write.leave_behind()
    report_error(complaint, RunError.exit_code, expected=True)
    return RunError.exit_code


if __name__ == "__main__":
    command = [sys.executable, "-m", "tests.checkpoint.hung_ranks"]
    raise SystemExit(run_rank() if "RANK" in os.environ else launch(command, 2))
