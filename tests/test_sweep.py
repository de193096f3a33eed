"""Files of options, a run a line, and those under examples/scaling/: every line is accepted by the planner."""

import functools
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from megatron_riskpo.config import TrainConfig
from megatron_riskpo.config_checks import PLAN_RULES, check_plan, problems
from megatron_riskpo.config_io import load_config, read_model_config
from megatron_riskpo.config_rules import Setup
from megatron_riskpo.errors import UsageError
from megatron_riskpo.planning.gpus import GPUS
from megatron_riskpo.planning.plan import make_plan
from megatron_riskpo.planning.state_bytes import stage_ranks
from megatron_riskpo.sweep import read_sweep

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "examples" / "scaling"
SWEEPS = {path.stem: path for path in sorted(FOLDER.glob("*nodes.txt"))}


def test_words_are_split_and_kept_together(tmp_path: Path) -> None:
    file = tmp_path / "sweep.txt"
    file.write_text("# rates\n\n--optimizer.lr 1e-6\n  --run.name 'a b' --data.train \"$HOME/`x`\"\n")
    assert read_sweep(file) == [["--optimizer.lr", "1e-6"], ["--run.name", "a b", "--data.train", "$HOME/`x`"]]


LINES = (
    r'--data.prompt_template "{problem} \\boxed"',
    r"--data.prompt_template '{problem} \\boxed{}'",
    r"""--run.name a\ b "it's" '"' "" c""",
    "--run.name a#b # --x",
)


@pytest.mark.parametrize("line", LINES)
def test_a_line_is_read_as_the_job_reads_it(line: str, tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text(line + "\n")
    by_xargs = subprocess.run(["xargs", "printf", "%s\n"], input=line, capture_output=True, text=True, check=True)
    assert read_sweep(file) == [by_xargs.stdout.splitlines()]


@pytest.mark.parametrize(
    ("text", "message"), [("--run.name 'a\n", "No closing quotation; close"), ("# none\n", "no line of options")]
)
def test_wrong_files(text: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "sweep.txt"
    with pytest.raises(UsageError, match="cannot be read"):
        read_sweep(file)
    file.write_text(text)
    with pytest.raises(UsageError, match=message):
        read_sweep(file)


@functools.cache
def lines_of(sweep: str) -> list[TrainConfig]:
    return [load_config(TrainConfig, str(FOLDER / "qwen2.5_32b.toml"), words) for words in read_sweep(SWEEPS[sweep])]


def ranks_of(sweep: str) -> int:
    found = re.fullmatch(r"qwen2.5_32b_(\d+)nodes", sweep)
    assert found is not None
    return 8 * int(found[1])


MODEL: dict[str, Any] = read_model_config(ROOT / "examples" / "models" / "Qwen2.5-32B" / "config.json")


@pytest.mark.parametrize("sweep", SWEEPS)
def test_every_line_breaks_no_rule_and_has_a_name(sweep: str) -> None:
    for config in lines_of(sweep):
        check_plan(config, ranks_of(sweep), MODEL)
        assert config.run.name.startswith(f"{ranks_of(sweep)}gpus_")


def test_names_are_there_once_and_both_kinds_of_scaling() -> None:
    runs = [(ranks_of(sweep), config) for sweep in SWEEPS for config in lines_of(sweep)]
    assert len({config.run.name for _, config in runs}) == len(runs)
    same_layout = [(ranks, config) for ranks, config in runs if (config.actor.tp, config.actor.pp) == (8, 2)]
    strong = {ranks for ranks, config in same_layout if config.data.prompts_per_step == 128}
    weak = {ranks for ranks, config in same_layout if config.data.prompts_per_step == 4 * ranks}
    assert strong == weak == {16, 32, 64}
    assert len({(c.actor.tp, c.actor.pp, c.actor.cp, c.actor.vp) for ranks, c in runs if ranks == 32}) >= 4


@pytest.mark.slow
@pytest.mark.parametrize("sweep", SWEEPS)
def test_every_line_fits(sweep: str) -> None:
    """What `riskpo plan` says, once for lines that differ in the number of questions only."""
    ranks = ranks_of(sweep)
    layouts = {(config.actor, config.rollout): config for config in lines_of(sweep)}
    for config in layouts.values():
        stages = stage_ranks(config.actor, ranks)
        plan = make_plan(config, MODEL, ranks, GPUS["h100"], None, sorted({stages[0], stages[-1]}))
        assert plan.complaints == [], config.run.name


def test_the_small_sweep_for_a_cpu_breaks_no_rule() -> None:
    model = {
        "model_type": "qwen2", "num_hidden_layers": 4, "hidden_size": 128, "intermediate_size": 384, "vocab_size": 100,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
    }  # fmt: skip
    for words in read_sweep(FOLDER / "quickstart_cpu.txt"):
        config = load_config(TrainConfig, str(ROOT / "examples" / "quickstart_cpu.toml"), words)
        assert list(problems(PLAN_RULES, Setup(config, config.run.ranks, model))) == []
