"""What a rollout engine refuses; the same on every rank, so that none is left waiting in a collective."""

from collections.abc import Sequence

from megatron_riskpo.errors import UsageError


def check_prompts(
    prompts: Sequence[Sequence[int]], max_response_tokens: int, max_sequence_length: int, vocab_size: int
) -> None:
    """UsageError for a prompt (token ids) that is empty, too long for the engine, or not of its vocabulary."""
    longest = max_sequence_length - max_response_tokens
    for i, prompt in enumerate(prompts):
        if not 0 < len(prompt) <= longest:
            raise UsageError(
                f"prompt {i} has {len(prompt)} tokens; with up to {max_response_tokens} response tokens it must have "
                f"1 to {longest} to fit the engine's {max_sequence_length}"
            )
        if min(prompt) < 0 or max(prompt) >= vocab_size:
            raise UsageError(f"prompt {i} has a token id outside 0..{vocab_size - 1}; check the tokenizer")
