"""Ranks whose responses take different times wait for each other longer than a collective may take."""

from tests.distributed.ranks import run_on_ranks
from tests.rollout import attendance_cases
from tests.rollout.attendance_cases import SLOW_S, TIMEOUT_S


def test_a_rank_may_wait_for_servers_longer_than_collectives_do(tmp_path):
    target = f"{attendance_cases.__name__}:{attendance_cases.outcomes.__name__}"
    (first, together), (second, _) = run_on_ranks(target, 2, tmp_path)
    assert second >= SLOW_S
    assert together - first > TIMEOUT_S
