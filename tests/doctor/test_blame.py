"""Who is blamed when communication hangs, from made-up progress."""

import pytest

from megatron_riskpo.doctor.blame import Progress, blame

STAGES = ["start", "first", "inside"]
HOSTS = ["n0", "n0", "n1", "n1"]
FIRST, INSIDE, DONE = Progress(1, 9), Progress(2, 9), Progress(3, 9, is_done=True)
LOST, TORN = Progress(2, 9, "closed by peer", 1), Progress(2, 9, "CUDA error", 2)


CASES = {
    "in inside rank 3 (n1) does not answer any more: stopped, or lost with the node": [INSIDE] * 3 + [Progress(2, 5)],
    "in the start rank 3 (n1) does not answer any more: stopped, or lost with the node": [INSIDE] * 3 + [Progress()],
    "ranks 2 (n1), 3 (n1) do not get through first within 60 s, others do": [INSIDE, INSIDE, FIRST, FIRST],
    "ranks 0 (n0), 2 (n1), 3 (n1) do not get through inside within 60 s, others do": [INSIDE, DONE, INSIDE, INSIDE],
    "rank 2 (n1) does not get through inside: CUDA error": [INSIDE, INSIDE, TORN, INSIDE],
    # Those that wait for it are behind the one that is done as well.
    "rank 2 (n1) does not get through inside: closed by peer": [DONE, INSIDE, LOST, TORN],
    "no rank gets through first within 60 s": [FIRST] * 4,
    "rank 0 (n0) does not get through inside: closed by peer; behind it: rank 3 (n1)": [LOST, INSIDE, TORN, FIRST],
}


@pytest.mark.parametrize("words", CASES)
def test_who_is_to_blame(words: str) -> None:
    after = CASES[words]
    before = [Progress(progress.stage, 5) if progress.stage >= 0 else progress for progress in after]
    assert blame(before, after, STAGES, HOSTS, 60.0) == words


def test_many_ranks_are_counted() -> None:
    after = [Progress(2, 9)] * 4 + [Progress(1, 9)] * 60
    words = blame([Progress(1, 5)] * 64, after, STAGES, ["n"] * 64, 60.0)
    assert words.endswith("19 (n) and 44 more do not get through first within 60 s, others do")
