"""One JSON request to a server, with a limit on time and on the size of the answer."""

import json
import urllib.error
import urllib.request
from typing import Any

MAX_REPLY_BYTES = 16 << 20


class ServerError(Exception):
    """The server did not answer, or not with what was asked for."""


def post_json(url: str, payload: dict[str, Any], timeout_s: float) -> dict[str, Any]:
    """The reply's JSON object. Raises ServerError that names the address and what came instead."""
    request = urllib.request.Request(
        url, data=json.dumps(payload).encode(), headers={"Content-Type": "application/json"}, method="POST"
    )
    try:
        with urllib.request.urlopen(request, timeout=timeout_s) as reply:
            body = reply.read(MAX_REPLY_BYTES + 1)
    except urllib.error.HTTPError as error:
        raise ServerError(f"{url} answered {error.code} {error.reason}") from error
    except OSError as error:
        raise ServerError(f"{url} cannot be reached: {getattr(error, 'reason', error)}") from error
    if len(body) > MAX_REPLY_BYTES:
        raise ServerError(f"{url} answered more than {MAX_REPLY_BYTES} bytes")
    try:
        found = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise ServerError(f"{url} answered no JSON but {body[:60]!r}") from error
    if not isinstance(found, dict):
        raise ServerError(f"{url} answered no JSON object but {body[:60]!r}")
    return found
