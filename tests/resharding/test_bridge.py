"""bridge.verify stops a run whose engine holds other weights than the actor, on whichever rank that is."""

from types import SimpleNamespace

import pytest

from megatron_riskpo.config import BridgeConfig
from megatron_riskpo.errors import UsageError
from megatron_riskpo.resharding.bridge import _in_process
from tests.distributed.ranks import run_on_ranks
from tests.resharding.bridge_cases import outcomes
from tests.tiny_models import make_tiny_qwen2


def test_verify_accepts_equal_weights_and_refuses_everything_else(tmp_path):
    make_tiny_qwen2(tmp_path / "model", tied=True, seed=0)
    for rank in run_on_ranks(f"{outcomes.__module__}:{outcomes.__name__}", 2, tmp_path / "ranks"):
        assert rank["equal"] < 1e-6
        assert rank["seconds"] > 0
        assert "differ by" in rank["another weight on rank 1"]
        assert "differ by inf" in rank["nan on rank 1"]
        said, versions = rank["given up"]
        assert "differ by" in said
        assert versions == [4]
        assert "needs weights of version 3, the engine reports 2" in rank["another version"]


def test_verification_that_an_engine_has_not_is_refused():
    engine, config = SimpleNamespace(shares_weights=False), BridgeConfig(verify="golden")
    with pytest.raises(UsageError, match='"golden" needs vLLM in the training processes'):
        _in_process(None, engine, config)  # type: ignore[arg-type]
    # Nothing is pushed into an engine that samples from the actor's weights, so that nothing is to be verified.
    assert _in_process(None, SimpleNamespace(shares_weights=True), config) is None  # type: ignore[arg-type]
