"""`riskpo checkpoint`, as typed: what it prints, what it deletes, its exit codes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_riskpo.checkpoint import commands
from megatron_riskpo.checkpoint.manifest import MANIFEST, remove_checkpoint, step_folders
from megatron_riskpo.cli import main
from tests.checkpoint.folders import flip_byte, truncate, write_checkpoint

METRIC = "eval/heldout/pass@1"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run with checkpoints of steps 5, 10, 15 and 20, of which step 10 is the best."""
    for step, value in ((5, 0.25), (10, 0.75), (15, 0.5), (20, 0.5)):
        write_checkpoint(tmp_path / "checkpoints", step, {METRIC: value}, num_shards=3)
    record(tmp_path)
    return tmp_path


def record(run: Path, **options) -> None:
    (run / "config.json").write_text(json.dumps({"config": {"checkpoint": {"every": 5, "keep": 9, **options}}}))


def steps(run: Path) -> list[int]:
    return [int(path.name.removeprefix("step_")) for path in reversed(step_folders(run / "checkpoints"))]


def checkpoint(capfd, *arguments) -> tuple[int, list[str], str]:
    """Exit code, lines of stdout, stderr."""
    code = main(["checkpoint", *map(str, arguments)])
    out, err = capfd.readouterr()
    return code, out.splitlines(), err


def test_ls_is_a_table_without_reading_checksums(run, capfd):
    record(run, keep_best=METRIC)
    truncate(run / "checkpoints" / "step_5")
    flip_byte(run / "checkpoints" / "step_15")
    (run / "checkpoints" / "step_25.partial").mkdir()
    code, lines, _ = checkpoint(capfd, "ls", run)
    assert code == 0
    assert lines[0].split() == ["step", "size", "layout", "state", "saved", "options"]
    cells = [line.split() for line in lines[1:5]]
    assert [row[:6] for row in cells] == [
        ["5", *cells[0][1:3], "-", "damaged", cells[0][5]],
        *([str(step), "30.0", "KiB", "tp2", "dp4", "complete"] for step in (10, 15, 20)),
    ]
    assert lines[1].endswith("megatron/shard_0 has 10239 bytes, the manifest says 10240")
    assert [row[8:] for row in cells[1:]] == [["01234567", *marks] for marks in (["best"], [], ["latest"])]
    assert lines[5].startswith("step_25.partial: being written or deleted")


@pytest.mark.parametrize("content", [None, "{", "[]", '{"config": {"checkpoint": 3}}'])
def test_ls_needs_no_record(run, content, capfd):
    (run / "config.json").unlink()
    if content is not None:
        (run / "config.json").write_text(content)
    assert checkpoint(capfd, "ls", run)[0] == 0


def test_verify_names_every_damaged_file(run, capfd):
    assert checkpoint(capfd, "verify", run) == (
        0, [*(f"step_{step}: whole" for step in (5, 10, 15, 20)), "all 4 whole, checksums read"], ""
    )  # fmt: skip
    folder = run / "checkpoints"
    (folder / "step_10" / "megatron" / "shard_0").unlink()
    truncate(folder / "step_10", "shard_1")
    flip_byte(folder / "step_10", "shard_2")
    (folder / "step_20" / MANIFEST).unlink()
    code, lines, _ = checkpoint(capfd, "verify", run)
    assert code == 1
    assert lines == [
        "step_5: whole",
        "step_10: megatron/shard_0 is missing",
        "step_10: megatron/shard_1 has 10239 bytes, the manifest says 10240",
        "step_10: megatron/shard_2 has another checksum than the manifest says",
        "step_15: whole",
        "step_20: no manifest.json: it was never finished",
        "2 of 4 damaged",
    ]
    assert checkpoint(capfd, "verify", run, "--step", 15)[0] == 0
    assert checkpoint(capfd, "verify", run, "--step", 10)[0] == 1


def test_a_checkpoint_that_its_run_deletes_meanwhile_is_not_damaged(run, capfd, monkeypatch):
    original = commands.damages

    def after_deletion(folder):
        if folder.name == "step_10":
            remove_checkpoint(folder)
        return original(folder)

    monkeypatch.setattr(commands, "damages", after_deletion)
    code, lines, _ = checkpoint(capfd, "verify", run)
    assert code == 0
    assert lines[1] == "step_10: deleted meanwhile, by its run or by prune"
    assert lines[-1] == "all 3 whole, checksums read"


def test_prune_deletes_the_oldest_and_says_what_it_frees(run, capfd):
    size = sum(path.stat().st_size for path in (run / "checkpoints" / "step_5").rglob("*") if path.is_file())
    total = f"{2 * size / 1024:.1f} KiB"
    code, lines, _ = checkpoint(capfd, "prune", run, "--keep", 2, "--dry-run")
    assert code == 0
    assert [line.partition(" (")[0] for line in lines[:2]] == ["would delete step_5", "would delete step_10"]
    assert lines[2] == f"would free {total}, which leaves 2 of 4 checkpoints"
    assert steps(run) == [5, 10, 15, 20]
    code, lines, _ = checkpoint(capfd, "prune", run, "--keep", 2)
    assert lines[-1] == f"freed {total}, which leaves 2 of 4 checkpoints"
    assert steps(run) == [15, 20]
    assert checkpoint(capfd, "prune", run, "--keep", 2)[:2] == (0, ["freed 0.0 KiB, which leaves 2 of 2 checkpoints"])


def test_prune_never_deletes_the_newest_that_verifies(run, capfd):
    flip_byte(run / "checkpoints" / "step_20")
    truncate(run / "checkpoints" / "step_15")
    code, lines, _ = checkpoint(capfd, "prune", run, "--keep", 1)
    assert code == 0
    assert lines[0] == "step_20 is damaged: megatron/shard_0 has another checksum than the manifest says"
    assert steps(run) == [10, 20]


def test_prune_deletes_nothing_where_nothing_verifies(run, capfd):
    for step in steps(run):
        flip_byte(run / "checkpoints" / f"step_{step}")
    code, _, err = checkpoint(capfd, "prune", run, "--keep", 1)
    assert code == 1
    assert "none of the 4 checkpoints verifies; nothing was deleted" in err
    assert steps(run) == [5, 10, 15, 20]


@pytest.mark.parametrize(
    ("options", "left"),
    [({"keep_best": METRIC}, [10, 20]), ({"keep_every": 15}, [15, 20]), ({"keep_best": "eval/other"}, [20])],
)
def test_prune_spares_what_the_run_keeps(run, options, left, capfd):
    record(run, **options)
    checkpoint(capfd, "prune", run, "--keep", 1)
    assert steps(run) == left


def test_prune_spares_what_latest_names(run, capfd):
    (run / "checkpoints" / "latest").write_text("step_5\n")
    checkpoint(capfd, "prune", run, "--keep", 1)
    assert steps(run) == [5, 20]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["ls", "no/such"], "no/such is no folder: name the folder of a run"),
        (["ls", "."], ". has no checkpoints: name the folder of a run"),
        (["verify", "RUN", "--step", "7"], "has no checkpoint of step 7; it has steps 5, 10, 15, 20"),
        (["verify", "RUN", "--step", "x"], "invalid int value: 'x'; see riskpo checkpoint verify --help"),
        (["prune", "RUN"], "required: --keep"),
        (["prune", "RUN", "--keep", "0"], "--keep 0 is out of range; it must be >= 1"),
        (["list", "RUN"], "invalid choice: 'list'"),
        ([], "required: ACTION"),
    ],
)
def test_wrong_input_is_one_line_and_code_2(run, arguments, message, capfd, monkeypatch):
    monkeypatch.chdir(run / "checkpoints" / "step_5")
    code, lines, err = checkpoint(capfd, *(run if argument == "RUN" else argument for argument in arguments))
    assert (code, lines) == (2, [])
    assert message in err
    assert err.count("\n") == 1


def test_prune_without_a_record_deletes_nothing(run, capfd):
    (run / "config.json").unlink()
    code, _, err = checkpoint(capfd, "prune", run, "--keep", 1)
    assert code == 2
    assert "config.json does not say which checkpoints the run keeps" in err
    assert steps(run) == [5, 10, 15, 20]


@pytest.mark.parametrize("arguments", [("ls",), ("verify",), ("prune", "--keep", "1")])
def test_nothing_heavy_is_imported(run, arguments):
    program = (
        "import sys; from megatron_riskpo.cli import main; code = main(sys.argv[1:]); "
        "print([m for m in ('torch', 'megatron.core', 'numpy', 'tyro', 'pickle') if m in sys.modules]); sys.exit(code)"
    )
    command = [sys.executable, "-c", program, "checkpoint", arguments[0], str(run), *arguments[1:]]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
