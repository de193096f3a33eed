"""Models and layouts that cannot be are refused in one line, before anything starts."""

import pytest

from megatron_riskpo.config import TrainConfig
from megatron_riskpo.config_checks import PLAN_RULES, TRAIN_RULES, check_train, problems
from megatron_riskpo.config_io import load_config
from megatron_riskpo.config_rules import Setup
from megatron_riskpo.errors import UsageError
from tests.test_config import BASE, MODEL


@pytest.mark.parametrize(
    ("overrides", "world_size", "message"),
    [
        (["--actor.vp", "3"], 1, "actor.vp = 3 needs actor.pp > 1"),
        (
            ["--actor.vp", "2", "--actor.pp", "2"],
            2,
            "actor.vp = 2 does not divide the 3 layers of a pipeline stage; use 1 or 3",
        ),
        (["--actor.vp", "3", "--actor.pp", "2", "--actor.first_stage_layers", "2"], 2, "needs even stages"),
        (["--actor.last_stage_layers", "2"], 1, "need actor.pp > 1"),
        (["--actor.first_stage_layers", "3", "--actor.pp", "3"], 3, "leave 3 of 6 layers to 2 other stages"),
        (["--actor.first_stage_layers", "6", "--actor.pp", "2"], 2, "leave 0 of 6 layers to 1 other stages"),
        (
            ["--actor.first_stage_layers", "2", "--actor.last_stage_layers", "3", "--actor.pp", "2"],
            2,
            "are 5 layers on the 2 stages, the model has 6",
        ),
        (["--actor.ep", "2"], 2, "actor.ep = 2, but the model has no experts; set it to 1"),
        (["--actor.etp", "2"], 2, "actor.etp = 2, but the model has no experts; set it to 1"),
        (["--actor.cp", "2"], 3, "actor.tp * actor.cp * actor.pp = 1 * 2 * 1 = 2; use 2 or 4 ranks"),
        (["--actor.cp", "2"], 2, 'actor.cp = 2 does not go with rollout.engine = "megatron"'),
    ],
)
def test_layouts_that_cannot_be(overrides, world_size: int, message: str, toml) -> None:
    config = load_config(TrainConfig, toml(), [*BASE, *overrides])
    with pytest.raises(UsageError) as caught:
        check_train(config, world_size, MODEL)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


MOE = MODEL | {
    "model_type": "qwen3_moe",
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 48,
    "intermediate_size": 383,
}


@pytest.mark.parametrize(
    ("overrides", "world_size", "message"),
    [
        (
            ["--actor.ep", "3"],
            3,
            "actor.ep = 3 does not divide both the 8 experts of a layer and the 3 ranks of a pipeline stage; use 1",
        ),
        (["--actor.ep", "8"], 4, "8 experts of a layer and the 4 ranks of a pipeline stage; use 4"),
        (["--actor.ep", "2", "--actor.pp", "2"], 2, "the 1 ranks of a pipeline stage; use 1"),
        (
            ["--actor.etp", "5"],
            10,
            "actor.etp = 5 does not divide both the 48 columns of an expert and the 10 ranks of a pipeline stage that "
            "hold the same experts (actor.ep = 1); use 2",
        ),
        (["--actor.ep", "2", "--actor.etp", "4"], 4, "the 2 ranks of a pipeline stage that hold the same experts"),
        (["--actor.etp", "2"], 2, 'actor.etp = 2 does not go with rollout.engine = "megatron"; set it to 1'),
        (["--actor.tp", "2"], 2, "actor.tp = 2 with experts needs actor.sequence_parallel = true"),
    ],
)
def test_experts_need_ranks_that_they_divide_over(overrides, world_size: int, message: str, toml) -> None:
    config = load_config(TrainConfig, toml(), [*BASE, *overrides])
    with pytest.raises(UsageError) as caught:
        check_train(config, world_size, MOE)
    assert message in str(caught.value)


WHOLE_EXPERTS = ("--rollout.engine", "vllm", "--rollout.expert_parallel", "true")


@pytest.mark.parametrize(
    ("overrides", "model", "message"),
    [
        ([], MOE, "rollout.expert_parallel = true needs rollout.tp > 1"),
        (["--rollout.tp", "4"], MODEL, "rollout.expert_parallel = true, but the model has no experts; set it to false"),
        (
            ["--rollout.tp", "4"],
            MOE | {"num_experts": 3},
            "ranks without any of the 3 experts of a layer; use rollout.",
        ),
        (["--rollout.engine", "megatron"], MOE, 'is for vLLM; with rollout.engine = "megatron" experts lie as actor.e'),
    ],
)
def test_whole_experts_need_vllm_and_ranks_to_deal_them_out_to(overrides, model, message: str, toml) -> None:
    config = load_config(TrainConfig, toml(), [*BASE, *WHOLE_EXPERTS, *overrides])
    with pytest.raises(UsageError) as caught:
        check_train(config, 4, model)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("experts", "width"), [(8, 48), (8, 49), (5, 48), (2, 47)])
def test_whole_experts_may_have_any_width_and_need_not_divide(experts, width, toml) -> None:
    model = MOE | {"num_experts": experts, "moe_intermediate_size": width}
    config = load_config(TrainConfig, toml(), [*BASE, *WHOLE_EXPERTS, "--rollout.tp", "2"])
    assert list(problems(PLAN_RULES, Setup(config, 2, model))) == []
    split = load_config(TrainConfig, toml(), [*BASE, *WHOLE_EXPERTS[:2], "--rollout.tp", "2"])
    found = list(problems(PLAN_RULES, Setup(split, 2, model)))
    assert [f"{width} columns of an expert" in line for line in found] == [True] * (width % 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gpt2"}, "model_type 'gpt2' in config.json is not supported; known: qwen2, qwen3, qwen3_moe"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"use_sliding_window": True}, "use_sliding_window = true is not supported for qwen2; only false is"),
        ({"model_type": "mistral"}, "sliding_window = 4096 is not supported for mistral; only null is"),
        ({"model_type": "llama", "mlp_bias": True}, "mlp_bias = true is not supported for llama"),
        ({"rope_scaling": {"type": "yarn"}}, "rope_type 'yarn' is not supported; known: default, linear, llama3"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"rope_scaling": {"type": "linear"}}, "the rotary option factor is None; it must be a number above 0"),
        ({"rope_theta": "x"}, "the rotary option rope_theta is 'x'"),
        (
            {"rope_scaling": {"type": "llama3", "factor": 8}},
            "original_max_position_embeddings is None; it must be a number",
        ),
        ({"head_dim": "x"}, "head_dim = 'x'"),
        ({"head_dim": 33}, "a head dimension of 33; rotary embeddings need an even one"),
        ({"num_key_value_heads": 3}, "4 attention heads, which its 3 key-value heads do not divide"),
        (MOE | {"num_experts": "8"}, "num_experts = '8'"),
        (MOE | {"num_experts_per_tok": 9}, "num_experts_per_tok = 9 of 8 experts"),
        (MOE | {"num_experts": None}, "qwen3_moe has no num_experts"),
        (MOE | {"mlp_only_layers": [0]}, "mlp_only_layers = [0] is not supported for qwen3_moe; only [] is"),
    ],
)
def test_models_that_would_be_computed_wrongly_are_refused(change, message: str, toml) -> None:
    config = load_config(TrainConfig, toml(), BASE)
    with pytest.raises(UsageError) as caught:
        check_train(config, 1, MODEL | change)
    assert message in str(caught.value)


def test_a_folder_needs_the_size_of_its_vocabulary(toml) -> None:
    config = load_config(TrainConfig, toml(), [*BASE, "--model.path", "models/x"])
    with pytest.raises(UsageError, match="has vocab_size = None"):
        check_train(config, 1, {key: value for key, value in MODEL.items() if key != "vocab_size"})


@pytest.mark.parametrize("layout", [(1, 1, 1), (2, 1, 2), (2, 3, 6), (1, 2, 4), (2, 1, 10)])
def test_layouts_that_work_pass_every_rule(layout, toml) -> None:
    tp, pp, world_size = layout
    config = load_config(TrainConfig, toml(), [*BASE, "--actor.tp", str(tp), "--actor.pp", str(pp)])
    check_train(config, world_size, MODEL)
    assert list(problems(TRAIN_RULES, Setup(config, world_size, MODEL))) == []
