"""Server-sent events: how a stream looks on the wire.

Owns: nothing.  Thread-safety: stateless.
"""

from __future__ import annotations

import json
from typing import Any

from pydantic import BaseModel

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
        text = data.model_dump_json(exclude_unset=True)
    else:
        text = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    prefix = "" if name is None else f"event: {name}\n"
    return f"{prefix}data: {text}\n\n".encode("utf-8", "replace")
