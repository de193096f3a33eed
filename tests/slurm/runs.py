"""The smallest real training that a job can do, and the files that it needs."""

import json
import sys
from pathlib import Path

from megatron_riskpo.data.character_tokenizer import qwen2_tokenizer, train_character_model
from tests.slurm.cluster import Cluster, Job
from tests.tiny_models import make_tiny_qwen2

ROOT = Path(__file__).parents[2]
SCRIPTS = ROOT / "slurm"
STEPS = 4
CONFIG = """
[run]
name = "run"
steps = {steps}
seed = 7
timeout_s = 120
[model]
path = "{folder}/model"
[data]
train = "{folder}/questions.jsonl"
evaluation_size = 2
prompts_per_step = 4
max_prompt_tokens = 16
[rollout]
engine = "megatron"
group_size = 2
max_response_tokens = 4
[rewards]
grader = "{folder}/holding.py:grade"
gold_checks = 0
timeout_s = 300
[algorithm]
bundle_size = 2
quantile_source = "tracked"
[optimizer]
lr = 1e-3
[evaluation]
num_samples = 1
ks = [1]
[checkpoint]
every = 100
[logging]
tensorboard = false
"""
GRADER = '''
"""While there is a file `hold`, a run stays in its second step, and says so by a file `held`."""
import time
from pathlib import Path

def grade(response, expected_answer, fields):
    while Path("hold").exists() and '"step": 1,' in Path("runs/run/metrics.jsonl").read_text():
        Path("held").touch()
        time.sleep(0.05)
    return float(len(response) % 2)
'''
ENV = """
. "$RISKPO_SLURM/env.sh"
RISKPO=({riskpo})
CONVERT_OPTIONS=(--ntasks=1 --time=10)
EVALUATE_OPTIONS=(--ntasks=1 --time=10)
PREFLIGHT=()
# Both nodes are this machine.
export MASTER_ADDR=127.0.0.1 GLOO_SOCKET_IFNAME=lo
server_host() {{ echo 127.0.0.1; }}
"""


def write_files(folder: Path) -> None:
    """Model, questions, grader and configuration (run.toml)."""
    train_character_model(["0123456789 + - ="] * 20, folder / "tokenizer.model")
    tokenizer = qwen2_tokenizer(folder / "tokenizer.model")
    make_tiny_qwen2(folder / "model", tied=True, seed=0, vocab_size=len(tokenizer))
    tokenizer.save_pretrained(folder / "model")
    lines = [{"problem": f"{i} + {i + 3} =", "expected_answer": str(2 * i + 3)} for i in range(60)]
    (folder / "questions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "holding.py").write_text(GRADER)
    (folder / "run.toml").write_text(CONFIG.format(folder=folder, steps=STEPS))


def use_environment(cluster: Cluster, folder: Path, riskpo: str = f'"{sys.executable}" -m megatron_riskpo.cli') -> None:
    """Have jobs run this checkout, or the stand-in `riskpo`."""
    (folder / "env.sh").write_text(ENV.format(riskpo=riskpo))
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        cluster.environment.pop(name, None)
    cluster.environment |= {
        "RISKPO_ENV": str(folder / "env.sh"), "RISKPO_SLURM": str(SCRIPTS), "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
    }  # fmt: skip


def phase(job: Job) -> str:
    """By its state file; empty while there is none."""
    file = job.logs / "state.json"
    return json.loads(file.read_text())["phase"] if file.exists() else ""


def log(job: Job, attempt: int, name: str = "training_0") -> str:
    return (job.logs / f"attempt_{attempt}" / f"{name}.log").read_text()
