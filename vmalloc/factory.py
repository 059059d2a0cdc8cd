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
from .paged_cache import PagedKVCache

BackendKind = Literal["auto", "virtual", "paged"]


@dataclass(frozen=True, slots=True)
class BackendChoice:
    """What a kind stands for on this machine, and why, in one sentence for people."""

    kind: Literal["virtual", "paged"]
    driver: str
    reason: str


def choose_backend(kind: str = "auto") -> BackendChoice:
    """Say which backend ``kind`` stands for on this machine.

    Raises:
        ConfigError: an unknown kind.
    """
    if kind not in ("auto", "virtual", "paged"):
        raise ConfigError(f"kv_backend is {kind!r}; supported: auto, virtual, paged")
    if kind == "paged":
        return BackendChoice(
            kind="paged",
            driver="host",
            reason="asked for; blocks are in ordinary memory and kernels follow a block table",
        )
    return BackendChoice(
        kind="virtual",
        driver="host",
        reason="no GPU driver is built in yet; the host driver maps memfd pages on any Linux",
    )


def create_kv_backend(config: KVCacheConfig, kind: str = "auto") -> KVBackend:
    """Make the backend that ``kind`` (``"auto"``, ``"virtual"`` or ``"paged"``) stands for.

    Raises:
        ConfigError: a value in ``config`` or ``kind`` can never work.
    """
    if choose_backend(kind).kind == "paged":
        return PagedKVCache(config)
    return VirtualKVCache(config)
