"""Conversion holds a few blocks in memory, whatever the model: peak of the process's own memory in a subprocess.

Mapped files are not counted: the system takes those pages back when it needs them.
"""

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from megatron_riskpo.checkpoint.rows import BLOCK_BYTES
from megatron_riskpo.checkpoint.safetensors_writer import ShardWriter, name_shards
from megatron_riskpo.checkpoint.weight_map import family_of, shape_of
from megatron_riskpo.checkpoint.weight_map.shapes import hf_shapes
from tests.distributed.ranks import ROOT

pytestmark = pytest.mark.slow

CONFIG = {
    "model_type": "qwen2", "num_hidden_layers": 12, "hidden_size": 512, "intermediate_size": 2048, "dtype": "float32",
    "num_attention_heads": 8, "num_key_value_heads": 2, "vocab_size": 8192, "tie_word_embeddings": False,
}  # fmt: skip
"""204 MiB, the largest parameter 16 MiB."""


def write_random(folder: Path) -> tuple[int, int]:
    """Bytes of the whole, and of the largest parameter."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    writer, sizes = ShardWriter(folder), []
    for rule in family_of(CONFIG).rules(shape_of(CONFIG)):
        tensors = [torch.randn(shape) for shape in hf_shapes(rule, CONFIG)]
        sizes.append(sum(4 * tensor.numel() for tensor in tensors))
        for name, tensor in zip(rule.hf, tensors, strict=True):
            writer.add(name, tensor)
    name_shards(writer.finish())
    return sum(sizes), max(sizes)


def own_memory() -> int:
    """Bytes of this process that no file stands behind."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


def convert_and_measure(model: str, folder: str) -> None:
    """In the subprocess: there and back; prints the growth of its memory, in bytes, of either."""
    from megatron_riskpo.checkpoint.convert import write_hf, write_megatron
    from megatron_riskpo.checkpoint.team import Team
    from megatron_riskpo.checkpoint.to_hf import MegatronWeights

    folders = {name: Path(folder, name) for name in ("there", "back", "rounded")}
    growth, team = [], Team()

    def to_hf(target, dtype):
        write_hf(team, MegatronWeights(folders["there"], CONFIG), CONFIG, target, dtype, lambda _: None)

    for work in (
        lambda: write_megatron(team, Path(model), CONFIG, folders["there"], None, lambda _: None),
        lambda: to_hf(folders["back"], None),
        lambda: to_hf(folders["rounded"], torch.bfloat16),
    ):
        before, peak, done = own_memory(), [0], threading.Event()

        def watch(peak=peak, done=done):
            while not done.is_set():
                peak[0] = max(peak[0], own_memory())
                time.sleep(0.002)

        watcher = threading.Thread(target=watch)
        watcher.start()
        work()
        done.set()
        watcher.join()
        growth.append(peak[0] - before)
    print(json.dumps(growth))


def test_memory_does_not_follow_the_model(tmp_path):
    total, largest = write_random(tmp_path / "model")
    code = f"from {__name__} import convert_and_measure; import sys; convert_and_measure(*sys.argv[1:])"
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "model"), str(tmp_path)],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    growth = json.loads(done.stdout.splitlines()[-1])
    print(f"model {total / 2**20:.0f} MiB, largest {largest / 2**20:.0f} MiB, growth {[g / 2**20 for g in growth]} MiB")
    for folder in ("there", "back"):
        assert sum(file.stat().st_size for file in (tmp_path / folder).iterdir()) < 1.01 * total
    # Less than one large parameter; most of it is what is imported on the way.
    assert max(growth) < 16 * BLOCK_BYTES < total / 10
