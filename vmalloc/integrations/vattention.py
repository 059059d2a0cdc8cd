"""The module API of vAttention's artifact (arXiv 2405.04437) over vmalloc: change one import.

``import vmalloc.integrations.vattention as vattention`` instead of ``import vattention``.

Owns: the one cache of the process, as the original does.  Thread-safety: all functions.

Names, order of arguments and meaning are the original's. What differs:

- Sizes that can never work, lengths beyond the maximum and slots that there are not raise
  ``ConfigError``; too little memory raises ``OutOfPagesError`` (a ``RuntimeError``, as theirs is),
  and no active sequence has lost anything then. Nothing ends the process.
- Any ``max_context_length`` works, and any page that the driver can map, be it smaller than a token
  or no multiple of one: slots start on pages, which the tensors' strides know.
- ``device`` may be ``"cpu"``. A page of less than the driver's granularity (2 MiB on today's
  NVIDIA GPUs) needs the original's patched driver and is refused.
- Pages are unmapped only once the work is done that torch's current stream had at the time.
- With deferred reclamation off a freed slot's pages go at once rather than one a step.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from threading import Lock

import torch
from torch import Tensor

from ..elastic import DriverChoice
from ..errors import ClosedError, ConfigError
from .vattention_cache import OutOfPagesError, VAttentionCache

__all__ = [
    "OutOfPagesError",
    "alloc_new_batch_idx",
    "cleanup",
    "free_batch_idx",
    "init_kvcache",
    "map_common_pages",
    "num_free_kvblocks",
    "release_kvcache_physical",
    "reserve_physical_pages",
    "set_deferred_reclamation",
    "set_verbose",
    "show_allocator_state",
    "show_kvcache_config",
    "step",
    "step_async",
]

_cache: VAttentionCache | None = None
_cache_lock = Lock()  # while it changes
_is_verbose = False
_TWO_CACHES = "there is a KV cache already; call cleanup() before another init_kvcache"


def init_kvcache(
    num_layers: int,
    num_kv_heads: int,
    head_size: int,
    max_batch_size: int,
    max_context_length: int,
    device: int | str | torch.device,
    dtype: torch.dtype,
    page_size: int = 2 << 20,
    megacache: bool = False,
    *,
    lookahead_tokens: int = 0,
    zero_on_reuse: bool = False,
    driver: DriverChoice = "auto",
) -> list[Tensor]:
    """Reserve the addresses of K and V for every slot; nothing is mapped.

    Args:
        device: number of a CUDA device, or ``"cpu"``, ``"cuda"``, ``"cuda:N"``.
        page_size: bytes of a physical page.
        megacache: one K and one V tensor over all layers instead of a pair a layer.
        lookahead_tokens: rows past each length that are backed too, for kernels that read whole
            tiles (FlashAttention-3's TMA: 255).
        zero_on_reuse: a new sequence finds zeros, not what the slot's last one left.
        driver: as in ``KVCacheConfig``; for tests.

    Returns:
        Per layer: K of every layer, then V of every layer, each ``[max_batch_size,
        max_context_length, num_kv_heads, head_size]``. Megacache: K and V, each
        ``[max_batch_size, max_context_length, num_layers, num_kv_heads, head_size]``.

    Raises:
        ConfigError: a value can never work, or there is a cache already (``cleanup`` first).
    """
    global _cache
    if _cache is not None:
        raise ConfigError(_TWO_CACHES)
    if not isinstance(dtype, torch.dtype):
        raise ConfigError(f"dtype is {dtype!r}; it must be a torch.dtype")
    cache = VAttentionCache(
        num_layers,
        num_kv_heads,
        head_size,
        max_batch_size,
        max_context_length,
        device,
        dtype,
        page_size,
        megacache,
        lookahead_tokens=lookahead_tokens,
        zero_on_reuse=zero_on_reuse,
        driver=driver,
    )
    with _cache_lock:
        is_first = _cache is None
        if is_first:
            _cache = cache
    if not is_first:  # another thread was faster
        cache.close()
        raise ConfigError(_TWO_CACHES)
    return cache.tensors()


def reserve_physical_pages(free_memory: int) -> int:
    """Take so many bytes from the device for the pool, in whole blocks; the pool's pages.

    A block is a page in every tensor. The pool never shrinks: less than it has changes nothing.

    Raises:
        OutOfPagesError: the device has not so much; the pool is as before.
    """
    return _required().reserve_pages(free_memory)


def alloc_new_batch_idx(seqlen: int) -> int:
    """An inactive slot for a sequence of ``seqlen`` tokens, marked active; -1 if there is none.

    The best fit: of the slots that have enough pages from before the one with the fewest, else the
    one with the most. Nothing is mapped.
    """
    return _required().alloc(seqlen)


def step(seq_lens: Sequence[int], eager_reclaim: bool = False) -> None:
    """Back ``seq_lens[i]`` rows of every slot i before returning; 0 is an inactive slot.

    Args:
        seq_lens: one length a slot, ``max_batch_size`` of them.
        eager_reclaim: take the pages of inactive slots first.

    Raises:
        OutOfPagesError: there are too few pages; lengths are as before, and no rows are lost.
        ConfigError: a length is negative or beyond the maximum, or there are too many or too few.
    """
    _required().step(seq_lens, eager_reclaim, commit_ahead=False)


def step_async(seq_lens: Sequence[int]) -> None:
    """As ``step``; then a thread backs the rows that the next steps need, meanwhile."""
    _required().step(seq_lens, False, commit_ahead=True)


def free_batch_idx(batch_idx: int) -> None:
    """Make a slot inactive. Its pages stay in it, unless deferred reclamation is off."""
    _required().free(batch_idx)


def num_free_kvblocks() -> int:
    """Blocks that can still be given out: free ones, and those that slots have but do not need."""
    return _required().num_free_blocks()


def set_deferred_reclamation(val: bool) -> None:
    """Whether freed slots keep their pages until a step is short of them; they do by default."""
    _required().is_deferred = bool(val)


def map_common_pages(num_tokens: int) -> None:
    """Back the first rows of all slots with the same memory, up to a row that ends on a page.

    Writes through one slot show in all. The memory comes free once no slot has it.

    Raises:
        ConfigError: a slot has pages already.
        OutOfPagesError: there are too few pages; nothing was changed.
    """
    _required().map_common(num_tokens)


def release_kvcache_physical() -> None:
    """Give the memory of inactive slots, and what is free, back to the system.

    The original's engine calls this, and its module has no such function.
    """
    _required().release_inactive()


def cleanup() -> None:
    """Unmap and give back everything; tensors that are left keep their addresses. Idempotent.

    In a forked child there is nothing to give back, and ``init_kvcache`` may begin anew.
    """
    global _cache
    with _cache_lock:
        cache, _cache = _cache, None
    if cache is not None:
        with suppress(ClosedError):
            cache.close()


def set_verbose(val: bool) -> None:
    """Whether the ``show`` functions print to standard output; they do not by default."""
    global _is_verbose
    _is_verbose = bool(val)


def show_kvcache_config() -> None:
    """Print the sizes, if verbose."""
    cache = _required()
    _log(
        f"Num layers: {cache.num_layers}",
        f"Num kv_heads: {cache.num_kv_heads}",
        f"Head size: {cache.head_size}",
        f"Max batch size: {cache.max_batch_size}",
        f"Max context length: {cache.max_context_length}",
        f"Bytes per elem: {cache.dtype.itemsize}",
        f"virt_buff_size_per_req: {cache.slot_bytes}",
        f"virt_buff_size: {cache.slot_bytes * cache.max_batch_size}",
        f"Page size: {cache.page_bytes}",
        f"KV block size: {cache.block_bytes}",
        f"Megacache: {cache.megacache}",
    )


def show_allocator_state() -> None:
    """Print the free pool and, per slot, length, blocks mapped and required; if verbose."""
    _log(*_required().describe_slots())


def _required() -> VAttentionCache:
    if _cache is None:
        raise ConfigError("there is no KV cache; call init_kvcache first")
    return _cache


def _log(*lines: str) -> None:
    if _is_verbose:
        print(*lines, sep="\n")
