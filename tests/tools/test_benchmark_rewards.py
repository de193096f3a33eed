"""tools/benchmark/rewards.py on a few tasks: every way grades them right. Not tested: any time."""

import json
from collections.abc import Callable
from pathlib import Path

from tests.sandboxes import needs_sandbox


@needs_sandbox
def test_all_ways_are_measured_in_every_round(tmp_path: Path, run_script: Callable[..., None], capsys) -> None:
    import rewards

    output = tmp_path / "rewards.json"
    sizes = ("--grades", "8", "--programs", "2", "--tests", "2", "--workers", "1")
    run_script(rewards, "--rounds", "1", *sizes, "--json", str(output))
    rates = json.loads(output.read_text())
    after = rates.pop("after")
    assert list(after) == ["handed in together", "handed in as they finish"]
    assert all(len(found) == 1 and found[0] > 0 for found in after.values())
    assert {what: list(ways) for what, ways in rates.items()} == {
        "mathematics": ["pool", "subprocess"], "code": ["pool", "subprocess", "subprocess, bare"],
    }  # fmt: skip
    assert all(len(found) == 1 and found[0] > 0 for ways in rates.values() for found in ways.values())
    shown = capsys.readouterr().out
    assert "| grades a second, pool |" in shown
    assert "| programs of 2 tests a second, subprocess, bare |" in shown
    assert "| 2 programs handed in as they finish |" in shown
