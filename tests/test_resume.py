"""Which options of a run may change before it goes on."""

import dataclasses
import re
from pathlib import Path

import pytest

from megatron_riskpo.config import TrainConfig
from megatron_riskpo.config_io import config_hash, leaf_types, resolved
from megatron_riskpo.errors import UsageError
from megatron_riskpo.resume import FREE_OPTIONS, FREE_SECTIONS, changed_options, check_resume, without_outdated


def changed(section: str, **values: object) -> TrainConfig:
    config = TrainConfig()
    return dataclasses.replace(config, **{section: dataclasses.replace(getattr(config, section), **values)})


@pytest.mark.parametrize(
    ("section", "values", "expected"),
    [
        ("run", {"steps": 7, "dir": "x", "resume": "never", "ranks": 4, "timeout_s": 1.0}, []),
        ("run", {"seed": 7}, ["run.seed 1234 -> 7"]),
        ("actor", {"tp": 2, "pp": 2, "sequence_parallel": True, "micro_batch_tokens": 1}, []),
        ("actor", {"mini_batches": 2}, ["actor.mini_batches 1 -> 2"]),
        (
            "rollout",
            {
                "placement": "server",
                "servers": 2,
                "tp": 2,
                "max_num_seqs": 1,
                "kv_cache_gib": 1.0,
                "gpu_memory_utilization": 0.1,
            },
            [],
        ),
        ("rollout", {"engine": "megatron"}, ['rollout.engine "vllm" -> "megatron"']),
        ("algorithm", {"estimator": "grpo"}, ['algorithm.estimator "riskpo" -> "grpo"']),
        ("data", {"options": {"max_terms": 3}}, ["data.options.max_terms (not set) -> 3"]),
        ("evaluation", {"ks": (1, 2), "every": 3}, []),
        ("mismatch", {"abort_above": 1.0, "cap": 3.0}, ["mismatch.cap 2.0 -> 3.0"]),
        ("optimizer", {"max_skipped_steps": 0, "lr": 1.0}, ["optimizer.lr 1e-06 -> 1.0"]),
        ("rewards", {"workers": 3, "timeout_s": 1.0, "answer_form": "boxed"}, ['rewards.answer_form "any" -> "boxed"']),
    ],
)
def test_changed_options(section: str, values: dict, expected: list[str]) -> None:
    old, new = resolved(TrainConfig()), resolved(changed(section, **values))
    assert old != new
    assert [f"{key} {change}" for key, change in changed_options(old, new).items()] == expected


def test_an_option_that_only_the_old_record_has_is_a_change() -> None:
    new = resolved(TrainConfig())
    old = new | {"run": new["run"] | {"old_name": True}}
    assert changed_options(old, new) == {"run.old_name": "true -> (not set)"}


def test_what_may_change_exists() -> None:
    options = leaf_types(TrainConfig)
    assert set(FREE_OPTIONS) <= set(options)
    assert set(FREE_SECTIONS) <= {key.partition(".")[0] for key in options}


def test_the_documented_options_are_those_that_may_change() -> None:
    page = (Path(__file__).parents[1] / "docs" / "checkpoints.md").read_text(encoding="utf-8")
    table = page[page.index("| may change freely |") :].partition("\n\n")[0]
    words = [word for row in table.splitlines()[2:] for word in re.findall(r"`([^`]+)`", row.split("|")[1])]
    sections, options, section = set(), set(), ""
    for word in words:
        if word.startswith("["):
            sections.add(word.strip("[]"))
            continue
        section, name = word.split(".") if "." in word else (section, word)
        options.add(f"{section}.{name}")
    assert (sections, options) == (set(FREE_SECTIONS), set(FREE_OPTIONS))


PATH = Path("runs/x/checkpoints/step_5")


def accepting(config: TrainConfig, *names: str) -> TrainConfig:
    return dataclasses.replace(config, run=dataclasses.replace(config.run, accept_changes=names))


def test_a_run_goes_on_only_under_the_options_of_its_checkpoint() -> None:
    saved = resolved(TrainConfig())
    assert check_resume(TrainConfig(), PATH, saved) == {}
    assert check_resume(changed("run", steps=7), PATH, saved) == {}
    expected = (
        r"step_5 was made with other options: optimizer.lr 1e-06 -> 1.0, optimizer.beta1 0.9 -> 0.5; restore them, "
        r"choose another run.name, or go on with --run.accept_changes optimizer.lr optimizer.beta1$"
    )
    with pytest.raises(UsageError, match=expected):
        check_resume(changed("optimizer", lr=1.0, beta1=0.5), PATH, saved)


def test_named_changes_are_accepted_and_others_are_not() -> None:
    saved, config = resolved(TrainConfig()), changed("optimizer", lr=1.0, beta1=0.5)
    both = {"optimizer.lr": "1e-06 -> 1.0", "optimizer.beta1": "0.9 -> 0.5"}
    assert check_resume(accepting(config, "optimizer.lr", "optimizer.beta1"), PATH, saved) == both
    assert check_resume(accepting(config, "all"), PATH, saved) == both
    with pytest.raises(
        UsageError, match=r"other options: optimizer.beta1 0.9 -> 0.5; .*accept_changes optimizer.beta1$"
    ):
        check_resume(accepting(config, "optimizer.lr", "run.seed"), PATH, saved)


def test_a_checkpoint_without_its_options_is_said() -> None:
    with pytest.raises(UsageError, match=r"does not say under which options it was made .*--run.accept_changes all"):
        check_resume(TrainConfig(), PATH, None)
    assert check_resume(accepting(TrainConfig(), "all"), PATH, None) == {}


OBJECTIVE = {"tracker": {"levels": [0.2]}, "pass_rates": {"num_questions": 3}, "quantiles": {"risk/q_alpha": 1.0}}
STATE = {"step": 5, "stream": {"position": 8}, "objective": OBJECTIVE}


@pytest.mark.parametrize(
    ("keys", "lost", "said"),
    [
        (("optimizer.lr", "data.prompts_per_step", "rollout.group_size"), (), []),
        (("data.options.max_terms",), ("stream", "pass_rates"), ["data position", "pass rates"]),
        (("run.seed",), ("stream", "pass_rates"), ["data position", "pass rates"]),
        (("algorithm.alpha",), ("tracker", "quantiles"), ["quantile tracker"]),
        (
            ("model.path", "algorithm.bundling"),
            ("stream", "pass_rates", "tracker", "quantiles"),
            ["data position", "pass rates", "quantile tracker"],
        ),
    ],
)
def test_what_a_change_makes_meaningless_starts_anew(keys, lost, said) -> None:
    state, anew = without_outdated(STATE, keys)
    expected = {key: None if key in lost else value for key, value in OBJECTIVE.items()}
    assert state["objective"] == expected
    assert state["stream"] == (None if "stream" in lost else STATE["stream"])
    assert (state["step"], anew) == (5, said)
    assert STATE["objective"] is OBJECTIVE
    assert None not in OBJECTIVE.values()


def test_hash_is_of_the_values() -> None:
    config = resolved(TrainConfig())
    assert config_hash(config) == config_hash(dict(reversed(config.items())))
    assert config_hash(config) != config_hash(resolved(changed("optimizer", lr=1.0)))


def test_steps_begun_ahead_do_not_outlast_another_batch_size():
    state = STATE | {"stream": {"position": 8, "ahead": {"6": [1, 2]}}}
    kept, anew = without_outdated(state, ("data.prompts_per_step",))
    assert kept["stream"] == {"position": 8, "ahead": {}}
    assert anew == ["steps sampled ahead, whose questions are passed over"]
    assert without_outdated(state, ("optimizer.lr",)) == (state, [])
