"""Choose and make a KV backend.

Owns: nothing.  Thread-safety: all functions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from .backend import KVBackend
from .config import KVCacheConfig
from .errors import ConfigError
from .kv_cache import VirtualKVCache

BackendKind = Literal["auto", "virtual"]


@dataclass(frozen=True, slots=True)
class BackendChoice:
    """What ``auto`` picked, and why, in one sentence for people."""

    kind: Literal["virtual"]
    driver: str
    reason: str


def choose_backend(kind: str = "auto") -> BackendChoice:
    """Say which backend ``kind`` stands for on this machine.

    Raises:
        ConfigError: an unknown kind, or one that is not there yet.
    """
    if kind == "paged":
        raise ConfigError("kv_backend is 'paged'; the paged fallback is not there yet: use virtual")
    if kind not in ("auto", "virtual"):
        raise ConfigError(f"kv_backend is {kind!r}; supported: auto, virtual")
    return BackendChoice(
        kind="virtual",
        driver="host",
        reason="no GPU driver is built in yet; the host driver maps memfd pages on any Linux",
    )


def create_kv_backend(config: KVCacheConfig, kind: str = "auto") -> KVBackend:
    """Make the backend that ``kind`` (``"auto"`` or ``"virtual"``) stands for.

    Raises:
        ConfigError: a value in ``config`` or ``kind`` can never work.
    """
    choose_backend(kind)
    return VirtualKVCache(config)
