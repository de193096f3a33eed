"""PhaseMemory with marks that the test sets, and the process's own on a real allocation."""

import pytest

from megatron_riskpo.observability import memory
from megatron_riskpo.observability.memory import GIB, PhaseMemory, ResidentPeak
from tests.resident_pages import resident


class Meter:
    """A mark that only rises until it is reset."""

    used: float = 0.0
    mark: float = 0.0
    works = True

    def use(self, used: float) -> None:
        self.used, self.mark = used, max(self.mark, used)

    def reset(self) -> None:
        self.mark = self.used

    def read(self) -> float | None:
        return self.mark if self.works else None


def test_a_phase_has_the_highest_mark_since_the_last_step() -> None:
    meter = Meter()
    phases = PhaseMemory(meter)
    for phase, most, rest in (("rollout", 5, 1), ("update", 3, 2), ("rollout", 4, 1)):
        with phases(phase):
            meter.use(most * GIB)
            meter.use(rest * GIB)
    assert phases.take() == {"memory/rollout_peak_gib": 5, "memory/update_peak_gib": 3}
    assert phases.take() == {}


def test_a_phase_that_raises_is_measured() -> None:
    meter = Meter()
    phases = PhaseMemory(meter)

    def fail() -> None:
        with phases("update"):
            meter.use(2 * GIB)
            raise KeyError("x")

    with pytest.raises(KeyError):
        fail()
    assert phases.take() == {"memory/update_peak_gib": 2}


def test_without_a_mark_nothing_is_said() -> None:
    meter = Meter()
    meter.works = False
    phases = PhaseMemory(meter)
    with phases("update"):
        meter.use(GIB)
    assert phases.take() == {}


def test_resident_set_is_left_out_where_it_cannot_be_reset(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(memory, "CLEAR_REFS", tmp_path / "missing" / "clear_refs")
    meter = ResidentPeak()
    assert meter.read() is None
    meter.reset()
    assert meter.read() is None


def test_resident_set_rises_and_falls_with_what_is_held() -> None:
    meter, num_bytes = ResidentPeak(), 256 * 2**20
    meter.reset()
    before = meter.read()
    if before is None:
        pytest.skip("this system does not let a process reset the mark of its resident set")
    with resident(num_bytes):
        pass
    risen = meter.read()
    meter.reset()
    again = meter.read()
    assert risen is not None
    assert again is not None
    assert risen - before > 0.9 * num_bytes
    assert risen - again > 0.9 * num_bytes
