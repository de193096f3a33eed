"""A push that goes wrong ends on every rank, in bounded time, and says which rank and bucket it was."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.ranks import processes
from tests.resharding import fault_ranks
from tests.resharding.fault_ranks import NUM_RANKS, OF_FIRST, TIMEOUT_S, VICTIM


def outcomes(faults: list[str], folder: Path, ranks: list[int]) -> list[dict[str, Any]]:
    """What the given ranks of one launch say; the others may be dead or stopped."""
    folder.mkdir()
    with processes(fault_ranks.main, [(faults, folder, rank) for rank in range(NUM_RANKS)]) as started:
        for rank in ranks:
            started[rank].join(timeout=120)
            assert started[rank].exitcode == 0
    return [json.loads((folder / f"outcome_{rank}.json").read_text()) for rank in ranks]


def test_corruption_and_a_wrong_version_are_refused(tmp_path):
    faults = ["version", "none over gloo", "none", "corruption", "corruption over gloo"]
    found = outcomes(faults, tmp_path / "ranks", list(range(NUM_RANKS)))
    for rank, outcome in enumerate(found):
        assert "do not agree on the version of the weights (rank 0: 7, rank 1: 8" in outcome["version"]["message"]
        assert outcome["none"]["message"] == outcome["none over gloo"]["message"] == ""
        for case in ("corruption", "corruption over gloo"):
            # Who received the damaged slices says it; the others wait for it in vain, but not for long.
            expected = ["is corrupted: of "] if rank == VICTIM else ["waited", "did not go through"]
            assert any(part in outcome[case]["message"] for part in expected), (rank, case)
            assert outcome[case]["seconds"] < 4 * TIMEOUT_S
    for case, place in (("corruption", "round"), ("corruption over gloo", "bucket of round")):
        message = found[VICTIM][case]["message"]
        assert f"version 7: rank {VICTIM}, {place} " in message
        assert "1 have another checksum than there, the first is of 'model." in message


@pytest.mark.parametrize("fault", ["SIGKILL", "SIGSTOP", f"SIGSTOP{OF_FIRST}", "late over gloo", "SIGSTOP over gloo"])
def test_a_dead_or_stopped_rank_ends_the_others(tmp_path, fault):
    victim = 0 if fault.endswith(OF_FIRST) else VICTIM
    found = outcomes([fault], tmp_path / "ranks", [rank for rank in range(NUM_RANKS) if rank != victim])
    happened = float((tmp_path / "ranks/fault_time").read_text())
    for outcome in found:
        assert outcome[fault]["message"].startswith("weight push")
        assert outcome[fault]["end"] - happened < 4 * TIMEOUT_S
    messages = [outcome[fault]["message"] for outcome in found]
    print(f"{fault}: ended {[round(outcome[fault]['end'] - happened, 1) for outcome in found]} s later: {messages}")
    if "over" in fault:
        named = [message for message in messages if f"rank {victim} is dead, stopped" in message]
        assert named
        assert all("bucket of round" in message for message in named)
    else:
        assert all(f"s for rank {victim} (" in message for message in messages)
