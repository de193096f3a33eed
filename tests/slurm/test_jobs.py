"""slurm/'s scripts on a real controller with two virtual nodes, training on real ranks.

All jobs are submitted at once, each from a folder of its own. Second way to the weights of an interrupted run: the run
in one go. Interrupted runs stay in their second step, once they are there, until the test has seen their signal arrive.
"""

import json
import os
import signal
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime

import psutil
import pytest
import torch
from safetensors.torch import load_file

from tests.slurm.cluster import Cluster, Job
from tests.slurm.runs import SCRIPTS, STEPS, log, phase, use_environment, write_files

pytestmark = pytest.mark.slow

ONE_RANK = ("--nodes=1", "--ntasks=1")
TWO_NODES = ("--nodes=2", "--ntasks-per-node=1")
INTERRUPTED = {
    "signal": TWO_NODES,
    "time_limit": (*ONE_RANK, "--signal=B:USR1@110"),
    "preempted": (*ONE_RANK, "--gpus-per-node=8", "--nodelist=n1"),
    "cancelled": ONE_RANK,
}
STALL_LIMIT_S = 45
"""The second attempt is held as well, and killed meanwhile: on a busy machine that is half a minute later."""
FAILING = ("--checkpoint.every", "1", "--checkpoint.asynchronous", "false")
FAILING += ("--run.stall_limit_s", str(STALL_LIMIT_S), "--bridge.timeout_s", "5")
SWEEP = """
# Two runs, one of them with an option that does not exist.
--optimizer.lr 2e-3 --data.prompt_template "{problem} "

--optimizer.lrr 2e-3
"""


@pytest.fixture(scope="module")
def jobs(cluster: Cluster) -> dict[str, Job]:
    """By name, all submitted and interrupted; they may still run."""
    folder = cluster.folder.parent
    write_files(folder)
    use_environment(cluster, folder)
    jobs = {name: _train(cluster, name, *options, hold=True) for name, options in INTERRUPTED.items()}
    jobs["failing"] = _train(cluster, "failing", *TWO_NODES, hold=True, options_of_run=FAILING)
    jobs |= {"one_rank": _train(cluster, "one_rank", *ONE_RANK), **_sweep(cluster), **_chain(cluster)}
    jobs |= _unwarned(cluster)
    with ThreadPoolExecutor(1) as beside:
        failed = beside.submit(_fail_twice, jobs["failing"])
        _interrupt(jobs)
        failed.result()
    return jobs


def _train(cluster: Cluster, name: str, *options: str, hold: bool = False, options_of_run: Sequence[str] = ()) -> Job:
    folder = cluster.folder.parent / name
    folder.mkdir()
    if hold:
        (folder / "hold").touch()
    run = (SCRIPTS / "train.sbatch", folder.parent / "run.toml", *options_of_run)
    return cluster.submit(folder, *options, "--time=60", *run)


def _sweep(cluster: Cluster) -> dict[str, Job]:
    folder = cluster.folder.parent / "sweep"
    folder.mkdir()
    (folder / "rates.txt").write_text(SWEEP)
    options = ("--array=1-2%2", *ONE_RANK, "--time=60", SCRIPTS / "sweep.sbatch")
    array = cluster.submit(folder, *options, folder.parent / "run.toml", "rates.txt", "--run.steps", "1")
    return {name: Job(cluster, folder, f"{array.id}_{number}") for number, name in ((1, "good_line"), (2, "bad_line"))}


def _chain(cluster: Cluster) -> dict[str, Job]:
    """Its training is the one that begins with an examination of the nodes."""
    folder = cluster.folder.parent / "chain"
    folder.mkdir()
    env = (folder.parent / "env.sh").read_text().replace("PREFLIGHT=()\n", "")
    (folder / "env.sh").write_text(env)
    limits = ("--rollout.max_response_tokens", "4", "--data.max_prompt_tokens", "16")
    said = cluster.run(
        SCRIPTS / "chain.sh", "runs/run", folder.parent / "questions.jsonl", *TWO_NODES, "--time=60",
        "--", folder.parent / "run.toml", "--", *limits, cwd=folder,
        RISKPO_ENV=str(folder / "env.sh"),
    )  # fmt: skip
    words = said.split()
    return {name: Job(cluster, folder, id) for name, id in zip(words[::2], words[1::2], strict=True)}


def _unwarned(cluster: Cluster) -> dict[str, Job]:
    """A job that asked for no warning, does not end by itself, and has to make way."""
    folder = cluster.folder.parent / "unwarned"
    folder.mkdir()
    (folder / "env.sh").write_text('. "$RISKPO_SLURM/env.sh"\nRISKPO=(bash -c "sleep infinity")\n')
    where, variables = ("--gpus-per-node=8", "--nodelist=n0"), {"RISKPO_ENV": str(folder / "env.sh")}
    job = cluster.submit(folder, "--partition=brief", *where, SCRIPTS / "convert.sbatch", "x", **variables)
    job.wait_for(lambda: phase(job) == "converting")
    return {"unwarned": job, "urgent_n0": _urgent(job, *where)}


def _urgent(job: Job, *where: str) -> Job:
    """Takes the GPUs that `job` has."""
    return job.cluster.submit(job.folder, "--partition=urgent", *where, "--wrap", "true")


def _interrupt(jobs: dict[str, Job]) -> None:
    """Each of those that hold, in its own way; then let them go on as soon as they know of it."""
    held = [jobs[name] for name in INTERRUPTED]
    for job in held:
        job.wait_for((job.folder / "held").exists)
    run, limited = held[0].cluster.run, jobs["time_limit"]
    run("scancel", jobs["cancelled"].id)
    run("scancel", "--batch", "--signal=USR1", jobs["signal"].id)
    jobs["urgent_n1"] = _urgent(jobs["preempted"], "--gpus-per-node=8", "--nodelist=n1")
    # One to two minutes from now, so that the warning is due; Slurm looks every 30 s.
    hours, minutes, _ = map(int, limited.shown("RunTime").split(":"))
    run("scontrol", "update", f"JobId={limited.id}", f"TimeLimit={60 * hours + minutes + 2}")
    told = [jobs[name] for name in ("cancelled", "signal", "preempted", "time_limit")]
    for job in told:
        job.wait_for(lambda job=job: phase(job) in ("saving", "stopping"))
    # From the batch script the signal goes on through srun to the ranks, which say nothing of it before the step's end.
    time.sleep(5)
    for job in told:
        (job.folder / "hold").unlink()
    run("scontrol", "update", f"JobId={limited.id}", "TimeLimit=60")


def _fail_twice(job: Job) -> None:
    """Stop its rank 1, which has it requeued; then kill it."""
    _signal_rank_1(job, signal.SIGSTOP)
    job.wait_for((job.logs / "attempt_2").exists)
    (job.folder / "held").unlink()
    _signal_rank_1(job, signal.SIGKILL)


def _signal_rank_1(job: Job, number: signal.Signals) -> None:
    """Once it is in its second step; a file with the signal's name tells when."""
    job.wait_for((job.folder / "held").exists)
    (rank,) = [process for process in psutil.process_iter() if _is_rank(process, job, 1)]
    os.kill(rank.pid, number)
    (job.folder / number.name).touch()


def _is_rank(process: psutil.Process, job: Job, rank: int) -> bool:
    try:
        environment, command = process.environ(), process.cmdline()
    except psutil.Error:
        return False
    mine = (environment.get("SLURM_JOB_ID"), environment.get("SLURM_PROCID")) == (job.id, str(rank))
    return mine and command[0] == sys.executable and "train" in command


def assert_went_on(job: Job, whole: Job) -> None:
    """It was saved after its second step, requeued, resumed there, and has the weights of `whole`."""
    job.end("COMPLETED")
    assert (job.shown("Restarts"), phase(job)) == ("1", "done")
    batch = log(job, 1, "batch")
    assert [line.split()[1] for line in batch.splitlines() if line[:2] == "20"] == ["training", "saving", "requeued"]
    assert f"stopped by a signal after step 2 of {STEPS}" in log(job, 1)
    assert (job.logs / "attempt_1" / "progress").exists()
    assert "checkpoints/step_2 at step 2\n" in log(job, 2)
    assert_same_weights(job, whole)


def assert_same_weights(job: Job, whole: Job) -> None:
    whole.end("COMPLETED")
    found, expected = (load_file(each.folder / "runs" / "run" / "hf" / "model.safetensors") for each in (job, whole))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_the_time_limit(jobs: dict[str, Job]) -> None:
    assert_went_on(jobs["time_limit"], jobs["one_rank"])


def test_a_signal(jobs: dict[str, Job]) -> None:
    assert_went_on(jobs["signal"], jobs["train"])


def test_a_job_of_a_higher_partition_takes_its_place(jobs: dict[str, Job]) -> None:
    jobs["urgent_n1"].end("COMPLETED")
    assert_went_on(jobs["preempted"], jobs["one_rank"])


def test_without_a_warning_slurm_requeues_what_has_to_make_way(jobs: dict[str, Job]) -> None:
    """TERM alone comes, and the grace period is longer than what the ranks need to end."""
    job = jobs["unwarned"]
    jobs["urgent_n0"].end("COMPLETED")
    job.wait_for(lambda: (job.logs / "attempt_2").exists())
    assert log(job, 1, "batch").splitlines()[-1].endswith(" preempted")
    assert job.shown("Restarts") == "1"


def test_a_stopped_rank_is_named_and_its_job_goes_on_from_the_checkpoint(jobs: dict[str, Job]) -> None:
    job = jobs["failing"]
    batch = log(job, 1, "batch")
    assert f"no progress within run.stall_limit_s = {STALL_LIMIT_S} s: rank 1 (" in batch
    assert "stopped by a signal (SIGSTOP); 1 of 2 ranks wait for it" in batch
    (requeued,) = [line.split()[0] for line in batch.splitlines() if line.endswith(" requeued")]
    stopped = (job.folder / "SIGSTOP").stat().st_mtime
    # The limit, 10 s on an idle machine, and what a busy one needs.
    assert datetime.fromisoformat(requeued).timestamp() - stopped < STALL_LIMIT_S + 60
    assert "checkpoints/step_1 at step 1\n" in log(job, 2)


def test_a_failing_rank_ends_the_job(jobs: dict[str, Job]) -> None:
    """Killed while the other one waits, and does not watch its connections."""
    job = jobs["failing"]
    job.end("FAILED")
    ended = datetime.fromisoformat(job.shown("EndTime")).timestamp()
    assert ended - (job.folder / "SIGKILL").stat().st_mtime < 60
    assert job.shown("ExitCode") == "137:0"
    assert phase(job) == "failed"
    assert "rank 1 on n1: exit code 137\n" in log(job, 2, "batch")


def test_a_bad_line_of_a_sweep_marks_only_its_own_task(jobs: dict[str, Job]) -> None:
    good, bad = jobs["good_line"], jobs["bad_line"]
    bad.end("FAILED")
    good.end("COMPLETED")
    assert bad.shown("ExitCode") == "2:0"
    assert "unknown key optimizer.lrr; did you mean optimizer.lr?" in log(bad, 1)
    assert (phase(good), phase(bad)) == ("done", "failed")
    record = json.loads((good.folder / "runs" / "rates_1" / "config.json").read_text())["config"]
    assert record["optimizer"]["lr"] == 2e-3
    assert record["data"]["prompt_template"] == "{problem} "


def test_a_chain_trains_converts_and_evaluates(jobs: dict[str, Job]) -> None:
    for name in ("train", "convert", "evaluate"):
        jobs[name].end("COMPLETED")
    assert "versions of all ranks: the same on 2 ranks" in log(jobs["train"], 1, "preflight_0")
    starts = [jobs[name].shown("StartTime") for name in ("train", "convert", "evaluate")]
    assert starts == sorted(starts)
    run = jobs["train"].folder / "runs" / "run"
    converted, written = (load_file(run / name / "model.safetensors") for name in ("converted", "hf"))
    assert all(torch.equal(converted[name], written[name]) for name in written)
    results = jobs["train"].folder / "evaluations" / "converted" / "eval-results"
    metrics = json.loads((results / "metrics.json").read_text())
    assert metrics["questions"]["pass@1"]["num_entries"] == 60


def test_scancel_ends_it_for_good(jobs: dict[str, Job]) -> None:
    """Last, so that a job that comes back has had the time."""
    job = jobs["cancelled"]
    job.end("CANCELLED")
    assert (job.folder / "runs" / "run" / "checkpoints" / "step_2" / "manifest.json").exists(), job.tail()
    ended = datetime.fromisoformat(job.shown("EndTime")).timestamp()
    # Longer than a requeued job has to wait.
    time.sleep(max(0.0, ended + 8 - time.time()))
    assert (job.state, job.shown("Restarts"), phase(job)) == ("CANCELLED", "0", "cancelled")
