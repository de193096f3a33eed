"""Resuming is bit-exact, across layouts exact in the weights; a save that fails harms nothing.

Second way to each number: the run that was not interrupted. All on real megatron-core over gloo; the save is this
project's, the load is Megatron's own strategy. Not tested here: CUDA generators, NCCL, folders that only some see.
"""

import subprocess

import pytest
import torch

from megatron_riskpo.checkpoint.commands import verify_checkpoints
from megatron_riskpo.checkpoint.manifest import latest_complete, read_manifest
from tests.checkpoint.cases import STATE, flip_byte, run_one, run_two
from tests.distributed.ranks import run_on_ranks
from tests.tiny_models import make_tiny, make_tiny_qwen2

pytestmark = pytest.mark.slow

# One checkpoint of the tiny model is about 5 MB: the first fits, the second does not.
SMALL_DISK = "8m"


@pytest.fixture(scope="module")
def small_disk(folder):
    """A real file system that fills up, where the tests may mount one."""
    path = folder / "small_disk"
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={SMALL_DISK}", "none", str(path)]
    if subprocess.run(mount, capture_output=True).returncode != 0:
        path.rmdir()
        yield None
        return
    yield path
    subprocess.run(["umount", str(path)], check=True)


def make_models(folder):
    """Two of each kind, with other weights: the one trained, and the one that a checkpoint is loaded into."""
    # 97 entries: tensor parallelism pads the vocabulary, one rank does not.
    make_tiny_qwen2(folder / "model", tied=True, seed=3, vocab_size=97)
    make_tiny_qwen2(folder / "other_model", tied=True, seed=4, vocab_size=97)
    for seed, name in enumerate(("model", "other_model")):
        # Two stages of two chunks; and the tied embedding's 97 x 64 weights do not fill whole blocks of 128.
        make_tiny_qwen2(folder / f"deep_{name}", tied=True, seed=seed, vocab_size=97, num_layers=4, hidden_size=64)
        make_tiny(folder / f"moe_{name}", "qwen3_moe", tied=False, seed=seed, vocab_size=97, hidden_size=64)
    make_tiny_qwen2(folder / "narrow_model", tied=True, seed=3, vocab_size=97, hidden_size=64)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_models(tmp_path_factory.mktemp("training_state"))


@pytest.fixture(scope="module")
def two(folder):
    return run_on_ranks(f"{run_two.__module__}:run_two", 2, folder / "two")


@pytest.fixture(scope="module")
def one(folder, two, small_disk):
    """After `two`: it loads what two ranks have saved."""
    return run_on_ranks(f"{run_one.__module__}:run_one", 1, folder / "one")[0]


def assert_bit_equal(found, expected):
    torch.testing.assert_close(found["weights"], expected["weights"], rtol=0, atol=0)
    torch.testing.assert_close(found["optimizer"], expected["optimizer"], rtol=0, atol=0)
    assert found["metrics"] == expected["metrics"]
    assert found["draws"] == expected["draws"]


def largest_difference(a, b):
    assert a.keys() == b.keys()
    scale = max(t.abs().max().item() for t in b.values())
    return max((a[n] - b[n]).abs().max().item() for n in b) / scale


@pytest.mark.parametrize("layout", ["tp2", "dp2", "tp2 plain optimizer", "pp2 deep", "pp2 vp2 deep", "ep2 moe"])
def test_resume_is_bit_exact_on_two_ranks(two, layout):
    for number, rank in enumerate(two):
        assert_bit_equal(rank[layout]["found"], rank[layout]["expected"])
        assert rank[layout]["state"] == STATE
        assert rank[layout]["under way"] == [number, number + 1, number + 2]


@pytest.mark.parametrize("layout", ["one", "one bfloat16", "one bfloat16, offloaded"])
def test_resume_is_bit_exact_on_one_rank(one, layout):
    assert_bit_equal(one[layout]["found"], one[layout]["expected"])
    assert one[layout]["state"] == STATE


def test_offloading_changes_nothing(one):
    assert_bit_equal(one["one bfloat16, offloaded"]["expected"], one["one bfloat16"]["expected"])


CROSSINGS = [
    *(("tp2", "dp2"), ("tp2", "pp2"), ("tp2", "one"), ("dp2", "one")),
    *(("pp2 deep", "pp2 vp2 deep"), ("pp2 vp2 deep", "tp2 deep"), ("pp2 vp2 deep", "one deep")),
    *(("ep2 moe", "tp2 sp moe"), ("ep2 moe", "one moe")),
]


@pytest.mark.parametrize(("saved", "loaded"), CROSSINGS)
def test_another_layout_goes_on_from_the_same_weights(two, one, saved, loaded):
    result = (one if loaded.startswith("one") else two[0])[saved, loaded]
    assert result["num_optimizer_steps"] == 3
    torch.testing.assert_close(result["weights"], two[0][saved]["saved"], rtol=0, atol=0)
    assert largest_difference(result["next"]["weights"], two[0][saved]["expected"]["weights"]) < 1e-6


def test_failing_rank_raises_on_all_ranks_and_harms_nothing(two):
    for rank in two:
        for place in ("shards", "common", "rng", "manifest"):
            (kind, message), names, latest = rank["failing"][place]
            assert kind == "RunError", place
            assert message.count("\n") == 0
            assert "No space left on device" in message
            assert "MiB are free" in message
            assert "run.dir" in message
            assert names == ["latest", "step_1"], place
            assert latest.name == "step_1"
        assert rank["failing"]["after"].name == "step_2"
        assert rank["failing"]["told"] == [False, True]
    assert "(rank 1)" in two[0]["failing"]["shards"][0][1]
    assert "(rank 0)" in two[1]["failing"]["common"][0][1]


def test_newest_whole_checkpoint_is_agreed_on(two, folder):
    for rank in two:
        result = rank["agreement"]
        assert result["nothing"] is None
        assert result["kept"] == ["step_10", "step_2"]
        assert result["used"] == folder / "kept" / "step_2"
        kind, message = result["error"]
        assert kind == "RunError"
        assert "checksum" in message
        # Saving the damaged step again repairs it.
        assert result["replaced"] == folder / "kept" / "step_10"
        assert result["named"] == "step_10\n"


def test_newest_regular_and_best_are_kept(one):
    assert one["retention"] == [["step_2"], ["step_3", "step_2"], ["step_4", "step_2"], ["step_6", "step_4", "step_2"]]


def test_real_checkpoints_verify(one, folder, capfd):
    run = folder / "retained"
    assert verify_checkpoints(run, None) == 0
    flip_byte(run / "checkpoints" / "step_4" / "rng_0.pt")
    assert verify_checkpoints(run, None) == 1
    assert "step_4: rng_0.pt has another checksum" in capfd.readouterr().out


def assert_refused(results, reason):
    assert len(results) == 2
    for (kind, message), names, latest in results:
        assert kind == "RunError"
        assert reason in message
        assert "earlier checkpoints are intact" in message
        assert names == ["step_1"]
        assert latest.name == "step_1"


def test_limit_on_file_sizes(one):
    assert_refused(one["limits"]["limited"], "File too large")


def test_full_file_system(one, small_disk):
    if small_disk is None:
        pytest.skip("may not mount a small file system here")
    assert_refused(one["limits"]["mounted"], "No space left on device")


def test_checkpoint_of_something_else_is_refused(one):
    kind, message = one["unfit"]["model"]
    assert kind == "UsageError"
    assert "hidden_size is 128 there, 64 here" in message
    kind, message = one["unfit"]["optimizer"]
    assert kind == "UsageError"
    assert "distributed_optimizer is False there, True here" in message


def test_hyperparameters_are_those_of_the_present_configuration(one):
    for groups in one["hyperparameters"].values():
        assert set(groups) == {(0.5, 0.75, 1e-2, 0.25)}


def test_manifest_says_what_is_inside(two, folder):
    path = latest_complete(folder / "saved" / "tp2")
    manifest = read_manifest(path)
    assert manifest.layout == {"tp": 2, "pp": 1, "vp": 1, "cp": 1, "ep": 1, "etp": 1, "dp": 1}
    assert {"state.json", "rng_0.pt", "rng_1.pt", "megatron/.metadata"} <= manifest.files.keys()
    assert manifest.versions["torch"].split("+")[0] == torch.__version__.split("+")[0]
