"""Single verbs of a step that whole runs (test_end_to_end) do not tell apart."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_riskpo.actor.actor import UpdateOutputs
from megatron_riskpo.actor.flops import ModelFlops
from megatron_riskpo.algorithms.config import MismatchConfig, PolicyLossConfig
from megatron_riskpo.algorithms.token_inputs import TokenInputs
from megatron_riskpo.collect import Groups
from megatron_riskpo.config import ActorConfig, RewardConfig, RolloutConfig, TrainConfig
from megatron_riskpo.data.sources import Question
from megatron_riskpo.errors import RunError
from megatron_riskpo.rewards.reference import Reference
from megatron_riskpo.rewards.scoring import Rewards
from megatron_riskpo.rollout.types import Rollouts
from megatron_riskpo.trainer import EncodedQuestions, Trainer
from tests.distributed.advantage_cases import DigitTokenizer


def trainer(config: TrainConfig, **parts: Any) -> Trainer:
    """With nothing but the given parts."""
    names = ("actor", "engine", "bridge", "pool", "tokenizer", "train_set", "held_out", "source", "stop", "observer",
             "run_dir", "saver", "objective")  # fmt: skip
    return Trainer(config=config, **(dict.fromkeys(names) | parts), step=3)  # type: ignore[arg-type]


def two_groups() -> Groups:
    """Questions 5 and 2, responses of 1, 2, 3 and 4 tokens."""
    lengths = torch.arange(1, 5)
    rollouts = Rollouts(
        tokens=torch.arange(14), prompt_lengths=torch.ones(4, dtype=torch.int64), response_lengths=lengths,
        rollout_logprobs=-torch.arange(10) / 10, finished=torch.tensor([True, True, True, False]),
    )  # fmt: skip
    matrix = torch.tensor([[1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    no, yes = torch.zeros(2, 2, dtype=torch.bool), torch.ones(2, 2, dtype=torch.bool)
    return Groups([5, 2], rollouts, Rewards(matrix, errors=no, formatted=yes))


@pytest.mark.parametrize(("kl_in", "estimator"), [("loss", "k2"), ("reward", "k1")])
def test_rewards_are_shaped_by_length_and_divergence(kl_in, estimator):
    batch, g = two_groups(), torch.Generator().manual_seed(1)
    old, ref = (-torch.rand(10, generator=g, dtype=torch.float64) for _ in range(2))
    config = TrainConfig(
        rollout=RolloutConfig(max_response_tokens=4),
        rewards=RewardConfig(overlong_buffer_tokens=2, overlong_penalty=0.5),
        loss=PolicyLossConfig(kl_coefficient=0.1, kl_estimator=estimator, kl_in=kl_in),
    )
    expected = [1.0, 0.0, 0.0 - 0.25, 1.0 - 0.5]
    if kl_in == "reward":
        spans = [(0, 1), (1, 3), (3, 6), (6, 10)]
        expected = [e - 0.1 * float((old - ref)[a:b].sum()) for e, (a, b) in zip(expected, spans, strict=True)]
    shaped = trainer(config).shape(batch, TokenInputs(old_logprobs=old, ref_logprobs=ref))
    assert shaped.flatten().tolist() == pytest.approx(expected, abs=1e-12)
    assert batch.rewards.matrix.flatten().tolist() == [1.0, 0.0, 0.0, 1.0]


@pytest.mark.parametrize(("difference", "limit", "raises"), [(0.5, 0.0, False), (0.5, 0.6, False), (0.5, 0.4, True)])
def test_mismatch_beyond_the_threshold_ends_the_run(difference, limit, raises):
    one = trainer(TrainConfig(mismatch=MismatchConfig(abort_above=limit)))
    sampled = two_groups().rollouts.rollout_logprobs
    if not raises:
        metrics = one.measure_mismatch(sampled, sampled + difference)
        assert metrics["mismatch/logprob_abs_mean"] == pytest.approx(0.5)
        return
    with pytest.raises(RunError, match=r"step 3: .* differ by 0.5 nats a token .*abort_above = 0.4; .* or raise"):
        one.measure_mismatch(sampled, sampled + difference)
    with pytest.raises(RunError, match="differ by nan"):
        one.measure_mismatch(sampled, sampled * float("nan"))


@pytest.mark.parametrize(
    ("actor_options", "changes", "num_passes"),
    [
        ({}, {}, 0),
        ({"mini_batches": 2}, {}, 1),
        ({}, {"mismatch": MismatchConfig(correction="tis")}, 1),
        ({}, {"loss": PolicyLossConfig(kind="clip_cov")}, 1),
        ({}, {"loss": PolicyLossConfig(kl_coefficient=0.1)}, 1),
        ({}, {"loss": PolicyLossConfig(kl_coefficient=0.1, kl_in="reward")}, 2),
        ({"old_logprobs": "rollout"}, {}, 0),
        ({"old_logprobs": "rollout", "mini_batches": 2}, {}, 0),
        ({"old_logprobs": "rollout"}, {"loss": PolicyLossConfig(kind="kl_cov")}, 0),
        ({"old_logprobs": "rollout"}, {"loss": PolicyLossConfig(kl_coefficient=0.1, kl_in="reward")}, 1),
    ],
)
def test_forward_passes_are_made_only_where_needed(actor_options, changes, num_passes):
    rollouts, passes = two_groups().rollouts, []

    def logprobs(rollouts: Rollouts, temperature: float) -> torch.Tensor:
        passes.append(temperature)
        return rollouts.rollout_logprobs.clone()

    config = TrainConfig(**changes, actor=ActorConfig(**actor_options))
    one = trainer(
        config,
        actor=SimpleNamespace(logprobs=logprobs),
        observer=SimpleNamespace(phase=lambda name: torch.no_grad()),
        reference=SimpleNamespace(in_place=torch.no_grad) if config.loss.kl_coefficient else None,
    )
    tokens, mismatch = one.score_tokens(rollouts)
    assert passes == [1.0] * num_passes
    assert (tokens.ref_logprobs is not None) == bool(config.loss.kl_coefficient)
    from_rollout = tokens.old_logprobs is rollouts.rollout_logprobs
    assert from_rollout == (config.actor.old_logprobs == "rollout")
    assert ("mismatch/k3" in mismatch) == (tokens.old_logprobs is not None and not from_rollout)


@pytest.mark.parametrize("num_skipped", [0, 2])
def test_skipped_optimizer_steps_are_said_aloud(num_skipped):
    lines: list[str] = []
    outputs = UpdateOutputs({"actor/skipped_steps": float(num_skipped)}, torch.zeros(10), 10)
    one = trainer(
        TrainConfig(actor=ActorConfig(mini_batches=4)),
        actor=SimpleNamespace(update=lambda *args, **kwargs: outputs),
        observer=SimpleNamespace(log=lines.append),
    )
    assert one.update(two_groups().rollouts, torch.zeros(2, 2), TokenInputs()) is outputs
    expected = "step 3: 2 of 4 optimizer steps skipped, their gradients were not finite"
    assert lines == ([expected] if num_skipped else [])


def test_speed_of_an_update_counts_prompts_and_responses_over_all_ranks():
    hf_config = {
        "vocab_size": 90, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    }  # fmt: skip
    grid = SimpleNamespace(world=SimpleNamespace(size=lambda: 2), device=torch.device("cpu"))
    one = trainer(
        TrainConfig(),
        actor=SimpleNamespace(hf_config=hf_config, grid=grid),
        observer=SimpleNamespace(seconds={"update": 0.5}.__getitem__),
    )
    flops = ModelFlops.from_hf_config(hf_config).forward_backward([2, 3, 4, 5], num_targets=10)
    expected = {"perf/update_tokens_per_second": 28.0, "perf/model_tflops": flops / 0.5 / 2 / 1e12}
    assert one.update_speed(two_groups().rollouts) == pytest.approx(expected)


def test_a_checkpoint_takes_the_evaluation_and_what_the_next_step_depends_on_along():
    saved = []
    saver = SimpleNamespace(save=lambda *args: saved.append(args), wait=lambda: None)
    stateful = {name: SimpleNamespace(state_dict=lambda name=name: {name: 1}) for name in ("source", "objective")}
    stateful["source"].under_way = lambda: {"4": "tokens so far"}
    one = trainer(TrainConfig(), saver=saver, **stateful)
    one.save({"reward/mean": 0.5, "eval/heldout/pass@1": 0.25})
    state = {"step": 3, "stream": {"source": 1}, "objective": {"objective": 1}}
    assert saved == [(3, None, state, {"eval/heldout/pass@1": 0.25}, {"4": "tokens so far"})]


def test_a_data_position_that_is_not_there_starts_anew():
    loaded = []
    parts = {
        name: SimpleNamespace(load_state_dict=lambda *args: loaded.append(args)) for name in ("source", "objective")
    }
    one = trainer(TrainConfig(), **parts)
    one.restore({"step": 7, "stream": None, "objective": "objective"}, {"8": "tokens so far"})
    one.restore({"step": 7, "stream": "stream", "objective": "objective"}, {"8": "tokens so far"})
    assert loaded == [("objective",), ("stream", {"8": "tokens so far"}), ("objective",)]
    assert one.step == 7


def test_sample_rows_show_both_rewards():
    batch = two_groups()
    questions = [Question(f"problem {i}", str(i), "here") for i in range(6)]
    one = trainer(
        TrainConfig(),
        tokenizer=DigitTokenizer(),
        train_set=EncodedQuestions([[]] * 6, questions, [Reference(q.expected_answer) for q in questions]),
    )
    rows = one.sample_rows(batch, batch.rewards.matrix - 0.5, torch.arange(4.0).view(2, 2), num=9)
    assert [row["problem"] for row in rows] == ["problem 5", "problem 5", "problem 2", "problem 2"]
    assert [(row["reward"], row["shaped_reward"]) for row in rows] == [(1, 0.5), (0, -0.5), (0, -0.5), (1, 0.5)]
    assert [row["advantage"] for row in rows] == [0, 1, 2, 3]
    assert [row["response"] for row in rows] == ["1", "3", "6", "10"]
    assert len(one.sample_rows(batch, batch.rewards.matrix, torch.zeros(2, 2), num=1)) == 2
