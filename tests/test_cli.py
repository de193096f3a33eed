"""The command line as a user meets it: exit codes, and one line on stderr."""

import errno
import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_riskpo.cli import explain, main
from megatron_riskpo.distributed.signals import STOP_SIGNALS
from megatron_riskpo.errors import RunError, UsageError


@pytest.fixture(autouse=True)
def handlers_restored(monkeypatch):
    """main() takes over the stop signals; a test process under torchrun's variables would be a rank."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_STEP_ID"):
        monkeypatch.delenv(name, raising=False)
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def recipe(tmp_path: Path) -> str:
    (tmp_path / "model").mkdir()
    model = {"num_attention_heads": 4, "num_key_value_heads": 4, "num_hidden_layers": 2, "hidden_size": 128}
    model |= {"model_type": "qwen2", "intermediate_size": 384, "vocab_size": 1000, "max_position_embeddings": 512}
    (tmp_path / "model" / "config.json").write_text(json.dumps(model))
    path = tmp_path / "x.toml"
    path.write_text(
        f'[model]\npath = "{tmp_path}/model"\n[rollout]\nengine = "megatron"\n[data]\nprompts_per_step = 40\n'
    )
    return str(path)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["--actor.tpp", "2"], "--actor.tpp: unknown key actor.tpp; did you mean actor.tp?"),
        (["--actor.tp", "3"], "actor.tp = 3 does not divide the model's 4 attention heads; use 2 or 4"),
        (["--rollout.group_size", "1", "--algorithm.estimator", "grpo"], "rollout.group_size = 1: set it to 2 or more"),
        (["--model.path", "/no/model"], "model.path = /no/model: no such folder"),
        (["--model.path="], "model.path is empty"),
    ],
)
def test_wrong_input_is_one_line_and_code_2(overrides, message: str, recipe: str, capfd) -> None:
    assert main(["train", recipe, *overrides]) == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert message in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["train", "/no/such.toml"], "/no/such.toml: no such configuration file"),
        (["tran"], "invalid choice: 'tran'"),
        (["train"], "required: X.toml"),
        ([], "required: COMMAND"),
    ],
)
def test_wrong_command_lines(argv, message: str, capfd) -> None:
    assert main(argv) == 2
    err = capfd.readouterr().err
    assert message in err
    assert err.count("\n") == 1


def test_debug_shows_the_traceback_wherever_it_stands(recipe: str, capfd) -> None:
    assert main(["train", recipe, "--debug", "--actor.tpp", "2"]) == 2
    err = capfd.readouterr().err
    assert "Traceback" in err
    assert err.rstrip().splitlines()[-1].startswith("error: --actor.tpp")


def test_help_lists_every_option_with_its_meaning(recipe: str, capfd) -> None:
    from megatron_riskpo.config import TrainConfig
    from megatron_riskpo.config_io import leaf_types

    with pytest.raises(SystemExit) as caught:
        main(["train", recipe, "--help"])
    out = capfd.readouterr().out
    assert caught.value.code == 0
    assert [key for key in leaf_types(TrainConfig) if f"--{key}" not in out] == []
    assert "Softmax temperature of sampling" in out


@pytest.mark.parametrize(
    ("option", "names"),
    [
        ("--algorithm.estimator", {"grpo", "riskpo"}),
        ("--algorithm.spectrum", {"mvar", "max_at_k"}),
        ("--loss.kind", {"gspo", "ppo"}),
    ],
)
@pytest.mark.parametrize("form", ["after a file", "alone", "with ="])
def test_list_prints_the_registry(option: str, names: set[str], form: str, recipe: str, capfd) -> None:
    forms = {"after a file": [recipe, option, "list"], "alone": [option, "list"], "with =": [f"{option}=list"]}
    assert main(["train", *forms[form]]) == 0
    out = capfd.readouterr().out
    assert names <= {line.partition(":")[0] for line in out.splitlines()}


def test_errors_are_explained_in_one_line() -> None:
    assert explain(UsageError("bad\n  key")) == ("bad key", 2)
    assert explain(RunError("lost a rank")) == ("lost a rank", 1)
    full = RunError("checkpoint step_5 could not be written")
    full.__cause__ = OSError(errno.ENOSPC, "No space left on device")
    assert explain(full) == ("checkpoint step_5 could not be written", 1)
    assert explain(ValueError("x")) == ("ValueError: x (use --debug for the traceback)", 1)


def test_a_full_disk_is_recognised_behind_other_errors() -> None:
    wrapped = RuntimeError("save failed")
    wrapped.__cause__ = OSError(errno.ENOSPC, "No space left on device", "/runs/a/step_5/model.pt")
    message, code = explain(wrapped)
    assert code == 1
    assert message.startswith("no space left on device while writing /runs/a/step_5/model.pt: ")
    assert message.endswith("free space or set run.dir to another disk")
    assert explain(RuntimeError("I/O error: No space left on device (os error 28)"))[0].startswith("no space left")


def test_a_real_full_disk() -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full on this system")
    with pytest.raises(OSError, match="No space left") as caught:
        Path("/dev/full").write_text("x")
    assert explain(caught.value)[0].startswith("no space left on device")


def test_the_command_line_loads_no_torch() -> None:
    program = "import sys, megatron_riskpo.cli; print([m for m in ('torch', 'tyro', 'numpy') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
