"""One rank without the others: as many ranks as one likes, no memory, nothing left behind."""

import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megatron_riskpo.config import ActorConfig
from megatron_riskpo.config_io import read_model_config
from megatron_riskpo.planning.fake_world import fake_rank, without_memory
from megatron_riskpo.planning.live_bytes import LiveBytes
from megatron_riskpo.planning.model_size import count_parameters
from megatron_riskpo.planning.state_bytes import rank_state, stage_ranks

MODELS = Path(__file__).parents[2] / "examples" / "models"
PUBLISHED = {
    "Qwen2.5-1.5B-Instruct": 1_543_714_304,
    "DeepSeek-R1-Distill-Qwen-1.5B": 1_777_088_000,
    "Qwen2.5-7B": 7_615_616_512,
    "Qwen2.5-32B": 32_763_876_352,
    "Qwen3-30B-A3B": 30_532_122_624,
    "Qwen3-235B-A22B": 235_093_634_560,
    "Llama-3.3-70B-Instruct": 70_553_706_496,
}
"""Parameters as the models' pages on Hugging Face state them."""


@pytest.mark.parametrize("name", PUBLISHED)
def test_models_have_the_published_number_of_parameters(name: str) -> None:
    assert count_parameters(read_model_config(MODELS / name / "config.json")) == PUBLISHED[name]


def test_a_single_rank_holds_all_parameters() -> None:
    hf_config = read_model_config(MODELS / "Qwen2.5-1.5B-Instruct" / "config.json")
    state = rank_state(hf_config, ActorConfig(distributed_optimizer=False), torch.bfloat16, 0, 1)
    number = PUBLISHED["Qwen2.5-1.5B-Instruct"]
    assert state.num_parameters == number
    assert (state.parameters, state.gradients, state.main_weights) == (2 * number, 4 * number, 4 * number)
    assert state.moments == 8 * number


def test_ranks_of_a_job_add_up_to_the_model() -> None:
    """Tensor and pipeline parallelism share the parameters out; norms alone are on every tensor-parallel rank."""
    hf_config = read_model_config(MODELS / "Qwen2.5-32B" / "config.json")
    actor, world_size = ActorConfig(tp=8, pp=4, sequence_parallel=True), 64
    held = [rank_state(hf_config, actor, torch.bfloat16, rank, world_size) for rank in stage_ranks(actor, world_size)]
    norms = (2 * hf_config["num_hidden_layers"] + 1) * hf_config["hidden_size"]
    assert 8 * sum(state.num_parameters for state in held) == PUBLISHED["Qwen2.5-32B"] + 7 * norms


def test_the_rank_is_where_megatron_puts_it() -> None:
    with fake_rank(5, 8, ActorConfig(tp=2, pp=2)) as grid:
        assert (grid.rank, grid.tp.rank(), grid.dp.rank(), grid.pp.rank()) == (5, 1, 0, 1)
        assert (grid.tp.size(), grid.dp.size(), grid.pp.size()) == (2, 2, 2)
    assert not dist.is_initialized()


def test_a_process_with_ranks_of_its_own_is_not_misused() -> None:
    inside = fake_rank(0, 2, ActorConfig())
    with fake_rank(0, 2, ActorConfig()), pytest.raises(RuntimeError, match="no process group"), inside:
        pass
    assert not dist.is_initialized()


def test_live_bytes_follow_allocation_and_release() -> None:
    with without_memory():
        known = torch.empty(1000)
        with LiveBytes([known]) as live:
            a = torch.empty(2**20)
            b = a + 1
            view = known[:10]
            assert live.current == 2 * 2**22
            del a, view
            assert (live.current, live.peak) == (2**22, 2 * 2**22)
            del b
            assert live.current == 0


@pytest.mark.parametrize("rank", [0, 511])
def test_a_dry_run_of_512_ranks_is_quick_and_small(rank: int) -> None:
    """Qwen2.5-32B on 64 nodes; the limits are 60 s of CPU on 2 cores and 8 GB."""
    command = [
        *(sys.executable, "-m", "megatron_riskpo.cli", "plan", str(MODELS.parent / "qwen2.5_32b_8nodes.toml")),
        *("--gpus", "512", "--model", str(MODELS / "Qwen2.5-32B"), "--dry-run", "--rank", str(rank), "--json"),
        *("--actor.pp", "4", "--data.prompts_per_step", "1024"),
    ]
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stderr
    (found,) = json.loads(done.stdout)["ranks"]
    assert (found["rank"], found["stage"]) == (rank, 3 * (rank == 511))
    assert found["state"]["num_parameters"] > 10**9
    print(f"rank {rank}: {time.monotonic() - start:.0f} s, {after.ru_maxrss / 2**20:.2f} GiB")
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 60
    assert after.ru_maxrss < 8 * 2**20
