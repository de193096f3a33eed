"""Weights into a running vLLM engine: the driver's side and the worker's side.

The route is vLLM 0.32's layerwise reload. On the CPU it is the only right one: Linear weights are packed into oneDNN
handlers and the parameters are emptied, so that a plain `model.load_weights` fails half-way.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from megatron_riskpo.errors import RunError, UsageError
from megatron_riskpo.resharding.buckets import NamedTensor
from megatron_riskpo.resharding.shard_sink import VllmShardSink

if TYPE_CHECKING:
    from vllm import LLM

Shapes = dict[str, tuple[int, ...]]


def weight_files(model_dir: str | Path) -> list[Path]:
    """The folder's *.safetensors; UsageError where it is no model."""
    files = sorted(Path(model_dir).glob("*.safetensors"))
    if not files or not (Path(model_dir) / "config.json").is_file():
        raise UsageError(
            f"model.path = {str(model_dir)!r} has no config.json with *.safetensors ({len(files)} of these); "
            "give a Hugging Face model folder"
        )
    return files


def checkpoint_shapes(model_dir: str | Path) -> Shapes:
    """Names and shapes in the folder's *.safetensors headers: what a complete push brings.

    With tied embeddings `lm_head.weight` is not a weight of its own and left out, as are rotary tables.
    """
    from safetensors import safe_open
    from transformers import AutoConfig

    shapes: Shapes = {}
    for file in weight_files(model_dir):
        with safe_open(file, framework="pt") as tensors:
            shapes.update({name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()})  # noqa: SIM118
    if AutoConfig.from_pretrained(model_dir).get_text_config().tie_word_embeddings:
        shapes.pop("lm_head.weight", None)
    return {name: shape for name, shape in shapes.items() if not name.endswith("rotary_emb.inv_freq")}


def checked(weights: Iterable[NamedTensor], shapes: Shapes) -> Iterator[NamedTensor]:
    """Pass the weights through; RunError on a name that is unknown, repeated, of another shape, or missing at the end.

    vLLM itself ignores a missing tensor (the old values stay).
    """
    missing = dict(shapes)
    for name, tensor in weights:
        if name not in missing:
            what = "came twice" if name in shapes else f"is none of the {len(shapes)} weights of the model"
            raise RunError(f"weight {name!r} {what}; the weight map and model.path do not fit together")
        shape = missing.pop(name)
        if tuple(tensor.shape) != shape:
            raise RunError(f"weight {name!r} has shape {tuple(tensor.shape)}, the engine's model has {shape}")
        yield name, tensor
    if missing:
        raise RunError(f"{len(missing)} of {len(shapes)} weights did not come, the first is {min(missing)!r}")


def drop_cached_prefixes(llm: "LLM") -> None:
    """They were computed with the weights before; RunError while requests are running."""
    if not llm.reset_prefix_cache():
        raise RunError("vLLM kept its cached prefixes because requests are running; push between generate calls only")


class WeightSink:
    """Mixed into vLLM's worker class (`worker_extension_cls`); the methods run in the worker."""

    model_runner: Any
    model_config: Any
    vllm_config: Any
    _riskpo_weight_version = -1

    def riskpo_begin_update(self) -> None:
        from vllm.config import set_current_vllm_config

        self._riskpo_weight_version = -1
        with set_current_vllm_config(self.vllm_config):
            begin_update(self.model_runner.get_model())

    def riskpo_finish_update(self, version: int) -> None:
        from vllm.config import set_current_vllm_config

        with set_current_vllm_config(self.vllm_config):
            finish_update(self.model_runner.get_model(), self.model_config)
        self._riskpo_weight_version = version

    def riskpo_shard_sink(self, expected: dict[str, int]) -> VllmShardSink:
        """For an engine in this process: takes slices of the worker's own shard (`expected` as VllmShardSink's)."""
        return VllmShardSink(self, expected)

    def riskpo_get_version(self) -> int:
        return self._riskpo_weight_version


def begin_update(model: nn.Module) -> None:
    """Prepare a model for new weights; then `model.load_weights` for each bucket, then `finish_update`. All three in
    the worker, inside `set_current_vllm_config`."""
    from vllm.model_executor.model_loader.reload import initialize_layerwise_reload

    _forget_expert_kernels(model)
    initialize_layerwise_reload(model)


def finish_update(model: nn.Module, model_config: Any) -> None:
    """The weights are complete: bring them into the form that vLLM computes with."""
    from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

    finalize_layerwise_reload(model, model_config)
    _repack_embeddings(model)


def _on_cpu() -> bool:
    from vllm.platforms import current_platform

    return current_platform.is_cpu()


def _forget_expert_kernels(model: nn.Module) -> None:
    """vLLM 0.32 on the CPU: experts are packed only when their kernel is made. A reload keeps the kernel, and leaves
    weights in it that are not packed: other numbers, without an error. Without a kernel both are made anew."""
    if not _on_cpu():
        return
    for module in model.modules():
        method = getattr(module, "quant_method", None)
        if getattr(method, "moe_kernel", None) is not None:
            method.moe_kernel = None


def _repack_embeddings(model: nn.Module) -> None:
    """vLLM 0.32 on the CPU: a tied output layer shares the embedding's parameter but keeps its own packed copy of
    it, which a layerwise reload leaves at the old values. Packing again is the same step as after loading."""
    from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

    if not _on_cpu():
        return
    for module in model.modules():
        if isinstance(module, VocabParallelEmbedding) and hasattr(module, "cpu_linear"):
            module.quant_method.process_weights_after_loading(module)
