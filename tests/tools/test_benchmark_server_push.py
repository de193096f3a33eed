"""tools/benchmark/server_push.py: how figures are summed up. The pushes: rollout/test_server_engine.py."""

from typing import Any


def test_seconds_are_rank_0s_over_all_blocks_of_a_way() -> None:
    import server_push

    def rank(scale: float) -> dict[str, Any]:
        def turns(*seconds: float) -> list[dict[str, float]]:
            return [{"seconds": s, "peak": scale * s * 2**20, "pack": 0.5, "received": 7.0} for s in seconds]

        blocks = [("file", turns(4.0, 8.0)), ("network", turns(1.0)), ("file", turns(6.0)), ("network", turns(3.0))]
        blocks.append(("shared_memory", turns(1.5)))
        return {"blocks": [{"way": way, "turns": of} for way, of in blocks]}

    ways = server_push.summarize([rank(1.0), rank(10.0)])
    assert ways["file"]["seconds"] == 6.0
    assert ways["network"] == {
        "seconds": 2.0, "fastest": 1.0, "pack": 0.5, "received": 7.0, "peak_first": 3 * 2**20, "peak_last": 30 * 2**20
    }  # fmt: skip
    assert ways["shared_memory"]["seconds"] == 1.5
    assert "| network | 2.00 | 0.33 | 1.00 | 0.25 | 3 | 30 |" in server_push.table(ways)
