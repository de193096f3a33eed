"""Who is named, from made-up heartbeats."""

from dataclasses import replace

import pytest

from megatron_riskpo.watchdog.heartbeat import Heartbeat
from megatron_riskpo.watchdog.laggards import MAX_NAMED, Sighting, laggards, summary, waits_for_others

IN_COLLECTIVE = """Thread 0x00007f (most recent call first):
  File "/lib/threading.py", line 331 in wait

Thread 0x00007e (most recent call first):
  File "/site-packages/torch/distributed/distributed_c10d.py", line 3004 in all_reduce
  File "/megatron_riskpo/rewards/scoring.py", line 40 in score_rollouts
"""
AT_WORK = """Thread 0x00007f (most recent call first):
  File "/site-packages/torch/distributed/checkpoint/state_dict_saver.py", line 12 in save

Current thread 0x00007e (most recent call first):
  File "/megatron_riskpo/rewards/pool.py", line 98 in gather
"""


def beat(rank: int, **values) -> Heartbeat:
    base = {"rank": rank, "local_rank": rank % 8, "host": f"n{rank // 8}", "pid": 100 + rank, "steps_done": 3}
    base |= {"phase": "update", "phases": 20, "phase_s": 1800.2, "state": "S", "beat": 900, "time": 1e9}
    return Heartbeat(**{**base, **values})


def seen(rank: int, stacks: str = "", answers: bool = True, **values) -> Sighting:
    before = beat(rank, **values)
    return Sighting(rank, before, replace(before, beat=before.beat + answers), stacks)


@pytest.mark.parametrize(
    ("ranks", "expected"),
    [
        ([seen(0), seen(1, state="T")], {1: "rank 1 (n0) is in update after step 3 for 1800 s, stopped by a signal"}),
        ([seen(0), seen(9, answers=False)], {9: "rank 9 (n1) is in update after step 3 for 1800 s, and silent since"}),
        ([seen(0), Sighting(1, None, None)], {1: "rank 1 has not started"}),
        ([seen(0), seen(1, phases=19, phase="rollout")], {1: "rank 1 (n0) is in rollout after step 3"}),
        ([seen(0), seen(1, steps_done=2, phases=25)], {1: "after step 2"}),
        ([seen(0, IN_COLLECTIVE), seen(1, AT_WORK)], {1: "after step 3 for 1800 s, in no collective"}),
        ([seen(0, IN_COLLECTIVE), seen(1, IN_COLLECTIVE)], {}),
        ([seen(0, AT_WORK), seen(1, AT_WORK)], {}),
        # Their stacks have not come.
        ([seen(0, IN_COLLECTIVE), seen(1), seen(2, AT_WORK)], {2: "in no collective"}),
        ([seen(0, IN_COLLECTIVE), seen(1)], {}),
        ([seen(0, IN_COLLECTIVE), seen(1, "no stacks: the process does not answer (state D)\n")], {}),
        ([seen(0, AT_WORK), seen(1)], {}),
        ([seen(0)], {}),
        # A stopped rank is named, and not the one that is behind because of it.
        ([seen(0, phases=18), seen(1, state="T"), seen(2)], {1: "stopped"}),
    ],
)
def test_who_lags(ranks, expected) -> None:
    found = laggards(ranks)
    assert found.keys() == expected.keys()
    for rank, words in expected.items():
        assert words in found[rank]


def test_the_main_thread_counts() -> None:
    assert waits_for_others(IN_COLLECTIVE)
    assert not waits_for_others(AT_WORK)
    assert not waits_for_others("")
    # A traceback of an error, which has no threads.
    assert waits_for_others('Traceback:\n  File "/x/torch/distributed/distributed_c10d.py", line 1, in barrier\n')


def test_the_line_names_few_and_counts_the_others() -> None:
    line = summary(
        [seen(rank, state="T" if rank else "S") for rank in range(20)], "no progress", "runs/a/stall", "do x"
    )
    assert line.startswith("no progress: rank 1 (n0) is in update after step 3 for 1800 s, stopped by a signal")
    assert "rank 8 (n1)" in line
    assert "rank 9 (" not in line
    assert f"and {19 - MAX_NAMED} more (ranks 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19)" in line
    assert line.endswith("; 1 of 20 ranks wait for them; stacks: runs/a/stall; do x")
    assert "\n" not in line


def test_ranks_without_stacks_neither_lag_nor_wait() -> None:
    line = summary([seen(0, IN_COLLECTIVE), seen(1, AT_WORK), seen(2), seen(3)], "no progress", "stall", "do x")
    assert line.startswith("no progress: rank 1 (n0) is in update after step 3 for 1800 s, in no collective; ")
    assert "; 1 of 4 ranks wait for it; stacks unknown of ranks 2, 3; stacks: stall; do x" in line
    line = summary([seen(0, IN_COLLECTIVE), seen(1)], "no progress", "stall", "do x")
    assert (
        "no rank is behind the others; rank 0 (n0) is in update after step 3 for 1800 s; stacks unknown of rank 1;"
        in line
    )
    # Where another reason names a rank they do not matter.
    assert "unknown" not in summary([seen(0), seen(1, state="T")], "no progress", "stall", "do x")


def test_without_laggards_the_line_says_so() -> None:
    line = summary([seen(0), seen(1)], "no progress", "stall", "do x")
    assert "no rank is behind the others; rank 0 (n0) is in update after step 3" in line
