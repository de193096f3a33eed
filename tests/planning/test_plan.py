"""Memory and time react as they must; the search keeps the rules; what is refused is refused in train's words."""

import dataclasses
import itertools
import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from megatron_riskpo.cli import main
from megatron_riskpo.config import ActorConfig, TrainConfig
from megatron_riskpo.config_checks import PLAN_RULES, TRAIN_RULES, problems
from megatron_riskpo.config_io import load_config
from megatron_riskpo.config_rules import Setup
from megatron_riskpo.planning.activations import ActivationBytes
from megatron_riskpo.planning.gpus import GIB, GPUS
from megatron_riskpo.planning.memory import PHASES, RankMemory, complaints, engine_bytes, phases
from megatron_riskpo.planning.model_size import count_parameters, largest_module
from megatron_riskpo.planning.pipeline import bubble_share, layers_of_chunk, most_in_flight
from megatron_riskpo.planning.plan import Plan, make_plan
from megatron_riskpo.planning.search import candidates, search
from megatron_riskpo.planning.state_bytes import StateBytes
from megatron_riskpo.planning.step_time import StepTime, plan_time
from megatron_riskpo.planning.workload import fullest_micro_batch, workload
from megatron_riskpo.resharding.plan import plan_rank
from megatron_riskpo.resharding.plan_text import planned_layout

MODEL = {
    "model_type": "qwen2",
    "vocab_size": 32000,
    "hidden_size": 1024,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "num_hidden_layers": 8,
    "intermediate_size": 4096,
    "max_position_embeddings": 8192,
}
H100 = GPUS["h100"]


def config_of(toml, *overrides: str) -> TrainConfig:
    own = ("--model.dtype", "bfloat16", "--data.prompts_per_step", "40", "--rollout.max_response_tokens", "2048")
    return load_config(TrainConfig, toml(), [*own, *overrides])


def plan_of(toml, world_size: int, *overrides: str) -> Plan:
    return make_plan(config_of(toml, *overrides), MODEL, world_size, H100)


def test_what_shares_memory_out_lowers_it(toml) -> None:
    base = plan_of(toml, 1)
    full, halves = plan_of(toml, 1, "--actor.recompute", "full"), plan_of(toml, 2, "--actor.tp", "2")
    assert full.memory[0].activations.update < 0.5 * base.memory[0].activations.update
    assert full.time.phases["update"].seconds > base.time.phases["update"].seconds
    assert halves.memory[0].state.parameters < 0.51 * base.memory[0].state.parameters
    waiting = plan_of(toml, 1, "--actor.offload_optimizer", "true").memory[0]
    assert waiting.phases["rollout"]["optimizer"] == 0 < waiting.host == base.memory[0].state.optimizer
    assert waiting.phases["update"].get("activations", 0) + waiting.phases["update"]["optimizer"] > 0


def test_every_phase_is_there_and_adds_up(toml) -> None:
    plan = plan_of(toml, 2, "--actor.pp", "2", "--actor.mini_batches", "2")
    assert [rank.rank for rank in plan.memory] == [0, 1]
    for rank in plan.memory:
        assert list(rank.phases) == ["load", "rollout", "logprobs", "update", "sync"]
        assert rank.peak == max(sum(items.values()) for items in rank.phases.values())
    assert list(plan.time.phases) == ["rollout", "reward", "logprobs", "update", "sync"]
    assert plan.time.phases["logprobs"].seconds > 0
    assert plan.time.seconds == pytest.approx(sum(phase.seconds for phase in plan.time.phases.values()))
    assert 0 < plan.time.mfu < 1


def test_steps_ahead_take_the_longer_of_sampling_and_training(toml) -> None:
    """Against steps played through."""
    base, longer = config_of(toml, "--rollout.engine", "vllm", "--rollout.placement", "server"), set()
    for ahead, (servers, prompts) in itertools.product((0, 1, 2), ((1, 40), (32, 4000))):
        rollout = dataclasses.replace(base.rollout, servers=servers, max_staleness=ahead)
        data = dataclasses.replace(base.data, prompts_per_step=prompts)
        time = without_state(dataclasses.replace(base, rollout=rollout, data=data), 2)[0]
        took = {name: phase.seconds for name, phase in time.phases.items()}
        longer.add(took["rollout"] > took["logprobs"] + took["update"])
        assert time.seconds == pytest.approx(played(took, ahead), rel=1e-9), (ahead, took)
        assert bool(time.overlapped) == bool(ahead)
    assert longer == {True, False}


def played(took: Mapping[str, float], ahead: int) -> float:
    """Seconds a step in the long run: the servers answer one step's questions after the other, and stand still in a
    sync; the trainer asks for the next steps when it has graded one."""
    now, ends, asked, waiting = 0.0, [], 0, []

    def work(seconds: float) -> None:
        nonlocal now
        now += seconds
        while waiting and seconds > 0:
            done = min(seconds, waiting[0][1])
            waiting[0][1], seconds = waiting[0][1] - done, seconds - done
            if waiting[0][1] <= 0:
                waiting.pop(0)

    for step in range(1, 201):
        waiting += [[later, took["rollout"]] for later in range(asked + 1, step + 1)]
        asked = max(asked, step)
        while waiting and waiting[0][0] <= step:
            work(waiting[0][1])
        work(took["reward"])
        waiting += [[later, took["rollout"]] for later in range(asked + 1, step + ahead + 1)]
        asked = max(asked, step + ahead)
        work(took["logprobs"] + took["update"])
        now += took["sync"]
        ends.append(now)
    return (ends[-1] - ends[99]) / 100


def without_state(config: TrainConfig, world_size: int) -> tuple[StepTime, dict[str, dict[str, int]]]:
    """Time, and phases of memory, of an actor without state."""
    state, passes = StateBytes(0, 0, 0, 0, 0), ActivationBytes(0, 0, (), {})
    engine = engine_bytes(config, MODEL, H100)
    marks = phases(config, MODEL, state, passes, engine)
    memory = RankMemory(0, 0, state, passes, engine, marks, host=0)
    return plan_time(config, MODEL, world_size, H100, workload(config, 1), memory), marks


def sync_of(config: TrainConfig, world_size: int) -> tuple[float, dict[str, int]]:
    """Seconds, and what the phase takes beside what lasts."""
    time, marks = without_state(config, world_size)
    lasting = marks["rollout"]
    return time.phases["sync"].seconds, {k: v for k, v in marks["sync"].items() if k not in lasting}


def test_a_sync_counts_what_the_bridge_moves_and_holds(toml) -> None:
    """Against the plans of the bridge itself: bytes over one link, buckets."""
    vllm = ("--rollout.engine", "vllm", "--bridge.bucket_mib", "8")
    config = config_of(toml, *vllm, "--actor.tp", "4", "--rollout.tp", "2")
    seconds, extra = sync_of(config, 4)
    plans = [plan_rank(planned_layout(config, MODEL, 4, 4), rank) for rank in range(4)]
    shard = count_parameters(MODEL) * 2 / 2
    assert max(plan.num_bytes(plan.receives) for plan in plans) == pytest.approx(shard, rel=0.01)
    remote = max(plan.num_bytes(plan.remote) for plan in plans) / (0.7 * 450e9)
    copies = 6 * shard / (0.7 * 3.35e12)
    # Three quarters on average; a rank that has nothing of its own shard gets all of it.
    assert remote * 3 / 4 * 0.99 <= seconds - copies <= remote
    table = MODEL["vocab_size"] * MODEL["hidden_size"] * 2
    assert extra == {"buckets": 2 * 8 * 2**20, "module": table // 2}
    assert all(plan.peak_round_bytes <= 8 * 2**20 for plan in plans)

    served = config_of(toml, *vllm, "--rollout.placement", "server")
    on_servers, extra = sync_of(served, 4)
    assert extra == {"buckets": 8 * 2**20 + 2 * table}
    assert on_servers > 2 * shard / 0.5e9
    assert sync_of(config_of(toml, "--rollout.engine", "megatron"), 1) == (0, {})


@pytest.mark.parametrize(("transport", "servers"), [("network", 1), ("network", 5), ("shared_memory", 2)])
def test_a_push_to_servers_counts_what_its_plan_moves(toml, transport, servers) -> None:
    options = ("--rollout.engine", "vllm", "--rollout.placement", "server", "--bridge.bucket_mib", "8")
    options += ("--server.transport", transport, "--rollout.servers", str(servers), "--actor.tp", "2")
    config = config_of(toml, *options)
    seconds, extra = sync_of(config, 2)
    plans = [plan_rank(planned_layout(config, MODEL, 2, 2), rank) for rank in range(2 + servers)]
    shard = max(plan.num_bytes(plan.receives) for plan in plans)
    sent = sum(plan.num_bytes(plan.sends) for plan in plans) / 2
    if transport == "network":
        assert extra == {"buckets": 2 * 8 * 2**20}
        busiest = max(shard, sent)
        expected = busiest / (0.7 * 50e9) + 6 * busiest / (0.7 * 3.35e12)
    else:
        assert not any(extra.values())
        expected = shard / (0.7 * 450e9) + 4 * shard / (0.7 * 3.35e12)
    assert seconds == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize(("experts", "whole"), [(6, "true"), (5, "true"), (6, "false")])
def test_a_shard_of_experts_is_that_of_the_bridge(experts: int, whole: str, toml) -> None:
    model = MODEL | {
        "model_type": "qwen3_moe", "num_experts": experts, "num_experts_per_tok": 2, "moe_intermediate_size": 512,
        "head_dim": 64,
    }  # fmt: skip
    config = config_of(toml, "--rollout.engine", "vllm", "--rollout.tp", "2", "--rollout.expert_parallel", whole)
    layout = planned_layout(config, model, 2, 2)
    shards = [plan.num_bytes(plan.receives) for plan in (plan_rank(layout, rank) for rank in range(2))]
    assert (shards[0] > 1.1 * shards[1]) == (experts == 5)
    # Norms and routers, whole on both, are counted as halves.
    assert engine_bytes(config, model, H100).weights == pytest.approx(max(shards), rel=0.002)
    at_once = largest_module(model, 2, expert_parallel=whole == "true") * 2
    held = -(-experts // 2) if whole == "true" else experts / 2
    assert at_once == max(held * 3 * 1024 * 512, 32000 * 1024 / 2) * 2


def test_a_sleeping_engine_leaves_its_weights_and_cache_to_training(toml) -> None:
    vllm = ("--rollout.engine", "vllm", "--rollout.gpu_memory_utilization", "0.5")
    awake, asleep = (plan_of(toml, 1, *vllm, "--rollout.sleep", sleep).memory[0] for sleep in ("false", "true"))
    given_back = {phase: sum(awake.phases[phase].values()) - sum(asleep.phases[phase].values()) for phase in PHASES}
    share = int(0.5 * H100.memory)
    assert given_back == {
        "load": 0,
        "rollout": 0,
        "logprobs": share - 2 * 2**30,
        "update": share - 2 * 2**30,
        "sync": 0,
    }


def test_what_does_not_fit_is_said_with_numbers_and_a_remedy(toml) -> None:
    plan = plan_of(toml, 1, "--rollout.gpu_memory_utilization", "0.95", "--actor.micro_batch_tokens", "65536")
    (complaint,) = plan.complaints
    assert complaint.startswith("phase update needs ")
    assert "an H100 has 79.1; " in complaint
    assert 'set actor.recompute to "full"' in complaint
    assert "lower rollout.gpu_memory_utilization below 0.95" in complaint
    small = dataclasses.replace(plan.config.rollout, gpu_memory_utilization=0.02)
    config = dataclasses.replace(plan.config, rollout=small)
    starved = [dataclasses.replace(plan.memory[0], engine=engine_bytes(config, MODEL, H100), phases={"load": {}})]
    assert "leaves vLLM a KV cache of 0 tokens" in complaints(config, starved, H100)[0]


def test_micro_batches_are_filled(toml) -> None:
    lengths = fullest_micro_batch(config_of(toml, "--actor.micro_batch_tokens", "5000"))
    assert lengths.num_tokens == 5000
    # One longer than the budget goes alone.
    alone = fullest_micro_batch(config_of(toml, "--actor.micro_batch_tokens", "100"))
    assert alone.num_tokens == 2048 + 256
    assert len(alone.prompts) == 1
    work = workload(config_of(toml, "--actor.vp", "2", "--actor.pp", "4"), data_parallel=1)
    assert work.micro_batches % 4 == 0


def test_in_flight_as_the_schedules_have_it() -> None:
    """Against the schedule played through: forward passes done and not yet gone back, on a stage."""
    for pp, stage, num in ((4, 0, 8), (4, 3, 8), (4, 0, 2)):
        warm_up = min(num, pp - stage - 1)
        waiting = most = warm_up
        for _ in range(num - warm_up):
            waiting += 1
            most = max(most, waiting)
            waiting -= 1
        assert most_in_flight(ActorConfig(pp=pp), stage, num) == {0: max(most, 1)}
    assert most_in_flight(ActorConfig(pp=2, vp=2), 0, 8) == {0: 3, 1: 2}
    assert most_in_flight(ActorConfig(pp=2, vp=2), 1, 8) == {0: 2, 1: 1}
    assert bubble_share(ActorConfig(pp=4, vp=2), 8) == 3 / 16


def test_layers_of_uneven_stages() -> None:
    actor = ActorConfig(pp=8, first_stage_layers=11, last_stage_layers=11)
    assert [layers_of_chunk(actor, 94, stage) for stage in range(8)] == [11, *[12] * 6, 11]
    assert layers_of_chunk(ActorConfig(pp=2, vp=2), 8, 1) == 2


def test_the_search_breaks_no_rule_and_its_plans_fit(toml) -> None:
    config = config_of(toml, "--rollout.gpu_memory_utilization", "0.5")
    every = list(candidates(config, MODEL, 4))
    assert len(every) > 20
    assert all(not list(problems(PLAN_RULES, Setup(candidate, 4, MODEL))) for candidate in every)
    plans = search(config, MODEL, 4, H100, top=2)
    assert len(plans) == 2
    assert all(not plan.complaints for plan in plans)
    assert plans[0].time.seconds <= plans[1].time.seconds
    # Nothing that was left out is both faster and fits: the plain layout is as fast as any on so small a model.
    assert plans[0].config.actor.tp * plans[0].config.actor.pp * plans[0].config.actor.cp == 1


def test_no_layout_fits_where_none_can(toml) -> None:
    big = MODEL | {"num_hidden_layers": 96, "hidden_size": 16384, "intermediate_size": 65536, "vocab_size": 256000}
    assert search(config_of(toml), big, 2, H100) == []


SERVER = ("--rollout.placement", "server")
WRONG = {
    "bounds": (["--actor.tp", "0"], 1, {}),
    "run_name": (["--run.name", "a/b"], 1, {}),
    "templates": (["--data.prompt_template", "x"], 1, {}),
    "model_type": ([], 1, {"model_type": "gpt2"}),
    "model_sizes": ([], 1, {"hidden_size": "x"}),
    "model_heads": ([], 1, {"num_key_value_heads": 3}),
    "architecture": ([], 1, {"hidden_act": "gelu"}),
    "tensor_parallel": (["--actor.tp", "3"], 3, {}),
    "pipeline_parallel": (["--actor.pp", "3"], 3, {}),
    "virtual_pipeline": (["--actor.pp", "2", "--actor.vp", "3"], 2, {}),
    "expert_parallel": (["--actor.ep", "2"], 2, {}),
    "world_split": (["--actor.cp", "2", "--rollout.engine", "vllm"], 3, {}),
    "expert_ranks": (
        ["--actor.ep", "3"],
        3,
        {"model_type": "qwen3_moe", "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 512},
    ),
    "expert_split": (
        ["--actor.etp", "3"],
        3,
        {"model_type": "qwen3_moe", "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 512},
    ),
    "sequence_parallel": (["--actor.sequence_parallel", "true"], 1, {}),
    "engine_layout": (["--actor.cp", "2"], 2, {}),
    "engine_split": (["--rollout.engine", "vllm", "--rollout.tp", "3"], 3, {}),
    "engine_experts": (["--rollout.engine", "vllm", "--rollout.expert_parallel", "true"], 1, {}),
    "placement": (["--rollout.max_staleness", "1"], 1, {}),
    "server_urls": (["--rollout.engine", "vllm", *SERVER, "--rollout.server_urls", "ftp://x"], 1, {}),
    "transport": (
        ["--rollout.engine", "vllm", *SERVER, "--server.transport", "network", "--server.transfer_dir", "x"],
        1,
        {},
    ),
    "stall_limit": (["--run.stall_limit_s", "60", "--bridge.timeout_s", "60"], 1, {}),
    "staleness_correction": (["--rollout.engine", "vllm", *SERVER, "--rollout.max_staleness", "1"], 1, {}),
    "collective_timeout": (["--rollout.engine", "vllm", *SERVER, "--server.start_timeout_s", "9000"], 1, {}),
    "verification": (["--rollout.engine", "vllm", *SERVER, "--bridge.verify", "golden"], 1, {}),
    "sleep": (["--rollout.sleep", "true"], 1, {}),
    "data_sources": (["--data.sources", "a.jsonl:1", "b.jsonl:0"], 1, {}),
    "lengths": (["--rollout.max_response_tokens", "9000"], 1, {}),
    "pass_at_k": (["--evaluation.ks", "9"], 1, {}),
    "keep_every": (["--checkpoint.keep_every", "7"], 1, {}),
    "keep_best": (["--checkpoint.keep_best", "x"], 1, {}),
    "mini_batches": (["--actor.mini_batches", "3"], 1, {}),
    "overlong": (["--rewards.overlong_buffer_tokens", "64"], 1, {}),
    "graders": (["--rewards.grader", "maths"], 1, {}),
    "dynamic_sampling": (["--rollout.dynamic_sampling", "true", "--rollout.group_size", "1"], 1, {}),
    "algorithm": (["--algorithm.alpha", "2"], 1, {}),
    "kl_cov": (["--loss.kind", "kl_cov"], 1, {}),
    "old_logprobs": (["--actor.old_logprobs", "rollout", "--mismatch.correction", "tis"], 1, {}),
}
"""By rule, what breaks it: options, ranks, changes of the model."""


@pytest.mark.parametrize("rule", WRONG)
def test_plan_and_slurm_refuse_in_the_words_of_train(
    rule: str, tmp_path: Path, toml, capsys: pytest.CaptureFixture
) -> None:
    overrides, world_size, change = WRONG[rule]
    (tmp_path / "config.json").write_text(json.dumps(MODEL | change))
    path = toml()
    common = ("--model.path", str(tmp_path), "--run.ranks", str(world_size), "--data.prompts_per_step", "40")
    # Before the overrides, some of which ask for vLLM.
    common += ("--rollout.engine", "megatron")
    said = {}
    slurm = ["slurm", path, "--nodes", "1", "--time", "60", "--gpus-per-node", "0"]
    slurm += ["--ranks-per-node", str(world_size)]
    for command in (["train", path], ["plan", path], slurm):
        assert main([*command, *common, *overrides]) == 2
        said[command[0]] = capsys.readouterr().err
    assert said["plan"] == said["slurm"] == said["train"] != ""
    assert len(said["plan"].splitlines()) == 1


def test_every_rule_is_tried_but_those_of_the_machine() -> None:
    of_machine = {"engine_available", "transfer_dir", "sleep_device"}
    assert {rule.__name__ for rule in TRAIN_RULES} - set(WRONG) == of_machine | {"model_folder"}
    assert {rule.__name__ for rule in TRAIN_RULES} - {rule.__name__ for rule in PLAN_RULES} == of_machine


def test_the_command(tmp_path: Path, toml) -> None:
    """In a process of its own: as text, and as JSON with flags behind the file; 1 where it does not fit."""
    (tmp_path / "config.json").write_text(json.dumps(MODEL))
    command = [sys.executable, "-m", "megatron_riskpo.cli", "plan", toml(), "--model", str(tmp_path / "config.json")]
    own = ["--model.dtype", "bfloat16", "--data.prompts_per_step", "40", "--rollout.gpu_memory_utilization", "0.99"]
    done = subprocess.run([*command, *own, "--gpus", "2", "--json"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 1, done.stderr
    plan = json.loads(done.stdout)
    assert plan["gpus"] == 2
    assert not plan["fits"]
    assert plan["peak_bytes"] > 79 * GIB
    assert plan["ranks"][0]["state"]["num_parameters"] > 10**8


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--gpus", "0"], "--gpus 0: give 1 or more"),
        (["--dry-run", "--rank", "9"], "--rank 9: there are 1 ranks; give 0 to 0"),
        (["--model", "nowhere.json"], "nowhere.json: no such file; give a model folder or its config.json"),
        (["--gpu", "v100"], "invalid choice: 'v100'"),
    ],
)
def test_wrong_flags(flags, message: str, tmp_path: Path, toml, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "config.json").write_text(json.dumps(MODEL))
    model = [] if "--model" in flags else ["--model", str(tmp_path)]
    assert main(["plan", toml(), "--data.prompts_per_step", "40", *model, *flags]) == 2
    assert message in capsys.readouterr().err
