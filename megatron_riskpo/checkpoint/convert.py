"""Conversion of whole checkpoints: every process takes a share of the parameters and writes files of its own, the
first one the index; the folder appears when all is on the disk."""

import errno
import shutil
from collections.abc import Callable, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, TypeVar

import torch

from megatron_riskpo.checkpoint.copy import Copy, run_copies
from megatron_riskpo.checkpoint.from_hf import megatron_slices
from megatron_riskpo.checkpoint.hf_folder import HfReader, write_config
from megatron_riskpo.checkpoint.manifest import partial_of, sync_folder, sync_to_disk
from megatron_riskpo.checkpoint.safetensors_writer import Shard, ShardWriter, name_shards
from megatron_riskpo.checkpoint.team import Team
from megatron_riskpo.checkpoint.to_hf import MegatronWeights
from megatron_riskpo.checkpoint.torch_dist_writer import Contents, TorchDistWriter, write_index
from megatron_riskpo.errors import RunError, UsageError

T = TypeVar("T")


def write_megatron(
    team: Team, source: Path, hf_config: dict[str, Any], target: Path, dtype: torch.dtype | None,
    add_files: Callable[[Path], None],
) -> None:  # fmt: skip
    """`source`, a folder that has been checked, as torch_dist. Collective; raises UsageError and RunError."""
    slices = team.each(lambda: list(megatron_slices(HfReader(source), hf_config)))
    sizes = [slice_.rows.num_bytes * (dtype or slice_.rows.dtype).itemsize // slice_.rows.dtype.itemsize
             for slice_ in slices]  # fmt: skip

    def write(folder: Path) -> Contents:
        writer, copies = TorchDistWriter(folder, team.rank), []
        for slice_ in share(slices, sizes, team):
            kept = dtype or slice_.rows.dtype
            place = writer.reserve(slice_.key, slice_.at, slice_.counts, kept, slice_.rows.shape)
            copies.append(Copy(slice_.rows, kept, *place))
            if slice_.has_empty_object:
                writer.add_empty_object(slice_.key.removesuffix("weight") + "_extra_state", slice_.at, slice_.counts)
        writer.flush()
        run_copies(copies)
        writer.sync()
        return writer.contents

    def finish(folder: Path, parts: Sequence[Contents]) -> None:
        write_index(folder, parts)
        add_files(folder)

    _build(team, target, sum(sizes), write, finish)


def write_hf(
    team: Team, weights: MegatronWeights, hf_config: dict[str, Any], target: Path, dtype: torch.dtype | None,
    add_files: Callable[[Path], None],
) -> None:  # fmt: skip
    """A Megatron checkpoint as a Hugging Face folder. Collective; raises UsageError and RunError."""
    if dtype is None and len(weights.dtypes) > 1:
        raise UsageError(f"the checkpoint holds {' and '.join(map(str, weights.dtypes))}; choose one by --dtype")
    kept = dtype or weights.dtypes[0]
    sizes = [parameter.num_bytes * kept.itemsize // parameter.dtype.itemsize for parameter in weights.parameters]

    def write(folder: Path) -> list[Shard]:
        writer = ShardWriter(folder, team.rank)
        tensors = [rows for parameter in share(weights.parameters, sizes, team) for rows in weights.tensors(parameter)]
        run_copies([Copy(rows, kept, *writer.reserve(rows.name, kept, rows.shape)) for rows in tensors])
        return writer.finish()

    def finish(folder: Path, parts: Sequence[list[Shard]]) -> None:
        name_shards([shard for part in parts for shard in part])
        write_config(folder, hf_config, kept)
        add_files(folder)

    _build(team, target, sum(sizes), write, finish)


def share(items: Sequence[T], sizes: Sequence[int], team: Team) -> list[T]:
    """This process's items: neighbours, so that files keep the order, and about as many bytes as any other's."""
    ends = list(accumulate(sizes))
    whole = max(1, ends[-1] if ends else 1)
    # By its middle: an item belongs to the process within whose bytes most of it lies.
    owners = [(2 * end - size) * team.size // (2 * whole) for end, size in zip(ends, sizes, strict=True)]
    return [item for item, owner in zip(items, owners, strict=True) if min(owner, team.size - 1) == team.rank]


def _build(
    team: Team, target: Path, num_bytes: int, write: Callable[[Path], T], finish: Callable[[Path, Sequence[T]], None]
) -> None:
    """The folder `target`, with what every process writes and the first one adds; whole, or not there."""
    building = partial_of(target)
    try:
        team.first(lambda: _begin(building, target, num_bytes))
        parts = team.gather(lambda: _writing(target, lambda: _on_shared_disk(building, write)))
        team.first(lambda: _writing(target, lambda: _publish(building, target, lambda: finish(building, parts))))
    except BaseException:
        # Half a model may be what fills the disk.
        if team.rank == 0:
            shutil.rmtree(building, ignore_errors=True)
        raise


def _begin(building: Path, target: Path, num_bytes: int) -> None:
    try:
        if building.exists():
            shutil.rmtree(building)
        building.mkdir(parents=True)
    except OSError as error:
        raise UsageError(f"OUT = {target} cannot be made ({error.strerror}: {error.filename}); "
                         "name another folder") from error  # fmt: skip
    free = shutil.disk_usage(building).free
    if free < num_bytes:
        raise UsageError(f"OUT = {target} takes {num_bytes / 1e9:.3g} GB, {free / 1e9:.3g} are free there; free space, "
                         "or name a folder on another disk")  # fmt: skip


def _on_shared_disk(building: Path, write: Callable[[Path], T]) -> T:
    if not building.is_dir():
        raise UsageError(f"{building} is not seen by every rank; name a folder on a disk that all machines share")
    return write(building)


def _publish(building: Path, target: Path, finish: Callable[[], None]) -> None:
    finish()
    sync_folder(building)
    building.rename(target)
    sync_to_disk(target.absolute().parent)


def _writing(target: Path, work: Callable[[], T]) -> T:
    try:
        return work()
    except OSError as error:
        where = error.filename or target
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise RunError(f"no space left on device while writing {where}; free space, or name a folder on another "
                           "disk") from error  # fmt: skip
        raise RunError(f"{where}: {error.strerror or error}; {target} was not made") from error
