"""Lines of a whole job, from made-up findings: nodes are named, numbers and remedies are there."""

from pathlib import Path

import pytest

from megatron_riskpo.doctor.bandwidth import between_lines, inside_lines, neighbours, ranks_by_host
from megatron_riskpo.doctor.clocks import clock_line
from megatron_riskpo.doctor.job import _gpu_lines
from megatron_riskpo.doctor.job_lines import checkpoint_lines, fold, shared_folder_line, version_lines
from megatron_riskpo.doctor.line import Line
from megatron_riskpo.doctor.machine import GIB, Disk
from megatron_riskpo.planning.gpus import GPUS, gpu_named
from megatron_riskpo.planning.model_size import checkpoint_bytes, count_parameters

HOSTS = ["n0", "n0", "n1", "n1", "n2", "n2"]


def test_other_versions_are_named_with_their_nodes() -> None:
    same = {"torch": "2.13.0", "vllm": "0.32.0"}
    (line,) = version_lines([same] * 6, HOSTS)
    assert str(line) == "ok    versions of all ranks: the same on 6 ranks"
    (line,) = version_lines([*[same] * 4, {"torch": "2.12.0", "vllm": "0.32.0"}, same], HOSTS)
    assert str(line) == (
        "fail  torch of all ranks: 2.13.0 on most ranks, 2.12.0 on n2 (ranks 4); install torch 2.13.0 "
        "there, or start all ranks from one environment"
    )
    (line,) = version_lines([{"torch": "2.13.0"}, same, same, same, same, same], HOSTS)
    assert "0.32.0 on most ranks, not installed on n0" in line.found


def test_what_is_well_on_all_nodes_is_said_once_and_the_rest_by_node() -> None:
    found = {
        "n0": [Line("torch", "ok", "2.13.0"), Line("host memory", "ok", "900 of 1024 GiB available")],
        "n1": [Line("torch", "ok", "2.13.0"), Line("host memory", "warn", "12 of 1024 GiB available", "free some")],
    }
    assert [str(line) for line in fold(found)] == [
        "ok    torch: 2.13.0 on 2 nodes",
        "warn  n1: host memory: 12 of 1024 GiB available; free some",
    ]
    assert str(fold({"n0": found["n0"][:1]})[0]) == "ok    torch: 2.13.0"


def test_gpus() -> None:
    good = {"name": "NVIDIA H100 80GB HBM3", "free": 78 * GIB, "total": 79 * GIB, "capability": [9, 0]}
    (line,) = _gpu_lines([good] * 6, HOSTS)
    assert line.found == "6, the first: NVIDIA H100 80GB HBM3, 78.0 of 79.0 GiB free"
    busy, absent = _gpu_lines([good, good, good, {**good, "free": 20 * GIB}, good, None], HOSTS)
    assert (busy.name, busy.state) == ("n1: GPU of rank 3", "warn")
    assert (absent.name, absent.state) == ("n2: GPU of rank 5", "fail")
    assert [line.state for line in _gpu_lines([None, None], HOSTS[:2])] == ["ok"]


@pytest.mark.parametrize(
    ("offset", "error", "state"), [(0.01, 0.002, "ok"), (-3.0, 0.1, "warn"), (1.5, 1.0, "ok"), (90.0, 0.1, "fail")]
)
def test_clocks(offset: float, error: float, state: str) -> None:
    line = clock_line({"n1": (0.001, 0.001), "n2": (offset, error)})
    assert line.state == state
    assert "n2 is" in line.found
    assert state == "ok" or "set the clock of n2" in line.remedy
    assert clock_line({}).state == "ok"


def test_a_run_folder_that_a_node_does_not_see() -> None:
    assert shared_folder_line({"n0": True, "n1": True}, "runs").state == "ok"
    line = shared_folder_line({"n0": True, "n1": False}, "runs")
    assert line.state == "fail"
    assert line.found.startswith("n1 does not see what rank 0 writes into runs")


def test_room_and_time_for_checkpoints() -> None:
    disks = {"n0": Disk(Path("runs"), 400 * GIB, 1e9), "n1": Disk(Path("runs"), 390 * GIB, 1e9)}
    room, time = checkpoint_lines(100 * GIB, 3, disks, 600)
    assert (room.state, time.state) == ("ok", "ok")
    assert room.found == "390.0 GiB free, 3 checkpoints of 100.0 GiB need 300.0"
    assert time.found == "54 s at 2000 MB/s of all nodes together"
    room, time = checkpoint_lines(200 * GIB, 3, disks, 60)
    assert (room.state, time.state) == ("fail", "fail")
    assert "107 s at 2000 MB/s of all nodes together, more than run.timeout_s = 60 s allows" in time.found
    (line,) = checkpoint_lines(1, 1, {**disks, "n2": Disk(Path("runs"), 0, 0.0, "Read-only file system")}, 60)
    assert line.found.endswith("on n2: Read-only file system")


def test_a_checkpoint_of_a_7b_model_is_98_gb() -> None:
    config = {
        "model_type": "qwen2", "num_hidden_layers": 28, "hidden_size": 3584, "intermediate_size": 18944,
        "num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152064, "tie_word_embeddings": False,
    }  # fmt: skip
    assert checkpoint_bytes(config, "bfloat16") == 14 * count_parameters(config)
    assert checkpoint_bytes(config, "bfloat16") / 1e9 == pytest.approx(106.6, abs=0.2)
    assert checkpoint_bytes(config, "float32") == 12 * count_parameters(config)


def test_links_against_what_is_expected() -> None:
    rates = {"n0": 300e9, "n1": 310e9, "n2": 0.0}
    (line,) = inside_lines(rates, None)
    assert line.state == "ok"
    assert inside_lines(rates, 290e9)[0].state == "ok"
    slow = inside_lines(rates, 315e9)[0]
    assert (slow.state, slow.found) == ("warn", "300.0 GB/s a rank on n0, the slowest, expected 315.0")
    assert inside_lines({"n0": 20e9}, 315e9)[0].state == "fail"
    assert inside_lines({"n0": 0.0}, 315e9)[0].found.startswith("one rank a node")
    assert between_lines(0.0, {}, 35e9)[0].found.startswith("one node")
    assert between_lines(40e9, {"n0": 30e9, "n1": 30e9}, 35e9)[0].state == "ok"
    slow = between_lines(2e9, {"n0": 30e9, "n1": 2e9, "n2": 31e9}, 35e9)[0]
    assert slow.state == "fail"
    assert "slowest with its neighbours: n1 (n1 2.0, n0 30.0, n2 31.0 GB/s)" in slow.found


@pytest.mark.parametrize("num", [2, 3, 4, 5, 8])
def test_neighbours_agree_on_whom_they_measure_with(num: int) -> None:
    leaders = [8 * place for place in range(num)]
    rounds = list(zip(*(neighbours(leaders, rank) for rank in leaders), strict=True))
    for peers in rounds:
        for rank, peer in zip(leaders, peers, strict=True):
            assert peer is None or (peer != rank and peers[leaders.index(peer)] == rank)
    assert all(any(peers[place] is not None for peers in rounds) for place in range(num))
    assert neighbours(leaders, 1) == []
    assert ranks_by_host(HOSTS) == {"n0": [0, 1], "n1": [2, 3], "n2": [4, 5]}


def test_gpus_by_the_name_that_cuda_gives() -> None:
    assert gpu_named("NVIDIA H100 80GB HBM3") is GPUS["h100"]
    assert gpu_named("NVIDIA A100-SXM4-80GB") is GPUS["a100"]
    assert gpu_named("NVIDIA H100 PCIe") is None
    assert gpu_named("NVIDIA L4") is None
