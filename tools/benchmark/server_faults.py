"""What a run does when one of its rollout servers fails: real servers of the model, one fault after the other.

    python tools/benchmark/server_faults.py runs/quickstart-base/hf [--transport file]

Prints a table: the seconds from the fault until the responses that were under way (or the push) are complete, what the
run said, and whether the tokens are those that it would have got without the fault. Through files there is one fault
more, a corrupted bucket: through shared memory there are no buckets.
"""

import argparse
import contextlib
import dataclasses
import os
import signal
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import psutil
import torch
import torch.distributed as dist

from megatron_riskpo.config import (
    ActorConfig,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    RolloutConfig,
    ServerConfig,
    TrainConfig,
)
from megatron_riskpo.distributed import cpu_backend
from megatron_riskpo.distributed.grid import RankGrid, build_grid
from megatron_riskpo.distributed.launch import RankEnv, init_process_group
from megatron_riskpo.distributed.runtime import quieten_libraries
from megatron_riskpo.errors import RunError
from megatron_riskpo.resharding import bucket_file
from megatron_riskpo.rollout import server_push
from megatron_riskpo.rollout.server_engine import ServerEngine
from megatron_riskpo.rollout.types import Rollouts, SamplingConfig

NUM_PROMPTS, PROMPT_TOKENS, MAX_RESPONSE_TOKENS, GROUP_SIZE = 16, 8, 48, 8
_REJOIN_S = 300.0
"""For a server that is started again, beside all else."""
SAMPLING = SamplingConfig(GROUP_SIZE, MAX_RESPONSE_TOKENS, temperature=1.0, stop_token_ids=())


@dataclasses.dataclass
class Outcome:
    """Of one fault."""

    fault: str
    seconds: float
    said: list[str]
    same_tokens: bool


class Bench:
    """An engine on two servers of its own, whose weights never change: each push brings a new version of the same."""

    def __init__(self, model: Path, folder: Path, server: ServerConfig, grid: RankGrid) -> None:
        # Megatron may only be imported once the CPU backend is in place.
        from megatron_riskpo.actor.actor import Actor
        from megatron_riskpo.resharding.actor_shards import ActorShards

        config = TrainConfig(
            model=ModelConfig(path=str(model)),
            data=DataConfig(max_prompt_tokens=PROMPT_TOKENS),
            rollout=RolloutConfig(placement="server", servers=2, max_response_tokens=MAX_RESPONSE_TOKENS),
            server=server,
        )
        self.lines: list[str] = []
        self._actor = Actor.from_hf(str(model), config.actor, OptimizerConfig(), torch.float32, grid)
        vocab_size = self._actor.shape.vocab_size
        self._prompts = [[2 + (i * 5 + j) % (vocab_size - 2) for j in range(PROMPT_TOKENS)] for i in range(NUM_PROMPTS)]
        self.engine = ServerEngine(
            config, vocab_size=vocab_size, world_group=grid.world, folder=folder, export=self._actor.export_weights,
            log=self.lines.append, shards=ActorShards.of(self._actor),
        )  # fmt: skip
        self.push()
        self.expected = self.generate()

    def push(self) -> None:
        """The next version."""
        self.engine.update_weights(self._actor.export_weights(), self.engine.weight_version + 1)

    def generate(self, fault: Callable[[], None] | None = None) -> Rollouts:
        """All responses; the fault comes while they are sampled."""
        pending = self.engine.submit(self._prompts, SAMPLING, range(NUM_PROMPTS))
        if fault is not None:
            while not any(response.reason for response in pending.responses):
                time.sleep(0.005)
            fault()
            if all(response.reason for response in pending.responses):
                raise RuntimeError("the responses were complete before the fault; sample more of them")
        return self.engine.collect(pending)

    def wait_for(self, num_servers: int) -> None:
        """Until so many servers are up and have the weights."""
        give_up = time.monotonic() + _REJOIN_S
        while len(self.engine.processes) < num_servers:
            if time.monotonic() > give_up:
                raise RunError(f"{len(self.engine.processes)} of {num_servers} servers are up after {_REJOIN_S:g} s")
            # Seldom: what is started shares the machine with what is asked.
            time.sleep(3.0)
            self.push()

    def measure(self, name: str, work: Callable[[], None]) -> Outcome:
        """One fault, with both servers there before and after."""
        self.wait_for(2)
        said, started = len(self.lines), time.monotonic()
        work()
        seconds = time.monotonic() - started
        tokens = self.generate().tokens
        self.wait_for(2)
        return Outcome(name, seconds, self.lines[said:], torch.equal(tokens, self.expected.tokens))

    def kill(self, number: signal.Signals, servers: slice) -> None:
        """Signal the processes of these servers (of a server that is stopped, its engine too)."""
        for process in list(self.engine.processes.values())[servers]:
            if number == signal.SIGSTOP:
                os.killpg(process.pid or 0, number)
            else:
                os.kill(process.pid or 0, number)

    def signal_engine(self, number: signal.Signals) -> None:
        """Kill the first server's engine, so that its HTTP process answers 500 until it ends, or stop it: then that one
        calls itself healthy."""
        process = next(iter(self.engine.processes.values()))
        for child in psutil.Process(process.pid).children(recursive=True):
            child.send_signal(number)

    def rename_weights(self) -> None:
        """Make a server say that it has other weights than were pushed."""
        url = next(iter(self.engine.processes))
        request = urllib.request.Request(
            f"{url}/update_weight_version", b'{"new_version": "99"}', {"Content-Type": "application/json"}
        )
        urllib.request.urlopen(request, timeout=30).close()


@contextlib.contextmanager
def corrupted_bucket() -> Iterator[None]:
    """One bit of the first bucket changes on its way."""
    num_written = 0

    def write(path: Path, bucket: bucket_file.Bucket) -> dict:
        nonlocal num_written
        record = bucket_file.write_bucket(path, bucket)
        num_written += 1
        if num_written == 1:
            with path.open("r+b") as file:
                first = file.read(1)[0]
                file.seek(0)
                file.write(bytes([first ^ 1]))
        return record

    with mock.patch.object(server_push, "write_bucket", write):
        yield


def faults(bench: Bench, *, with_buckets: bool) -> Iterator[Outcome]:
    """All that there can be."""
    first, both = slice(0, 1), slice(0, 2)

    def generate(fault: Callable[[], None]) -> Callable[[], None]:
        return lambda: bench.generate(fault) and None  # type: ignore[func-returns-value]

    def push_corrupted() -> None:
        with corrupted_bucket():
            bench.push()

    def push_to_stopped() -> None:
        bench.kill(signal.SIGSTOP, first)
        bench.push()

    yield bench.measure("no fault", lambda: bench.generate() and None)  # type: ignore[func-returns-value]
    yield bench.measure("one of two servers killed (SIGKILL)", generate(lambda: bench.kill(signal.SIGKILL, first)))
    yield bench.measure("one of two servers stopped (SIGSTOP)", generate(lambda: bench.kill(signal.SIGSTOP, first)))
    for number, what in ((signal.SIGKILL, "killed, so that it answers 500"), (signal.SIGSTOP, "stopped")):
        fault = generate(lambda number=number: bench.signal_engine(number))
        yield bench.measure(f"the engine of one {what}", fault)
    yield bench.measure("both servers killed", generate(lambda: bench.kill(signal.SIGKILL, both)))
    yield bench.measure("a server has weights of another version", generate(bench.rename_weights))
    yield bench.measure("a server stopped before a push", push_to_stopped)
    if with_buckets:
        yield bench.measure("a bucket corrupted on its way", push_corrupted)


@contextlib.contextmanager
def single_rank() -> Iterator[RankGrid]:
    """The groups of this process alone."""
    quieten_libraries()
    cpu_backend.install()
    init_process_group(RankEnv(0, 1, 0), _REJOIN_S, store=dist.HashStore())
    try:
        yield build_grid(ActorConfig(), 0, _REJOIN_S)
    finally:
        dist.destroy_process_group()


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model", type=Path, help="Hugging Face model folder with one model.safetensors")
    parser.add_argument("--health-timeout", type=float, default=10.0, help="server.health_timeout_s of the run")
    parser.add_argument("--transport", choices=("shared_memory", "file"), default="shared_memory")
    args = parser.parse_args(argv)
    server = ServerConfig(
        transport=args.transport, health_timeout_s=args.health_timeout, push_timeout_s=60.0, max_restarts=10
    )
    print(f"server.transport = {args.transport}, server.health_timeout_s = {args.health_timeout:g}\n")
    print("| fault | seconds | same tokens | said |\n|---|---|---|---|", flush=True)
    with single_rank() as grid, tempfile.TemporaryDirectory() as folder:
        bench = Bench(args.model, Path(folder), server, grid)
        try:
            for outcome in faults(bench, with_buckets=args.transport == "file"):
                said = "; ".join(outcome.said) or "nothing"
                print(f"| {outcome.fault} | {outcome.seconds:.1f} | {outcome.same_tokens} | {said} |", flush=True)
        except RunError as error:
            sys.exit(f"error: {error}")
        finally:
            bench.engine.close()


if __name__ == "__main__":
    main()
