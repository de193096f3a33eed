"""`riskpo doctor --job` with real ranks: bare, on two made-up nodes, and with ranks that never come."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).parents[2]
COMMAND = [sys.executable, "-m", "megatron_riskpo.cli"]
# Each rank is on a node of its own, and the second has another torch; what a node says of itself is left out.
ON_TWO_NODES = """
import os, signal, socket, sys, time
from megatron_riskpo.cli import entry
from megatron_riskpo.doctor import job, watched
rank = int(os.environ["RANK"])
socket.gethostname = lambda: f"n{rank}"
job.node_lines = lambda num_gpus: []
if sys.argv[1] == "other" and rank == 1:
    job.versions_here = lambda: {"torch": "2.12.0"}
if sys.argv[1] == "same":
    # Communication waits in the store longer than the store may be silent.
    watched._STORE_S, start = 7.0, job.init_process_group
    job.init_process_group = lambda *args, **options: (time.sleep(12 * (rank == 0)), start(*args, **options))
if sys.argv[1] == "stops" and rank == 1:
    # After it has told where it is.
    job.bandwidth.all_reduce_rate = lambda group, device: time.sleep(2) or os.kill(os.getpid(), signal.SIGSTOP)
entry(["doctor", "--job", "--run-dir", "runs", *sys.argv[2:]])
"""


def environment(rank: int, world_size: int, port: int) -> dict[str, str]:
    """As torchrun's or srun's."""
    places = {"RANK": rank, "WORLD_SIZE": world_size, "LOCAL_RANK": 0, "MASTER_PORT": port}
    return {
        **os.environ, **{name: str(value) for name, value in places.items()},
        "MASTER_ADDR": "127.0.0.1", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo",
    }  # fmt: skip


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


def start(folder: Path, ranks: list[int], world_size: int, command: list[str]) -> list[subprocess.Popen]:
    port = free_port()
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return [subprocess.Popen(command, cwd=folder, env=environment(rank, world_size, port), **pipes) for rank in ranks]


def ended(processes: list[subprocess.Popen]) -> list[tuple[int, str, str]]:
    """Exit code, stdout, stderr of each, and of the first alone where others are stopped."""
    try:
        outputs = [process.communicate(timeout=300) for process in processes if not is_stopped(process)]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, *output) for process, output in zip(processes, outputs, strict=False)]


def is_stopped(process: subprocess.Popen) -> bool:
    return process.poll() is None and psutil.Process(process.pid).status() == psutil.STATUS_STOPPED


def test_a_bare_job_with_its_configuration(tmp_path: Path) -> None:
    model = {
        "model_type": "qwen2", "num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 128, "vocab_size": 1000,
        "num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 512,
    }  # fmt: skip
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(model))
    (tmp_path / "x.toml").write_text('[model]\npath = "model"\n[run]\nname = "a"\n')
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    bare = {name: value for name, value in os.environ.items() if name not in names} | {"PYTHONPATH": str(ROOT)}
    command = [*COMMAND, "doctor", "--job", "--ranks", "2", "x.toml", "--run.name", "b"]
    done = subprocess.run(command, cwd=tmp_path, env=bare, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    assert "ok    versions of all ranks: the same on 2 ranks" in done.stdout
    assert "ok    torch: 2.13." in done.stdout
    assert "ok    room for checkpoints: " in done.stdout
    assert "GiB free, 3 checkpoints of 0.0 GiB need 0.0" in done.stdout
    assert "ok    run folder: runs/b, seen by 1 node" in done.stdout
    assert "ok    all-reduce inside nodes: " in done.stdout
    assert [path.name for path in (tmp_path / "runs" / "b").iterdir()] == []


JOBS = {
    "two nodes": ([0, 1], 2, ["same", "--timeout", "60", "--expect-between", "1e6"]),
    "another torch": ([0, 1], 2, ["other"]),
    "rank 1 and 2 missing": ([0], 3, ["same", "--timeout", "6"]),
    "rank 1 stops": ([0, 1], 2, ["stops", "--timeout", "20"]),
    "rank 0 missing": ([1], 3, ["same", "--timeout", "6"]),
}
"""Ranks that are started, of how many, and how."""


@pytest.fixture(scope="module")
def jobs(tmp_path_factory) -> dict[str, list[tuple[int, str, str]]]:
    """All run side by side, since each mostly waits."""
    script = [sys.executable, "-c", ON_TWO_NODES]
    running = {
        name: start(tmp_path_factory.mktemp("job"), ranks, world_size, [*script, *arguments])
        for name, (ranks, world_size, arguments) in JOBS.items()
    }
    return {name: ended(processes) for name, processes in running.items()}


def test_two_nodes_are_measured_against_what_is_expected(jobs) -> None:
    """One comes 12 s late into torch's process group."""
    first, second = jobs["two nodes"]
    assert (first[0], second) == (1, (1, "", ""))
    lines = first[1].splitlines()
    assert "ok    versions of all ranks: the same on 2 ranks" in lines
    assert "ok    run folder: runs, seen by 2 nodes" in lines
    (clocks,) = [line for line in lines if " clocks: " in line]
    assert clocks.startswith("ok    clocks: at most: n1 is 0.")
    (between,) = [line for line in lines if "between nodes" in line]
    assert between.startswith("fail  all-reduce between nodes: ")
    assert "a rank on all nodes, expected 1000000.0; slowest with its neighbours: n" in between
    assert "see NCCL_DEBUG=INFO for the network" in between
    assert first[2].endswith("lines fail: all-reduce between nodes; each has its remedy above\n")


def test_another_version_fails_before_links_are_measured(jobs) -> None:
    code, out, err = jobs["another torch"][0]
    assert code == 1
    assert "2.12.0 on n1 (ranks 1)" in out
    assert "all-reduce: not measured: lines above fail" in out
    assert err.startswith("error: ")
    assert "torch of all ranks" in err


def test_ranks_that_do_not_come_are_named(jobs) -> None:
    ((code, out, err),) = jobs["rank 1 and 2 missing"]
    assert (code, out) == (1, "")
    assert err == (
        "error: 1 of 3 ranks came within 6 s, from n0; ranks 1, 2 did not; look at their output, or leave their "
        "nodes out (sbatch --exclude)\n"
    )
    ((code, out, err),) = jobs["rank 0 missing"]
    assert (code, out) == (1, "")
    assert "error: rank 1: rank 0 does not answer at 127.0.0.1:" in err
    assert "see whether rank 0 started, and whether a firewall lies between" in err


def test_a_rank_that_stops_in_a_collective_is_named(jobs) -> None:
    """gloo itself gives up without a name."""
    ((code, out, err),) = jobs["rank 1 stops"]
    assert (code, out) == (1, "")
    assert err.startswith(
        "error: bandwidth: in all-reduce inside nodes rank 1 (n1) does not answer any more: stopped, or lost with the "
        "node; see its output, nvidia-smi and dmesg there"
    )


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--ranks", "2"], "riskpo doctor takes --ranks with --job only"),
        (["x.toml"], "riskpo doctor takes x.toml with --job only"),
        (["--job", "--timeout", "0"], "must be above 0"),
        (["--job", "none.toml"], "none.toml: no such configuration file"),
    ],
)
def test_wrong_flags(flags: list[str], message: str, capfd: pytest.CaptureFixture[str], monkeypatch) -> None:
    from megatron_riskpo.cli import main

    assert main(["doctor", *flags]) == 2
    assert message in capfd.readouterr().err
