"""slurm/'s scripts on a real controller, with a stand-in for riskpo that writes down how it was started.

What training does with a signal is tested with real ranks (test_jobs.py).
"""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_riskpo.cli import main
from tests.slurm.cluster import REQUIRED, Cluster, Job, require_slurm
from tests.slurm.runs import ROOT, SCRIPTS, log, phase, use_environment
from tests.test_slurm_command import MODEL

RISKPO = """#!/bin/bash
# Its arguments and place; then: `serve` announces itself and ends at TERM (with `... slow ...` a node's second one does
# not announce itself), `... bad ...` fails, `... wrong ...` as after wrong input, `... stall ...` ends as by the
# watchdog, `... wait ...` waits for the file `go`.
printf '%s\\n' "$SLURMD_NODENAME" "${CUDA_VISIBLE_DEVICES-}" "$@" >"$1.${SLURM_STEP_ID}_$SLURM_PROCID"
[[ " $* " == *" bad "* ]] && echo "no luck" && exit 3
[[ " $* " == *" wrong "* ]] && exit 2
[[ " $* " == *" stall "* ]] && echo "rank 1 lags" >"$RISKPO_STALLED_FILE" && exit 137
trap 'echo ended >"ended.$SLURM_STEP_ID"; exit 0' TERM
while [[ $1 == serve && " $* " == *"_1.json "*" slow "* ]]; do sleep 0.05; done
while [[ $1 == serve && $# -gt 1 ]]; do
    if [[ $2 == --endpoint ]]; then
        echo "{\\"url\\": \\"http://$SLURMD_NODENAME:80$SLURM_STEP_ID\\", \\"pid\\": 1}" >"$3"
        while :; do sleep 0.05; done
    fi
    set -- "$1" "${@:3}"
done
while [[ " $* " == *" wait "* && ! -e go ]]; do sleep 0.05; done
[[ $1 == doctor ]] || touch "$RISKPO_DONE_FILE"
"""
ARGUMENTS = {
    "train": ["my.toml"],
    "evaluate": ["--model", "runs/my", "--data", "x.jsonl"],
    "convert": ["megatron-to-hf", "runs/my", "out"],
    "sweep": ["my.toml", "rates.txt"],
    "serve": ["my.toml"],
}
Submit = Callable[..., Job]


@pytest.fixture
def submit(cluster: Cluster, tmp_path: Path) -> Submit:
    """Submits by submit.sh from an empty folder, with the stand-in as riskpo."""
    (tmp_path / "riskpo").write_text(RISKPO)
    (tmp_path / "riskpo").chmod(0o755)
    use_environment(cluster, tmp_path, f'"{tmp_path}/riskpo"')

    def submit(*arguments: object) -> Job:
        return Job(cluster, tmp_path, cluster.run(SCRIPTS / "submit.sh", "--parsable", *arguments, cwd=tmp_path))

    return submit


def started(job: Job, pattern: str) -> list[list[str]]:
    """Node, CUDA_VISIBLE_DEVICES and arguments of the stand-ins."""
    return [file.read_text().splitlines() for file in sorted(job.folder.glob(pattern))]


@pytest.mark.parametrize("name", ARGUMENTS)
def test_slurm_accepts_every_script(name: str, cluster: Cluster, submit: Submit, tmp_path: Path) -> None:
    shape = [] if name == "serve" else ["--nodes=2", "--ntasks-per-node=8"]
    command = ["sbatch", "--test-only", *shape, "--gpus-per-node=8", SCRIPTS / f"{name}.sbatch", *ARGUMENTS[name]]
    assert "to start at" in cluster.run(*command, cwd=tmp_path)
    command[-len(ARGUMENTS[name]) - 1 : -len(ARGUMENTS[name]) - 1] = ["--nodes=3", "--ntasks=3"]
    refused = cluster.run(*command, check=False, cwd=tmp_path)
    assert "Node count specification invalid" in refused


def test_there_is_a_test_for_every_script() -> None:
    assert {path.stem for path in SCRIPTS.glob("*.sbatch")} == set(ARGUMENTS)


@pytest.mark.parametrize("name", ["train", "evaluate", "convert", "serve", "sweep"])
def test_without_arguments_it_says_what_it_needs(name: str, submit: Submit) -> None:
    job = submit(SCRIPTS / f"{name}.sbatch")
    job.end("FAILED")
    assert job.shown("ExitCode") == "2:0"
    assert f"slurm/{name}.sbatch " in log(job, 1, "batch")
    assert phase(job) == "failed"
    assert not started(job, f"{name}.*")


def test_arguments_reach_every_rank_as_they_are(submit: Submit) -> None:
    arguments = ["my.toml", "--data.prompt_template", "a  'b' $(touch evil) \"c\"; *"]
    job = submit("--nodes=2", "--ntasks-per-node=2", SCRIPTS / "train.sbatch", *arguments)
    job.end("COMPLETED")
    assert [words[2:] for words in started(job, "train.*")] == [["train", *arguments]] * 4
    assert sorted(words[0] for words in started(job, "train.*")) == ["n0", "n0", "n1", "n1"]
    assert (phase(job), (job.folder / "evil").exists()) == ("done", False)


def test_a_preflight_runs_before_the_training_and_can_end_the_job(submit: Submit, tmp_path: Path) -> None:
    with (tmp_path / "env.sh").open("a") as env:
        env.write("PREFLIGHT=(doctor --job)\n")
    job = submit("--nodes=2", SCRIPTS / "train.sbatch", "my.toml", "--actor.tp", "2")
    job.end("COMPLETED")
    assert [words[2:] for words in started(job, "doctor.0_*")] == [
        ["doctor", "--job", "my.toml", "--actor.tp", "2"]
    ] * 2
    assert len(started(job, "train.1_*")) == 2
    job = submit("--nodes=2", SCRIPTS / "train.sbatch", "bad")
    job.end("FAILED")
    lines = [line for line in log(job, 1, "batch").splitlines() if line.startswith("20")]
    assert [line.split()[1] for line in lines] == ["preflight", "failed"]
    assert len(started(job, "train.*")) == 2


def test_a_failed_job_is_tried_again_as_often_as_env_says(submit: Submit, tmp_path: Path) -> None:
    with (tmp_path / "env.sh").open("a") as env:
        env.write("RETRIES=1 STALL_RETRIES=0\n")
    job, stalled = (submit(SCRIPTS / "train.sbatch", word) for word in ("bad", "stall"))
    job.end("FAILED")
    assert (job.shown("Restarts"), job.shown("ExitCode"), phase(job)) == ("1", "3:0", "failed")
    stalled.end("FAILED")
    assert (stalled.shown("Restarts"), stalled.shown("ExitCode"), phase(stalled)) == ("0", "137:0", "failed")
    assert "\nrank 1 lags\n" in log(stalled, 1, "batch")
    assert ["rank 0 on n0: exit code 3\n" in log(job, attempt, "batch") for attempt in (1, 2)] == [True, True]


def test_the_end_of_one_task_leaves_the_others_of_its_array_alone(
    submit: Submit, cluster: Cluster, tmp_path: Path
) -> None:
    """Of the last one, whose number is the array's."""
    with (tmp_path / "env.sh").open("a") as env:
        env.write("RETRIES=1\n")
    tasks = {}
    for last in ("bad", "wait"):
        (tmp_path / f"{last}.txt").write_text(f"wait\n{last}\n")
        array = submit("--array=1-2", "--ntasks=1", SCRIPTS / "sweep.sbatch", "my.toml", f"{last}.txt")
        tasks |= {(last, number): Job(cluster, tmp_path, f"{array.id}_{number}") for number in (1, 2)}
    cancelled = tasks["wait", 2]
    cancelled.wait_for(lambda: phase(cancelled) == "training")
    cluster.run("scancel", cancelled.id)
    cancelled.end("CANCELLED")
    tasks["bad", 2].end("FAILED")
    (tmp_path / "go").touch()
    for last in ("bad", "wait"):
        tasks[last, 1].end("COMPLETED")
    cancelled.wait_for(lambda: phase(cancelled) == "cancelled")
    assert [task.shown("Restarts") for task in tasks.values()] == ["0", "1", "0", "0"]


def test_what_ends_without_being_done_is_no_success(submit: Submit, tmp_path: Path) -> None:
    (tmp_path / "riskpo").write_text("#!/bin/bash\nexit 0\n")
    job = submit(SCRIPTS / "train.sbatch", "my.toml")
    job.end("FAILED")
    assert phase(job) == "failed"


def test_servers_run_on_nodes_of_their_own_and_end_with_the_run(submit: Submit) -> None:
    shape = ("--nodes=2", "--ntasks-per-node=2", "--gpus-per-node=8")
    job = submit(
        *shape, SCRIPTS / "train.sbatch", "--server-nodes=1", "--servers-per-node=2", "my.toml", "--rollout.tp", "4"
    )
    job.end("COMPLETED")
    # Whichever asked first is the first step: by their GPUs.
    servers, ranks = sorted(started(job, "serve.*"), key=lambda words: words[1]), started(job, "train.*")
    attempt = job.logs / "attempt_1"
    assert [words[:2] for words in servers] == [["n1", "0,1,2,3"], ["n1", "4,5,6,7"]]
    for index, words in enumerate(servers):
        endpoint = str(attempt / f"server_n1_{index}.json")
        assert words[2:] == [
            "serve", "--host", "127.0.0.1", "--tokens-only", "--without-weights", "--endpoint", endpoint,
            "my.toml", "--rollout.tp", "4",
        ]  # fmt: skip
    urls = [json.loads((attempt / f"server_n1_{index}.json").read_text())["url"] for index in (0, 1)]
    own = ["--rollout.server_urls", *urls]
    assert [words[0] for words in ranks] == ["n0", "n0"]
    assert [words[2:] for words in ranks] == [["train", "my.toml", *own, "--rollout.tp", "4"]] * 2
    assert len(list(job.folder.glob("ended.*"))) == 2


def test_a_server_that_does_not_come_up_ends_the_job_with_its_exit_code(submit: Submit, tmp_path: Path) -> None:
    with (tmp_path / "env.sh").open("a") as env:
        env.write("RETRIES=1\n")
    jobs = [submit("--nodes=2", SCRIPTS / "train.sbatch", "--server-nodes=1", "my.toml", w) for w in ("bad", "wrong")]
    for job, code, restarts in zip(jobs, (3, 2), ("1", "0"), strict=True):
        job.end("FAILED")
        assert (job.shown("ExitCode"), job.shown("Restarts")) == (f"{code}:0", restarts)
        assert f"server_n1_0 ended with exit code {code} before all were healthy:\n" in log(job, 1, "batch")
        assert not started(job, "train.*")
    assert "healthy:\nno luck\n" in log(jobs[0], 1, "batch")


def test_servers_that_a_job_still_waits_for_are_named_at_its_end(submit: Submit, tmp_path: Path) -> None:
    with (tmp_path / "env.sh").open("a") as env:
        env.write("IDLE_RETRIES=0\n")
    job = submit("--nodes=2", SCRIPTS / "train.sbatch", "--server-nodes=1", "--servers-per-node=2", "my.toml", "slow")
    job.wait_for((job.logs / "attempt_1" / "server_n1_0.json").exists)
    job.cluster.run("scancel", "--batch", "--signal=USR1", job.id)
    job.end("FAILED")
    assert "a signal came before all rollout servers were healthy" in log(job, 1, "batch")
    assert "not yet: server_n1_1; see" in log(job, 1, "batch")
    assert not started(job, "train.*")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--server-nodes=2"], "--server-nodes=2 --servers-per-node=1: of 2 nodes at least one has to train"),
        (
            ["--server-nodes=1", "--servers-per-node=5"],
            "--servers-per-node=5: a node has 4 GPUs, and a server takes one at least",
        ),
    ],
)
def test_too_many_servers_are_refused(options: list[str], message: str, submit: Submit) -> None:
    job = submit("--nodes=2", "--gpus-per-node=4", SCRIPTS / "train.sbatch", *options, "my.toml")
    job.end("FAILED")
    assert message in log(job, 1, "batch")
    assert job.shown("ExitCode") == "2:0"
    assert not started(job, "serve.*")


def test_a_server_alone_serves_until_it_is_cancelled(submit: Submit) -> None:
    job = submit(SCRIPTS / "serve.sbatch", "my.toml", "--rollout.tp", "4")
    job.wait_for((job.logs / "server.json").exists)
    assert phase(job) == "serving"
    job.cluster.run("scancel", job.id)
    job.end("CANCELLED")
    job.wait_for(lambda: phase(job) == "cancelled")
    (words,) = started(job, "serve.*")
    assert words[2:] == ["serve", "--host", "127.0.0.1", "--endpoint", str(job.logs / "server.json"), "my.toml",
                         "--rollout.tp", "4"]  # fmt: skip
    assert list(job.folder.glob("ended.*"))


def test_what_follows_a_failed_training_is_taken_out_of_the_queue(
    submit: Submit, cluster: Cluster, tmp_path: Path
) -> None:
    said = cluster.run(SCRIPTS / "chain.sh", "runs/my", "x.jsonl", "--time=5", "--", "bad", cwd=tmp_path)
    train, convert, evaluate = (Job(cluster, tmp_path, id) for id in said.split()[1::2])
    train.end("FAILED")
    convert.end("CANCELLED")
    evaluate.end("CANCELLED")
    assert train.shown("ExitCode") == "3:0"
    assert started(convert, "*.*_0")[0][2:] == ["train", "bad"]


def test_a_chain_whose_later_job_is_refused_says_what_is_in_the_queue(
    submit: Submit, cluster: Cluster, tmp_path: Path
) -> None:
    with (tmp_path / "env.sh").open("a") as env:
        env.write("EVALUATE_OPTIONS=(--nodes=3)\n")
    said = cluster.run(
        SCRIPTS / "chain.sh", "runs/my", "x y.jsonl", "--time=5", "--begin=now+1hour", "--", "my.toml",
        cwd=tmp_path, check=False,
    )  # fmt: skip
    lines = said.splitlines()
    assert "Node count specification invalid" in lines[-5] + lines[-4]
    train, convert = lines[-3].removeprefix("in the queue is: train ").split(" convert ")
    assert lines[-4:-1] == [
        "error: the job to evaluate was refused, see above",
        f"in the queue is: train {train} convert {convert}",
        f"take it out (scancel {train} {convert}), or mend the options and submit what is left, beginning with:",
    ]
    assert f" --dependency=afterok:{convert} --kill-on-invalid-dep=yes --nodes=3 " in lines[-1]
    assert "x\\ y.jsonl" in lines[-1]
    assert [Job(cluster, tmp_path, id).state for id in (train, convert)] == ["PENDING", "PENDING"]
    cluster.run("scancel", train, convert)


def test_riskpo_slurm_submits_what_it_prints(
    submit: Submit, cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(MODEL))
    (tmp_path / "x.toml").write_text('[model]\npath = "."\n[rollout]\nengine = "megatron"\n[run]\nname = "mine"\n')
    for name, value in cluster.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    options = ["--time", "1:00:00", "--gpus-per-node", "0", "--ranks-per-node", "2", "--cpus-per-rank", "1"]
    options += ["--data.prompts_per_step", "40", "--loss.kind", "gspo"]
    assert main(["slurm", "x.toml", "--nodes", "2", "--test-only", *options]) == 0
    assert "to start at" in capfd.readouterr().err
    assert main(["slurm", "x.toml", "--nodes", "5", *options]) == 1
    assert "Node count specification invalid" in capfd.readouterr().err
    assert main(["slurm", "x.toml", "--nodes", "2", *options]) == 0
    job = Job(cluster, tmp_path, capfd.readouterr().out.split()[-1])
    job.end("COMPLETED")
    assert [job.shown(name) for name in ("JobName", "NumNodes", "TimeLimit")] == ["riskpo-mine", "2", "01:00:00"]
    assert [words[2:] for words in started(job, "train.*")] == [["train", "x.toml", *options[-4:]]] * 4


def test_where_slurm_has_to_be_its_absence_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", os.devnull)
    monkeypatch.delenv(REQUIRED, raising=False)
    with pytest.raises(pytest.skip.Exception, match="munged, slurmctld, slurmd, sbatch not installed"):
        require_slurm()
    monkeypatch.setenv(REQUIRED, "1")
    with pytest.raises(pytest.fail.Exception, match=f"{REQUIRED} is set, but munged"):
        require_slurm()
    assert f"export {REQUIRED}=1" in (ROOT / ".ci" / "run").read_text()
