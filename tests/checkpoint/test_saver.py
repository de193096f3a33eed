"""A checkpoint written in the background is the one that would have been written at once, whatever training does
meanwhile; what goes wrong there reaches every rank.

Second way to each file: the save that training waits for. To each error's ranks: two of them.
"""

import json
import re

import pytest

from megatron_riskpo.checkpoint.manifest import list_files
from megatron_riskpo.config_io import config_hash
from tests.checkpoint.cases import STATE
from tests.checkpoint.saver_cases import CONFIG, DAMAGES, WAYS, run
from tests.checkpoint.test_training_state import assert_bit_equal, make_models
from tests.distributed.ranks import run_on_ranks

pytestmark = pytest.mark.slow

LAYOUTS = ("dp2", "tp2 plain optimizer", "ep2 moe")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_models(tmp_path_factory.mktemp("saver"))


@pytest.fixture(scope="module")
def ranks(folder):
    return run_on_ranks(f"{run.__module__}:run", 2, folder / "ranks")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_files_are_those_of_a_save_at_once(ranks, folder, layout):
    at_once, later = (folder / layout / kind / "step_3" for kind in ("at_once", "later"))
    assert list_files(at_once) == list_files(later)
    manifests = [json.loads((path / "manifest.json").read_text()) for path in (at_once, later)]
    for name in manifests[0]["files"]:
        # torch's index has a random id of the save.
        if name != "megatron/.metadata":
            assert (later / name).read_bytes() == (at_once / name).read_bytes(), name
            assert manifests[0]["files"][name] == manifests[1]["files"][name]
    assert {name for name in manifests[0] if manifests[0][name] != manifests[1][name]} == {"files"}
    assert manifests[0]["config_hash"] == config_hash(CONFIG)
    assert json.loads((later / "state.json").read_text())["config"] == CONFIG


@pytest.mark.parametrize("layout", LAYOUTS)
def test_training_goes_on_meanwhile_and_a_resume_is_bit_exact(ranks, layout):
    for rank in ranks:
        assert rank[layout]["before"] == []
        assert_bit_equal(rank[layout]["found"], rank[layout]["expected"])
        assert rank[layout]["state"] == STATE


def test_second_save_waits_for_the_first(ranks):
    for rank in ranks:
        assert rank["second"] == {"between": ["step_1"], "after": ["step_2", "step_1"]}


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("full", r"checkpoint step_2 could not be written to \S+: No space left on device \(rank 1\);.*MiB are free"),
        ("odd", r"checkpoint step_2 could not be written to \S+: ValueError: odd \(rank 1\)"),
        ("hung", r"checkpoint step_2 in \S+ was not written within run.timeout_s = 5 s"),
    ],
)
def test_failures_reach_every_rank_and_harm_nothing(ranks, folder, kind, reason):
    messages = set()
    for rank in ranks:
        (error, message), latest = rank["failures"][kind]
        assert error == "RunError"
        messages.add(message)
        assert latest == folder / "failures" / "step_1"
    (message,) = messages
    assert message.count("\n") == 0
    assert "earlier checkpoints are intact" in message
    assert re.search(reason, message)


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("way", WAYS)
def test_damage_is_named_and_the_checkpoint_before_is_used(ranks, folder, way, damage):
    copy = folder / f"corrupted_{way == 'asynchronous'}" / damage
    said = [rank["corrupted"][way][damage][1] for rank in ranks]
    for rank in ranks:
        path, _, step = rank["corrupted"][way][damage]
        assert path == copy / "step_1"
        assert step == 1
    # Rank 0 speaks, once.
    ((path, reason),) = said[0]
    assert path == copy / "step_2"
    assert DAMAGES[damage][0] in reason
    assert said[1] == []
