"""A gradient that is not finite, from one micro-batch on one rank, changes nothing on any rank; too many end the run.

On two ranks, under data, tensor and pipeline parallelism, with and without the distributed optimizer, in both dtypes,
and with two chained optimizers in place of experts. Second way to the state after a skipped step: a run that never saw
its batch. Not tested here: NCCL, experts.
"""

import json
import math

import pytest
import torch

from megatron_riskpo.actor.actor import summarize_steps
from megatron_riskpo.observability.metrics import MetricsWriter
from tests.distributed.gradient_cases import CASES, LAYOUTS, run
from tests.distributed.ranks import run_on_ranks
from tests.tiny_models import make_tiny_qwen2


@pytest.fixture(scope="module")
def by_rank(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gradients")
    make_tiny_qwen2(folder / "model", tied=True, seed=3, hidden_size=64)
    return run_on_ranks(f"{run.__module__}:{run.__name__}", 2, folder / "two")


def assert_bit_equal(found, expected):
    assert found.keys() == expected.keys()
    different = [name for name in expected if not torch.equal(found[name], expected[name])]
    assert different == []


@pytest.mark.parametrize("case", CASES, ids=" ".join)
def test_all_ranks_skip_and_nothing_changes(by_rank, case):
    for rank in by_rank:
        result = rank[case]
        assert result["spoilt"]["actor/skipped_steps"] == 1
        assert not math.isfinite(result["spoilt"]["actor/grad_norm"])
        assert any("exp_avg" in name for name in result["before"])
        assert_bit_equal(result["after"], result["before"])


@pytest.mark.parametrize("case", CASES, ids=" ".join)
def test_the_next_step_is_that_of_a_run_that_never_saw_the_batch(by_rank, case):
    for rank in by_rank:
        result = rank[case]
        assert [metrics["actor/skipped_steps"] for metrics in result["metrics"]] == [0, 0]
        assert result["metrics"] == result["expected metrics"]
        assert_bit_equal(result["end"], result["expected end"])
        assert any(not torch.equal(result["end"][name], tensor) for name, tensor in result["before"].items())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_norm_is_the_same_on_every_rank(by_rank, layout):
    first, second = ([m["actor/grad_norm"] for m in rank["nan", layout]["metrics"]] for rank in by_rank)
    assert first == second
    assert min(first) > 0.1  # so that it was clipped


def test_one_rank_alone_makes_all_skip(by_rank):
    assert [rank["agreement", "dp2"] for rank in by_rank] == [False, False]


def test_chained_optimizers_clip_by_their_common_norm(by_rank):
    for rank in by_rank:
        one, two = rank["nan", "tp2"], rank["nan", "tp2 two optimizers"]
        for a, b in zip(one["metrics"], two["metrics"], strict=True):
            assert b == pytest.approx(a, rel=1e-5, abs=1e-7)
        weights = [name for name in one["end"] if name.startswith(("decoder", "embedding"))]
        assert weights
        for name in weights:
            torch.testing.assert_close(two["end"][name], one["end"][name], rtol=0, atol=1e-6)


@pytest.mark.parametrize("layout", ["dp2 distributed optimizer", "tp2", "pp2"])
def test_a_first_step_may_be_skipped(by_rank, layout):
    for rank in by_rank:
        assert_bit_equal(*rank["first", layout])


@pytest.mark.parametrize("layout", ["dp2 distributed optimizer", "tp2", "pp2"])
def test_too_many_in_a_row_end_the_run_on_every_rank(by_rank, layout):
    first, second = (rank["abort", layout] for rank in by_rank)
    assert first == second
    assert first["not in a row"] == ""
    assert "norm is nan at optimizer step 1, not finite 1 times in a row" in first["none allowed"]
    two = first["two in a row"]
    assert "optimizer step 2, not finite 2 times in a row (optimizer.max_skipped_steps = 1)" in two
    assert "or start a new run with a lower optimizer.lr" in two
    # Nearest to the loss first.
    assert "parameters spoilt: decoder.final_layernorm.weight, " in two or "spoilt: output_layer.weight, " in two
    assert two.count("decoder.") + two.count("output_layer.") == 5
    assert ", ...; " in two
    assert "\n" not in two


@pytest.mark.parametrize("layout", ["dp2 distributed optimizer", "tp2", "pp2"])
def test_the_error_names_what_is_spoilt(by_rank, layout):
    for rank in by_rank:
        errors = rank["abort", layout]
        assert "; 1 parameters spoilt: decoder.layers.1.mlp.linear_fc2.weight; the last" in errors["one parameter"]
        assert "norm is inf " in errors["too large"]
        assert "; each gradient is finite, but their norm overflows float32; " in errors["too large"]


def test_metrics_are_those_of_the_steps_taken_and_stay_json(tmp_path):
    good, bad = {"actor/loss": 2.0, "actor/skipped_steps": 0.0}, {"actor/loss": math.nan, "actor/skipped_steps": 1.0}
    assert summarize_steps([good, bad, {**good, "actor/loss": 4.0}]) == {"actor/loss": 3.0, "actor/skipped_steps": 1.0}
    with MetricsWriter(tmp_path, tensorboard=False) as writer:
        writer.write(1, summarize_steps([bad, bad]))
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(line) == {"step": 1, "actor/loss": None, "actor/skipped_steps": 2.0}
