"""docs/methods.md and docs/risk.md against the code: configurations load, code runs, names are all there.

Not tested: the numbers and the prose.
"""

import contextlib
import io
import json
import re
import tomllib
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import torch

from megatron_riskpo.algorithms import AlgorithmConfig, MismatchConfig, PolicyLossConfig, compute_advantages
from megatron_riskpo.algorithms.advantages import ESTIMATORS
from megatron_riskpo.algorithms.spectra import SPECTRA
from megatron_riskpo.algorithms.surrogates import SURROGATES
from megatron_riskpo.config import TrainConfig
from megatron_riskpo.config_checks import TRAIN_RULES, problems
from megatron_riskpo.config_io import load_config
from megatron_riskpo.config_rules import Setup
from megatron_riskpo.errors import UsageError

ROOT = Path(__file__).parents[1]
METHODS = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
RISK = (ROOT / "docs" / "risk.md").read_text(encoding="utf-8")
BASE = tomllib.loads((ROOT / "examples" / "quickstart_cpu.toml").read_text(encoding="utf-8"))
REPLACED_WHOLE = ("algorithm", "loss", "mismatch")
NUM_RANKS = 2
MODEL = {
    "model_type": "qwen2", "num_hidden_layers": 28, "hidden_size": 1536, "intermediate_size": 8960,
    "num_attention_heads": 12, "num_key_value_heads": 2, "vocab_size": 1000, "max_position_embeddings": 32768,
}  # fmt: skip
"""Of the size that the papers train."""


def snippets() -> dict[str, str]:
    """The toml block under each heading."""
    return dict(re.findall(r"^### ([^\n]+)$(?:(?!^#).)*?^```toml\n(.*?)^```$", METHODS, re.MULTILINE | re.DOTALL))


def merged(snippet: str) -> str:
    """The snippet in the quick start's configuration, in the way that the page says."""
    tables = {name: dict(table) for name, table in BASE.items() if name not in REPLACED_WHOLE}
    for name, table in tomllib.loads(snippet).items():
        tables.setdefault(name, {}).update(table)
    return "\n".join(line for name, table in tables.items() for line in toml_lines(name, table))


def toml_lines(name: str, table: dict[str, Any]) -> list[str]:
    plain = {key: value for key, value in table.items() if not isinstance(value, dict)}
    inner = {key: value for key, value in table.items() if isinstance(value, dict)}
    lines = [f"[{name}]", *(f"{key} = {json.dumps(value)}" for key, value in plain.items())]
    return lines + [line for key, value in inner.items() for line in toml_lines(f"{name}.{key}", value)]


def check(snippet: str, tmp_path: Path) -> TrainConfig:
    """Load it, and raise UsageError for the first rule of `riskpo train` that it breaks."""
    file = tmp_path / "snippet.toml"
    file.write_text(merged(snippet), encoding="utf-8")
    # The rules below need no vLLM, and not every test machine has it.
    config = load_config(TrainConfig, str(file), ["--rollout.engine", "megatron"])
    for problem in problems(TRAIN_RULES, Setup(config, NUM_RANKS, MODEL)):
        raise UsageError(problem)
    return config


def test_all_configurations_are_found():
    expected = {
        "RiskPO, recommended", "RiskPO, as in the paper", "RiskPO's released code", "GRPO", "Dr. GRPO", "DAPO", "GSPO",
        "GMPO", "CISPO", "RLOO", "Pass@k training",
    }  # fmt: skip
    assert expected <= set(snippets())
    assert len(snippets()) == METHODS.count("```toml")


@pytest.mark.parametrize("title", snippets())
def test_configuration_is_accepted(title, tmp_path):
    config = check(snippets()[title], tmp_path)
    for section, table in tomllib.loads(snippets()[title]).items():
        for key, value in table.items():
            assert getattr(getattr(config, section), key) == value


@pytest.mark.parametrize(
    ("right", "wrong", "complaint"),
    [
        ('estimator = "grpo"', 'estimator = "grop"', "did you mean grpo"),
        ('estimator = "grpo"', 'estimator = "grpo"\nbundle_size = 4', "no effect on grpo"),
        ('kind = "ppo"', 'kind = "kl_cov"\nclip_high = 0.3', "no effect on loss.kind = kl_cov"),
        ("kl_coefficient", "kl_coeficient", "did you mean loss.kl_coefficient"),
    ],
)
def test_a_wrong_configuration_is_not(right, wrong, complaint, tmp_path):
    snippet = snippets()["GRPO"]
    assert right in snippet
    with pytest.raises(UsageError, match=complaint):
        check(snippet.replace(right, wrong), tmp_path)


def test_every_estimator_and_loss_has_a_row():
    rows = {match[1] for match in re.finditer(r"^\| `(\w+)`", METHODS, re.MULTILINE)}
    names = {*ESTIMATORS, *SURROGATES}
    for config, option in (
        (PolicyLossConfig, "aggregation"),
        (PolicyLossConfig, "kl_estimator"),
        (MismatchConfig, "correction"),
    ):
        names |= set(get_args(get_type_hints(config)[option]))
    assert names <= rows


@pytest.mark.parametrize("name", sorted({*ESTIMATORS, *SURROGATES}))
def test_sources_are_those_of_the_registry(name):
    described = (ESTIMATORS.get(name) or SURROGATES[name]).description
    row = re.search(rf"^\| `{name}`.*$", METHODS, re.MULTILINE)[0]
    assert all(source in row for source in re.findall(r"arXiv (\d+\.\d+)", described))


def test_every_spectrum_and_option_has_a_row():
    rows = {match[1] for match in re.finditer(r"^\| `(\w+)`", RISK, re.MULTILINE)}
    assert set(SPECTRA) <= rows
    options = get_type_hints(AlgorithmConfig)
    for option in ("bundling", "remainder", "quantile_source"):
        assert set(get_args(options[option])) <= rows
    for option in ("baseline", "scale", "pairing"):
        assert all(f"`{value}`" in RISK or f'{option} = "{value}"' in RISK for value in get_args(options[option]))


def test_every_metric_is_explained():
    rewards = torch.tensor([[0.0, 1.0, 1.0, 0.0], [0.0, 0.0, 0.0, 1.0]])
    metrics = compute_advantages(rewards, AlgorithmConfig(bundle_size=2)).metrics
    missing = {key for key in metrics if f"`{key}`" not in RISK and not key.startswith("risk/effective_weight/")}
    assert not missing


def test_the_spectrum_of_ones_own_gives_what_the_page_says(tmp_path, monkeypatch):
    function, example = re.findall(r"^```python\n(.*?)^```$", RISK, re.MULTILINE | re.DOTALL)
    (shown,) = re.findall(r"^```text\n(.*?)^```$", RISK, re.MULTILINE | re.DOTALL)
    name = function.splitlines()[0].removeprefix("# ")
    assert f'"{name}:' in example
    assert len(function.splitlines()) <= 10
    (tmp_path / name).write_text(function, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(example, "docs/risk.md", "exec"), {})
    assert printed.getvalue() == shown


@pytest.mark.parametrize("page", sorted(path.name for path in (ROOT / "docs").glob("*.md")))
def test_links_lead_somewhere(page):
    texts = {path.name: path.read_text(encoding="utf-8") for path in (ROOT / "docs").glob("*.md")}
    anchors = {
        name: {
            re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in re.findall(r"^#+ (.+)$", text, re.M)
        }
        for name, text in texts.items()
    }
    for target in re.findall(r"\]\(([^)]+)\)", texts[page]):
        if target.startswith("https:"):
            continue
        file, _, anchor = target.partition("#")
        assert (ROOT / "docs" / file).exists(), target
        # Of pages elsewhere in the project only the file is looked for.
        assert not anchor or anchor in anchors.get(file or page, {anchor}), target
