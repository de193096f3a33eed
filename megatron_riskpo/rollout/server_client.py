"""One vLLM server over HTTP: token ids in, token ids with log-probs and weight versions out, and new weights."""

import asyncio
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import aiohttp

from megatron_riskpo.errors import RunError
from megatron_riskpo.rollout.weight_labels import WeightLabels, is_half_updated

_REASONS = ("stop", "length", "abort")


class ServerError(Exception):
    """A server did not do what it was asked for; another may."""


@dataclass(frozen=True)
class Segment:
    """What one request gave."""

    tokens: list[int]
    logprobs: list[float]
    versions: list[int]
    """Of the weights, a token, as WeightLabels has them; -1 too where the server could not say."""
    labels: dict[int, str]
    """What the server calls the weights of these versions."""
    reason: str
    """stop, length, or abort (the server was paused)."""


@dataclass(frozen=True)
class ModelCard:
    """What a server says of its model."""

    path: str
    """As the server was given it."""
    max_model_len: int
    """Longest prompt + response, in tokens."""


class ServerClient:
    """Calls of one server. All raise ServerError with the server's address and what went wrong."""

    def __init__(
        self,
        url: str,
        session: aiohttp.ClientSession,
        labels: WeightLabels | None = None,
        vocab_size: int | None = None,
    ) -> None:
        """`labels`: of the run that pushes weights, if one does. `vocab_size`: sampled tokens are below it."""
        self.url = url.rstrip("/")
        self.labels = labels or WeightLabels()
        self._session, self._vocab_size = session, vocab_size

    async def is_healthy(self, timeout_s: float) -> bool:
        """Whether it answers its health check in time."""
        try:
            await self._call("GET", "/health", None, timeout_s)
        except (ServerError, RunError):
            return False
        return True

    async def obstacle(self, timeout_s: float, *, was_ours: bool) -> str:
        """Why it can take no weights, or nothing: it is not healthy, also where both answers take longer than
        `timeout_s`; a push broke off in it, of which only a restart heals it; or it `was_ours`, had this run's weights
        before, and another run has pushed to it since."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._call("GET", "/health", None, timeout_s)
                label = await self.weight_label(timeout_s)
        except TimeoutError:
            return f"{self.url} did not answer within {timeout_s:g} s"
        except (ServerError, RunError) as error:  # RunError: something else answers at its address
            return str(error)
        if was_ours and self.labels.is_of_another_run(label):
            return f"{self.url} has weights {label!r}: {self.labels.cause(label)}"
        return f"a push broke off, or is under way, in {self.url} (weights {label!r})" if is_half_updated(label) else ""

    async def begin_update(self, version: int, timeout_s: float) -> None:
        """Have it say that its weights are those of no version, until `finish_update`."""
        await self.post("/update_weight_version", timeout_s, {"new_version": self.labels.towards(version)})
        await self.post("/start_weight_update", timeout_s)

    async def finish_update(self, version: int, timeout_s: float) -> None:
        """Put the new weights in use. Not where another run has begun a push since: they may be a mixture of both."""
        await self._check_label(self.labels.towards(version), timeout_s)
        await self.post("/finish_weight_update", timeout_s, {"weight_version": self.labels.of(version)})
        await self._check_label(self.labels.of(version), timeout_s)

    async def _check_label(self, expected: str, timeout_s: float) -> None:
        found = await self.weight_label(timeout_s)
        if found != expected:
            raise ServerError(f"{self.url} has weights {found!r}, not {expected!r}: {self.labels.cause(found)}")

    async def weight_label(self, timeout_s: float) -> str:
        """What it calls its weights. The engine itself answers, between two passes of the model."""
        return str((await self._call("GET", "/weight_info", None, timeout_s)).get("weight_version"))

    async def model_card(self, timeout_s: float) -> ModelCard:
        """Of the model that it serves."""
        body = await self._call("GET", "/v1/models", None, timeout_s)
        try:
            card = body["data"][0]
            return ModelCard(str(card["root"]), int(card["max_model_len"]))
        except (LookupError, TypeError, ValueError) as error:
            raise ServerError(f"{self.url} does not say what model it serves ({error}): {str(body)[:200]}") from error

    async def generate(self, prompt: Sequence[int], sampling: dict[str, Any], timeout_s: float) -> Segment:
        """Continue the prompt; `sampling` is vLLM's SamplingParams."""
        asked = {"token_ids": list(prompt), "sampling_params": sampling}
        body = await self._call("POST", "/inference/v1/generate", asked, timeout_s)
        try:
            return self._segment(body["choices"][0])
        except (LookupError, TypeError, ValueError) as error:
            raise ServerError(f"{self.url} gave an answer without {error}: {str(body)[:200]}") from error

    def _segment(self, choice: dict[str, Any]) -> Segment:
        tokens = [int(token) for token in choice["token_ids"]]
        logprobs = [float(entry["logprob"]) for entry in (choice["logprobs"]["content"] if tokens else [])]
        versions, labels = [-1] * len(tokens), {}
        for span in choice["weight_versions"] or ():
            label = str(span["version"])
            version = self.labels.version(label)
            labels[version] = label
            versions[span["start"] : span["end"]] = [version] * (span["end"] - span["start"])
        segment = Segment(tokens, logprobs, versions, labels, str(choice["finish_reason"]))
        _check_segment(segment, self._vocab_size)
        return segment

    async def prompt_logprobs(self, prompt: Sequence[int], timeout_s: float) -> list[float]:
        """Of each token but the first given those before it, at temperature 1."""
        sampling = {"temperature": 0.0, "max_tokens": 1, "prompt_logprobs": 0, "ignore_eos": True, "detokenize": False}
        asked = {"token_ids": list(prompt), "sampling_params": sampling}
        body = await self._call("POST", "/inference/v1/generate", asked, timeout_s)
        try:
            entries = body["prompt_logprobs"][1:]
            return [entry[str(token)]["logprob"] for token, entry in zip(prompt[1:], entries, strict=True)]
        except (LookupError, TypeError, ValueError) as error:
            raise ServerError(f"{self.url} gave no log-probs of the prompt ({error}): {str(body)[:200]}") from error

    async def post(self, path: str, timeout_s: float | None, body: dict[str, Any] | None = None) -> None:
        """One of vLLM's control endpoints; without `timeout_s` until it answers."""
        await self._call("POST", path, body, timeout_s)

    async def _call(
        self, method: str, path: str, body: dict[str, Any] | None, timeout_s: float | None
    ) -> dict[str, Any]:
        timeout = aiohttp.ClientTimeout(total=timeout_s)
        try:
            async with self._session.request(method, self.url + path, json=body, timeout=timeout) as response:
                text = await response.text(errors="replace")
                status = response.status
        except TimeoutError as error:
            raise ServerError(f"{self.url} did not answer {path} within {timeout_s:g} s") from error
        except (aiohttp.ClientError, OSError, asyncio.IncompleteReadError) as error:
            raise ServerError(f"{self.url} cannot be reached ({type(error).__name__}: {error})") from error
        if 400 <= status < 500:
            # The request is at fault: no other server would take it either.
            raise RunError(f"{self.url}{path} refused a request with {status}: {_message(text)}")
        if status != 200:
            raise ServerError(f"{self.url}{path} answered {status}: {_message(text)}")
        return _json(text)


def _json(text: str) -> dict[str, Any]:
    try:
        body = json.loads(text) if text else {}
    except ValueError:
        return {}
    return body if isinstance(body, dict) else {}


def _message(text: str) -> str:
    error = _json(text).get("error")
    message = error.get("message") if isinstance(error, dict) else error
    return " ".join(str(message or text or "no message").split())[:300]


def _check_segment(segment: Segment, vocab_size: int | None) -> None:
    """ValueError for one that cannot be; the message goes after "an answer without"."""
    tokens, logprobs, versions = segment.tokens, segment.logprobs, segment.versions
    if len(logprobs) != len(tokens) or len(versions) != len(tokens):
        raise ValueError(
            f"as many log-probs ({len(logprobs)}) and versions ({len(versions)}) as tokens ({len(tokens)})"
        )
    if segment.reason not in _REASONS:
        raise ValueError(f"a reason for its end that is known ({segment.reason})")
    if not all(map(math.isfinite, logprobs)):
        raise ValueError(f"finite log-probs ({next(p for p in logprobs if not math.isfinite(p))})")
    if vocab_size is not None and tokens and not 0 <= min(tokens) <= max(tokens) < vocab_size:
        raise ValueError(f"tokens of the vocabulary ({min(tokens)} to {max(tokens)}, not 0 to {vocab_size - 1})")
