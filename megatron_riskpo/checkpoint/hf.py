"""Hugging Face model folders: read this rank's part of the weights, write the whole model."""

import json
import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from megatron_riskpo.actor.model import PolicyModel, named_parameters
from megatron_riskpo.checkpoint.weight_map.base import Family, ModelShape, Rule, pad_vocab, padded_vocab_size
from megatron_riskpo.errors import UsageError

MAX_SHARD_BYTES = 5 * 10**9


class HfReader:
    """Slices of a folder's safetensors, without reading whole files."""

    def __init__(self, model_dir: str | Path) -> None:
        self.model_dir = Path(model_dir)
        files = sorted(self.model_dir.glob("*.safetensors"))
        if not files:
            raise UsageError(f"model.path: no *.safetensors in {self.model_dir}; save the model with safetensors")
        self._handles = [safe_open(str(file), framework="pt") for file in files]
        self._handle_of = {name: handle for handle in self._handles for name in handle.keys()}  # noqa: SIM118 (a handle is no dict)

    @property
    def names(self) -> set[str]:
        """All tensor names in the folder."""
        return set(self._handle_of)

    def num_rows(self, name: str) -> int:
        """Size of a tensor's first dimension."""
        return self._slice(name).get_shape()[0]

    def _slice(self, name: str) -> Any:
        if name not in self._handle_of:
            raise UsageError(f"{self.model_dir}: the safetensors hold no {name}; the folder and config.json disagree")
        return self._handle_of[name].get_slice(name)

    def read(self, name: str, shard_dim: int | None, rank: int, num_ranks: int, num_rows: int | None) -> Tensor:
        """The rank's piece of a tensor cut evenly along shard_dim; num_rows pads dimension 0 first (vocabulary)."""
        view = self._slice(name)
        if shard_dim is None:
            return view[:]
        size = view.get_shape()[shard_dim]
        piece = (num_rows or size) // num_ranks
        start = rank * piece
        rows = slice(min(start, size), min(start + piece, size))
        if shard_dim == 0:
            return pad_vocab(view[rows], piece)
        return view[:, rows]


@torch.no_grad()
def load_hf_weights(
    chunks: Sequence[PolicyModel], model_dir: str | Path, family: Family, shape: ModelShape, tp_rank: int, tp_size: int
) -> None:
    """Fill this rank's parameters from a Hugging Face folder.

    Raises UsageError for a missing tensor, a tensor that the family does not know, or another shape.
    """
    reader = HfReader(model_dir)
    rules = {rule.megatron: rule for rule in family.rules(shape)}
    if shape.tied_embeddings:
        # With pipeline stages a tied model keeps a copy of the embedding in its last stage.
        rules["output_layer.weight"] = rules["embedding.word_embeddings.weight"]
    _refuse_unknown(reader, rules.values(), shape)
    for name, parameter in named_parameters(chunks):
        rule = rules[name]
        num_rows = None
        if rule.is_vocab:
            _check_vocab(reader, rule.hf[0], shape)
            num_rows = padded_vocab_size(shape.vocab_size, tp_size)
        pieces = [reader.read(hf, rule.shard_dim, tp_rank, tp_size, num_rows) for hf in rule.hf]
        value = rule.fusion.fuse(pieces, shape)
        if value.shape != parameter.shape:
            raise UsageError(
                f"{model_dir}: {' + '.join(rule.hf)} give shape {list(value.shape)} on this rank, "
                f"config.json asks for {list(parameter.shape)}"
            )
        parameter.copy_(value)


def _check_vocab(reader: HfReader, name: str, shape: ModelShape) -> None:
    # Before it is padded: then it would fit any size.
    rows = reader.num_rows(name)
    if rows != shape.vocab_size:
        raise UsageError(
            f"{reader.model_dir}: {name} has {rows} rows, config.json says vocab_size = {shape.vocab_size}"
        )


def _refuse_unknown(reader: HfReader, rules: Iterable[Rule], shape: ModelShape) -> None:
    known = {name for rule in rules for name in rule.hf}
    if shape.tied_embeddings:
        known.add("lm_head.weight")  # some writers store the tied head again
    unknown = sorted(reader.names - known)
    if unknown:
        raise UsageError(f"{reader.model_dir}: {len(unknown)} tensors unknown to this model type, first {unknown[0]}")


class _ShardWriter:
    """Writes tensors into files of bounded size; memory holds one file's worth."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.pending: dict[str, Tensor] = {}
        self.pending_bytes = 0
        self.total_bytes = 0
        self.shards: list[list[str]] = []

    def add(self, name: str, tensor: Tensor) -> None:
        num_bytes = tensor.numel() * tensor.element_size()
        if self.pending and self.pending_bytes + num_bytes > MAX_SHARD_BYTES:
            self.flush()
        self.pending[name] = tensor.detach().to("cpu", copy=True).contiguous()
        self.pending_bytes += num_bytes
        self.total_bytes += num_bytes

    def flush(self) -> None:
        save_file(self.pending, self.folder / f"shard-{len(self.shards)}.safetensors", metadata={"format": "pt"})
        self.shards.append(list(self.pending))
        self.pending, self.pending_bytes = {}, 0

    def finish(self) -> None:
        """Give the files Hugging Face's names, and write the index when there are several."""
        self.flush()
        count = len(self.shards)
        weight_map = {}
        for i, names in enumerate(self.shards):
            file = "model.safetensors" if count == 1 else f"model-{i + 1:05d}-of-{count:05d}.safetensors"
            (self.folder / f"shard-{i}.safetensors").rename(self.folder / file)
            weight_map.update(dict.fromkeys(names, file))
        if count > 1:
            index = {"metadata": {"total_size": self.total_bytes}, "weight_map": weight_map}
            (self.folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))


def save_hf(
    target: str | Path, weights: Iterable[tuple[str, Tensor]], hf_config: dict[str, Any],
    add_files: Callable[[Path], None], is_writer: bool,
) -> None:  # fmt: skip
    """Write a Hugging Face folder: weights, config.json, and what `add_files(folder)` adds (tokenizer, ...).

    Every rank calls it (taking the weights is collective), the writer writes. The folder appears whole: it is
    built beside and renamed.
    """
    if not is_writer:
        for _ in weights:
            pass
        return
    target = Path(target)
    building = target.with_name(target.name + ".partial")
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir(parents=True)
    writer = _ShardWriter(building)
    dtypes = set()
    for name, tensor in weights:
        dtypes.add(str(tensor.dtype).removeprefix("torch."))
        writer.add(name, tensor)
    writer.finish()
    # One dtype throughout in what the actor trains; transformers and vLLM read it from here.
    (dtype,) = dtypes
    config = {**hf_config, "dtype": dtype}
    (building / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    add_files(building)
    if target.exists():
        shutil.rmtree(target)
    building.rename(target)
