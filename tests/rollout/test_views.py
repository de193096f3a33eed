"""Views of several ranks; of two with servers: test_attendance.py."""

from megatron_riskpo.rollout.views import View, joined


def test_of_one_server_the_first_rank_that_lost_it_is_heard() -> None:
    views = [View("", 0, {"a": "is gone"}), View("no room", 2, {"b": "hangs", "a": "is silent"}), View("late", 1, {})]
    assert joined(views) == View("no room", 3, {"a": "is gone (rank 0)", "b": "hangs (rank 1)"})
