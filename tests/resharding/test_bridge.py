"""bridge.verify stops a run whose engine holds other weights than the actor, on whichever rank that is."""

from tests.distributed.ranks import run_on_ranks
from tests.resharding.bridge_cases import outcomes
from tests.tiny_models import make_tiny_qwen2


def test_verify_accepts_equal_weights_and_refuses_everything_else(tmp_path):
    make_tiny_qwen2(tmp_path / "model", tied=True, seed=0)
    for rank in run_on_ranks(f"{outcomes.__module__}:{outcomes.__name__}", 2, tmp_path / "ranks"):
        assert rank["equal"] < 1e-6
        assert "differ by" in rank["another weight on rank 1"]
        assert "differ by inf" in rank["nan on rank 1"]
        assert "needs weights of version 3, the engine reports 2" in rank["another version"]
