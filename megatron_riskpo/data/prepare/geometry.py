"""Geometry: questions about a figure, answers with a numeric tolerance."""

import base64
import io
from collections.abc import Mapping
from typing import Any

from megatron_riskpo.data.prepare.recipe import Entry, Recipe, Unusable, answer_text

IMAGES = "images"
"""Column with the figures: base64 in the question file."""


def geometry3k(row: Mapping[str, Any]) -> Entry:
    """The figures go along in `images`; <image> stays in the problem where it stands."""
    answer = answer_text(row["answer"])
    return {
        "problem": row["problem"],
        "expected_answer": answer,
        "grader": "numeric" if _is_number(answer) else "math",
        IMAGES: [_encoded(image) for image in row.get(IMAGES) or []],
    }


def _is_number(answer: str) -> bool:
    try:
        float(answer)
    except ValueError:
        return False
    return True


def _encoded(image: Any) -> str:
    if hasattr(image, "save"):  # the hub's client makes pictures of them
        buffer = io.BytesIO()
        image.save(buffer, format="PNG")
        image = buffer.getvalue()
    data = image.get("bytes") if isinstance(image, Mapping) else image
    if not isinstance(data, bytes):
        raise Unusable("a figure that is not in the file")
    return base64.b64encode(data).decode("ascii")


RECIPES: dict[str, Recipe] = {
    "geometry3k": Recipe(geometry3k, (("problem",), ("answer",)), ("hiyouga/geometry3k", (None,), "test"))
}
