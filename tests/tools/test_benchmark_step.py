"""What tools/benchmark/step.py gives both trainers, and how it sums up. Not tested: any time."""

from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
from transformers import PreTrainedTokenizerFast, Qwen2ForCausalLM


@pytest.fixture(scope="module")
def cases() -> ModuleType:
    import step_cases

    return step_cases


@pytest.fixture(scope="module")
def inputs(cases: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    assert cases.write_inputs(cases.CASES["tiny"], folder, num_steps=2) == 603_520
    return folder


def test_both_trainers_see_the_same_prompts(cases: ModuleType, inputs: Path) -> None:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(inputs / "model")
    prompts = cases.read_prompts(inputs)
    assert len(prompts) == 2 * cases.CASES["tiny"].num_prompts
    assert tokenizer([cases.prompt_text(prompt) for prompt in prompts])["input_ids"] == prompts
    assert tokenizer.eos_token_id == cases.EOS_ID


def test_checkpoint_ends_its_answers_as_promised(cases: ModuleType, tmp_path: Path) -> None:
    """Sampled lengths against the mean of a cut geometric distribution."""
    case = replace(cases.CASES["tiny"], mean_response_tokens=10, max_response_tokens=40)
    cases.write_inputs(case, tmp_path, num_steps=1)
    model = Qwen2ForCausalLM.from_pretrained(tmp_path / "model").eval()
    torch.manual_seed(0)
    prompt = torch.tensor([[5, 6, 7]]).repeat(512, 1)
    sampled = model.generate(prompt, do_sample=True, top_k=0, max_new_tokens=case.max_response_tokens)[:, 3:]
    ended = sampled == cases.EOS_ID
    lengths = torch.where(ended.any(1), ended.int().argmax(1) + 1, sampled.size(1)).double()
    standard_error = lengths.std() / len(lengths) ** 0.5
    assert abs(lengths.mean() - cases.expected_response_tokens(case)) < 4 * standard_error
    assert lengths.std() > 0.5 * lengths.mean()


def test_report_takes_medians_and_divides_them(cases: ModuleType) -> None:
    from step_records import StepRecord
    from step_report import case_report

    def steps(*seconds: float) -> list[StepRecord]:
        return [StepRecord(s, {"rollout": s / 4, "update": 3 * s / 4}, 10, [2, 6], 0.5) for s in seconds]

    report = case_report(cases.CASES["tiny"], 1, {"trl": steps(6.0, 9.0, 60.0), "riskpo": steps(3.0, 3.0)})
    assert report["ratio"] == 3.0
    assert report["phase_ratios"] == {"rollout": 3.0, "update": 3.0}
    assert report["trainers"]["trl"]["phase_shares"] == {"rollout": 0.25, "update": 0.75}
    assert report["trainers"]["trl"]["response_length_mean"] == 4.0
