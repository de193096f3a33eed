"""`riskpo convert` with wrong input: one line that names what, exit code 2 (1 for a failed write), no traceback, and no
folder left behind."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys

import pytest
import torch

from megatron_riskpo.checkpoint import convert, copy
from megatron_riskpo.checkpoint.manifest import partial_of
from megatron_riskpo.checkpoint.safetensors_writer import INDEX
from megatron_riskpo.checkpoint.torch_dist import TorchDistReader
from megatron_riskpo.cli import main
from megatron_riskpo.data.character_tokenizer import qwen2_tokenizer, train_character_model
from tests.distributed.ranks import ROOT
from tests.tiny_models import make_tiny


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A model of several files, and what was converted of it."""
    folder = tmp_path_factory.mktemp("input")
    make_tiny(folder / "one", "qwen2", tied=False, seed=1)
    train_character_model(["1 + 2 = 3, 40 - 17 = 23"] * 20, folder / "tokenizer.model")
    qwen2_tokenizer(folder / "tokenizer.model").save_pretrained(folder / "one")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("megatron_riskpo.checkpoint.safetensors_writer.MAX_SHARD_BYTES", 400_000)
        assert main(["convert", "hf-to-megatron", str(folder / "one"), str(folder / "megatron")]) == 0
        assert main(["convert", "megatron-to-hf", str(folder / "megatron"), str(folder / "model")]) == 0
    assert len(list((folder / "model").glob("model-*-of-*.safetensors"))) >= 3
    return folder


@pytest.fixture
def model(whole, tmp_path):
    return shutil.copytree(whole / "model", tmp_path / "model")


def failed(capfd, code: int, *arguments) -> str:
    capfd.readouterr()
    assert main(["convert", *map(str, arguments)]) == code
    err = capfd.readouterr().err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    return err


def first_shard(model):
    return min(model.glob("model-*.safetensors"))


def truncate(path, keep=0.5):
    path.write_bytes(path.read_bytes()[: int(keep * path.stat().st_size)])


def rewrite_json(path, change):
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


DAMAGES = {
    "no folder": (shutil.rmtree, "HF_DIR = {model}: no such folder"),
    "no config": (lambda model: (model / "config.json").unlink(), "HF_DIR = {model}: has no config.json"),
    "no JSON": (lambda model: (model / "config.json").write_text("{"), "config.json: not readable as JSON"),
    "unknown family": (
        lambda model: rewrite_json(model / "config.json", lambda c: c.update(model_type="gpt2")),
        "model_type 'gpt2' in config.json is not supported; known: qwen2",
    ),
    "size missing": (
        lambda model: rewrite_json(model / "config.json", lambda c: c.pop("hidden_size")),
        "config.json has no 'hidden_size'",
    ),
    "table cut": (lambda model: first_shard(model).write_bytes(b"\x20\0\0\0\0\0\0\0{"), "safetensors is damaged"),
    "table no JSON": (lambda model: first_shard(model).write_bytes(b"\x02\0\0\0\0\0\0\0{{"), "safetensors is damaged"),
    "shard truncated": (lambda model: truncate(first_shard(model)), "safetensors is damaged"),
    "shard missing": (lambda model: first_shard(model).unlink(), "model-00001-of-"),
    "index without the tensor": (
        lambda model: rewrite_json(
            model / INDEX, lambda i: i["weight_map"].update(ghost="model-00001-of-00004.safetensors")
        ),
        "first: ghost is in no file",
    ),
    "index no JSON": (lambda model: (model / INDEX).write_text("[]"), f"{INDEX} is not readable"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_model_folder(model, tmp_path, capfd, name):
    damage, message = DAMAGES[name]
    damage(model)
    err = failed(capfd, 2, "hf-to-megatron", model, tmp_path / "out")
    assert message.format(model=model) in err
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith("out")] == []


def test_missing_shard_is_named_before_its_tensors(model, capfd):
    shard = first_shard(model)
    shard.unlink()
    assert main(["convert", "check", str(model)]) == 1
    rows = capfd.readouterr().out.splitlines()
    assert rows[1].startswith(shard.name)
    assert f"is missing; {INDEX} puts" in rows[1]
    assert not any("no file" in row for row in rows)


def test_wrong_arguments(whole, tmp_path, capfd):
    out = tmp_path / "out"
    assert "invalid choice: 'fp32'" in failed(capfd, 2, "hf-to-megatron", whole / "model", out, "--dtype", "fp32")
    assert "--ranks: must be a whole number above 0, not '0'" in failed(
        capfd, 2, "hf-to-megatron", whole / "model", out, "--ranks", "0"
    )
    for tolerance in ("-1", "nan", "inf", "small"):
        err = failed(capfd, 2, "check", whole / "model", f"--tolerance={tolerance}")
        assert f"--tolerance: must be a finite number, 0 or above, not '{tolerance}'" in err
    assert "is there already" in failed(capfd, 2, "hf-to-megatron", whole / "model", whole / "one")
    (tmp_path / "file").touch()
    for place in (tmp_path / "file" / "out", "/proc/out"):
        assert "cannot be made" in failed(capfd, 2, "hf-to-megatron", whole / "model", place)
    assert "neither a run nor a checkpoint" in failed(capfd, 2, "megatron-to-hf", whole / "one", out)
    (tmp_path / "config.json").write_text('{"model_type": "qwen2"}')
    err = failed(capfd, 2, "megatron-to-hf", whole / "megatron", out, "--model", tmp_path)
    assert "config.json has no 'num_attention_heads'" in err


def test_truncated_checkpoint(whole, tmp_path, capfd):
    bad = shutil.copytree(whole / "megatron", tmp_path / "bad")
    (file,) = bad.glob("*.distcp")
    truncate(file, 0.7)
    assert "cannot be read" in failed(capfd, 1, "megatron-to-hf", bad, tmp_path / "out")
    file.unlink()
    assert "cannot be read" in failed(capfd, 1, "megatron-to-hf", bad, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert not partial_of(tmp_path / "out").exists()


def test_source_that_ends_early_while_it_is_copied(whole, tmp_path, capfd, monkeypatch):
    """Between the check and the copy: as if the file were being written."""
    sendfile = os.sendfile
    monkeypatch.setattr(copy.os, "sendfile", lambda out, source, offset, count: 0)
    for option in ([], ["--dtype", "bfloat16"]):
        monkeypatch.setattr("megatron_riskpo.checkpoint.rows.os.preadv", lambda *_: 0)
        err = failed(capfd, 1, "hf-to-megatron", whole / "model", tmp_path / "out", *option)
        assert "bytes early; copy it again" in err
    monkeypatch.setattr(copy.os, "sendfile", sendfile)
    assert not partial_of(tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["hf-to-megatron", "megatron-to-hf"])
def test_full_disk_is_named(whole, tmp_path, capfd, monkeypatch, kind):
    source = whole / ("model" if kind == "hf-to-megatron" else "megatron")

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(copy.os, "sendfile", full)
    err = failed(capfd, 1, kind, source, tmp_path / "out")
    assert f"no space left on device while writing {partial_of(tmp_path / 'out')}/" in err
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(convert.shutil, "disk_usage", lambda _: usage._replace(free=1000))
    assert "1e-06 are free there" in failed(capfd, 2, kind, source, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_terminated_process_leaves_nothing(whole, tmp_path):
    """SIGTERM in the middle of the copying: no OUT, and no half of it beside."""
    code = (
        "import os, signal, sys, time\n"
        "from megatron_riskpo.checkpoint import copy\n"
        "from megatron_riskpo.cli import main\n"
        "copy.os.sendfile = lambda *_: (os.kill(os.getpid(), signal.SIGTERM), time.sleep(30))\n"
        "sys.exit(main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", code, "convert", "hf-to-megatron", str(whole / "model"), str(tmp_path / "out")]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, timeout=120)
    assert done.returncode == 128 + signal.SIGTERM
    assert list(tmp_path.iterdir()) == []


def test_mixed_dtypes_need_a_choice(whole, tmp_path, capfd, monkeypatch):
    dtype = TorchDistReader.dtype
    mixed = {"decoder.final_layernorm.weight": torch.bfloat16}
    monkeypatch.setattr(TorchDistReader, "dtype", lambda self, key: mixed.get(key) or dtype(self, key))
    err = failed(capfd, 2, "megatron-to-hf", whole / "megatron", tmp_path / "out")
    assert "holds torch.bfloat16 and torch.float32; choose one by --dtype" in err


def test_prompts(whole, tmp_path, capfd):
    prompts = tmp_path / "prompts.txt"

    def check(*options):
        return ["convert", "check", str(whole / "model"), "--prompts", str(prompts), *options]

    assert "No such file" in failed(capfd, 2, *check()[1:])
    prompts.write_text("\n")
    assert "holds no prompt" in failed(capfd, 2, *check()[1:])
    prompts.write_bytes("1 + 2 = drei, für alle".encode("latin-1"))
    assert "is no UTF-8 text" in failed(capfd, 2, *check()[1:])
    other = tmp_path / "prompts.jsonl"
    other.write_text('{"text": "1 + 2"}\n')
    assert "KeyError: 'prompt'" in failed(capfd, 2, "check", whole / "model", "--prompts", other)
