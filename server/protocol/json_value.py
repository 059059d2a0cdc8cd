"""Free JSON inside a request: schemas, arguments, variables of a template.

Owns: nothing.  Thread-safety: plain values.
"""

from __future__ import annotations

import json
import math
from typing import Annotated, Any

from pydantic import PlainValidator, WithJsonSchema
from pydantic_core import PydanticCustomError

MAX_DEPTH = 64
"""Levels of lists and objects in each other; what reads them recurses."""


def find_json_fault(value: Any) -> str | None:
    """Why a value cannot be used as JSON: too deep, not finite, not Unicode. None: it can."""
    pending: list[tuple[Any, int]] = [(value, 1)]
    while pending:
        one, depth = pending.pop()
        if isinstance(one, dict | list):
            if depth > MAX_DEPTH:
                return f"is nested more than {MAX_DEPTH} levels deep"
            parts = [*one.keys(), *one.values()] if isinstance(one, dict) else one
            pending.extend((part, depth + 1) for part in parts)
        elif isinstance(one, float) and not math.isfinite(one):
            return f"holds {one}, which is not JSON"
        elif isinstance(one, str) and not is_unicode(one):
            return f"holds {one!r:.100}, which is not Unicode"
    return None


def is_unicode(text: str) -> bool:
    """False for text with half a surrogate pair in it, which JSON can write and nobody can send."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def read_json_object(text: str) -> dict[str, Any] | None:
    """The object that a text holds; None if it holds something else."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) and find_json_fault(value) is None else None


def _check(value: Any) -> Any:
    if not isinstance(value, dict):
        raise PydanticCustomError("invalid_value", "must be an object")
    fault = find_json_fault(value)
    if fault is not None:
        raise PydanticCustomError("invalid_value", "{fault}", {"fault": fault})
    return value


JsonObject = Annotated[
    dict[str, Any],
    PlainValidator(_check),
    WithJsonSchema({"type": "object", "additionalProperties": True}),
]
