"""What one rank does in test_saver: saves in the background that are held, fail, or take too long. Imported by the
ranks."""

import errno
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch.distributed.checkpoint import FileSystemWriter

from megatron_riskpo.actor.actor import Actor
from megatron_riskpo.checkpoint import saver as saver_module
from megatron_riskpo.checkpoint import training_state, writing
from megatron_riskpo.checkpoint.manifest import latest_complete, step_folders
from megatron_riskpo.checkpoint.retention import Retention
from megatron_riskpo.checkpoint.saver import CheckpointSaver
from megatron_riskpo.checkpoint.training_state import load_checkpoint, verified_checkpoint
from tests.checkpoint.cases import STATE, alone, error_of, flip_byte, make_actor, train

WAYS = ("synchronous", "asynchronous")
CONFIG = {"run": {"seed": 1}}


def make_saver(folder: Path, actor: Actor, *, asynchronous: bool = True, timeout_s: float = 60.0) -> CheckpointSaver:
    return CheckpointSaver(folder, Retention(), CONFIG, actor.grid, asynchronous=asynchronous, timeout_s=timeout_s)


@contextmanager
def held_writers() -> Iterator[threading.Event]:
    """Threads begin to write only once the event is set."""
    release, write = threading.Event(), writing.write_checkpoint

    def hold(*arguments: Any) -> Path:
        release.wait()
        return write(*arguments)

    with mock.patch.object(saver_module, "write_checkpoint", hold):
        yield release


def while_training(layout: str, folder: Path) -> dict[str, Any]:
    """The same state saved at once and in the background, there only after two more steps; then resumed."""
    actor = make_actor(layout, folder.parent / "model", seed=1)
    train(actor, range(3))
    at_once, later = folder.parent / layout / "at_once", folder.parent / layout / "later"
    make_saver(at_once, actor, asynchronous=False).save(3, actor, STATE, {"eval/x": 0.5})
    saver = make_saver(later, actor)
    with held_writers() as release:
        saver.save(3, actor, STATE, {"eval/x": 0.5})
        saver.check()
        expected = train(actor, range(3, 5))
        before = step_folders(later)
        dist.barrier()
        release.set()
        saver.wait()
    fresh = make_actor(layout, folder.parent / "other_model", seed=2)
    state = load_checkpoint(verified_checkpoint(later / "step_3", fresh.grid.world), fresh)
    return {"before": before, "expected": expected, "found": train(fresh, range(3, 5)), "state": state}


def second_save(folder: Path) -> dict[str, Any]:
    """A save while another one is held: it begins when that has ended."""
    actor = make_actor("tp2", folder.parent / "model", seed=1)
    checkpoints = folder.parent / "second"
    saver = make_saver(checkpoints, actor)
    with held_writers() as release:
        saver.save(1, actor, STATE, {})
        timer = threading.Timer(0.5, release.set)
        timer.start()
        saver.save(2, actor, STATE, {})
        between = [path.name for path in step_folders(checkpoints) if (path / "manifest.json").is_file()]
        saver.close()
    return {"between": between, "after": [path.name for path in step_folders(checkpoints)]}


def failures(folder: Path) -> dict[str, Any]:
    """In the background, on one of two ranks: the disk is full, something unforeseen, a write that hangs."""
    actor = make_actor("tp2", folder.parent / "model", seed=1)
    checkpoints = folder.parent / "failures"
    make_saver(checkpoints, actor, asynchronous=False).save(1, actor, STATE, {})
    is_second = dist.get_rank() == 1
    results = {}
    for name, error in (("full", OSError(errno.ENOSPC, "No space left on device")), ("odd", ValueError("odd\nlines"))):
        saver = make_saver(checkpoints, actor)
        broken = mock.Mock(side_effect=error) if is_second else FileSystemWriter.write_data
        with mock.patch.object(FileSystemWriter, "write_data", broken):
            saver.save(2, actor, STATE, {})
            results[name] = error_of(saver.wait), latest_complete(checkpoints)
        saver.check()
        dist.barrier()
    results["hung"] = hung_write(checkpoints, actor, is_second)
    return results


def hung_write(checkpoints: Path, actor: Actor, is_second: bool) -> tuple[tuple[str, str], Path | None]:
    """The other rank waits for the hung one in its thread; both are told at the same step."""
    saver, release, write = (
        make_saver(checkpoints, actor, timeout_s=5.0),
        threading.Event(),
        FileSystemWriter.write_data,
    )

    def hang(*arguments: Any) -> Any:
        release.wait()
        return write(*arguments)

    with mock.patch.object(FileSystemWriter, "write_data", hang if is_second else write):
        saver.save(2, actor, STATE, {})
        # Not yet too slow.
        saver.check()
        result = error_of(saver.wait), latest_complete(checkpoints)
        dist.barrier()
        release.set()
        # A process that ends before would end with exit code 1.
        for thread in threading.enumerate():
            if thread.name == "checkpoint":
                thread.join()
    return result


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


DAMAGES: dict[str, tuple[str, Callable[[Path], None]]] = {
    "truncated shard": ("megatron/__0_0.distcp", cut),
    "flipped byte": ("megatron/__1_0.distcp", flip_byte),
    "missing shard": ("megatron/__1_0.distcp", Path.unlink),
    "truncated index": ("megatron/.metadata", cut),
    "missing common file": ("megatron/common.pt", Path.unlink),
    "missing rank file": ("rng_1.pt", Path.unlink),
    "flipped byte in rollouts under way": ("rollouts_1.pt", flip_byte),
    "missing rollouts under way": ("rollouts_0.pt", Path.unlink),
    "missing manifest": ("manifest.json", Path.unlink),
    "truncated manifest": ("manifest.json", cut),
}
"""What is done to which file of the newest checkpoint."""


def corruptions(folder: Path, *, asynchronous: bool) -> dict[str, Any]:
    """Of each damage: what two ranks agree on, what is said, and the state that is loaded then.

    The step after is under way at each save."""
    actor = make_actor("tp2", folder.parent / "model", seed=1)
    place, results = folder.parent / f"corrupted_{asynchronous}", {}
    saver = make_saver(place / "original", actor, asynchronous=asynchronous)
    for step in (1, 2):
        saver.save(step, actor, STATE | {"step": step}, {}, {str(step + 1): torch.arange(9)})
    saver.wait()
    for name, (file, harm) in DAMAGES.items():
        copy = place / name
        if dist.get_rank() == 0:
            shutil.copytree(place / "original", copy)
            harm(copy / "step_2" / file)
        dist.barrier()
        with mock.patch.object(training_state, "log_damage") as said:
            agreed = training_state.agree_on_latest(copy, actor.grid.world)
        state = load_checkpoint(agreed, actor)
        results[name] = agreed.path, [call.args for call in said.call_args_list], state["step"]
    return results


def run(folder: Path) -> dict[str, Any]:
    layouts = ("dp2", "tp2 plain optimizer", "ep2 moe")
    return {
        **{layout: alone(while_training, layout, folder) for layout in layouts},
        "second": second_save(folder),
        "corrupted": {way: corruptions(folder, asynchronous=way == "asynchronous") for way in WAYS},
        "failures": failures(folder),
    }
