"""What one rank does in test_training_state: train, save, resume, fail. Imported by the ranks."""

import dataclasses
import errno
import os
import random
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from torch.distributed.checkpoint import FileSystemWriter

from megatron_riskpo.actor.actor import Actor
from megatron_riskpo.actor.optimizer import inner_optimizers
from megatron_riskpo.algorithms.config import PolicyLossConfig
from megatron_riskpo.algorithms.token_inputs import TokenInputs
from megatron_riskpo.checkpoint import writing
from megatron_riskpo.checkpoint.manifest import latest_complete, step_folders
from megatron_riskpo.checkpoint.retention import Retention
from megatron_riskpo.checkpoint.saver import CheckpointSaver
from megatron_riskpo.checkpoint.training_state import (
    agree_on_latest,
    load_checkpoint,
    load_rollouts,
    save_checkpoint,
    verified_checkpoint,
)
from megatron_riskpo.config import ActorConfig, OptimizerConfig
from megatron_riskpo.distributed.grid import build_grid
from megatron_riskpo.errors import RiskpoError
from tests.distributed.layout_cases import ragged_rollouts
from tests.distributed.ranks import release_groups

# The schedule depends on the number of optimizer steps, eps keeps AdamW's first steps well conditioned.
OPTIMIZER = OptimizerConfig(lr=1e-3, schedule="cosine", eps=1e-3)
NUM_STEPS = 10
STATE = {"step": 3, "stream": {"epoch": 1, "position": 17}, "tracker": [0.1, 1e-300, -2.5], "none": None}

LAYOUTS = {
    "tp2": ActorConfig(tp=2, micro_batch_tokens=100),
    "dp2": ActorConfig(micro_batch_tokens=100),
    "pp2": ActorConfig(pp=2, micro_batch_tokens=100),
    "tp2 plain optimizer": ActorConfig(tp=2, distributed_optimizer=False, micro_batch_tokens=100),
    "one": ActorConfig(micro_batch_tokens=100),
    "one bfloat16": ActorConfig(micro_batch_tokens=100),
    "one bfloat16, offloaded": ActorConfig(micro_batch_tokens=100, offload_optimizer=True),
    "pp2 deep": ActorConfig(pp=2, micro_batch_tokens=100),
    "pp2 vp2 deep": ActorConfig(pp=2, vp=2, micro_batch_tokens=100),
    "tp2 deep": ActorConfig(tp=2, micro_batch_tokens=100),
    "one deep": ActorConfig(micro_batch_tokens=100),
    "ep2 moe": ActorConfig(ep=2, micro_batch_tokens=100),
    "tp2 sp moe": ActorConfig(tp=2, sequence_parallel=True, micro_batch_tokens=100),
    "one moe": ActorConfig(micro_batch_tokens=100),
}


def make_actor(layout: str, model_dir: Path, seed: int) -> Actor:
    dtype = torch.bfloat16 if "bfloat16" in layout else torch.float32
    config = LAYOUTS[layout]
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    for kind in ("moe", "deep"):
        if kind in layout:
            model_dir = model_dir.with_name(f"{kind}_{model_dir.name}")
    return Actor.from_hf(model_dir, config, OPTIMIZER, dtype, build_grid(config, seed))


def train(actor: Actor, steps: range) -> dict[str, Any]:
    """Updates on rollouts that depend on the step only; everything that they change."""
    metrics = []
    for step in steps:
        rollouts, advantages, _ = ragged_rollouts(4, seed=step)
        metrics.append(
            actor.update(rollouts, advantages, TokenInputs(), PolicyLossConfig(), 0.8, 40, NUM_STEPS).metrics
        )
    weights = {name: tensor.clone() for name, tensor in actor.export_weights()}
    return {"metrics": metrics, "weights": weights, "optimizer": optimizer_state(actor), "draws": draw()}


def optimizer_state(actor: Actor) -> list[dict[str, torch.Tensor]]:
    """AdamW's state of this rank's parameters, in order, with the main weights."""
    with actor.optimizer_state():
        return [
            {"main": p.detach().clone(), **{key: value.clone() for key, value in inner.optimizer.state[p].items()}}
            for inner in inner_optimizers(actor.optimizer)
            for p in inner.get_parameters()
        ]


def draw() -> list[Any]:
    """Numbers from every generator of this rank."""
    with get_cuda_rng_tracker().fork():
        megatron = torch.rand(3).tolist()
    return [torch.rand(3).tolist(), megatron, random.random(), random.gauss(0, 1), *np.random.normal(size=3).tolist()]


def round_trip(layout: str, folder: Path) -> dict[str, Any]:
    """Steps 0 to 2, save, steps 3 and 4; and steps 3 and 4 again from a fresh actor with other weights."""
    actor = make_actor(layout, folder.parent / "model", seed=1)
    saved = train(actor, range(3))["weights"]
    checkpoints = folder.parent / "saved" / layout
    start = time.perf_counter()
    rollouts = {"4": {"tokens": torch.arange(3) + actor.grid.rank}}
    path = save_checkpoint(checkpoints, 3, actor, STATE, {}, Retention(keep=2), rollouts=rollouts)
    save_s = time.perf_counter() - start
    expected = train(actor, range(3, 5))
    fresh = make_actor(layout, folder.parent / "other_model", seed=2)
    start = time.perf_counter()
    checkpoint = verified_checkpoint(path, fresh.grid.world)
    state = load_checkpoint(checkpoint, fresh)
    load_s = time.perf_counter() - start
    found = train(fresh, range(3, 5))
    under_way = load_rollouts(checkpoint, fresh)["4"]["tokens"].tolist()
    return {
        "saved": saved, "expected": expected, "found": found, "state": state, "seconds": (save_s, load_s),
        "under way": under_way,
    }  # fmt: skip


def across(saved: str, loaded: str, folder: Path) -> dict[str, Any]:
    """Load what another layout saved: the weights, and what the next two steps give."""
    actor = make_actor(loaded, folder.parent / "other_model", seed=2)
    checkpoint = verified_checkpoint(folder.parent / "saved" / saved / "step_3", actor.grid.world)
    load_checkpoint(checkpoint, actor)
    assert load_rollouts(checkpoint, actor) == {}, "of other ranks' shares"
    weights = {name: tensor.clone() for name, tensor in actor.export_weights()}
    return {"weights": weights, "num_optimizer_steps": actor.num_optimizer_steps, "next": train(actor, range(3, 5))}


def error_of(work: Callable[[], Any]) -> tuple[str, str]:
    try:
        work()
    except RiskpoError as error:
        return type(error).__name__, str(error)
    return "", "no error"


def failing_saves(folder: Path) -> dict[str, Any]:
    """The disk is full on one of two ranks, at three places of a save; and what the job script is told."""
    actor = make_actor("tp2", folder.parent / "model", seed=1)
    checkpoints, progress = folder.parent / "full", folder.parent / "progress"
    save_checkpoint(checkpoints, 1, actor, STATE, {}, Retention(keep=2))
    no_space = mock.Mock(side_effect=OSError(errno.ENOSPC, "No space left on device"))
    places = {
        "shards": (1, FileSystemWriter, "write_data"),
        "common": (0, writing, "write_common"),
        "rng": (1, writing, "sync_to_disk"),
        "manifest": (0, writing, "write_manifest"),
    }
    results = {}
    for name, (rank, owner, attribute) in places.items():
        with mock.patch.object(owner, attribute, no_space if dist.get_rank() == rank else getattr(owner, attribute)):
            error = error_of(lambda: save_checkpoint(checkpoints, 2, actor, STATE, {}, Retention(keep=2)))
        names = sorted(path.name for path in checkpoints.iterdir())
        results[name] = error, names, latest_complete(checkpoints)
        dist.barrier()
    with mock.patch.dict(os.environ, RISKPO_PROGRESS_FILE=str(progress)):
        with mock.patch.object(writing, "write_manifest", no_space):
            error_of(lambda: save_checkpoint(checkpoints, 2, actor, STATE, {}, Retention(keep=2)))
        told = [progress.exists()]
        dist.barrier()
        save_checkpoint(checkpoints, 2, actor, STATE, {}, Retention(keep=2))
    return results | {"after": latest_complete(checkpoints), "told": [*told, progress.exists()]}


def agreement(folder: Path) -> dict[str, Any]:
    """Retention; then a flipped byte in the newest checkpoint, and one load of it all the same."""
    actor = make_actor("dp2", folder.parent / "model", seed=1)
    checkpoints = folder.parent / "kept"
    nothing = agree_on_latest(checkpoints, actor.grid.world)
    for step in (1, 2, 10):
        save_checkpoint(checkpoints, step, actor, STATE, {}, Retention(keep=2))
    kept = [path.name for path in step_folders(checkpoints)]
    if dist.get_rank() == 0:
        flip_byte(next((checkpoints / "step_10" / "megatron").glob("*.distcp")))
    dist.barrier()
    used = agree_on_latest(checkpoints, actor.grid.world).path
    error = error_of(lambda: verified_checkpoint(checkpoints / "step_10", actor.grid.world))
    save_checkpoint(checkpoints, 10, actor, STATE, {}, Retention(keep=2))
    return {"nothing": nothing, "kept": kept, "used": used, "error": error,
            "replaced": agree_on_latest(checkpoints, actor.grid.world).path,
            "named": (checkpoints / "latest").read_text()}  # fmt: skip


def retention(folder: Path) -> list[list[str]]:
    """Which checkpoints there are after each save."""
    actor = make_actor("one", folder.parent / "model", seed=1)
    checkpoints = folder.parent / "retained" / "checkpoints"
    rules = Retention(keep=1, keep_every=4, keep_best="eval/heldout/pass@1")
    kept = []
    for step, metrics in ((2, {"eval/heldout/pass@1": 0.5}), (3, {"eval/heldout/pass@1": 0.25}), (4, {}), (6, None)):
        save_checkpoint(checkpoints, step, actor, STATE, {}, rules, metrics)
        kept.append([path.name for path in step_folders(checkpoints)])
    return kept


def flip_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def real_limits(folder: Path) -> dict[str, Any]:
    """The system's own refusals: a limit on file sizes, and (where the test could mount one) a full file system; of
    saves at once and in the background."""
    actor = make_actor("one", folder.parent / "model", seed=1)
    results = {}
    limited, mounted = folder.parent / "limited", folder.parent / "small_disk"
    save_checkpoint(limited, 1, actor, STATE, {}, Retention(keep=2))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))
    results["limited"] = refused_saves(limited, actor)
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    if mounted.is_dir():
        save_checkpoint(mounted, 1, actor, STATE, {}, Retention(keep=2))
        results["mounted"] = refused_saves(mounted, actor)
    return results


def refused_saves(checkpoints: Path, actor: Actor) -> list[tuple[Any, ...]]:
    """The error of each way to save, where it is raised, and what stands afterwards."""
    results = []
    for asynchronous in (False, True):
        saver = CheckpointSaver(checkpoints, Retention(), {}, actor.grid, asynchronous=asynchronous, timeout_s=60)
        of_save = error_of(lambda saver=saver: saver.save(2, actor, STATE, {}))
        error = error_of(saver.wait) if asynchronous else of_save
        names = sorted(path.name for path in checkpoints.iterdir() if path.name != "latest")
        results.append((error, names, latest_complete(checkpoints)))
    return results


def unfit(folder: Path) -> dict[str, Any]:
    """Checkpoints of another model, and of another kind of optimizer."""
    saved = folder.parent / "saved"
    narrow = make_actor("one", folder.parent / "narrow_model", seed=1)
    one, plain = (
        verified_checkpoint(saved / name / "step_3", narrow.grid.world) for name in ("one", "tp2 plain optimizer")
    )
    errors = {"model": error_of(lambda: load_checkpoint(one, narrow))}
    actor = make_actor("one", folder.parent / "model", seed=1)
    errors["optimizer"] = error_of(lambda: load_checkpoint(plain, actor))
    return errors


def other_hyperparameters(folder: Path) -> dict[str, list[tuple[Any, ...]]]:
    """What the optimizers go by after the load of a checkpoint that was made under others."""
    found = {}
    optimizer = dataclasses.replace(OPTIMIZER, beta1=0.5, beta2=0.75, eps=1e-2, weight_decay=0.25)
    for layout in ("one", "one bfloat16"):
        dtype = torch.bfloat16 if "bfloat16" in layout else torch.float32
        grid = build_grid(LAYOUTS[layout], seed=1)
        actor = Actor.from_hf(folder.parent / "model", LAYOUTS[layout], optimizer, dtype, grid)
        load_checkpoint(verified_checkpoint(folder.parent / "saved" / layout / "step_3", grid.world), actor)
        groups = actor.optimizer.param_groups
        found[layout] = [(*group["betas"], group["eps"], group["weight_decay"]) for group in groups]
    return found


def alone(case: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
    """The case's result; its process groups are taken down."""
    result = case(*arguments)
    release_groups()
    return result


def run_two(folder: Path) -> dict[str, Any]:
    saved = ("tp2", "dp2", "tp2 plain optimizer", "pp2 deep", "pp2 vp2 deep", "ep2 moe")
    crossings = (
        *(("tp2", "dp2"), ("tp2", "pp2"), ("pp2 deep", "pp2 vp2 deep"), ("pp2 vp2 deep", "tp2 deep")),
        ("ep2 moe", "tp2 sp moe"),
    )
    return {
        **{name: alone(round_trip, name, folder) for name in saved},
        **{crossing: alone(across, *crossing, folder) for crossing in crossings},
        "failing": failing_saves(folder),
        "agreement": agreement(folder),
    }


def run_one(folder: Path) -> dict[str, Any]:
    crossings = (("tp2", "one"), ("dp2", "one"), ("pp2 vp2 deep", "one deep"), ("ep2 moe", "one moe"))
    return {
        **{name: alone(round_trip, name, folder) for name in ("one", "one bfloat16", "one bfloat16, offloaded")},
        **{crossing: alone(across, *crossing, folder) for crossing in crossings},
        "limits": real_limits(folder),
        "unfit": unfit(folder),
        "hyperparameters": other_hyperparameters(folder),
        "retention": retention(folder),
    }
