"""What the API description says about answers that are not a plain 200.

Owns: nothing.  Thread-safety: plain values.
"""

from __future__ import annotations

from typing import Any

from .protocol.operations import ErrorBody

Responses = dict[int | str, dict[str, Any]]

_REASONS = {
    400: "The request is wrong; `param` names the field.",
    401: "No valid API key.",
    404: "There is no such model.",
    408: "The body took too long to arrive.",
    413: "The body is too long.",
    415: "The body is compressed.",
    429: "Too many requests wait; try again after `Retry-After` seconds.",
    499: "The request was aborted.",
    500: "The server made a mistake.",
    503: "The engine takes no requests now, or cannot hold this one.",
    504: "The request took longer than the server allows.",
}


def errors(*statuses: int) -> Responses:
    """The errors that an operation may answer with."""
    described: Responses = {
        status: {"model": ErrorBody, "description": _REASONS[status]} for status in statuses
    }
    if 429 in described:
        described[429]["headers"] = {
            "Retry-After": {"description": "seconds", "schema": {"type": "integer"}}
        }
    return described


TEXT_ERRORS = errors(400, 401, 404, 408, 413, 415, 500, 503)
"""Of operations that read a body and generate nothing."""

GENERATION_ERRORS: Responses = {
    **errors(*_REASONS),
    200: {"content": {"text/event-stream": {"schema": {"type": "string"}}}},
}
"""Of operations that generate, and stream if they are asked to."""
