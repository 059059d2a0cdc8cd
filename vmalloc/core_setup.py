"""From a config to the core's driver and arena.

Owns: nothing.  Thread-safety: stateless.
"""

from __future__ import annotations

from math import ceil

from . import _core
from .config import DEFAULT_PAGE_BYTES, DTYPE_BYTES, KVCacheConfig, LayerKVSpec
from .device import device_index
from .layout import KVLayout

MAX_SPARE_PAGES = 64
"""128 MiB of pages of 2 MiB: about a prompt of 1,024 tokens of a model with 128 KiB a token."""


def cuda_absence(device: str = "cuda") -> str | None:
    """Why the CUDA driver's virtual memory cannot be used on ``device``; None if it can.

    The library is ``libcuda.so.1``, or what ``VMALLOC_LIBCUDA`` names.
    """
    return _core.cuda_absence(device=device_index(device))


def make_driver(config: KVCacheConfig) -> _core.Driver:
    """The driver that ``config`` names.

    Raises:
        ConfigError: the page size does not suit it, or there is no such device here.
    """
    return open_driver(config.driver_name, config.device, config.page_bytes)


def open_driver(name: str, device: str, page_bytes: int | None) -> _core.Driver:
    """The driver ``name`` (``"host"``, ``"cuda"`` or ``"null"``) for tensors on ``device``.

    Raises:
        ConfigError: the page size does not suit it, or there is no such device here.
    """
    if name == "cuda":
        return _core.make_cuda_driver(
            page_bytes or 0, device_index(device), cpu_tensors=device == "cpu"
        )
    make = _core.make_null_driver if name == "null" else _core.make_host_driver
    return make(page_bytes or DEFAULT_PAGE_BYTES)


def make_arena(
    config: KVCacheConfig,
    driver: _core.Driver,
    layout: KVLayout,
    spare_pages: int | None = None,
) -> _core.KVArena:
    """An arena over ``driver`` with the slots of ``layout``.

    ``spare_pages``: free pages that the worker keeps created; None: what suits the driver.
    """
    max_pages = config.capacity_bytes // driver.page_bytes
    if spare_pages is None:
        spare_pages = _spare_pages(config, max_pages)
    return _core.KVArena(
        driver,
        layers=[_core_spec(layer) for layer in config.layers],
        layers_per_group=config.layers_per_group or len(config.layers),
        kv_split=config.kv_split,
        num_slots=layout.num_slots,
        max_rows=config.max_seq_len,
        max_pages=max_pages,
        low_pages=low_pages(config, max_pages),
        high_pages=high_pages(config, max_pages),
        ahead_rows=config.commit_ahead_tokens,
        lookahead_rows=config.lookahead_tokens,
        spare_pages=spare_pages,
        zero_on_reuse=config.zero_on_reuse or _mixes_dtypes(config),
        swap_bytes=config.swap_bytes,
        protect_shared=config.protect_shared,
    )


def low_pages(config: KVCacheConfig, max_pages: int) -> int:
    """Pages that new sequences leave to the running ones."""
    return int(max_pages * config.low_watermark)


def high_pages(config: KVCacheConfig, max_pages: int) -> int:
    """Pages that may stay created without being needed."""
    return ceil(max_pages * config.high_watermark)


def _spare_pages(config: KVCacheConfig, max_pages: int) -> int:
    """Pages that the worker keeps created on CUDA, where creating one takes the driver longest."""
    if config.driver_name != "cuda":
        return 0
    return min(MAX_SPARE_PAGES, max_pages // 16)


def _core_spec(layer: LayerKVSpec) -> _core.LayerKVSpec:
    return _core.LayerKVSpec(
        num_kv_heads=layer.num_kv_heads,
        k_head_dim=layer.k_head_dim,
        v_head_dim=layer.v_head_dim,
        element_bytes=DTYPE_BYTES[layer.dtype],
    )


def _mixes_dtypes(config: KVCacheConfig) -> bool:
    # Bits of one type read as another may be NaN, which a masked row must never hold.
    return len({layer.dtype for layer in config.layers}) > 1
