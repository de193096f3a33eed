"""A checkpoint folder counts only if it is, byte for byte, what its manifest says."""

import json
import logging
import shutil

import pytest

from megatron_riskpo.checkpoint.manifest import (
    MANIFEST,
    DamagedCheckpointError,
    clear_leftovers,
    corrupted_files,
    damages,
    latest_complete,
    read_manifest,
    remove_checkpoint,
    step_folders,
)
from tests.checkpoint.folders import LAYOUT, flip_byte, truncate, write_checkpoint


@pytest.fixture
def folder(tmp_path):
    for step in (2, 9, 10):
        write_checkpoint(tmp_path, step)
    return tmp_path


def cut_manifest(path):
    manifest = path / MANIFEST
    manifest.write_text(manifest.read_text()[:-20])


def point_outside(path):
    manifest = path / MANIFEST
    manifest.write_text(manifest.read_text().replace("state.json", "../step_9/state.json"))


DAMAGES = {
    "truncated file": (truncate, "megatron/shard_0 has 10239 bytes, the manifest says 10240"),
    "flipped byte": (flip_byte, "megatron/shard_0 has another checksum"),
    "missing file": (lambda path: (path / "state.json").unlink(), "state.json is missing"),
    "missing manifest": (lambda path: (path / MANIFEST).unlink(), "never finished"),
    "truncated manifest": (cut_manifest, "manifest.json is not readable"),
    "manifest of another shape": (lambda path: (path / MANIFEST).write_text("[1]"), "manifest.json is not readable"),
    "name outside the folder": (point_outside, "points out of the folder"),
    "other format": (lambda path: (path / MANIFEST).write_text('{"format": 99}'), "format 99"),
}


def test_newest_is_by_number(folder):
    assert latest_complete(folder) == folder / "step_10"
    assert (folder / "latest").read_text() == "step_10\n"


def test_manifest_without_the_split_of_experts_is_of_whole_ones(folder):
    """Of before they could be split; else a resume would take it for another layout, and seed anew."""
    manifest = folder / "step_10" / MANIFEST
    document = json.loads(manifest.read_text())
    assert document["layout"].pop("etp") == 1
    manifest.write_text(json.dumps(document))
    assert read_manifest(folder / "step_10").layout == LAYOUT


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_said_and_the_one_before_is_used(folder, damage, caplog):
    harm, reason = DAMAGES[damage]
    harm(folder / "step_10")
    with caplog.at_level(logging.WARNING):
        assert latest_complete(folder) == folder / "step_9"
    assert reason in caplog.text
    assert str(folder / "step_10") in caplog.text


def test_every_share_is_checked_once(folder):
    path = folder / "step_9"
    manifest = read_manifest(path)
    flip_byte(path)
    (path / "state.json").write_text(json.dumps({"step": 8}))
    shares = [corrupted_files(path, manifest, share, 3) for share in range(3)]
    assert sorted(len(share) for share in shares) == [0, 1, 1]


def test_no_checkpoint(tmp_path):
    assert latest_complete(tmp_path) is None
    assert latest_complete(tmp_path / "absent") is None


def test_a_deletion_that_is_killed_leaves_nothing_that_looks_like_a_checkpoint(folder, monkeypatch):
    write_checkpoint(folder, 20)
    monkeypatch.setattr(shutil, "rmtree", lambda *_, **__: None)
    remove_checkpoint(folder / "step_20")
    monkeypatch.undo()
    assert folder / "step_20" not in step_folders(folder)
    # The same step again, and deleted again.
    write_checkpoint(folder, 20)
    remove_checkpoint(folder / "step_20")
    assert not list(folder.glob("step_20*"))


def test_leftovers_are_not_used_and_go(folder):
    (folder / "step_11.partial" / "megatron").mkdir(parents=True)
    assert latest_complete(folder) == folder / "step_10"
    clear_leftovers(folder)
    assert [path.name for path in step_folders(folder)] == ["step_10", "step_9", "step_2"]
    assert not (folder / "step_11.partial").exists()


def test_saving_a_step_again_replaces_it(folder):
    truncate(folder / "step_10")
    with pytest.raises(DamagedCheckpointError):
        read_manifest(folder / "step_10")
    write_checkpoint(folder, 10)
    assert latest_complete(folder) == folder / "step_10"
    assert sorted(path.name for path in folder.iterdir()) == ["latest", "step_10", "step_2", "step_9"]


def test_every_damaged_file_is_named(tmp_path):
    path = write_checkpoint(tmp_path, 3, num_shards=4)
    assert damages(path) == []
    (path / "megatron" / "shard_0").unlink()
    truncate(path, "shard_1")
    flip_byte(path, "shard_2")
    assert damages(path) == [
        "megatron/shard_0 is missing",
        "megatron/shard_1 has 10239 bytes, the manifest says 10240",
        "megatron/shard_2 has another checksum than the manifest says",
    ]


def test_manifests_without_metrics_are_read(tmp_path):
    path = write_checkpoint(tmp_path, 3, {"eval/heldout/pass@1": 0.25})
    assert read_manifest(path).metrics == {"eval/heldout/pass@1": 0.25}
    document = json.loads((path / MANIFEST).read_text())
    del document["metrics"]
    (path / MANIFEST).write_text(json.dumps(document))
    assert read_manifest(path).metrics == {}
