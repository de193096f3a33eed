"""When a colocated vLLM gives its memory back. Not tested here: that vLLM does it, which needs a GPU."""

from types import SimpleNamespace
from typing import Any

import pytest

from megatron_riskpo.errors import RunError
from megatron_riskpo.rollout import vllm_engine
from megatron_riskpo.rollout.types import SamplingConfig
from megatron_riskpo.rollout.vllm_engine import VllmEngine

SAMPLING = SamplingConfig(group_size=1, max_response_tokens=4, temperature=1.0, stop_token_ids=())


def engine(calls: list[str], monkeypatch: pytest.MonkeyPatch, *, may_sleep: bool) -> VllmEngine:
    """With a vLLM that only notes what it is told."""
    monkeypatch.setattr(vllm_engine, "drop_cached_prefixes", lambda llm: None)
    one = VllmEngine.__new__(VllmEngine)
    one._llm = SimpleNamespace(
        sleep=lambda level: calls.append(f"sleep {level}"),
        wake_up=lambda tags: calls.append(f"wake {tags}"),
        collective_rpc=lambda method: [one.pushed],
    )
    one._may_sleep, one._is_asleep, one._is_lost, one._unusable, one._weight_version = may_sleep, False, False, "", -1
    return one


def push(one: VllmEngine, calls: list[str], version: int) -> None:
    sink: Any = SimpleNamespace(begin=lambda: None, finish=lambda version: None)
    vars(one)["pushed"] = version
    one.update_shards(sink, lambda: calls.append("push"), version, lambda found: calls.append(f"check {found}"))


def test_it_sleeps_until_new_weights_come_and_wakes_part_by_part(monkeypatch):
    calls: list[str] = []
    one = engine(calls, monkeypatch, may_sleep=True)
    push(one, calls, 0)
    one.release()
    one.release()
    with pytest.raises(RunError, match="sleeps until it gets weights"):
        one.generate([[5]], SAMPLING, [0])
    push(one, calls, 1)
    one.release()
    assert calls == [
        *("push", "check 0", "sleep 2"),
        *("wake ['weights']", "push", "wake ['kv_cache']", "check 1", "sleep 2"),
    ]


def test_without_the_option_it_stays_awake(monkeypatch):
    calls: list[str] = []
    one = engine(calls, monkeypatch, may_sleep=False)
    push(one, calls, 0)
    one.release()
    push(one, calls, 1)
    assert calls == ["push", "check 0", "push", "check 1"]


def test_a_push_that_fails_on_waking_leaves_it_unusable(monkeypatch):
    calls: list[str] = []
    one = engine(calls, monkeypatch, may_sleep=True)
    push(one, calls, 0)
    one.release()

    def out_of_memory(tags: list[str]) -> None:
        raise RuntimeError("out of memory")

    one._llm.wake_up = out_of_memory
    with pytest.raises(RunError, match="push of version 1 into vLLM failed: RuntimeError: out of memory"):
        push(one, calls, 1)
    one.release()
    calls.clear()
    with pytest.raises(RunError, match=r"half-updated \(push of version 1"):
        one.generate([[5]], SAMPLING, [0])
    with pytest.raises(RunError, match=r"half-updated \(push of version 1"):
        push(one, calls, 2)
    assert not calls
