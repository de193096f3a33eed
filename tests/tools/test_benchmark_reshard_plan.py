"""tools/benchmark/reshard_plan.py: what it counts. Not tested: any time."""

import pytest


def small_case():
    from reshard_cases import QWEN_7B, Case

    from megatron_riskpo.resharding.layouts import ActorLayout, RolloutLayout

    return Case("small", QWEN_7B | {"num_hidden_layers": 4}, ActorLayout(8, 4, 2), RolloutLayout(2, 4))


def test_predicted_bytes_are_those_of_the_plans():
    from reshard_plan import NIC_BYTES_S, NVLINK_BYTES_S, predict

    from megatron_riskpo.resharding.plan import plan_rank

    layout = small_case().layout
    sync = predict(layout)
    plans = [plan_rank(layout, rank) for rank in range(8)]
    # All eight are in one node.
    busiest = max(max(plan.num_bytes(plan.sends), plan.num_bytes(plan.remote)) for plan in plans)
    assert sync.near_gb == pytest.approx(busiest / 1e9)
    assert sync.far_gb == 0
    assert sync.seconds == pytest.approx(busiest / NVLINK_BYTES_S)
    assert sync.ideal_seconds == pytest.approx(max(plan.num_bytes(plan.receives) for plan in plans) / NIC_BYTES_S)
    assert sync.slices_in == max(len(plan.receives) for plan in plans)
    assert sync.slices_out == max(len(plan.sends) for plan in plans)
    assert sync.slices == max(len(plan.receives) + len(plan.sends) for plan in plans)


def test_the_host_is_timed_on_a_whole_push_of_as_many_slices():
    from reshard_cases import SYNC_CASES
    from reshard_host import microseconds_a_slice, push_of, tiny

    from megatron_riskpo.resharding.plan import plan_rank

    for case in (small_case(), SYNC_CASES[0]):
        push, sink = push_of(tiny(case).layout, 0)
        push.run(sink, version=0)
        assert not any(sink.missing.values())
        # Of a large one embedding and output layer are cut in addition.
        whole = plan_rank(case.layout, 0)
        assert 0.9 * len(whole.receives) <= len(push.plan.receives) <= len(whole.receives)
        assert 0.9 * len(whole.sends) <= len(push.plan.sends) <= len(whole.sends)
    assert microseconds_a_slice(small_case(), repeats=1) > 0


def test_megatrons_planner_plans_the_same_model():
    """Rank 0 takes a tensor of each of its parameters, from as many ranks as its slice is spread over."""
    from megatron_planner import seconds_for_all_ranks

    case = small_case()
    _, transfers = seconds_for_all_ranks(case.hf_config, case.actor, case.rollout)
    # Per layer two norms once, and five parameters from two ranks each; final norm; embedding and output layer.
    assert transfers == 4 * (2 + 5 * 2) + 1 + 2 * 2


@pytest.mark.parametrize("num_ranks", [1, 3])
def test_as_many_ranks_are_timed_as_asked_for(num_ranks):
    from reshard_plan import plan_milliseconds

    assert len(plan_milliseconds(small_case().layout, num_ranks)) == num_ranks
