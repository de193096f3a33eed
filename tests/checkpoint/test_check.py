"""`riskpo convert check`: whole folders of every family pass, and each kind of damage is found and named.

The flipped value is made in the file's bytes, the other cases with safetensors' own writer.
"""

import json
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from megatron_riskpo.cli import main
from tests.tiny_models import FAMILIES, make_tiny

NAME = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return make_tiny(tmp_path_factory.mktemp("check") / "model", "qwen2", tied=True, seed=1)


@pytest.fixture
def model(whole, tmp_path):
    """A copy to be damaged."""
    return shutil.copytree(whole, tmp_path / "model")


def rewrite(model, change):
    tensors = load_file(model / "model.safetensors")
    change(tensors)
    save_file(tensors, model / "model.safetensors")


def resize(model, **sizes):
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | sizes))


def differences(capfd, *arguments):
    """The table's rows, by tensor."""
    assert main(["convert", "check", *map(str, arguments)]) == 1
    header, *rows, last = capfd.readouterr().out.splitlines()
    assert header.split() == ["tensor", "what", "differs"]
    assert last.startswith(f"{len(rows)} differences in ")
    return dict(row.split(maxsplit=1) for row in rows)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_what_transformers_writes_passes(tmp_path, family, tied, capfd):
    folder = make_tiny(tmp_path / family, family, tied=tied, seed=1, vocab_size=97)
    assert main(["convert", "check", str(folder)]) == 0
    assert main(["convert", "check", str(folder), str(folder)]) == 0
    assert "every bit equal" in capfd.readouterr().out


def test_flipped_bit_is_found_by_comparison(whole, model, capfd):
    file = model / "model.safetensors"
    content = bytearray(file.read_bytes())
    table = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    start = 8 + int.from_bytes(content[:8], "little") + table[NAME]["data_offsets"][0]
    content[start + 4 * 5] ^= 1  # the lowest bit of the fifth value
    file.write_bytes(content)
    assert main(["convert", "check", str(model)]) == 0
    capfd.readouterr()
    ((name, what),) = differences(capfd, whole, model).items()
    assert name == NAME
    assert what.startswith(f"1 of {256 * 128} values, by up to ")


def test_signs_of_zero_differ_and_nan_is_itself(whole, model, tmp_path, capfd):
    other = shutil.copytree(model, tmp_path / "other")
    nan = torch.tensor(float("nan"))
    rewrite(model, lambda t: (t[NAME][0].fill_(0.0), t[NAME][1].fill_(nan)))
    rewrite(other, lambda t: (t[NAME][0].fill_(-0.0), t[NAME][1].fill_(nan)))
    found = differences(capfd, model, other)
    assert found[NAME].startswith(f"128 of {256 * 128} values, by up to 0 ")
    assert main(["convert", "check", str(model), str(model)]) == 0


def test_missing_and_unknown_names_with_the_nearest(model, capfd):
    rewrite(model, lambda t: t.update({"model.layers.1.mlp.up_projection.weight": t.pop(NAME)}))
    found = differences(capfd, model)
    assert found[NAME] == "is missing; there is an unknown model.layers.1.mlp.up_projection.weight"
    assert found["model.layers.1.mlp.up_projection.weight"] == f"is unknown; the nearest known name is {NAME}"


def test_shape_and_dtype(model, capfd):
    def change(tensors):
        tensors[NAME] = tensors[NAME][:-1].clone()
        tensors["model.norm.weight"] = tensors["model.norm.weight"].half()

    rewrite(model, change)
    found = differences(capfd, model)
    assert found[NAME] == "has shape [255, 128], config.json asks for [256, 128]"
    assert found["model.norm.weight"] == "is float16, the model float32"


def test_comparison_names_shapes_dtypes_and_lonely_tensors(whole, model, capfd):
    def change(tensors):
        tensors[NAME] = tensors[NAME].bfloat16()
        tensors["model.norm.weight"] = tensors["model.norm.weight"][1:].clone()
        tensors["extra"] = tensors.pop("model.layers.0.input_layernorm.weight")

    rewrite(model, change)
    found = differences(capfd, whole, model)
    assert found[NAME] == "is float32 there, bfloat16 in the other"
    assert found["model.norm.weight"] == "has shape [128] there, [127] in the other"
    assert found["extra"] == f"is in {model} only"
    assert found["model.layers.0.input_layernorm.weight"] == f"is in {whole} only"


def test_tensor_in_two_files_and_wrong_index(model, capfd):
    with safe_open(model / "model.safetensors", framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (a handle is no dict)
    save_file({NAME: tensors[NAME]}, model / "second.safetensors")
    found = differences(capfd, model)
    assert found["model.safetensors.index.json"] == "is missing, with several files"
    assert found[NAME] == "is in model.safetensors and second.safetensors"
    weight_map = dict.fromkeys(tensors, "model.safetensors") | {"model.norm.weight": "second.safetensors"}
    del weight_map["model.embed_tokens.weight"]
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    found = differences(capfd, model)
    assert "index.json says second.safetensors" in found["model.norm.weight"]
    assert found["model.embed_tokens.weight"] == "is not in model.safetensors.index.json"


def test_tied_head_that_is_stored_must_be_the_embedding(model, capfd):
    rewrite(model, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    assert main(["convert", "check", str(model)]) == 0
    capfd.readouterr()
    rewrite(model, lambda t: t["lm_head.weight"].add_(1))
    assert "is not model.embed_tokens.weight" in differences(capfd, model)["lm_head.weight"]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda model: shutil.rmtree(model), "HF_DIR = {model}: no such folder"),
        (lambda model: (model / "model.safetensors").unlink(), "no *.safetensors in {model}"),
        (lambda model: (model / "model.safetensors").write_bytes(b"short"), "model.safetensors is damaged"),
        (lambda model: (model / "config.json").write_text('{"model_type": "gpt2"}'), "known: qwen2"),
        (lambda model: (model / "config.json").write_text('{"model_type": "qwen2"}'), "has no 'num_attention_heads'"),
        (lambda model: resize(model, num_hidden_layers="two"), "config.json has a size that is no number above 0"),
        (lambda model: resize(model, hidden_size=None, head_dim=None), "a size that is no number above 0"),
        (lambda model: (model / "more.safetensors").symlink_to("nowhere"), "more.safetensors cannot be read"),
    ],
)
def test_wrong_input_is_one_line(model, capfd, damage, message):
    damage(model)
    assert main(["convert", "check", str(model)]) == 2
    err = capfd.readouterr().err
    assert err.startswith("error: ")
    assert message.format(model=model) in err
    assert err.count("\n") == 1


def test_other_side_that_is_nothing(whole, tmp_path, capfd):
    assert main(["convert", "check", str(whole), str(tmp_path / "none")]) == 2
    assert "OTHER = " in (err := capfd.readouterr().err)
    assert "no such folder; give a Hugging Face folder, a run's" in err


def test_tensors_without_elements_are_compared(model, capfd):
    rewrite(model, lambda t: t.update(rows=torch.zeros(3, 0), columns=torch.zeros(0, 3)))
    assert differences(capfd, model, model).keys() == {"rows", "columns"}
