"""What is timed: the cases, and the checkpoint, tokenizer and prompts that both trainers are given."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

EOS_ID, PAD_ID = 0, 1
LEARNING_RATE = 1e-6
"""Small: the checkpoint's response lengths shall stay what they are over the measured steps."""


@dataclass(frozen=True)
class Case:
    """One workload, the same for both trainers."""

    name: str
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    intermediate_size: int
    vocab_size: int
    num_responses: int
    """Responses a step; one optimizer step on all of them."""
    group_size: int
    max_response_tokens: int
    mean_response_tokens: float
    """Without the cut at the maximum: at every position the end token has a probability of about 1 / mean."""
    prompt_tokens: tuple[int, int]
    """Shortest and longest prompt."""
    trl_micro_batch: int
    """Responses a forward-backward pass of TRL (its per_device_train_batch_size)."""
    num_cores: int
    """TRL gets so many threads, this project so many ranks of one thread each."""
    steps: int
    """Measured steps a round."""
    rounds: int
    """How often the two trainers take turns."""

    warmup_response_tokens: int = 8
    """Warm-up steps, which are not measured, cut their responses after so many tokens."""

    @property
    def num_prompts(self) -> int:
        return self.num_responses // self.group_size


CASES = {
    "tiny": Case(
        name="tiny", num_layers=4, hidden_size=128, num_heads=4, num_kv_heads=2, intermediate_size=256, vocab_size=90,
        num_responses=64, group_size=8, max_response_tokens=32, mean_response_tokens=64, prompt_tokens=(4, 12),
        trl_micro_batch=64, num_cores=1, steps=12, rounds=2,
    ),
    "ragged": Case(
        name="ragged", num_layers=6, hidden_size=512, num_heads=8, num_kv_heads=4, intermediate_size=1408,
        vocab_size=4096, num_responses=256, group_size=8, max_response_tokens=256, mean_response_tokens=65,
        prompt_tokens=(8, 24), trl_micro_batch=16, num_cores=2, steps=1, rounds=1,
    ),
}  # fmt: skip


def write_inputs(case: Case, folder: Path, num_steps: int) -> int:
    """Checkpoint and tokenizer into folder/model, prompts for num_steps steps into folder/prompts.json; returns the
    model's number of parameters."""
    model = _random_model(case)
    model.save_pretrained(folder / "model")
    _tokenizer(case.vocab_size).save_pretrained(folder / "model")
    generator = torch.Generator().manual_seed(1)
    prompts = [
        _random_tokens(case, _prompt_length(case, generator), generator) for _ in range(num_steps * case.num_prompts)
    ]
    (folder / "prompts.json").write_text(json.dumps([prompt.tolist() for prompt in prompts]))
    return sum(parameter.numel() for parameter in model.parameters())


def read_prompts(folder: Path) -> list[list[int]]:
    """Token ids."""
    return json.loads((folder / "prompts.json").read_text())


def prompt_text(tokens: list[int]) -> str:
    """Text that the tokenizer turns into exactly these ids."""
    return " ".join(f"t{token}" for token in tokens)


def reward(response: list[int]) -> float:
    """Share of even token ids: costs nothing to grade, and differs from response to response."""
    return sum(token % 2 == 0 for token in response) / len(response)


def _random_model(case: Case) -> Qwen2ForCausalLM:
    config = Qwen2Config(
        vocab_size=case.vocab_size,
        hidden_size=case.hidden_size,
        intermediate_size=case.intermediate_size,
        num_hidden_layers=case.num_layers,
        num_attention_heads=case.num_heads,
        num_key_value_heads=case.num_kv_heads,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=EOS_ID,
        pad_token_id=PAD_ID,
        dtype="float32",
    )
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(config).eval()
    _give_end_probability(model, case)
    return model


@torch.no_grad()
def _give_end_probability(model: Qwen2ForCausalLM, case: Case) -> None:
    """Make every position end the response with probability about 1 / case.mean_response_tokens.

    Dimension 0 of every embedding gets the same large value, so the final hidden state has a nearly constant component
    there (and a small one along the last token, which tied embeddings would otherwise make the model repeat). It shifts
    all logits alike, but for the end token, whose row is nothing but that dimension: its entry is found by bisection on
    the hidden states of random sequences.
    """
    rows = cast(Tensor, model.get_input_embeddings().weight)
    rows[PAD_ID] = 0.02 * torch.randn(rows.size(1))  # transformers starts the padding row at 0
    rows[:, 0] = 4.0
    rows[EOS_ID] = 0.0
    tokens = _random_tokens(case, 16 * 64, torch.Generator().manual_seed(2)).view(16, 64)
    hidden = model.model(tokens).last_hidden_state.flatten(0, 1)
    others = (hidden @ rows[EOS_ID + 1 :].T).logsumexp(dim=1)
    rows[EOS_ID, 0] = _bisect(hidden[:, 0], others, 1 / case.mean_response_tokens)


def _bisect(component: Tensor, others: Tensor, probability: float) -> float:
    """The end token's entry for which its mean probability is as asked."""
    low, high = -100.0, 100.0
    while high - low > 1e-6:
        middle = (low + high) / 2
        too_likely = float((middle * component - others).sigmoid().mean()) > probability
        low, high = (low, middle) if too_likely else (middle, high)
    return (low + high) / 2


def _tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {"<eos>": EOS_ID, "<pad>": PAD_ID} | {f"t{i}": i for i in range(2, vocab_size)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>")


def _prompt_length(case: Case, generator: torch.Generator) -> int:
    shortest, longest = case.prompt_tokens
    return int(torch.randint(shortest, longest + 1, (), generator=generator))


def _random_tokens(case: Case, num_tokens: int, generator: torch.Generator) -> Tensor:
    return torch.randint(2, case.vocab_size, (num_tokens,), generator=generator)


def expected_response_tokens(case: Case) -> float:
    """Mean length of a geometric distribution cut at the maximum, in tokens."""
    return case.mean_response_tokens * (1 - math.pow(1 - 1 / case.mean_response_tokens, case.max_response_tokens))
