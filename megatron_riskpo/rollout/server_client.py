"""One vLLM server over HTTP: token ids in, token ids with log-probs and weight versions out, and new weights."""

import asyncio
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import aiohttp

from megatron_riskpo.errors import RunError

_HALF_UPDATED = "towards-"
"""Begins the label of weights that are being replaced."""


class ServerError(Exception):
    """A server did not do what it was asked for; another may."""


@dataclass(frozen=True)
class Segment:
    """What one request gave."""

    tokens: list[int]
    logprobs: list[float]
    versions: list[int]
    """Of the weights, a token; -1: the server could not say."""
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

    def __init__(self, url: str, session: aiohttp.ClientSession) -> None:
        self.url = url.rstrip("/")
        self._session = session

    async def is_healthy(self, timeout_s: float) -> bool:
        """Whether it answers its health check in time."""
        try:
            await self._call("GET", "/health", None, timeout_s)
        except (ServerError, RunError):
            return False
        return True

    async def weight_version(self, timeout_s: float) -> int:
        """Of the weights it says it has; -1: none of ours."""
        return _version(await self.weight_label(timeout_s))

    async def can_take_weights(self, timeout_s: float) -> bool:
        """Whether it is healthy, and no push broke off in it: of that only a restart heals it. False also where both
        answers take longer than `timeout_s`."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._call("GET", "/health", None, timeout_s)
                return not (await self.weight_label(timeout_s)).startswith(_HALF_UPDATED)
        except (ServerError, RunError, TimeoutError):  # or something else answers at its address
            return False

    async def begin_update(self, version: int, timeout_s: float) -> None:
        """Have it say that its weights are those of no version, until `finish_update`."""
        await self.post("/update_weight_version", timeout_s, {"new_version": f"{_HALF_UPDATED}{version}"})
        await self.post("/start_weight_update", timeout_s)

    async def finish_update(self, version: int, timeout_s: float) -> None:
        """Put the new weights in use."""
        await self.post("/finish_weight_update", timeout_s, {"weight_version": str(version)})
        found = await self.weight_version(timeout_s)
        if found != version:
            raise ServerError(f"{self.url} reports version {found} after a push of version {version}")

    async def weight_label(self, timeout_s: float) -> str:
        """What it calls its weights."""
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
            return _segment(body["choices"][0])
        except (LookupError, TypeError, ValueError) as error:
            raise ServerError(f"{self.url} gave an answer without {error}: {str(body)[:200]}") from error

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


def _segment(choice: dict[str, Any]) -> Segment:
    tokens = [int(token) for token in choice["token_ids"]]
    content = choice["logprobs"]["content"] if tokens else []
    versions = [-1] * len(tokens)
    for span in choice["weight_versions"] or ():
        versions[span["start"] : span["end"]] = [_version(span["version"])] * (span["end"] - span["start"])
    logprobs = [float(entry["logprob"]) for entry in content]
    if len(logprobs) != len(tokens) or len(versions) != len(tokens):
        raise ValueError(
            f"as many log-probs ({len(logprobs)}) and versions ({len(versions)}) as tokens ({len(tokens)})"
        )
    return Segment(tokens, logprobs, versions, str(choice["finish_reason"]))


def _version(label: Any) -> int:
    """vLLM's labels are any text; ours are numbers, and its own first one is "default"."""
    return int(label) if str(label).isdigit() else -1
