"""What has come of responses that are under way, as a checkpoint keeps it."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from megatron_riskpo.rollout.server_pool import Response


def packed(responses: Sequence[Response]) -> dict[str, Any]:
    """`tokens` int32, `logprobs` float64 and `versions` int32, of all responses one after the other; `lengths` int32,
    `reasons` (why it ended; empty: it has not) and `digests` (what was asked), of each; for a weights_only load."""
    return {
        "tokens": torch.tensor([token for response in responses for token in response.tokens], dtype=torch.int32),
        "logprobs": torch.tensor([p for response in responses for p in response.logprobs], dtype=torch.float64),
        "versions": torch.tensor([v for response in responses for v in response.versions], dtype=torch.int32),
        "lengths": torch.tensor([len(response.tokens) for response in responses], dtype=torch.int32),
        "reasons": [response.reason for response in responses],
        "digests": [_digest(response) for response in responses],
    }


def go_on_from(begun: Mapping[str, Any], responses: Sequence[Response]) -> int:
    """Give responses that were not begun yet what `packed` has of them; the number of those that go on.

    The others begin anew: the question has another text now, or another seed. Weights that sampled a part of a response
    are old enough for the rest.
    """
    lengths = begun["lengths"].tolist()
    columns = [begun[name].split(lengths) for name in ("tokens", "logprobs", "versions")]
    saved = dict(zip(begun["digests"], zip(*columns, begun["reasons"], strict=True), strict=True))
    known = [(response, saved[digest]) for response in responses if (digest := _digest(response)) in saved]
    for response, (tokens, logprobs, versions, reason) in known:
        response.tokens, response.logprobs, response.versions = tokens.tolist(), logprobs.tolist(), versions.tolist()
        response.reason = reason
        response.oldest_version = min([response.oldest_version, *response.versions])
    return len(known)


def _digest(response: Response) -> str:
    """Of the prompt's tokens and the seed: a file of questions may have changed under the same name."""
    asked = json.dumps([[int(token) for token in response.prompt], int(response.seed)])
    return hashlib.blake2b(asked.encode(), digest_size=16).hexdigest()
