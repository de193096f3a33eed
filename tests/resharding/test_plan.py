"""A plan moves every number to where vLLM keeps it, once, from whoever has it: carried out on made-up numbers.

The second way to the number: Megatron's parameters are fused as the loader of Hugging Face folders fuses them, vLLM's
are sliced from the whole tensors as vLLM's own weight loaders slice them (narrow by rank, heads repeated, vocabulary
padded to 64). Not tested here: real process groups, real engines (test_bridge).
"""

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_riskpo.checkpoint.weight_map.base import QKV, STACKED, pad_vocab, padded_vocab_size
from megatron_riskpo.errors import UsageError
from megatron_riskpo.resharding.layouts import ActorLayout, RolloutLayout
from megatron_riskpo.resharding.plan import RankPlan, plan_rank, transfer_items
from megatron_riskpo.resharding.schedule import BridgeLayout
from megatron_riskpo.resharding.slices import source_slice, target_slice
from tests.resharding.layout_strategies import ITEM_SIZE, bridge_layouts
from tests.resharding.whole_model import actor_parameters, rollout_parameters

QUICK = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large]
)


def all_ranks(layout: BridgeLayout) -> list[int]:
    return list(range(max(layout.actor.world_size, layout.rollout.rank(layout.rollout.replicas, 0))))


def message(layout: BridgeLayout, rank: int, transfer: np.void, parameters: dict) -> torch.Tensor:
    source = source_slice(layout, rank, transfer)
    out = torch.empty(source.shape, dtype=torch.int64)
    source.copy(parameters[source.parameter], out)
    return out


def carried_out(layout: BridgeLayout, plans: dict[int, RankPlan]) -> dict[int, dict[str, torch.Tensor]]:
    """Every rollout rank's parameters, and how often each number was written, after all rounds."""
    held = {rank: actor_parameters(layout, rank) for rank in range(layout.actor.world_size)}
    mail = {
        (t["round"], t["source"], t["destination"]): []
        for plan in plans.values() for t in plan.sends
    }  # fmt: skip
    for rank, plan in plans.items():
        for t in plan.sends:
            mail[t["round"], rank, t["destination"]].append(message(layout, rank, t, held[rank]))
    results = {}
    for rank, plan in plans.items():
        place = layout.rollout.place(rank)
        if place is None:
            assert len(plan.receives) == 0
            continue
        expected = rollout_parameters(layout, place[1])
        found = {name: torch.zeros_like(tensor) for name, tensor in expected.items()}
        writes = {name: torch.zeros_like(tensor) for name, tensor in expected.items()}
        for t in plan.receives:
            target = target_slice(layout, place[1], t)
            local = t["source"] == rank
            sent = message(layout, rank, t, held[rank]) if local else mail[t["round"], t["source"], rank].pop(0)
            target.view(found[target.parameter]).copy_(sent)
            target.view(writes[target.parameter]).add_(1)
        results[rank] = {name: (found[name], writes[name], expected[name]) for name in expected}
    assert not any(mail.values())  # nothing was sent that nobody takes
    return results


@given(bridge_layouts())
@QUICK
def test_every_number_arrives_once_within_the_bound(layout):
    plans = {rank: plan_rank(layout, rank) for rank in all_ranks(layout)}
    for rank, parameters in carried_out(layout, plans).items():
        for name, (found, writes, expected) in parameters.items():
            assert torch.equal(found, expected), (rank, name)
            # Made-up numbers start at 1: 0 is vLLM's padding of the vocabulary, which nothing is sent for.
            assert torch.equal(writes, (expected > 0).long()), (rank, name)
        num_numbers = sum(int((expected > 0).sum()) for _, _, expected in parameters.values())
        assert plans[rank].num_bytes(plans[rank].receives) == num_numbers * ITEM_SIZE
    for plan in plans.values():
        assert plan.peak_round_bytes <= layout.bucket_bytes


@given(bridge_layouts())
@QUICK
def test_near_sources_are_taken(layout):
    """Its own rank where it has the number, else a rank of its node where one has it (a tied embedding apart: its copy
    is chosen first)."""
    node = layout.node_size
    for rank in all_ranks(layout):
        plan = plan_rank(layout, rank)
        for t in plan.receives:
            owners = owners_of(layout, t)
            assert t["source"] in owners
            if t["source"] == rank or layout.model.pieces[t["piece"]].rule.is_vocab:
                continue
            assert rank not in owners
            if any(owner // node == rank // node for owner in owners):
                assert t["source"] // node == rank // node


def owners_of(layout: BridgeLayout, t: np.void) -> set[int]:
    """Ranks of the source's stage with the first number of the transfer, looked for one by one."""
    actor, piece = layout.actor, layout.model.pieces[t["piece"]]
    stage = t["source"] // actor.stage_size
    ranks = range(stage * actor.stage_size, (stage + 1) * actor.stage_size)
    if piece.is_expert:
        owner = t["expert"] // (layout.model.shape.num_experts // actor.ep)
        part = t["start"] // (piece.length // actor.etp)
        return {r for r in ranks if (r - ranks[0]) % (actor.ep * actor.etp) == owner * actor.etp + part}
    if not piece.is_split:
        return set(ranks)
    length = padded_vocab_size(piece.length, actor.tp) if piece.rule.is_vocab else piece.length
    return {rank for rank in ranks if rank % actor.tp == t["start"] // (length // actor.tp)}


DENSE = {
    "model_type": "qwen2", "hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 8,
    "num_attention_heads": 8, "num_key_value_heads": 8, "vocab_size": 512, "tie_word_embeddings": False,
}  # fmt: skip


def layout_of(actor: ActorLayout, rollout: RolloutLayout, bucket_bytes: int = 2**20, **config) -> BridgeLayout:
    from megatron_riskpo.resharding.pieces import Model

    return BridgeLayout(Model.of(DENSE | config), actor, rollout, 2, bucket_bytes)


def test_all_replicas_give_their_share():
    """One engine elsewhere: each of the 8 data-parallel replicas of a shard sends about an eighth of it."""
    layout = layout_of(ActorLayout(32, tp=2, pp=2), RolloutLayout(2, 1, first_rank=32), num_hidden_layers=16)
    sent = np.array([plan_rank(layout, rank).num_bytes(plan_rank(layout, rank).sends) for rank in range(32)])
    by_shard = sent.reshape(2, 8, 2).transpose(0, 2, 1)  # stage, tp rank, replica
    assert (by_shard.max(axis=-1) < 1.5 * by_shard.mean(axis=-1)).all()


def test_as_many_bytes_as_a_shard_has_and_none_where_the_rank_has_them():
    """The same tensor-parallel layout on both sides, one stage: nothing travels."""
    layout = layout_of(ActorLayout(8, tp=2), RolloutLayout(2, 4))
    for rank in range(8):
        plan = plan_rank(layout, rank)
        assert len(plan.sends) == len(plan.remote) == 0
        assert plan.num_bytes(plan.receives) > 0


@pytest.mark.parametrize(
    ("actor_tp", "replicas", "stages"), [(2, 1, 1), (2, 2, 2), (2, 4, 4), (2, 8, 4), (1, 1, 2), (1, 2, 4)]
)
def test_stages_send_at_the_same_time(actor_tp, replicas, stages):
    """One an engine, two where a rank of the actor has what both ranks of an engine need."""
    layout = layout_of(
        ActorLayout(16, tp=actor_tp, pp=4), RolloutLayout(2, replicas, first_rank=16), bucket_bytes=2**16,
        num_hidden_layers=32,
    )  # fmt: skip
    busy: dict[int, set[int]] = {}
    for rank in range(16):
        for number in np.unique(plan_rank(layout, rank).sends["round"]).tolist():
            busy.setdefault(number, set()).add(rank // 4)
    # Stages are not equally large: in the last rounds some have nothing left.
    assert sum(len(of_round) >= stages for of_round in busy.values()) > 0.8 * len(busy)
    assert max(len(of_round) for of_round in busy.values()) == stages


def test_plans_are_cached_compared_and_told_apart():
    actor = ActorLayout(8, tp=2, pp=2)
    layout, same = (layout_of(actor, RolloutLayout(2, 4)) for _ in range(2))
    assert plan_rank(layout, 3) is plan_rank(same, 3)
    rebuilt = plan_rank.__wrapped__(layout, 3)
    assert rebuilt == plan_rank(layout, 3)
    assert hash(rebuilt) == hash(plan_rank(layout, 3))
    other = plan_rank(layout_of(actor, RolloutLayout(1, 8)), 3)
    assert other != rebuilt
    assert other.digest != rebuilt.digest


def test_a_tensor_larger_than_a_bucket_is_cut():
    layout = layout_of(ActorLayout(4, tp=2, pp=2), RolloutLayout(2, 2), bucket_bytes=16384)
    table = 512 * 64 * 2 // 2  # bytes of half an embedding
    assert table > 16384
    for rank in range(4):
        plan = plan_rank(layout, rank)
        assert plan.peak_round_bytes <= 16384
        assert (transfer_items(plan.remote) * 2 <= 16384).all()


@pytest.mark.parametrize(
    ("actor", "rollout", "options", "message"),
    [
        (ActorLayout(2), RolloutLayout(16, 1, first_rank=2), {}, r"rollout.tp = 16 does not divide the 8 heads"),
        (ActorLayout(3, tp=3), RolloutLayout(1, 3), {}, r"actor.tp = 3 does not divide the 8 heads"),
        (ActorLayout(2), RolloutLayout(6, 1, first_rank=2), {"num_attention_heads": 12, "num_key_value_heads": 4,
                                                              "vocab_size": 384}, r"no multiple of the 4 key-value"),
        (ActorLayout(2), RolloutLayout(1, 2), {"bucket_bytes": 256}, r"bucket_mib is too small .* room for 128"),
    ],
)  # fmt: skip
def test_what_does_not_divide_is_refused(actor, rollout, options, message):
    with pytest.raises(UsageError, match=message):
        plan_rank(layout_of(actor, rollout, **options), 0)
    with pytest.raises(UsageError, match="cannot be laid out"):
        ActorLayout(6, tp=4)
    with pytest.raises(UsageError, match=r"4 ranks .* with ep 2 x etp 4; choose"):
        ActorLayout(4, ep=2, etp=4)


@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 3))
@settings(max_examples=30, deadline=None)
def test_fusions_of_the_reference_are_those_of_the_loader(groups, queries, size):
    """That `actor_parameters` below orders rows as Megatron's fused attention does: by group, its queries first."""
    from megatron_riskpo.checkpoint.weight_map.base import ModelShape

    shape = ModelShape(1, groups * queries, groups, size, 8, tied_embeddings=False)
    rows = [torch.arange(n * size)[:, None] + 1000 * i for i, n in enumerate((groups * queries, groups, groups))]
    fused = QKV.fuse(rows, shape)[:, 0].tolist()
    expected = []
    for group in range(groups):
        expected += range(group * queries * size, (group + 1) * queries * size)
        expected += [1000 + group * size + i for i in range(size)]
        expected += [2000 + group * size + i for i in range(size)]
    assert fused == expected
    assert torch.equal(STACKED.fuse(rows[:2], shape), torch.cat(rows[:2]))
    assert pad_vocab(rows[0], 100).shape == (100, 1)
