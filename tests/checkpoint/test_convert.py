"""`riskpo convert`: what it writes, Megatron's own loader reads into an actor laid out over four ranks; what that saves
comes out of its checkpoint bit for bit, read by one process without Megatron; wrong input is one line.

Not tested: checkpoints that TransformerEngine's modules wrote.
"""

import json
import os
import pickle
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from megatron_riskpo.cli import main
from megatron_riskpo.data.character_tokenizer import qwen2_tokenizer, train_character_model
from tests.checkpoint.convert_cases import (
    CASES,
    DTYPES,
    NUM_RANKS,
    STEP,
    WHOLE,
    load_and_save,
    model_name,
    run_name,
)
from tests.distributed.ranks import ROOT, run_on_ranks
from tests.tiny_models import FAMILIES, make_tiny

pytestmark = pytest.mark.slow

GENERATION = {"eos_token_id": [1, 2], "temperature": 0.7}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Models, what is converted of them, and a run of each with one checkpoint."""
    folder = tmp_path_factory.mktemp("convert")
    train_character_model(["1 + 2 = 3, 40 - 17 = 23"] * 20, folder / "tokenizer.model")
    tokenizer = qwen2_tokenizer(folder / "tokenizer.model")
    for seed, (family, tied) in enumerate((family, tied) for family in FAMILIES for tied in (True, False)):
        model = folder / model_name(family, tied)
        # 97 entries: two tensor-parallel ranks pad the vocabulary.
        make_tiny(model, family, tied=tied, seed=seed, vocab_size=97)
        tokenizer.save_pretrained(model)
        (model / "generation_config.json").write_text(json.dumps(GENERATION))
    for family, tied, dtype in CASES:
        target = folder / "megatron" / run_name(family, tied, dtype)
        source = folder / model_name(family, tied)
        assert main(["convert", "hf-to-megatron", str(source), str(target), "--dtype", dtype]) == 0
    results = run_on_ranks(f"{load_and_save.__module__}:{load_and_save.__name__}", NUM_RANKS, folder / "ranks")
    for family, tied, dtype in CASES:
        record = {"config": {"model": {"path": str(folder / model_name(family, tied))}}}
        (folder / "runs" / run_name(family, tied, dtype) / "config.json").write_text(json.dumps(record))
    torch.save(results, folder / "loaded.pt")
    return folder


def expected_weights(folder, name, dtype):
    return {key: value.to(DTYPES[dtype]) for key, value in load_file(folder / name / "model.safetensors").items()}


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert found[key].dtype == value.dtype
        assert torch.equal(found[key], value), key


@pytest.mark.parametrize(("family", "tied", "dtype"), CASES)
def test_weights_come_out_as_they_went_in(folder, tmp_path, family, tied, dtype):
    out, model = tmp_path / "out", folder / model_name(family, tied)
    assert main(["convert", "megatron-to-hf", str(folder / "runs" / run_name(family, tied, dtype)), str(out)]) == 0
    assert_equal(load_file(out / "model.safetensors"), expected_weights(folder, model.name, dtype))
    config = json.loads((model / "config.json").read_text())
    assert json.loads((out / "config.json").read_text()) == {**config, "dtype": dtype}
    assert json.loads((out / "generation_config.json").read_text()) == GENERATION
    ids = AutoTokenizer.from_pretrained(model)("40 - 17 = 23").input_ids
    assert AutoTokenizer.from_pretrained(out)("40 - 17 = 23").input_ids == ids
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


@pytest.mark.parametrize(("family", "tied", "dtype"), WHOLE)
def test_megatron_loads_the_run_whole(folder, family, tied, dtype):
    for of_rank in torch.load(folder / "loaded.pt"):
        expected = expected_weights(folder, model_name(family, tied), dtype)
        assert_equal(of_rank[run_name(family, tied, dtype)], expected)


@pytest.mark.parametrize(("family", "tied", "dtype"), CASES)
def test_there_and_back_without_ranks(folder, tmp_path, family, tied, dtype):
    there, back = str(folder / "megatron" / run_name(family, tied, dtype)), str(tmp_path / "back")
    # config.json and tokenizer were carried along.
    assert main(["convert", "megatron-to-hf", there, back]) == 0
    assert_equal(load_file(f"{back}/model.safetensors"), expected_weights(folder, model_name(family, tied), dtype))
    assert json.loads((tmp_path / "back" / "generation_config.json").read_text()) == GENERATION
    assert main(["convert", "check", back, there]) == 0


def test_comparison_with_a_run(folder, capfd):
    for name in ("qwen3_moe_tied", "qwen3_untied"):
        assert main(["convert", "check", str(folder / name), str(folder / "runs" / f"{name}_float32")]) == 0
    other = make_tiny(folder / "other_qwen2_tied", "qwen2", tied=True, seed=99, vocab_size=97)
    assert main(["convert", "check", str(other), str(folder / "runs" / "qwen2_tied_float32")]) == 1
    assert "26 differences in 26 tensors" in capfd.readouterr().out


def test_other_dtype_step_and_folders(folder, tmp_path, capfd):
    name = "qwen2_tied"
    run = folder / "runs" / f"{name}_float32"
    checkpoint = run / "checkpoints" / f"step_{STEP}"
    moved = tmp_path / "moved"
    shutil.copytree(checkpoint, moved)
    options = ["--dtype", "bfloat16", "--model", str(folder / name), "--tokenizer", str(folder / "tokenizer.model")]
    for number, source in enumerate((moved, moved / "megatron")):
        out = tmp_path / f"out_{number}"
        assert main(["convert", "megatron-to-hf", str(source), str(out), *options]) == 0
        assert_equal(load_file(out / "model.safetensors"), expected_weights(folder, name, "bfloat16"))
        assert (out / "tokenizer.model").is_file()
    assert main(["convert", "megatron-to-hf", str(run), str(tmp_path / "out_2"), "--step", str(STEP)]) == 0
    assert "bfloat16" in capfd.readouterr().out


def test_script_converts_without_megatron(folder, tmp_path):
    script = ROOT / "tools" / "convert_checkpoint.py"
    code = f"import runpy, sys; sys.modules['megatron'] = None; runpy.run_path('{script}', run_name='__main__')"
    arguments = ["megatron-to-hf", str(folder / "runs" / "qwen3_untied_float32"), str(tmp_path / "out")]
    subprocess.run([sys.executable, "-c", code, *arguments], env=os.environ | {"PYTHONPATH": str(ROOT)}, check=True)
    assert_equal(load_file(tmp_path / "out" / "model.safetensors"), expected_weights(folder, "qwen3_untied", "float32"))


def one_line(capfd, arguments, code):
    assert main(["convert", *arguments]) == code
    err = capfd.readouterr().err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    return err


def test_wrong_input_is_one_line(folder, tmp_path, capfd):
    run, out = str(folder / "runs" / "qwen2_tied_float32"), str(tmp_path / "out")

    def message(*arguments):
        return one_line(capfd, ["megatron-to-hf", *arguments], 2)

    assert "its steps are: 7" in message(run, out, "--step", "3")
    assert "--step 3" in message(f"{run}/checkpoints/step_7", out, "--step", "3")
    assert "no such folder" in message(str(tmp_path / "none"), out)
    assert "neither a run nor a checkpoint" in message(str(folder / "qwen2_tied"), out)
    assert "is there already" in message(run, str(folder / "qwen2_tied"))
    assert "invalid choice: 'int8'" in message(run, out, "--dtype", "int8")
    assert "--model = /no/model" in message(run, out, "--model", "/no/model")
    assert "num_layers is 2 there" in message(run, out, "--model", str(other_config(folder, tmp_path)))
    bare = f"{run}/checkpoints/step_7/megatron"
    assert "asks for [3, 128]" in message(bare, out, "--model", str(other_config(folder, tmp_path)))
    assert "--model DIR" in message(bare, out)
    tokenizer = str(tmp_path / "no_tokenizer")
    assert "no tokenizer at" in message(run, out, "--tokenizer", tokenizer)
    assert not (tmp_path / "out").exists()


def other_config(folder, tmp_path):
    """A model folder that asks for another layer."""
    other = tmp_path / "other"
    shutil.copytree(folder / "qwen2_tied", other, dirs_exist_ok=True)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    return other


def test_damaged_checkpoint_is_refused(folder, tmp_path, capfd):
    run = tmp_path / "run"
    shutil.copytree(folder / "runs" / "qwen2_tied_float32", run)
    step = run / "checkpoints" / f"step_{STEP}"
    shards = next((step / "megatron").glob("*.distcp"))
    content = bytearray(shards.read_bytes())
    content[len(content) // 2] ^= 1
    shards.write_bytes(content)
    error = one_line(capfd, ["megatron-to-hf", str(step), str(tmp_path / "out")], 1)
    assert f"{shards.name} has another checksum" in error
    assert "no whole checkpoint" in capfd_last(capfd, ["megatron-to-hf", str(run), str(tmp_path / "out")])
    # Without the manifest nothing says so before the read does.
    shards.write_bytes(content[:1000])
    options = ["--model", str(folder / "qwen2_tied")]
    error = one_line(capfd, ["megatron-to-hf", str(step / "megatron"), str(tmp_path / "out"), *options], 1)
    assert "cannot be read" in error
    assert not list(tmp_path.glob("out*"))


def capfd_last(capfd, arguments):
    """The last line of stderr: log lines may stand before it."""
    assert main(["convert", *arguments]) == 2
    return capfd.readouterr().err.splitlines()[-1]


class _Evil:
    def __reduce__(self):
        return os.system, ("touch evil",)


def test_index_that_would_run_code_is_not_loaded(folder, tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".metadata").write_bytes(pickle.dumps(_Evil()))
    arguments = ["megatron-to-hf", str(tmp_path), str(tmp_path / "out"), "--model", str(folder / "qwen2_tied")]
    assert "posix.system, which no checkpoint needs" in one_line(capfd, arguments, 2)
    assert not (tmp_path / "evil").exists()
