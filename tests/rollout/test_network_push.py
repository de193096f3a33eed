"""Pushes of two trainer ranks to three servers of two workers each, over the network, and what becomes of them where a
server, a bucket or a rank is lost. The workers compare what they get with whole tensors cut by hand.

Processes, HTTP and gloo are real; vLLM's part is played (shard_server.py). With vLLM: test_server_engine.py.
"""

import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from megatron_riskpo.errors import RunError
from megatron_riskpo.resharding.transports.meeting import LOST_PEER
from megatron_riskpo.rollout.joint_calls import at_fault
from megatron_riskpo.rollout.push_address import address_of_rank, store_address
from tests.distributed.ranks import processes
from tests.resharding.fault_ranks import MODEL
from tests.rollout import network_ranks, shard_server
from tests.rollout.network_ranks import (
    BROKEN_LINKS,
    DEAD_RANK,
    NUM_RANKS,
    OWN_ERROR,
    RESTARTED,
    STOPPED_ASKING,
    STOPPED_MEETING,
    TIMEOUT_S,
)
from tests.rollout.shard_server import LAYOUT, RESTART


def url_of(folder: Path) -> str:
    deadline = time.monotonic() + 120
    while not (folder / "url").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return (folder / "url").read_text()


def pushes(
    tmp_path: Path, steps: list[str], faults: list[dict[int, str]], rank: int = 0
) -> tuple[list[str], list[dict[str, Any]]]:
    """The servers' addresses, and how each push went on a rank. `faults`: of each server, by version."""
    folders = [tmp_path / str(index) for index in range(len(faults))]
    for folder in folders:
        folder.mkdir()
    with processes(shard_server.main, list(zip(folders, faults, strict=True))):
        urls = [url_of(folder) for folder in folders]
        with processes(network_ranks.main, [(urls, steps, tmp_path, of) for of in range(NUM_RANKS)]) as ranks:
            ranks[rank].join(timeout=120)
            assert ranks[rank].exitcode == 0
    return urls, json.loads((tmp_path / f"outcome_{rank}.json").read_text())


def shard_bytes() -> int:
    """Of each of two workers, from config.json: halves of all matrices and of the qkv biases; norms are whole."""
    hidden, mlp, layers, vocab = (
        MODEL[key] for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size")
    )
    qkv = hidden + 2 * hidden * MODEL["num_key_value_heads"] // MODEL["num_attention_heads"]
    matrices = vocab * hidden + layers * (hidden * (qkv + hidden + 3 * mlp) + qkv)
    return 8 * (matrices // 2 + (2 * layers + 1) * hidden)


def test_what_fails_is_given_up_and_the_others_get_the_weights(tmp_path):
    steps = ["none", "none again", "corruption", "SIGKILL", "SIGSTOP", DEAD_RANK]
    (first, second, third), outcomes = pushes(
        tmp_path, steps, [{}, {2: "corruption", 3: "SIGKILL"}, {4: "SIGSTOP"}]
    )  # fmt: skip
    found = dict(zip(steps, outcomes, strict=True))
    print(*(f"{step}: {outcome['seconds']:.1f} s" for step, outcome in found.items()), sep="\n")
    alive = [[first, second, third]] * 2 + [[first, third]] * 2 + [[first]]
    for step, urls in zip(steps[:-1], alive, strict=True):
        assert found[step]["alive"] == urls, found[step]
        # The workers themselves have compared what they got.
        assert [report["bytes_received"] for report in found[step]["reports"]] == [shard_bytes()] * 2 * len(urls)
        assert found[step]["metrics"]["bridge/received_mib"] == shard_bytes() / 2**20
        assert all(report["peak_extra_bytes"] <= 2**18 for report in found[step]["reports"])
        assert found[step]["seconds"] < 4 * TIMEOUT_S
    assert [found[step]["num_groups"] for step in steps[:2]] == [1, 1]
    reasons = {step: found[step]["failed"] for step in steps[2:-1]}
    assert [list(of) for of in reasons.values()] == [[second], [second], [third]]
    assert "bucket of round" in reasons["corruption"][second]
    assert "is corrupted: of " in reasons["corruption"][second]
    assert "cannot be reached" in reasons["SIGKILL"][second]
    assert f"did not answer within {TIMEOUT_S:g} s" in reasons["SIGSTOP"][third]
    assert "s for rank 1 (the push of version 5)" in found[DEAD_RANK]["error"]
    assert found[DEAD_RANK]["seconds"] < 4 * TIMEOUT_S


def test_a_server_is_given_up_for_a_link_only_where_it_breaks_again(tmp_path):
    steps = ["none", RESTARTED, LAYOUT, *BROKEN_LINKS, OWN_ERROR]
    (first, second, third), outcomes = pushes(tmp_path, steps, [{0: RESTART}, {}, {2: LAYOUT}])
    own_error = outcomes.pop()
    assert own_error["error"] == "rank 1 failed"
    all_, both, (_, _, refused, _, lost) = [first, second, third], [first, second], outcomes
    assert [outcome["alive"] for outcome in outcomes] == [all_, all_, both, both, [first]]
    assert [outcome["num_groups"] for outcome in outcomes] == [1, 2, 3, 4, 6]
    assert "stored otherwise" in refused["failed"][third]
    assert list(lost["failed"]) == [second]
    assert LOST_PEER in lost["failed"][second]
    for outcome in outcomes:
        assert [report["bytes_received"] for report in outcome["reports"]] == [shard_bytes()] * 2 * len(
            outcome["alive"]
        )


def test_a_first_rank_that_is_stopped_is_named(tmp_path):
    """While it speaks with servers, and in the middle of making a group; the store is in its process."""
    phases = {
        STOPPED_ASKING: "the search for servers for the push of version 1",
        STOPPED_MEETING: "the group with the rollout servers",
    }
    folders = {step: tmp_path / str(index) for index, step in enumerate(phases)}
    for folder in folders.values():
        folder.mkdir()
    with ThreadPoolExecutor() as pool:
        steps = {STOPPED_ASKING: ["none", STOPPED_ASKING], STOPPED_MEETING: [STOPPED_MEETING]}
        found = {step: pool.submit(pushes, folders[step], steps[step], [{}], rank=1) for step in phases}
    for step, phase in phases.items():
        _, outcomes = found[step].result()
        assert f" s for rank 0 ({phase}" in outcomes[-1]["error"]
        assert outcomes[-1]["seconds"] < 8 * TIMEOUT_S


def test_who_is_given_up():
    lost, own, silent = f"answered 500: {LOST_PEER} rank 3", "answered 500: no memory", "did not answer within 3 s"
    assert at_fault({"a": "", "b": ""}, "") == {}
    assert at_fault({"a": lost, "b": own, "c": ""}, "a") == {"b": own}
    assert at_fault({"a": lost, "b": silent}, "") == {"b": silent}
    assert at_fault({"a": lost, "b": lost}, "b") == {"b": lost}
    assert at_fault({"a": lost, "b": lost}, "") == {"a": lost, "b": lost}
    # The ranks are well, and the others, too: it is the way to this one.
    assert at_fault({"a": lost, "b": ""}, "b") == {"a": lost}


def test_ranks_listen_beyond_this_machine_only_for_what_is_elsewhere(monkeypatch):
    routes = {
        "localhost": "::1", "127.0.0.1": "127.0.0.1", "node7": "10.0.0.4", "10.1.0.9": "10.1.0.4", "first": "10.1.0.9",
    }  # fmt: skip

    def towards(host: str) -> str:
        if host not in routes:
            raise RunError(f"there is no way to {host}")
        return routes[host]

    monkeypatch.setattr("megatron_riskpo.rollout.push_address.address_towards", towards)
    assert store_address((), ()) == "127.0.0.1"
    assert store_address(("http://localhost:8000", "http://127.0.0.1:8001"), ()) == "127.0.0.1"
    assert store_address(("http://localhost:8000", "http://node7:8000"), ()) == "10.0.0.4"
    assert store_address(("http://127.0.0.1:8000",), {"10.1.0.9"}) == "10.1.0.4"
    assert store_address((), {"a-name-unknown-here", "10.1.0.9"}) == "10.1.0.4"
    with pytest.raises(RunError, match="no way to node9"):
        store_address(("http://node9:8000",), ())
    for master, address in (("first", "10.1.0.9"), ("127.0.0.1", "own-name"), ("unknown", "own-name")):
        monkeypatch.setenv("MASTER_ADDR", master)
        assert address_of_rank("own-name") == address
