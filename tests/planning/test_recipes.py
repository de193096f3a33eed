"""Every recipe is accepted, fits, and states what the planner says of it."""

import re
from pathlib import Path

import pytest

from megatron_riskpo.config import TrainConfig
from megatron_riskpo.config_checks import check_plan
from megatron_riskpo.config_io import load_config, read_model_config
from megatron_riskpo.planning.gpus import GPUS
from megatron_riskpo.planning.plan import Plan, make_plan
from megatron_riskpo.planning.render import summary
from megatron_riskpo.planning.state_bytes import stage_ranks
from megatron_riskpo.slurm_job import warning_before

ROOT = Path(__file__).parents[2]
PLAN_LINE = re.compile(r"# Plan: riskpo plan (\S+) --gpus (\d+) --gpu (\S+) --model (\S+)\n#   (.+)\n")
RECIPES = sorted(path for path in (ROOT / "examples").glob("*.toml") if PLAN_LINE.search(path.read_text()))
SLOW = ("qwen3_235b_a22b", "qwen3_30b_a3b", "llama3.3_70b", "qwen2.5_32b_4nodes", "qwen2.5_32b_8nodes")
"""Thousands of modules, or much like another."""


def test_there_are_recipes_of_all_sizes() -> None:
    assert {path.stem for path in RECIPES} == {
        *("deepseek_r1_distill_qwen_1.5b_dapo", "qwen2.5_1.5b_instruct_gsm8k_math", "qwen2.5_7b"),
        *("qwen2.5_32b_2nodes", *SLOW),
    }


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_breaks_no_rule(path: Path) -> None:
    config, hf_config, num_gpus, _ = _read(path)
    check_plan(config, num_gpus, hf_config)
    text = path.read_text()
    nodes = num_gpus // 8
    assert f"#   sbatch --nodes {nodes} --ntasks-per-node 8" in text
    assert re.search(rf"^#   sbatch .* slurm/train.sbatch examples/{re.escape(path.name)}$", text, re.MULTILINE)
    assert "riskpo data prepare" in text
    assert "Expected result" in text


@pytest.mark.parametrize(
    "path",
    [pytest.param(path, marks=[pytest.mark.slow] * (path.stem in SLOW)) for path in RECIPES],
    ids=lambda path: path.stem,
)
def test_a_recipe_fits_and_its_comment_is_true(path: Path) -> None:
    plan = _plan(path)
    assert plan.complaints == []
    found = PLAN_LINE.search(path.read_text())
    assert found is not None
    assert (found[1], found[5]) == (f"examples/{path.name}", summary(plan))
    assert f"--signal B:USR1@{warning_before('1-0', plan.time.seconds)} slurm/train.sbatch" in path.read_text()


def _read(path: Path) -> tuple[TrainConfig, dict, int, str]:
    found = PLAN_LINE.search(path.read_text())
    assert found is not None
    hf_config = read_model_config(ROOT / found[4] / "config.json")
    return load_config(TrainConfig, str(path)), hf_config, int(found[2]), found[3]


def _plan(path: Path) -> Plan:
    config, hf_config, num_gpus, gpu = _read(path)
    ranks = stage_ranks(config.actor, num_gpus)
    return make_plan(config, hf_config, num_gpus, GPUS[gpu], None, sorted({ranks[0], ranks[-1]}))
