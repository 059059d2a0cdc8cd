"""Tells apart servers whose answers to the same request and seed may differ.

Owns: nothing.  Thread-safety: pure functions.
"""

from __future__ import annotations

import hashlib

from .. import __version__
from .state import ServerState

_SETTINGS = (
    "device",
    "dtype",
    "kv_backend",
    "batch_invariant",
    "max_model_len",
    "compile",
    "fused",
)
"""What may change an answer in its last bits, or in its length."""


def system_fingerprint(state: ServerState) -> str:
    """OpenAI's ``system_fingerprint``."""
    config = state.engine.config
    parts = [state.model_name, *(str(getattr(config, name, None)) for name in _SETTINGS)]
    digest = hashlib.sha256("\0".join(parts).encode()).hexdigest()
    return f"vmalloc-{__version__}-{digest[:10]}"
