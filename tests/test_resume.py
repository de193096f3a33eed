"""Which options of a run may change before it goes on."""

import dataclasses
from pathlib import Path

import pytest

from megatron_riskpo.config import TrainConfig
from megatron_riskpo.config_io import leaf_types, resolved, write_run_record
from megatron_riskpo.errors import UsageError
from megatron_riskpo.resume import FREE_OPTIONS, FREE_SECTIONS, changed_options, check_resume


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
    assert changed_options(old, new) == expected


def test_an_option_that_only_the_old_record_has_is_a_change() -> None:
    new = resolved(TrainConfig())
    old = new | {"run": new["run"] | {"old_name": True}}
    assert changed_options(old, new) == ["run.old_name true -> (not set)"]


def test_what_may_change_exists() -> None:
    options = leaf_types(TrainConfig)
    assert set(FREE_OPTIONS) <= set(options)
    assert set(FREE_SECTIONS) <= {key.partition(".")[0] for key in options}


def test_a_run_goes_on_only_under_its_own_configuration(tmp_path: Path) -> None:
    write_run_record(TrainConfig(), tmp_path)
    check_resume(changed("run", steps=7), tmp_path)
    with pytest.raises(UsageError, match=r"optimizer.lr 1e-06 -> 1.0; restore them, or choose another run.name"):
        check_resume(changed("optimizer", lr=1.0), tmp_path)


@pytest.mark.parametrize("content", [None, "{", "[]", "{}"])
def test_a_lost_record_is_said(content: str | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(UsageError, match=r"config.json does not say under which configuration"):
        check_resume(TrainConfig(), tmp_path)
