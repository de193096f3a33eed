"""What has come of responses that are under way, as a checkpoint keeps it."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from megatron_riskpo.rollout.server_pool import Response


def packed(responses: Sequence[Response]) -> dict[str, Any]:
    """`tokens` int32, `logprobs` float64 and `versions` int32, of all responses one after the other; `lengths` int32
    and `reasons` (why it ended; empty: it has not), of each. A weights_only load reads it."""
    return {
        "tokens": torch.tensor([token for response in responses for token in response.tokens], dtype=torch.int32),
        "logprobs": torch.tensor([p for response in responses for p in response.logprobs], dtype=torch.float64),
        "versions": torch.tensor([v for response in responses for v in response.versions], dtype=torch.int32),
        "lengths": torch.tensor([len(response.tokens) for response in responses], dtype=torch.int32),
        "reasons": [response.reason for response in responses],
    }


def go_on_from(begun: Mapping[str, Any], responses: Sequence[Response]) -> None:
    """Give responses that were not begun yet what `packed` has of them; weights that sampled a part of one are old
    enough for the rest."""
    lengths = begun["lengths"].tolist()
    columns = [begun[name].split(lengths) for name in ("tokens", "logprobs", "versions")]
    for response, tokens, logprobs, versions, reason in zip(responses, *columns, begun["reasons"], strict=True):
        response.tokens, response.logprobs, response.versions = tokens.tolist(), logprobs.tolist(), versions.tolist()
        response.reason = reason
        response.oldest_version = min([response.oldest_version, *response.versions])
