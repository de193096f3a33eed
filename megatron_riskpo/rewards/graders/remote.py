"""A grader behind HTTP: a reward model's server, or a verifier that has to live elsewhere."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_riskpo.rewards.http_json import ServerError, post_json


@dataclass(frozen=True)
class RemoteGrader:
    """Posts {"response", "expected_answer", "fields"} as JSON and takes {"score": number}; {"error": text} and
    anything else is an error, and no wrong answer."""

    url: str
    timeout_s: float

    def __call__(self, response: str, expected_answer: str, fields: Mapping[str, Any]) -> float:
        payload = {"response": response, "expected_answer": expected_answer, "fields": dict(fields)}
        reply = post_json(self.url, payload, self.timeout_s)
        score = reply.get("score")
        if isinstance(score, bool) or not isinstance(score, int | float):
            raise ServerError(f"{self.url} gave no score but {reply.get('error', reply)!r:.200}")
        return float(score)
