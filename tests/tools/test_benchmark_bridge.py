"""tools/benchmark/bridge.py on a tiny model: what is moved, how it is summed up. Not tested: any time."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


def test_seconds_are_medians_and_memory_is_that_of_the_rank_with_most() -> None:
    import bridge

    def rank(scale: int) -> dict[str, Any]:
        turns = [{"seconds": seconds, "peak": scale * seconds} for seconds in (4.0, 2.0, 9.0)]
        return {
            "turns": {"memcpy": [{"seconds": 1.0, "peak": 0}] * 3, "push": turns},
            "shard": 8 * 10**9, "received": scale, "buckets": 7, "rounds": 5,
            "engine": {"sync": [3.0, 5.0, 4.0], "pack": [1.0, 1.0, 2.0]},
        }  # fmt: skip

    case = bridge.summarize([rank(1), rank(2**20)])
    assert case["ways"]["push"] == {"seconds": 4.0, "fastest": 2.0, "peak": 9 * 2**20}
    assert case["received"] == 2**20
    assert case["engine"] == {"sync": 4.0, "pack": 1.0}
    assert "| a, push | 4.000 | 2.00 | 4.00 | 2.000 | 2.00 | 9 |" in bridge.table({"a": case})


@pytest.mark.slow
def test_the_ranks_fill_their_shards_in_every_way(tmp_path: Path, run_script: Callable[..., None], capsys) -> None:
    """That all ways end with the same bits is asserted by the ranks themselves."""
    import bridge

    output = tmp_path / "figures.json"
    sizes = ["--layers", "2", "--hidden-size", "128", "--bucket-mib", "1", "--repeats", "1"]
    cases = ["tp 2 -> tp 1", "pp 2 -> tp 2"]
    run_script(bridge, *sizes, "--cases", *cases, "--json", str(output))
    found = json.loads(output.read_text())
    first, second = (found["cases"][name] for name in cases)
    # Either rank has all of the norms and half of everything else.
    norms = 4 * 128 * (2 * 2 + 1)
    assert first["shard"] == found["bytes"]
    assert first["received"] == (found["bytes"] - norms) // 2
    assert second["shard"] == (found["bytes"] + norms) // 2
    for case in (first, second):
        assert set(case["ways"]) == {"memcpy", "push", "push over sockets", "gather"}
        assert case["buckets"] == 2 * 2**20
        assert case["engine"]["sync"] > case["engine"]["pack"] > 0
    assert "| pp 2 -> tp 2, gather |" in capsys.readouterr().out
