"""`riskpo slurm` up to the command that it submits, and what it refuses. (Jobs: tests/slurm.)"""

import json
import shlex
import stat
from pathlib import Path

import pytest

from megatron_riskpo import slurm_command
from megatron_riskpo.cli import main
from megatron_riskpo.errors import UsageError
from megatron_riskpo.slurm_job import seconds_of, warning_before
from tests.slurm.runs import SCRIPTS

MODEL = {
    "model_type": "qwen2", "vocab_size": 1000, "hidden_size": 256, "num_attention_heads": 8, "num_key_value_heads": 8,
    "num_hidden_layers": 2, "intermediate_size": 512, "max_position_embeddings": 4096,
}  # fmt: skip
SERVER = ("--rollout.engine", "vllm", "--rollout.placement", "server")


@pytest.fixture
def printed(tmp_path: Path, toml, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch):
    """Runs `riskpo slurm X.toml --print ...`; the words of the command, or what it complains of, and the exit code."""
    (tmp_path / "config.json").write_text(json.dumps(MODEL))
    path = toml(
        f'[model]\npath = "{tmp_path}"\n[data]\nprompts_per_step = 48\n[rollout]\nengine = "megatron"\n'
        '[run]\nname = "a b;c"\n'
    )
    monkeypatch.delenv("RISKPO_SLURM", raising=False)

    def printed(*arguments: str) -> tuple[list[str], str, int]:
        code = main(["slurm", path, "--print", *arguments])
        out, err = capsys.readouterr()
        return shlex.split(out), err, code

    return printed


def test_a_job_of_one_rank_a_gpu(printed, tmp_path: Path) -> None:
    words, err, code = printed("--nodes", "2", "--time", "12:00:00", "--sbatch=--qos=high", "--actor.tp", "2")
    assert (err, code) == ("", 0)
    assert words == [
        str(SCRIPTS / "submit.sh"), "--job-name=riskpo-a b;c", "--nodes=2", "--ntasks-per-node=8", "--cpus-per-task=12",
        "--time=12:00:00", words[6], "--gpus-per-node=8", "--qos=high", str(SCRIPTS / "train.sbatch"),
        str(tmp_path / "x.toml"), "--actor.tp", "2",
    ]  # fmt: skip
    # The planner's step, and what a checkpoint may take.
    warning = int(words[6].removeprefix("--signal=B:USR1@"))
    assert 180 < warning < 600


def test_a_job_on_cpus_is_not_planned(printed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_riskpo.planning.plan.make_plan", None)
    words, _, code = printed("--nodes", "2", "--time", "60", "--gpus-per-node", "0", "--cpus-per-rank", "3")
    assert code == 0
    assert words[2:7] == ["--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=3", "--time=60", "--signal=B:USR1@120"]
    assert not [word for word in words if "gpu" in word]


def test_servers_on_other_nodes(printed) -> None:
    words, err, code = printed("--nodes", "3", "--time", "60", "--server-nodes", "1", *SERVER, "--rollout.tp", "4")
    assert (err, code) == ("", 0)
    script = words.index(str(SCRIPTS / "train.sbatch"))
    assert words[script + 1 : script + 3] == ["--server-nodes=1", "--servers-per-node=2"]


def test_servers_beside_the_ranks_of_one_node_have_their_gpus(printed) -> None:
    words, err, code = printed("--nodes", "1", "--time", "60", *SERVER, "--rollout.tp", "2")
    assert (err, code) == ("", 0)
    assert "--ntasks-per-node=6" in words


def test_a_sweep_is_an_array(printed, tmp_path: Path) -> None:
    file = tmp_path / "rates.txt"
    file.write_text("# rates\n--optimizer.lr 1e-6\n\n--optimizer.lr 1e-5 --data.prompt_template 'x {problem}'\n")
    shape = ("--nodes", "1", "--time", "60", "--gpus-per-node", "0")
    words, err, code = printed(*shape, "--sweep", str(file), "--at-a-time", "1", "--run.steps", "3")
    assert (err, code) == ("", 0)
    assert "--array=1-2%1" in words
    assert words[-5:] == [str(SCRIPTS / "sweep.sbatch"), str(tmp_path / "x.toml"), str(file), "--run.steps", "3"]
    for text, complaint in (
        ("--optimizer.lr 1\n--optimizer.lrr 1\n", "line 2 of options: --optimizer.lrr: unknown key"),
        ("--run.name a\n--run.name a\n", "2 lines have run.name = a; give each its own"),
        ("# nothing\n", "has no line of options"),
        ('--data.train "x\n', "No closing quotation"),
    ):
        file.write_text(text)
        words, err, code = printed(*shape, "--sweep", str(file))
        assert (words, code) == ([], 2)
        assert complaint in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--nodes", "0"], "--nodes 0: give 1 or more"),
        (["--nodes", "2", "--server-nodes", "2"], "--server-nodes 2 of --nodes 2: give 0 to 1, one has to train"),
        (["--nodes", "2", "--server-nodes", "1"], "--server-nodes 1 is for a run with rollout.placement"),
        (["--nodes", "2", *SERVER], "listen on one machine only, and there are --nodes 2"),
        (["--nodes", "1", *SERVER, "--rollout.tp", "8"], "takes all of --gpus-per-node 8, and no rank is left"),
        (["--nodes", "2", "--server-nodes", "1", *SERVER, "--rollout.tp", "3"], "rollout.tp = 3 does not divide"),
        (["--nodes", "1", "--ranks-per-node", "9"], "--ranks-per-node 9: a node has 8 GPUs, one for each rank; give 8"),
        (["--nodes", "1", "--cpus-per-rank", "0"], "--cpus-per-rank 0: give 1 or more"),
        (["--nodes", "1", "--sbatch", "qos"], "write it as one word that begins with -"),
        (["--nodes", "1", "--at-a-time", "2"], "--at-a-time 2 is for --sweep"),
        (["--nodes", "1", "--time", "soon"], "--time soon: write minutes, H:M:S, or D-H:M:S"),
        (["--nodes", "1", "--time", "3"], "--time 3 is 180 s, and"),
        (["--nodes", "1", "--actor.tp", "3"], "actor.tp = 3 does not divide the model's 8 attention heads"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(arguments: list[str], message: str, printed) -> None:
    words, err, code = printed("--time", "60", *arguments)
    assert (words, code) == ([], 2)
    assert message in err
    assert err.count("\n") == 1


def test_what_does_not_fit_is_not_submitted(printed) -> None:
    full = ("--rollout.engine", "vllm", "--rollout.gpu_memory_utilization", "0.999999")
    words, err, code = printed("--nodes", "1", "--time", "60", *full)
    assert (words, code) == ([], 1)
    assert err.startswith("error: does not fit: phase ")


def test_slurms_own_refusal_is_passed_on(tmp_path: Path, toml, monkeypatch: pytest.MonkeyPatch, capfd) -> None:
    (tmp_path / "config.json").write_text(json.dumps(MODEL))
    path = toml(f'[model]\npath = "{tmp_path}"\n[rollout]\nengine = "megatron"\n')
    script = tmp_path / "submit.sh"
    script.write_text("#!/bin/bash\necho 'sbatch: error: no such partition' >&2\nexit 1\n")
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("RISKPO_SLURM", str(tmp_path))
    arguments = ["slurm", path, "--nodes", "1", "--time", "60", "--gpus-per-node", "0", "--data.prompts_per_step", "40"]
    assert main(arguments) == 1
    err = capfd.readouterr().err
    assert "sbatch: error: no such partition" in err
    assert "sbatch refused the job (exit code 1, see above)" in err
    script.write_text("#!/bin/bash\nexec sleep 30\n")
    monkeypatch.setattr(slurm_command, "SUBMIT_TIMEOUT_S", 0.2)
    assert main(arguments) == 1
    assert "sbatch did not answer within 0.2 s" in capfd.readouterr().err
    monkeypatch.setenv("RISKPO_SLURM", str(tmp_path / "nowhere"))
    assert main(arguments) == 2
    assert "nowhere; set RISKPO_SLURM to the folder slurm/ of the sources" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("time", "seconds"),
    [("30", 1800), ("1:30", 90), ("2:00:05", 7205), ("1-0", 86400), ("1-2:3", 93780), ("1-2:03:04", 93784)],
)
def test_time_limits_as_slurm_writes_them(time: str, seconds: int) -> None:
    assert seconds_of(time) == seconds


def test_the_warning_leaves_time_for_a_step_and_a_checkpoint() -> None:
    assert warning_before("60", 400.0) == 780
    assert warning_before("60", 0.0) == 120
    with pytest.raises(UsageError, match=r"--time 20 is 1200 s, and 780 s before its end .*; give 26 minutes or more"):
        warning_before("20", 400.0)
