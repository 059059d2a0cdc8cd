"""Names for the beginnings of a prompt: equal beginnings have equal names, block by block.

Owns: nothing.  Thread-safety: pure functions.

The engine's prefix index does the same with tokens and pages. Who routes has no tokenizer, and
needs none: requests whose text begins alike have tokens that begin alike.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from hashlib import blake2b
from typing import Any

BLOCK_BYTES = 128
"""About 32 tokens of English, two pages of the engine's default."""

MAX_BLOCKS = 256
"""Prompts that share so much (32 KiB) are told apart by load alone."""

KEY_BYTES = 16

GENERATION_PATHS = frozenset({"/v1/completions", "/v1/chat/completions", "/v1/responses"})


def prefix_keys(path: str, body: bytes) -> tuple[bytes, ...]:
    """One key for each full block of a request's prompt, each standing for all up to it.

    What isolates tenants in the cache, ``cache_salt``, and the model's name are part of every key.
    Empty for what is no request for text, and for prompts shorter than a block.
    """
    if path not in GENERATION_PATHS:
        return ()
    try:
        document = json.loads(body)
        if not isinstance(document, dict):
            return ()
        text = _leading_text(document)
        salt = json.dumps([path, document.get("model"), document.get("cache_salt")])
    except (ValueError, RecursionError):
        return ()  # the replica says what is wrong with it
    key = blake2b(salt.encode(), digest_size=KEY_BYTES).digest()
    keys: list[bytes] = []
    for start in range(0, min(len(text), MAX_BLOCKS * BLOCK_BYTES) - BLOCK_BYTES + 1, BLOCK_BYTES):
        block = text[start : start + BLOCK_BYTES]
        key = blake2b(block, digest_size=KEY_BYTES, key=key).digest()
        keys.append(key)
    return tuple(keys)


def _leading_text(document: Mapping[str, Any]) -> bytes:
    """What the model reads, in the order that it reads it, as far as a key needs it."""
    prompt = document.get("prompt")
    if isinstance(prompt, list) and prompt and isinstance(prompt[0], str | list):
        prompt = prompt[0]  # of several prompts the first one decides
    if isinstance(prompt, str):
        return prompt[: MAX_BLOCKS * BLOCK_BYTES].encode("utf-8", "surrogatepass")
    if isinstance(prompt, list):
        return json.dumps(prompt[: MAX_BLOCKS * BLOCK_BYTES]).encode()
    parts = [
        document[name]
        for name in ("tools", "instructions", "messages", "input")
        if document.get(name) is not None
    ]
    return json.dumps(parts).encode() if parts else b""
