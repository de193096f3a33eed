"""The methods that tools/compare_methods.py compares are what their labels say, whatever the quick start's file says.

Not tested: the runs.
"""

from pathlib import Path
from types import ModuleType

import pytest

from megatron_riskpo.config import TrainConfig
from megatron_riskpo.config_checks import TRAIN_RULES, Setup, problems
from megatron_riskpo.config_io import load_config

ROOT = Path(__file__).parents[2]
MODEL = {
    "model_type": "qwen2", "num_hidden_layers": 2, "hidden_size": 128, "intermediate_size": 384,
    "num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": 1000, "max_position_embeddings": 512,
}  # fmt: skip
SAID = {
    "riskpo": ("estimator", "riskpo"),
    "risk_seeking": ("estimator", "risk_seeking"),
    "grpo": ("estimator", "grpo"),
    "self bundles": ("bundling", "self"),
    "random bundles": ("bundling", "random"),
    "complete pairing": ("pairing", "complete"),
    "one permutation": ("pairing", "permutation"),
    "tracked quantiles": ("quantile_source", "tracked"),
}
"""Words of a label, and the option of [algorithm] that they speak of."""


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    import compare_methods

    return compare_methods


@pytest.mark.parametrize("name", ["self", "paper", "grpo", "seeking"])
def test_a_method_is_accepted_and_is_what_its_label_says(name: str, tool: ModuleType) -> None:
    method = tool.METHODS[name]
    # The rules need no vLLM, and not every test machine has it.
    options = [*tool.ONE_RANK, *method.overrides, "--rollout.engine", "megatron"]
    config = load_config(TrainConfig, str(ROOT / "examples" / "quickstart_cpu.toml"), options)
    assert list(problems(TRAIN_RULES, Setup(config, 1, MODEL))) == []
    said = [option for words, option in SAID.items() if words in method.label]
    assert said
    assert [(option, getattr(config.algorithm, option)) for option, _ in said] == said
    if name == "paper":
        assert (config.algorithm.baseline, config.algorithm.scale, config.loss.kind) == ("natural", "none", "gspo")


def test_the_test_knows_every_method(tool: ModuleType) -> None:
    assert set(tool.METHODS) == {"self", "paper", "grpo", "seeking"}
