"""riskpo plan --bridge: its figures are the plan's."""

import re

import pytest

from megatron_riskpo.cli import main
from megatron_riskpo.config import TrainConfig
from megatron_riskpo.config_io import load_config, load_model_config
from megatron_riskpo.resharding.plan import plan_rank
from megatron_riskpo.resharding.plan_text import planned_layout
from tests.tiny_models import make_tiny, make_tiny_qwen2


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plan")
    model = make_tiny_qwen2(folder / "model", tied=True, seed=0, num_layers=2)
    (folder / "run.toml").write_text(f'[model]\npath = "{model}"\n[actor]\ntp = 2\npp = 2\n[rollout]\ntp = 2\n')
    return folder / "run.toml"


def test_a_line_a_rank_with_its_bytes(config, capsys):
    assert main(["plan", "--bridge", "--gpus", "8", "--gpus-per-node", "4", str(config)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "actor: 8 ranks, tp 2, pp 2, vp 1, cp 1, ep 1, etp 1; rollout: 4 engines, tp 2"
    options = load_config(TrainConfig, config, [])
    layout = planned_layout(options, load_model_config(options.model.path), 8, 4)
    for rank, line in enumerate(lines[3:]):
        number, received, own, near, others, sent, peak, buckets, module = map(float, line.split())
        plan = plan_rank(layout, rank)
        assert number == rank
        assert received == pytest.approx(plan.num_bytes(plan.receives) / 2**20, abs=0.006)
        assert own + near + others == pytest.approx(received, abs=0.02)
        assert sent == pytest.approx(plan.num_bytes(plan.sends) / 2**20, abs=0.006)
        assert peak == pytest.approx(plan.peak_round_bytes / 2**20, abs=0.006)
        assert buckets == pytest.approx(plan.bucket_bytes / 2**20, abs=0.006)
        assert module == pytest.approx(plan.peak_open_bytes / 2**20, abs=0.006)
    assert len(lines) == 11


def test_servers_have_ranks_after_the_actors(config, capsys):
    own = ["--rollout.placement", "server", "--rollout.servers", "3", "--server.transport", "network"]
    assert main(["plan", "--bridge", "--gpus", "4", str(config), *own]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert " ".join(lines[0]).endswith("rollout: 3 engines, tp 2")
    received, sent = [float(line[1]) for line in lines[3:]], [float(line[5]) for line in lines[3:]]
    assert len(received) == 4 + 6
    assert (received[:4], sent[4:]) == ([0.0] * 4, [0.0] * 6)
    assert sum(received[4:]) == pytest.approx(sum(sent[:4]), abs=0.05)


def test_a_plan_that_gpus_do_not_follow_says_so(config, capsys):
    own = ["--gpus", "4", str(config), "--rollout.placement", "server"]
    for transport, is_said in (("auto", True), ("shared_memory", False)):
        assert main(["plan", "--bridge", *own, "--server.transport", transport]) == 0
        assert ("on GPUs through files" in capsys.readouterr().out.splitlines()[-1]) == is_said


def test_whole_experts_are_said_and_have_fewer_transfers(tmp_path, capsys):
    model = make_tiny(tmp_path / "model", "qwen3_moe", tied=False, seed=0)
    (tmp_path / "run.toml").write_text(f'[model]\npath = "{model}"\n[actor]\nep = 2\n[rollout]\ntp = 2\n')
    said = {}
    for whole in ("true", "false"):
        assert main(["plan", "--bridge", "--rank", "1", str(tmp_path / "run.toml"), "--gpus", "2",
                     "--rollout.expert_parallel", whole]) == 0  # fmt: skip
        said[whole] = capsys.readouterr().out
    num_experts, num_layers = 4, 2
    transfers = {whole: int(re.search(r"(\d+) transfers in", text)[1]) for whole, text in said.items()}
    assert transfers["false"] - transfers["true"] == num_layers * 3 * num_experts / 2
    own = "rank 1 decoder.layers.0.mlp.experts.local_experts.2.linear_fc1.weight"
    target = "rank 1 model.layers.0.mlp.experts.routed_experts.w13_weight[0]"
    assert f"{own} [0:48, 0:128] -> {target} [0:48, 0:128]" in said["true"]
    own_option = ["--rollout.expert_parallel", "true"]
    assert main(["plan", "--bridge", str(tmp_path / "run.toml"), "--gpus", "2", *own_option]) == 0
    assert "rollout: 1 engines, tp 2, expert-parallel\n" in capsys.readouterr().out


def test_the_transfers_of_a_rank(config, capsys):
    assert main(["plan", "--bridge", "--rank", "1", str(config)]) == 0
    out = capsys.readouterr().out
    assert re.match(r"rank 1: \d+ transfers in, \d+ out, digest [0-9a-f]{16}\n", out)
    own = "round 1: rank 1 decoder.layers.0.mlp.linear_fc2.weight [0:128, 0:128] -> rank 1 model.layers.0.mlp.down_proj"
    assert own.replace("round 1", "round 0") in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rank", "9"], "--rank 9: there are 4 ranks; give 0 to 3"),
        (["--gpus", "6"], "6 ranks"),
        (["--gpus", "4", "--rollout.tp", "3"], "rollout.tp = 3"),
        (["--gpus-per-node", "0"], "--gpus-per-node 0: give 1 or more"),
        (["--json"], "without --json"),
        (["--dry-run"], "without --dry-run"),
        (
            ["--rollout.placement", "server", "--server.transport", "file"],
            'or on servers with server.transport = "network" or',
        ),
        (["--bridge.verify", "true"], "expected one of none, probe, checksum, golden"),
    ],
)
def test_what_cannot_be_is_said_in_a_line(config, capsys, arguments, message):
    assert main(["plan", "--bridge", str(config), *arguments]) == 2
    assert message in capsys.readouterr().err
