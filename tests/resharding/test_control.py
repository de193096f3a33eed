"""Ranks that agree with each other name the one that is lost, all of them, in bounded time."""

import json

import pytest

from megatron_riskpo.errors import RunError
from megatron_riskpo.resharding.control import refuse_differences
from tests.distributed.ranks import processes
from tests.resharding import control_ranks
from tests.resharding.control_ranks import NUM_RANKS, TIMEOUT_S

# Victim, signal, phase.
CASES = [
    (0, "SIGSTOP", "gather"), (1, "SIGSTOP", "gather"), (2, "SIGKILL", "gather"), (0, "SIGSTOP", "export"),
    (1, "SIGSTOP", "export"),
]  # fmt: skip


def others(victim: int) -> list[int]:
    return [rank for rank in range(NUM_RANKS) if rank != victim]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int, str, str], list[tuple[str, float]]]:
    """Of the ranks that are left, in order: what they said, and after how many seconds. All cases at once, since they
    wait most of the time."""
    folders = {case: tmp_path_factory.mktemp("ranks") for case in CASES}
    arguments = [(*case, folder, rank) for case, folder in folders.items() for rank in range(NUM_RANKS)]
    with processes(control_ranks.main, arguments) as ranks:
        for (victim, *_, rank), process in zip(arguments, ranks, strict=True):
            if rank != victim:
                process.join(timeout=60)
                assert process.exitcode == 0
    return {
        case: [json.loads((folder / f"outcome_{rank}.json").read_text()) for rank in others(case[0])]
        for case, folder in folders.items()
    }


@pytest.mark.parametrize("case", CASES, ids=str)
def test_all_name_a_rank_that_does_not_come(outcomes, case):
    victim, _, phase = case
    print(case, outcomes[case])
    for rank, (message, seconds) in zip(others(victim), outcomes[case], strict=True):
        assert f"weight push: rank {rank} waited " in message
        assert f" s for rank {victim} ({phase}" in message
        assert seconds < 6 * TIMEOUT_S + 4
        if phase == "export":
            assert message.startswith(f"weight push: rank {rank}, export: ")
            assert "Timed out waiting 1000ms" in message or "Connection closed by peer" in message


def test_differences_are_shown():
    refuse_differences([3, 3], "the version")
    with pytest.raises(RunError, match=r"do not agree on the version \(rank 0: 3, rank 1: 4\)"):
        refuse_differences([3, 4], "the version")
