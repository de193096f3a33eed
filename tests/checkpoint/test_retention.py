"""What is kept: the rules on any history of steps, and what they leave of real folders."""

import math
import shutil

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_riskpo.checkpoint import retention as retention_module
from megatron_riskpo.checkpoint.manifest import step_folders, survey
from megatron_riskpo.checkpoint.retention import Retention, best_step, kept_steps, outdated, remove_old
from tests.checkpoint.folders import truncate, write_checkpoint

METRIC = "eval/heldout/pass@1"
BEST = Retention(keep=1, keep_best=METRIC)

# Few values, so that equals are common.
scores = st.sampled_from([0.0, 0.25, 0.5, 1.0, math.nan])
histories = st.dictionaries(
    st.integers(0, 60), st.one_of(st.just({}), st.fixed_dictionaries({METRIC: scores})), max_size=20
)
retentions = st.builds(Retention, st.integers(1, 6), st.integers(0, 12), st.sampled_from(["", METRIC, "eval/other"]))


@given(histories, retentions)
def test_a_step_is_kept_exactly_for_one_of_the_three_reasons(history, retention):
    kept = kept_steps(history, retention)
    known = {step: m[METRIC] for step, m in history.items() if METRIC in m and not math.isnan(m[METRIC])}
    for step in history:
        is_new = sum(other > step for other in history) < retention.keep
        is_regular = retention.keep_every > 0 and step % retention.keep_every == 0
        is_best = retention.keep_best == METRIC and step in known
        is_best = is_best and all((value, other) <= (known[step], step) for other, value in known.items())
        assert (step in kept) == (is_new or is_regular or is_best)
    assert kept <= history.keys()


@given(histories, retentions)
def test_deleting_after_every_save_leaves_what_deleting_once_would(history, retention):
    remaining = {}
    for step in sorted(history):
        remaining[step] = history[step]
        remaining = {step: remaining[step] for step in kept_steps(remaining, retention)}
    assert remaining.keys() == kept_steps(history, retention)


def test_the_best_is_the_newest_of_equals():
    assert best_step({1: {METRIC: 0.5}, 2: {METRIC: 0.5}, 3: {METRIC: 0.25}, 4: {}}, METRIC) == 2
    assert best_step({1: {METRIC: math.nan}, 2: {}}, METRIC) is None


def names(folder):
    return [path.name for path in step_folders(folder)]


@pytest.fixture
def folder(tmp_path):
    for step in (2, 9, 10):
        write_checkpoint(tmp_path, step)
    return tmp_path


def test_whole_checkpoints_only_count(folder):
    truncate(folder / "step_9")
    remove_old(folder, 10, Retention(keep=2))
    assert names(folder) == ["step_10", "step_9", "step_2"]
    write_checkpoint(folder, 12)
    remove_old(folder, 12, Retention(keep=2))
    assert names(folder) == ["step_12", "step_10"]


def test_the_one_just_saved_is_spared(folder):
    # Resumed from step 2 because the later ones looked damaged, and saved step 3.
    write_checkpoint(folder, 3)
    remove_old(folder, 3, Retention(keep=1))
    assert names(folder) == ["step_10", "step_9", "step_3"]


def test_every_nth_step_is_kept_for_ever(tmp_path):
    for step in range(5, 45, 5):
        write_checkpoint(tmp_path, step)
        remove_old(tmp_path, step, Retention(keep=2, keep_every=15))
    assert names(tmp_path) == ["step_40", "step_35", "step_30", "step_15"]


def test_the_best_is_known_from_the_files_alone(tmp_path):
    for step, value in ((1, 0.5), (2, 0.75), (3, 0.25), (4, None)):
        write_checkpoint(tmp_path, step, {} if value is None else {METRIC: value})
        remove_old(tmp_path, step, BEST)
    assert names(tmp_path) == ["step_4", "step_2"]
    write_checkpoint(tmp_path, 5, {METRIC: 0.8})
    remove_old(tmp_path, 5, BEST)
    assert names(tmp_path) == ["step_5"]


def test_a_damaged_best_gives_way_to_the_next(tmp_path):
    for step, value in ((1, 0.5), (2, 0.75), (3, 0.25)):
        write_checkpoint(tmp_path, step, {METRIC: value})
    truncate(tmp_path / "step_2")
    assert outdated(survey(tmp_path), BEST) == [tmp_path / "step_2"]


def test_a_folder_that_someone_else_deletes_meanwhile_is_no_error(folder, monkeypatch):
    original = retention_module.remove_checkpoint

    def after_another(path):
        shutil.rmtree(path)
        original(path)

    monkeypatch.setattr(retention_module, "remove_checkpoint", after_another)
    remove_old(folder, 10, Retention(keep=1))
    assert names(folder) == ["step_10"]
