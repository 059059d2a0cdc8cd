"""Choose and make a KV backend.

Owns: nothing.  Thread-safety: all functions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from .backend import KVBackend
from .config import KVCacheConfig
from .core_setup import cuda_absence, make_driver
from .device import check_device, resolve_driver
from .errors import ConfigError
from .kv_cache import VirtualKVCache
from .paged_cache import PagedKVCache

BackendKind = Literal["auto", "virtual", "paged"]

_PAGED_ON = {
    "host": "blocks are in ordinary memory and kernels follow a block table",
    "torch": "blocks are in torch tensors, taken at start, and kernels follow a block table",
    "null": "the null driver counts blocks and holds no memory",
}
_VIRTUAL_ON = {
    "host": "the host driver maps memfd pages on any Linux",
    "cuda": "the CUDA driver maps pages of device memory",
    "null": "the null driver counts pages and holds no memory",
}


@dataclass(frozen=True, slots=True)
class BackendChoice:
    """What a kind stands for on this machine, and why, in one sentence for people.

    Attributes:
        kind: ``"virtual"`` or ``"paged"``.
        driver: where its memory comes from: ``"host"``, ``"cuda"``, ``"torch"`` (a paged backend
            on a CUDA device) or ``"null"``.
    """

    kind: Literal["virtual", "paged"]
    driver: str
    reason: str


def choose_backend(kind: str = "auto", device: str = "cpu", driver: str = "auto") -> BackendChoice:
    """Say which backend ``kind`` stands for on ``device`` of this machine.

    ``"auto"`` is virtual wherever its driver is present. A driver that is named stays what it is:
    where it is not there, the backend says so when it is made.

    Raises:
        ConfigError: an unknown kind, device or driver, or a pair that cannot work.
    """
    if kind not in ("auto", "virtual", "paged"):
        raise ConfigError(f"kv_backend is {kind!r}; supported: auto, virtual, paged")
    check_device(device, driver)
    if kind == "paged":
        return _choose_paged(device, driver, "asked for")
    if kind == "auto" and driver == "auto" and device != "cpu":
        absence = cuda_absence(device)
        if absence is not None:
            return _choose_paged(device, driver, f"virtual memory cannot be used: {absence}")
    resolved = resolve_driver(device, driver)
    reason = _VIRTUAL_ON[resolved]
    return BackendChoice("virtual", resolved, f"asked for; {reason}" if kind != "auto" else reason)


def create_kv_backend(config: KVCacheConfig, kind: str = "auto") -> KVBackend:
    """Make the backend that ``kind`` (``"auto"``, ``"virtual"`` or ``"paged"``) stands for.

    Raises:
        ConfigError: a value in ``config`` or ``kind`` can never work, or not on this machine.
    """
    if choose_backend(kind, config.device, config.driver).kind == "paged":
        return PagedKVCache(config)
    return VirtualKVCache(config)


def page_bytes_of(config: KVCacheConfig) -> int:
    """Bytes of a physical page of the virtual backend with these settings.

    Raises:
        ConfigError: the page size does not suit the driver, or there is no such device here.
    """
    return make_driver(config).page_bytes


def _choose_paged(device: str, driver: str, why: str) -> BackendChoice:
    resolved = resolve_driver(device, driver)
    memory = "torch" if resolved == "cuda" else resolved
    return BackendChoice("paged", memory, f"{why}; {_PAGED_ON[memory]}")
