"""Which servers a run has, as its processes come and go; the processes are ones that only say what they are asked."""

import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_riskpo.errors import RunError
from megatron_riskpo.rollout import server_fleet
from megatron_riskpo.rollout.server_fleet import ServerFleet, transfer_folder


class Process:
    """Each start gives another address; `url` is None for `slow` calls after a start."""

    def __init__(self, index: int, restarts_left: int = 1, slow: int = 0) -> None:
        self.index, self.restarts_left, self.slow = index, restarts_left, slow
        self.config = SimpleNamespace(
            run=SimpleNamespace(timeout_s=30.2),
            server=SimpleNamespace(max_restarts=restarts_left, push_timeout_s=20.0, health_timeout_s=0.1),
        )
        self.num_starts, self.asked, self.running, self.has_ended = 0, 0, False, False

    def start(self) -> None:
        self.num_starts, self.asked, self.running, self.has_ended = self.num_starts + 1, 0, True, False

    def restart(self) -> bool:
        if not self.restarts_left:
            return False
        self.restarts_left -= 1
        self.start()
        return True

    def url(self) -> str | None:
        self.asked += 1
        return f"http://{self.index}:{self.num_starts}" if self.asked > self.slow else None

    def wait(self) -> str:
        while True:
            url = self.url()
            if url:
                return url

    def stop(self) -> None:
        self.running = False


def fleet(*processes: Process, given: tuple[str, ...] = ()) -> tuple[ServerFleet, list[str]]:
    lines: list[str] = []
    return ServerFleet(processes, given, lines.append), lines  # type: ignore[arg-type]


def test_a_failed_server_comes_back_under_another_address_and_the_others_go_on():
    one, other = Process(1, slow=2), Process(2)
    servers, lines = fleet(one, other)
    servers.wait_for_all()
    assert servers.addresses() == ["http://1:1", "http://2:1"]
    servers.restart(["http://1:1"])
    assert servers.addresses() == ["http://2:1"]  # does not wait for the one that starts
    servers.restart(["http://1:1"])  # said once more, of the address that is no longer
    assert one.num_starts == 2
    assert servers.addresses() == ["http://2:1"]
    assert servers.addresses() == ["http://1:2", "http://2:1"]
    assert lines == ["rollout server 1 is started again (0 more times at most)"]


def test_servers_that_die_or_hang_while_nobody_asks_them_are_started_again():
    dead, hung, given_up, well = (Process(index) for index in range(4))
    servers, _ = fleet(dead, hung, given_up, well)
    servers.wait_for_all()
    dead.has_ended = True
    assert servers.addresses() == ["http://1:1", "http://2:1", "http://3:1"]
    servers.restart_unready(ready=["http://3:1"], given_up=["http://2:1"])
    # One that has only just come up may yet be ready.
    assert [process.num_starts for process in (dead, hung, given_up, well)] == [2, 1, 2, 1]
    time.sleep(0.15)
    servers.restart_unready(ready=["http://3:1"], given_up=[])
    assert [process.num_starts for process in (dead, hung, given_up, well)] == [2, 2, 2, 1]
    assert servers.addresses() == ["http://0:2", "http://1:2", "http://2:2", "http://3:1"]


def test_restarts_are_bounded_and_the_reason_is_said(monkeypatch):
    monkeypatch.setattr(server_fleet, "_POLL_S", 0.0)
    process = Process(1, slow=3)
    servers, _ = fleet(process)
    servers.wait_for_all()
    servers.restart(["http://1:1"])
    assert servers.addresses() == ["http://1:2"]  # waits: there is no other
    servers.restart(["http://1:2"])
    assert not process.running
    assert not servers.has_processes
    message = r"no rollout server is left: the server at http://1:2 failed, and server.max_restarts = 1 is used up"
    with pytest.raises(RunError, match=message):
        servers.addresses()


def test_a_restart_is_waited_for_as_long_as_the_other_ranks_can_wait():
    process = Process(1, slow=10**6)
    servers, _ = fleet(process)
    begun = time.monotonic()
    with pytest.raises(RunError, match=r"no rollout server came back within 0.2 s, .*; raise run.timeout_s"):
        servers.addresses()
    assert time.monotonic() - begun < 10


def test_a_process_that_does_not_start_again_counts_as_failed(monkeypatch):
    monkeypatch.setattr(server_fleet, "_POLL_S", 0.0)
    process = Process(1)
    servers, _ = fleet(process)
    servers.wait_for_all()
    servers.restart(["http://1:1"])

    def url() -> str:
        raise RunError("rollout server 1 ended with exit code 1: error: no memory")

    monkeypatch.setattr(process, "url", url)
    with pytest.raises(RunError, match=r"is left: rollout server 1 ended with exit code 1: error: no memory, and serv"):
        servers.addresses()


def test_given_servers_stay_candidates():
    servers, _ = fleet(given=("http://a:1",))
    servers.restart(["http://a:1"])
    assert servers.addresses() == ["http://a:1"]
    assert not servers.has_processes


def test_at_the_end_the_processes_are_ended():
    one, other = Process(1), Process(2)
    servers, _ = fleet(one, other)
    servers.close()
    assert (one.running, other.running) == (False, False)


def test_the_transfer_folder_is_deleted_with_what_killed_runs_left(tmp_path, monkeypatch):
    monkeypatch.setattr(server_fleet, "_MEMORY", tmp_path)
    with transfer_folder("") as other:
        # A killed run's locks are gone.
        (tmp_path / "riskpo-transfer-left").mkdir()
        (tmp_path / "riskpo-transfer-left" / "bucket").write_bytes(b"1")
        with transfer_folder("") as folder:
            (folder / "bucket").write_bytes(b"1")
            assert set(tmp_path.iterdir()) == {folder, other}
        assert set(tmp_path.iterdir()) == {other}
    assert not other.exists()


def test_a_folder_that_other_machines_see_keeps_what_it_has(tmp_path):
    (tmp_path / "riskpo-transfer-of-another-machine").mkdir()
    with transfer_folder(str(tmp_path)) as folder:
        assert folder.parent == tmp_path
        assert len(list(tmp_path.iterdir())) == 2
    assert not folder.exists()


def test_a_folder_that_another_run_removed_before_it_was_locked_is_made_anew(tmp_path, monkeypatch):
    monkeypatch.setattr(server_fleet, "_MEMORY", tmp_path)
    made: list[str] = []

    def mkdtemp(**options: Any) -> str:
        made.append(real(**options))
        if len(made) < 3:
            Path(made[-1]).rmdir()
        return made[-1]

    real = server_fleet.tempfile.mkdtemp
    monkeypatch.setattr(server_fleet.tempfile, "mkdtemp", mkdtemp)
    with transfer_folder("") as folder:
        assert str(folder) == made[2]
        assert folder.is_dir()
