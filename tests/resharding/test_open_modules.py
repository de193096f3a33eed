"""How much of vLLM's modules a push holds at a time, counted slice by slice over random and real layouts.

The other way to the number: sizes of modules are those of whole tensors cut by hand, or worked out on paper. That the
bytes are vLLM's own: test_shard_sink, test_in_process.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings

from megatron_riskpo.errors import UsageError
from megatron_riskpo.resharding import stream
from megatron_riskpo.resharding.layouts import ActorLayout, RolloutLayout
from megatron_riskpo.resharding.pieces import Model
from megatron_riskpo.resharding.plan import RankPlan, plan_rank
from megatron_riskpo.resharding.rounds import make_rounds
from megatron_riskpo.resharding.schedule import BridgeLayout, make_schedule
from tests.resharding.layout_strategies import bridge_layouts
from tests.resharding.whole_model import module_bytes, rollout_parameters

MIB = 2**20


def modules_at_once(plan: RankPlan, numbers: dict[str, int]) -> Iterator[set[str]]:
    """After each slice, in the order in which a push takes them: those that have some of their `numbers` and not all,
    and the one that the slice was for."""
    missing = Counter(numbers)
    begun: set[str] = set()
    for step in make_rounds(plan):
        for arrival in step.arrivals:
            for part in arrival.parts:
                module = part.target.parameter.rpartition(".")[0]
                begun.add(module)
                missing[module] -= part.numel
                yield {name for name in begun if missing[name]} | {module}
    assert not any(missing.values())


def with_small_buckets(layout: BridgeLayout) -> BridgeLayout:
    """The smallest from 4 KiB on that it can have."""
    for power in range(12, 30):
        small = replace(layout, bucket_bytes=2**power)
        try:
            make_schedule(small)
        except UsageError:
            continue
        return small
    raise AssertionError("no bucket is large enough")


@pytest.mark.parametrize("span_buckets", [1, stream.SPAN_BUCKETS])
def test_one_module_is_under_way_at_a_time(monkeypatch, span_buckets):
    """Random models are small: with spans of one bucket ranks leave stages as often as they can."""
    monkeypatch.setattr(stream, "SPAN_BUCKETS", span_buckets)

    @given(bridge_layouts())
    @settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
    def check(drawn: BridgeLayout) -> None:
        make_schedule.cache_clear()
        layout = with_small_buckets(drawn)
        first, num_ranks = layout.rollout.first_rank, layout.rollout.num_ranks
        for rank in {first, first + num_ranks // 2, first + num_ranks - 1}:
            place = layout.rollout.place(rank)
            assert place is not None
            parameters = rollout_parameters(layout, place[1])
            numbers = module_bytes({name: tensor[tensor > 0] > 0 for name, tensor in parameters.items()})  # a byte each
            plan = plan_rank.__wrapped__(layout, rank)
            assert all(len(open_now) == 1 for open_now in modules_at_once(plan, numbers))
            assert plan.peak_open_bytes == max(module_bytes(parameters).values())

    check()
    make_schedule.cache_clear()


def _moe(hidden: int, width: int, layers: int, heads: int, groups: int, experts: int) -> dict:
    return {
        "model_type": "qwen3_moe", "hidden_size": hidden, "intermediate_size": width, "moe_intermediate_size": width,
        "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": groups, "head_dim": 128,
        "num_experts": experts, "num_experts_per_tok": 8, "vocab_size": 151936, "tie_word_embeddings": False,
    }  # fmt: skip


MOE_235B = _moe(4096, 1536, 94, 64, 4, 128)
MOE_671B = _moe(7168, 2048, 61, 128, 16, 256)


@pytest.mark.parametrize("replicas", [1, 3, 8, 32])
@pytest.mark.parametrize(
    ("config", "actor", "tp"),
    [
        (MOE_235B, ActorLayout(256, 4, 8, ep=32, first_stage_layers=11, last_stage_layers=11), 8),
        (MOE_671B, ActorLayout(256, 4, 16, ep=16, first_stage_layers=3, last_stage_layers=2), 16),
    ],
)
@pytest.mark.parametrize("whole_experts", [False, True])
def test_large_models_with_pipeline_stages(config, actor, tp, replicas, whole_experts):
    """Fewer and more engines than stages; the experts of a layer are larger than two buckets in one case."""
    layout = BridgeLayout(
        Model.of(config), actor, RolloutLayout(tp, replicas, whole_experts, actor.world_size), 2, 512 * MIB
    )
    experts = 3 * config["num_experts"] * config["hidden_size"] * config["moe_intermediate_size"] * 2 // tp
    for rank in (256, 256 + tp * replicas - 1):
        plan = plan_rank(layout, rank)
        assert plan.peak_open_bytes == experts
        assert plan.peak_round_bytes <= 512 * MIB
