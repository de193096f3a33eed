"""Conversion by several ranks: each writes files of its own, the folder is the one that a single process reads; what
fails on one fails on all, in one line, and leaves nothing."""

import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_riskpo.checkpoint.convert import share
from megatron_riskpo.checkpoint.safetensors_writer import INDEX
from megatron_riskpo.checkpoint.team import Team
from megatron_riskpo.cli import main
from megatron_riskpo.data.character_tokenizer import qwen2_tokenizer, train_character_model
from tests.checkpoint.rank_cases import MODELS, share_work
from tests.distributed.ranks import ROOT, run_on_ranks
from tests.tiny_models import make_tiny

NUM_RANKS = 2


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 8])
def test_shares_are_neighbours_of_like_size_and_lose_nothing(num_ranks):
    sizes = [600, *([5, 80, 1] * 40), 600]
    shares = [share(range(len(sizes)), sizes, Team(rank, num_ranks)) for rank in range(num_ranks)]
    assert [item for part in shares for item in part] == list(range(len(sizes)))
    loads = [sum(sizes[item] for item in part) for part in shares]
    assert max(loads) - min(loads) <= 2 * max(sizes)
    assert share([], [], Team()) == []


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shared")
    for family, tied in MODELS:
        make_tiny(folder / family, family, tied=tied, seed=5, vocab_size=97)
    make_tiny(folder / "other", MODELS[0][0], tied=MODELS[0][1], seed=6, vocab_size=97)
    return folder, run_on_ranks(f"{share_work.__module__}:{share_work.__name__}", NUM_RANKS, folder / "ranks")


@pytest.mark.slow
@pytest.mark.parametrize(("family", "tied"), MODELS)
def test_two_ranks_write_one_checkpoint(results, family, tied):
    folder, _ = results
    writers = {file.name.split("_")[2] for file in (folder / f"{family}_megatron").glob("*.distcp")}
    assert writers == {"0", "1"}
    files = sorted((folder / f"{family}_back").glob("*.safetensors"))
    assert [file.name for file in files] == [
        f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))
    ]
    assert len(files) >= 4
    expected = load_file(folder / family / "model.safetensors")
    found = [(name, tensor) for file in files for name, tensor in load_file(file).items()]
    assert sorted(name for name, _ in found) == sorted(expected)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found)
    assert (folder / f"{family}_back" / INDEX).is_file()
    # By one process, and with what each reads of the other's files.
    assert main(["convert", "check", str(folder / f"{family}_back"), str(folder / f"{family}_megatron")]) == 0


@pytest.mark.slow
def test_ranks_compare_shares_and_know_all_findings(results):
    _, ranks = results
    for of_rank in ranks:
        assert of_rank["equal"] == []
        assert len({finding.tensor for finding in of_rank["differing"]}) == 26


@pytest.mark.slow
def test_full_disk_on_one_rank_fails_on_all_and_leaves_nothing(results):
    folder, ranks = results
    pattern = r"RunError: rank 1: no space left on device while writing .*never\.partial/__1_0\.distcp; free space, .*"
    assert all(re.fullmatch(pattern, of_rank["failure"]) for of_rank in ranks)
    assert not list(folder.glob("never*"))


def riskpo(*arguments):
    command = [sys.executable, "-m", "megatron_riskpo.cli", "convert", *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


@pytest.mark.slow
def test_command_starts_its_ranks(results, tmp_path):
    folder, _ = results
    done = riskpo("hf-to-megatron", folder / "qwen2", tmp_path / "out", "--ranks", 2)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("26 tensors") == 1
    assert {file.name for file in (tmp_path / "out").glob("*.distcp")} == {"__0_0.distcp", "__1_0.distcp"}
    # Wrong input is one line, not one a rank.
    shutil.rmtree(tmp_path / "out")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "file").touch()
    done = riskpo("hf-to-megatron", folder / "qwen2", tmp_path / "out", "--ranks", 2)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "is there already" in done.stderr


@pytest.mark.slow
def test_logprobs_of_the_converted_model(results, tmp_path):
    """Through Megatron's own loader; a model with gate and up projection in each other's place is another one."""
    folder, _ = results
    model = shutil.copytree(folder / "qwen2", tmp_path / "model")
    train_character_model(["1 + 2 = 3, 40 - 17 = 23"] * 20, tmp_path / "tokenizer.model")
    qwen2_tokenizer(tmp_path / "tokenizer.model").save_pretrained(model)
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "1 + 2 = 3"}\n{"prompt": "40 - 17 = 23"}\n')
    done = riskpo("check", model, folder / "qwen2_megatron", "--prompts", prompts)
    assert done.returncode == 0, done.stderr
    assert float(re.search(r"mean difference .*, largest (\S+)", done.stdout)[1]) < 1e-5

    tensors = load_file(model / "model.safetensors")
    gate, up = (f"model.layers.1.mlp.{name}_proj.weight" for name in ("gate", "up"))
    tensors[gate], tensors[up] = tensors[up], tensors[gate]
    save_file(tensors, model / "model.safetensors")
    done = riskpo("check", model, folder / "qwen2_megatron", "--prompts", prompts)
    assert done.returncode == 1
    assert "2 differences in 2 tensors" in done.stdout
    largest = float(re.search(r"largest (\S+); more than --tolerance 0\.0001", done.stderr)[1])
    assert 0.1 < largest < 10
