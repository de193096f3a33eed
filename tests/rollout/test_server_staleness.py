"""Several steps' rollouts under way on a server that pushes stop: each token has the version of the weights that
sampled it. HTTP is real, vLLM's part is played; with vLLM, two versions: test_server_engine.py."""

import time
from pathlib import Path

from megatron_riskpo.data.stream import PromptStream
from megatron_riskpo.rollout.server_pool import continued_seed
from megatron_riskpo.rollout.source import RolloutSource, staleness_metrics
from megatron_riskpo.rollout.types import SamplingConfig
from tests.rollout.fake_server import FakeServer, fake_server, token_at
from tests.server_runs import exporter, server_config, server_engine, with_urls
from tests.tiny_models import make_tiny_qwen2
from tests.vllm_engines import single_rank

NUM_QUESTIONS, BATCH, NUM_STEPS = 12, 2, 3
SAMPLING = SamplingConfig(group_size=2, max_response_tokens=8, temperature=1.0, stop_token_ids=(1,))
HELD_AT = 3


def wait_for_requests(server: FakeServer, num: int) -> None:
    deadline = time.monotonic() + 30
    while len(server.requests) < num:
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_two_steps_ahead_a_response_may_have_tokens_of_three_versions(tmp_path: Path) -> None:
    model = make_tiny_qwen2(tmp_path / "model", tied=True, seed=0)
    prompts = [[20 + question, 5] for question in range(NUM_QUESTIONS)]
    per_step = BATCH * SAMPLING.group_size
    with fake_server() as server, single_rank():
        config = with_urls(server_config(model, server={"transport": "file"}), server.url)
        with server_engine(config, tmp_path, exporter(model)) as engine:
            stream = PromptStream(NUM_QUESTIONS, BATCH, 5, option="")
            source = RolloutSource(engine, stream, prompts, SAMPLING, 5, max_staleness=2, num_steps=NUM_STEPS)
            engine.update_weights(exporter(model)(), 0)
            source.draw(1, 0)
            server.requests.clear()
            server.holds = {prompt[0]: HELD_AT for prompt in prompts}
            source.prefetch(1)
            wait_for_requests(server, 2 * per_step)
            engine.update_weights(exporter(model)(), 1)
            wait_for_requests(server, 4 * per_step)
            for question in source.state_dict()["ahead"]["2"]:
                del server.holds[prompts[question][0]]  # the next step's questions are not held any more
            _, second = source.draw(2, 0)
            wait_for_requests(server, 4 * per_step)
            engine.update_weights(exporter(model)(), 2)
            _, third = source.draw(3, 0)
    versions = [rollouts.split_by_response(rollouts.weight_versions) for rollouts in (second, third)]
    assert [of.tolist() for of in versions[0]] == [[0] * 3 + [1] * 5] * per_step
    assert [of.tolist() for of in versions[1]] == [[0] * 3 + [1] * 3 + [2] * 2] * per_step
    assert staleness_metrics(3, third) == {
        "rollout/staleness_mean": (3 * 2 + 3 * 1) / 8,
        "rollout/staleness_max": 2.0,
        "rollout/mixed_versions": 1.0,
    }
    asked = {(*body["token_ids"],): body["sampling_params"]["seed"] for body in server.requests}
    for prompt, response in zip(third.sequences(), third.responses(), strict=True):
        start, tokens = prompt[:2].tolist(), response.tolist()
        seeds = [body["sampling_params"]["seed"] for body in server.requests if body["token_ids"] == start]
        first = next(seed for seed in seeds if [token_at(seed, i) for i in range(HELD_AT)] == tokens[:HELD_AT])
        # Sent again with what there is of them, each part with a seed of its own.
        assert asked[(*start, *tokens[:3])] == continued_seed(first, 3)
        assert asked[(*start, *tokens[:6])] == continued_seed(first, 6)
        second_part = [token_at(continued_seed(first, 3), i) for i in range(3)]
        third_part = [token_at(continued_seed(first, 6), i) for i in range(2)]
        assert tokens[3:] == second_part + third_part
