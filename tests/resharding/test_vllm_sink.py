"""Pushes into a real vLLM engine on the CPU, judged by transformers on the pushed checkpoint."""

import importlib.util
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_riskpo.errors import RunError, UsageError
from megatron_riskpo.resharding.vllm_sink import WeightSink, checked, checkpoint_shapes
from megatron_riskpo.rollout.types import SamplingConfig
from tests.tiny_models import load_hf, make_tiny, make_tiny_qwen2
from tests.vllm_engines import max_difference, push_folder, single_rank, vllm_engine

needs_vllm = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")

SAMPLING = SamplingConfig(group_size=4, max_response_tokens=16, temperature=1.0, stop_token_ids=())
PROMPTS, SEEDS = [[5, 6, 7], [9, 10, 11, 12, 13]], [0, 1]


MODELS = [
    ("qwen2", True),
    ("qwen2", False),
    ("qwen3", True),
    ("llama", False),
    ("qwen3_moe", False),
    ("mixtral", False),
]


@pytest.fixture(scope="module", params=MODELS, ids=lambda model: model[0] + " tied" * model[1])
def folders(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Checkpoints a and b of one shape."""
    folder, (family, tied) = tmp_path_factory.mktemp("models"), request.param
    return {name: make_tiny(folder / name, family, tied=tied, seed=seed) for seed, name in enumerate("ab")}


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


@needs_vllm
def test_after_each_push_vllm_is_the_pushed_model(folders, monkeypatch):
    models = {name: load_hf(folder) for name, folder in folders.items()}
    with single_rank(), vllm_engine(folders["a"], load_checkpoint=False) as engine:
        assert engine.weight_version == -1
        with pytest.raises(RunError, match="no weights yet"):
            engine.generate(PROMPTS, SAMPLING, SEEDS)
        for version, name in enumerate("aba"):
            push_folder(engine, folders[name], version)
            assert engine.weight_version == version
            rollouts = engine.generate(PROMPTS, SAMPLING, SEEDS)
            assert max_difference(rollouts, models[name], 1.0) <= 1e-5
        monkeypatch.setattr(WeightSink, "riskpo_get_version", lambda worker: 2)
        with pytest.raises(RunError, match=r"version 7 were pushed.*hold 2"):
            push_folder(engine, folders["b"], 7)
        with pytest.raises(RunError, match="half-updated"):
            engine.generate(PROMPTS, SAMPLING, SEEDS)


def die() -> None:
    raise OSError("the exporter died")


@needs_vllm
def test_a_broken_push_ends_the_engine(tmp_path):
    folder = make_tiny_qwen2(tmp_path, tied=True, seed=0, num_layers=1)
    with single_rank(), vllm_engine(folder) as engine:
        push_folder(engine, folder, 3)
        with pytest.raises(RunError, match="OSError: the exporter died"):
            push_folder(engine, folder, 4, spoil=die)
        assert engine.weight_version == 3
        for call in (
            lambda: engine.generate(PROMPTS, SAMPLING, SEEDS),
            lambda: engine.token_logprobs(PROMPTS),
            lambda: push_folder(engine, folder, 5),
        ):
            with pytest.raises(RunError, match=r"half-updated \(push of version 4"):
                call()


def test_names_and_shapes_of_a_push_are_checked(folders):
    weights = weights_of(folders["a"])
    shapes = checkpoint_shapes(folders["a"])
    assert dict(checked(weights.items(), shapes)) == weights
    first = next(iter(weights))
    for bad, message in [
        ([*weights.items(), (first, weights[first])], "came twice"),
        ([(first, torch.zeros(3))], r"shape \(3,\)"),
        ([("lm_head.bias", torch.zeros(3))], "none of the"),
        ([], f"{len(shapes)} of {len(shapes)}"),
        (list(weights.items())[1:], f"1 of {len(shapes)} weights did not come, the first is '{first}'"),
    ]:
        with pytest.raises(RunError, match=message):
            list(checked(bad, shapes))


@pytest.mark.parametrize("tied", [True, False])
def test_a_tied_output_layer_is_no_weight_of_its_own(tmp_path, tied):
    folder = make_tiny_qwen2(tmp_path, tied=tied, seed=0, num_layers=1)
    with_output_layer = weights_of(folder) | {"lm_head.weight": torch.zeros(96, 128)}
    save_file(with_output_layer, folder / "model.safetensors")
    assert set(with_output_layer) - set(checkpoint_shapes(folder)) == ({"lm_head.weight"} if tied else set())


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(UsageError, match=r"no config.json with \*.safetensors \(0"):
        checkpoint_shapes(tmp_path)
