"""GPUs, limits, sandbox and disk: each state of each line, and what is really measured here."""

import resource
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron_riskpo.doctor import machine
from megatron_riskpo.doctor.machine import GIB, Disk, GpuState

H100 = GpuState("NVIDIA H100 80GB HBM3", 78 * GIB, 79 * GIB, (9, 0))
V100 = GpuState("Tesla V100-SXM2-32GB", 31 * GIB, 32 * GIB, (7, 0))
BUSY = GpuState("NVIDIA H100 80GB HBM3", 30 * GIB, 79 * GIB, (9, 0))


def test_gpus() -> None:
    ok, busy, old = machine.gpu_lines([H100, BUSY, V100], "13.0", driver=True)
    assert str(ok) == "ok    GPU 0: NVIDIA H100 80GB HBM3, 78.0 of 79.0 GiB free"
    assert (busy.state, busy.found) == ("warn", "NVIDIA H100 80GB HBM3, 30.0 of 79.0 GiB free")
    assert old.state == "fail"
    assert "compute capability 7.0" in old.found


@pytest.mark.parametrize(
    ("built_for", "driver", "state", "words"),
    [
        (None, False, "ok", "none: models run on the CPU"),
        (None, True, "fail", "torch is built for CPUs alone"),
        ("13.0", True, "fail", "torch for CUDA 13.0 sees no GPU"),
    ],
)
def test_no_gpu(built_for, driver: bool, state: str, words: str) -> None:
    (line,) = machine.gpu_lines([], built_for, driver)
    assert line.state == state
    assert words in line.found


@pytest.mark.parametrize(
    ("driver", "built_for", "state", "words"),
    [
        ((13, 0), "13.0", "ok", "runs CUDA up to 13.0, torch is for 13.0"),
        ((13, 1), "12.8", "ok", "runs CUDA up to 13.1, torch is for 12.8"),
        ((12, 4), "12.8", "warn", "update the driver to one for CUDA 12.8: kernels compiled at run time may not load"),
        ((12, 8), "13.0", "fail", "add NVIDIA's cuda-compat-13-0, or install torch for CUDA 12"),
        (None, None, "ok", "no driver, and torch is for CPUs"),
        (None, "13.0", "ok", "no driver, and torch is for CUDA 13.0"),
        ((12, 8), None, "ok", "runs CUDA 12.8, and torch is for CPUs"),
    ],
)
def test_the_drivers_cuda_and_torchs(driver, built_for, state: str, words: str) -> None:
    line = machine.cuda_line(driver, built_for)
    assert line.state == state
    assert words in str(line)


def test_the_driver_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """As cuda.h has it: 1000 major + 10 minor, by a pointer."""

    def say(pointer, code: int) -> int:
        pointer._obj.value = 12080
        return code

    for code, expected in ((0, (12, 8)), (100, None)):
        library = SimpleNamespace(cuDriverGetVersion=lambda pointer, code=code: say(pointer, code))
        monkeypatch.setattr(machine.ctypes, "CDLL", lambda name, library=library: library)
        assert machine.cuda_of_driver() == expected


def test_nccl() -> None:
    assert machine.nccl_line((2, 27, 5)).found == "2.27.5"
    assert machine.nccl_line((2, 9, 0)).state == "warn"
    assert machine.nccl_line(None).state == "ok"


def test_bubblewrap() -> None:
    assert machine.bubblewrap_line("/usr/bin/bwrap", "").state == "ok"
    assert "apt-get install bubblewrap" in str(machine.bubblewrap_line(None, ""))
    line = machine.bubblewrap_line("/usr/bin/bwrap", "setting up uid map: Permission denied")
    assert line.state == "warn"
    assert "Permission denied" in line.found
    assert "user namespaces" in line.remedy


def test_a_sandbox_that_cannot_be_made_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = tmp_path / "bwrap"
    fake.write_text("#!/bin/sh\necho no permission >&2\nexit 1\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert machine.try_bubblewrap() == (str(fake), "no permission")


def test_host_memory_and_limits() -> None:
    assert machine.host_memory_line(100 * GIB, 128 * GIB, 8).state == "warn"
    assert machine.host_memory_line(900 * GIB, 1024 * GIB, 8).state == "ok"
    few, locked = machine.limit_lines(1024, 65536, on_gpu=True)
    assert str(few) == (
        "warn  ulimit -n (open files): 1024, advised is 4096; ulimit -n 4096 before the run, or in the job's limits"
    )
    assert locked.state == "warn"
    assert "ulimit -l unlimited" in locked.remedy
    assert [line.state for line in machine.limit_lines(resource.RLIM_INFINITY, 0, on_gpu=False)] == ["ok"]


def test_disk() -> None:
    path = Path("runs")
    assert machine.disk_line(Disk(path, 900 * GIB, 1e9)).state == "ok"
    slow, full = machine.disk_line(Disk(path, 900 * GIB, 5e7)), machine.disk_line(Disk(path, 3 * GIB, 1e9))
    assert slow.state == "warn"
    assert "writes 50 MB/s; 200 are advised" in slow.found
    assert full.state == "warn"
    assert "3 GiB free" in full.found
    assert machine.disk_line(Disk(path, 0, 0.0, "Read-only file system")).state == "fail"


def test_the_disk_is_written_and_left_clean(tmp_path: Path) -> None:
    measured = machine.measure_disk(tmp_path / "not" / "there", size=2**20)
    assert measured.path == tmp_path
    assert measured.write_rate > 0
    assert measured.free > 0
    assert not measured.error
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_cannot_be_written_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args, **options):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    line = machine.disk_line(machine.measure_disk(tmp_path, size=2**20))
    assert (line.state, line.found) == ("fail", "cannot be written: Permission denied")


def test_this_machine_is_fit(tmp_path: Path) -> None:
    """The whole command, in a process of its own: it imports what training would."""
    command = [sys.executable, "-m", "megatron_riskpo.cli", "doctor", "--run-dir", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "ok    torch: 2.13." in done.stdout
    assert "ok    megatron-core: 0.16.1" in done.stdout
    assert done.stdout.count("ok    ") + done.stdout.count("warn  ") == len(done.stdout.splitlines())
