"""The short form of kills.py: one rank, four kills. Second way to weights and metrics: the run in one go."""

import pytest

from tests.crash.kills import crash, write_configs

pytestmark = pytest.mark.slow


def test_a_run_that_is_killed_again_and_again_ends_as_if_it_had_not_been(tmp_path):
    write_configs(tmp_path)
    kills = crash(tmp_path, num_kills=4, ranks=1, engine="megatron", seed=4)
    assert len({kill.aimed_at for kill in kills}) == 4
    # A kill may come late; those of the writer mostly hit it.
    assert {kill.writing for kill in kills} & {"files", "manifest", "publish", "retention"}
