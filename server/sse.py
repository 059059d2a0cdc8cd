"""Server-sent events: how a stream looks on the wire.

Owns: nothing.  Thread-safety: stateless.
"""

from __future__ import annotations

import json
from typing import Any

from pydantic import BaseModel
from pydantic_core import PydanticSerializationError, to_json

KEEP_ALIVE = b": keep-alive\n\n"
DONE = b"data: [DONE]\n\n"

HEADERS = {
    "cache-control": "no-cache",
    # Proxies that follow nginx would otherwise collect a stream before they pass it on.
    "x-accel-buffering": "no",
}


def event(data: BaseModel | dict[str, Any], name: str | None = None) -> bytes:
    """One event: a pydantic model (unset fields left out) or a dict, as JSON."""
    if isinstance(data, BaseModel):
        text = data.model_dump_json(exclude_unset=True).encode()
    else:
        try:
            text = to_json(data)  # ten times as fast as json.dumps, once per token
        except PydanticSerializationError:  # a client's half surrogate pair, quoted in an error
            text = json.dumps(data).encode("ascii")
    prefix = b"" if name is None else f"event: {name}\n".encode()
    return b"%bdata: %b\n\n" % (prefix, text)
