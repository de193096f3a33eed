"""What `riskpo serve` refuses before anything heavy is loaded. Servers that start: rollout/test_server_engine.py."""

import json
import re
import socket
from pathlib import Path

import pytest

from megatron_riskpo.cli import main
from megatron_riskpo.errors import UsageError
from megatron_riskpo.rollout.vllm_server import ServeOptions, _endpoint, _listen, _url

MODEL = {
    "model_type": "qwen2", "num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 128,
    "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 96, "max_position_embeddings": 512,
}  # fmt: skip


@pytest.fixture
def model(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(MODEL))
    return tmp_path


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--rollout.tp", "3"], "rollout.tp = 3 does not divide the model's 4 attention heads; use 2"),
        (["--rollout.tp", "2", "--rollout.expert_parallel", "true"], "but the model has no experts; set it to false"),
        (["--data.max_prompt_tokens", "500"], "exceeds the model's max_position_embeddings = 512"),
        (["--rollout.max_num_seqs", "0"], "rollout.max_num_seqs = 0 is out of range"),
        (["--rollout.max_num_seq", "1"], "did you mean rollout.max_num_seqs?"),
    ],
)
def test_options_that_cannot_work_are_refused(model, options, message, capsys):
    assert main(["serve", str(model), *options]) == 2
    assert message in capsys.readouterr().err


def test_a_model_or_file_that_is_not_there_is_named(tmp_path, capsys):
    assert main(["serve", str(tmp_path)]) == 2
    assert "has no config.json" in capsys.readouterr().err
    assert main(["serve", str(tmp_path / "my.toml")]) == 2
    assert "my.toml: no such configuration file" in capsys.readouterr().err


def test_a_port_that_is_taken_is_told_at_once():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UsageError, match=rf"--host 127.0.0.1 --port {port}: Address already in use; choose others"):
            _listen("127.0.0.1", port)
    with pytest.raises(UsageError, match=r"--host no\.such\.host --port 0"):
        _listen("no.such.host", 0)
    with pytest.raises(UsageError, match=r"--port 99999: .*0-65535"):
        _listen("127.0.0.1", 99999)


def test_an_endpoint_file_that_cannot_be_written_is_told_before_the_model_is_loaded(model, tmp_path, capsys):
    assert main(["serve", "--endpoint", str(tmp_path / "config.json" / "server.json"), str(model)]) == 2
    assert re.search(r"--endpoint .*server.json cannot be written: .*; choose another file", capsys.readouterr().err)


def test_two_servers_of_one_configuration_have_a_file_each(tmp_path):
    name = f"server-{socket.gethostname()}"
    files = {_endpoint(ServeOptions(folder=tmp_path), port) for port in (8000, 8001)}
    assert files == {tmp_path / f"{name}-8000.json", tmp_path / f"{name}-8001.json"}
    assert _endpoint(ServeOptions(endpoint=tmp_path / "x.json", folder=tmp_path), 8000) == tmp_path / "x.json"
    assert _endpoint(ServeOptions(), 8000) is None


def test_the_address_can_be_used_by_others():
    assert _url("127.0.0.1", 80) == "http://127.0.0.1:80"
    assert _url("::1", 80) == "http://[::1]:80"
    assert _url("0.0.0.0", 80) == f"http://{socket.gethostname()}:80"
