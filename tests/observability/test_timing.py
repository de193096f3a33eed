"""PhaseTimer against a clock that the test moves."""

import pytest

from megatron_riskpo.observability.timing import PhaseTimer


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_seconds_add_up_per_phase_and_start_anew_each_step() -> None:
    clock = Clock()
    seen: list[str] = []
    timer = PhaseTimer(on_phase=seen.append, clock=clock)
    for phase, seconds in (("rollout", 2.0), ("update", 0.5), ("rollout", 1.0)):
        with timer(phase):
            clock.now += seconds
        clock.now += 10.0  # between phases: belongs to none
    assert timer.take() == {"time/rollout_s": 3.0, "time/update_s": 0.5}
    assert seen == ["rollout", "update", "rollout"]
    assert timer.take() == {}


def test_a_phase_that_raises_is_timed() -> None:
    clock = Clock()
    timer = PhaseTimer(clock=clock)

    def fail() -> None:
        with timer("update"):
            clock.now += 1.5
            raise KeyError("x")

    with pytest.raises(KeyError):
        fail()
    assert timer.take() == {"time/update_s": 1.5}
