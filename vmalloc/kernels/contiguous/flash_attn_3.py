"""FlashAttention-3 over slots, through an identity page table or, opt-in, through TMA.

With a page table whose pages are too small for TMA, K and V are copied row by row under a mask
(hopper's ``paged_kv.h``): no row past a sequence's end is read. The identity table names page ``j``
of slot ``s`` by its place in memory, and ``cache_batch_idx`` picks the slot's line of it, so the
table is a constant. ``fa3-tma`` hands the plain views over instead: TMA loads whole tiles, at most
256 rows, whatever the length. So up to 255 rows past the end must be backed, and hold finite
numbers in V: their weight is 0, and 0 times NaN is NaN. The cache must then clear fresh pages.

Owns: the identity tables made so far.
Thread-safety: launches go to the caller's current stream. Not yet run on a GPU.
"""

from __future__ import annotations

import importlib
from functools import cache
from typing import TYPE_CHECKING, Any, Final

import torch

from ..buckets import bucket_rows
from .case import AttentionCase, aligned, flash_refusal
from .decode_rows import decode_rows
from .padding import zero_padding

if TYPE_CHECKING:
    from torch import Tensor

    from ..attention_call import AttentionCall

PAGE_ROWS: Final = 16
TMA_ROWS: Final = 256
"""Most rows of one TMA box, so of any tile."""


@cache
def load_flash_attn_3() -> Any | None:
    """The module ``flash_attn_interface``, or None where it is absent or does not load."""
    try:
        module = importlib.import_module("flash_attn_interface")
    except (ImportError, OSError):  # a build for another torch fails with undefined symbols
        return None
    return module if hasattr(module, "flash_attn_with_kvcache") else None


class FlashAttn3:
    """``SlotKernel``; ``module`` is ``flash_attn_interface``, or None to look for it."""

    is_graph_safe: Final = True

    def __init__(self, *, use_tma: bool = False, module: Any = None) -> None:
        self.name: Final = "fa3-tma" if use_tma else "fa3"
        self.lookahead_rows: Final = TMA_ROWS - 1 if use_tma else 0
        self._use_tma = use_tma
        self._module: Any = module or load_flash_attn_3()
        self._tables: dict[tuple[torch.device, int, int], Tensor] = {}

    def absence(self) -> str | None:
        if self._module is None:
            return "flash_attn_interface (FlashAttention-3) is not installed or does not load"
        return None

    def refusal(self, case: AttentionCase) -> str | None:
        refusal = flash_refusal(case)
        if refusal is not None:
            return refusal
        if torch.cuda.get_device_capability(case.device)[0] not in (8, 9):
            return "it runs on compute capabilities 8 and 9"
        return None if self._use_tma else page_refusal(case)

    def attend(self, call: AttentionCall) -> Tensor:
        view, query = call.view, aligned(call.query)
        arguments = self._cache_arguments(call) | {
            "softmax_scale": call.softmax_scale,
            "causal": True,
            "window_size": (call.window_left, 0 if call.window_left >= 0 else -1),
            "softcap": call.softcap,
        }
        attended: Tensor
        if view.max_seqlen_q == 1:
            rows = decode_rows(view, query.shape[0], call.k_cache.shape[1])
            attended = self._module.flash_attn_with_kvcache(
                query.unsqueeze(1),
                cache_seqlens=rows.lengths,
                cache_batch_idx=rows.slots,
                **arguments,
            )
            return attended.squeeze(1)
        attended = self._module.flash_attn_with_kvcache(
            query,
            cache_seqlens=view.seqused_k,
            cache_batch_idx=view.cache_batch_idx,
            cu_seqlens_q=view.cu_seqlens_q,
            max_seqlen_q=view.max_seqlen_q,
            **arguments,
        )
        return zero_padding(attended, view)

    def _cache_arguments(self, call: AttentionCall) -> dict[str, Any]:
        k_cache, v_cache = call.k_cache, call.v_cache
        bucket = bucket_rows(call.view.max_seqlen_k, k_cache.shape[1])
        if self._use_tma:
            return {"k_cache": k_cache[:, :bucket], "v_cache": v_cache[:, :bucket]}
        table = self._identity_table(k_cache)
        return {
            "k_cache": as_pages(k_cache),
            "v_cache": as_pages(v_cache),
            "page_table": table[:, : bucket // PAGE_ROWS],
        }

    def _identity_table(self, k_cache: Tensor) -> Tensor:
        num_slots, slot_pages = (
            k_cache.shape[0],
            k_cache.stride(0) // k_cache.stride(1) // PAGE_ROWS,
        )
        key = (k_cache.device, num_slots, slot_pages)
        table = self._tables.get(key)
        if table is None:
            pages = torch.arange(num_slots * slot_pages, dtype=torch.int32, device=k_cache.device)
            table = pages.view(num_slots, slot_pages)
            # What is made while a graph is captured holds nothing until that graph runs.
            if not (k_cache.is_cuda and torch.cuda.is_current_stream_capturing()):
                self._tables[key] = table
        return table


def page_refusal(case: AttentionCase) -> str | None:
    """Why slots cannot be seen as pages of ``PAGE_ROWS`` rows, None if they can."""
    slot_rows = case.slot_rows
    if slot_rows is None or slot_rows % PAGE_ROWS or case.num_rows % PAGE_ROWS:
        return (
            f"slots of {case.num_rows} rows, {slot_rows or 'a broken number of rows'} apart, are"
            f" no whole pages of {PAGE_ROWS}"
        )
    return None


def as_pages(cache: Tensor) -> Tensor:
    """``[num_pages, PAGE_ROWS, num_kv_heads, head_dim]`` over the same memory as the slots."""
    num_slots, num_rows, num_kv_heads, head_dim = cache.shape
    slot_stride, row_stride, head_stride, _ = cache.stride()
    slot_pages = slot_stride // row_stride // PAGE_ROWS
    return cache.as_strided(
        ((num_slots - 1) * slot_pages + num_rows // PAGE_ROWS, PAGE_ROWS, num_kv_heads, head_dim),
        (PAGE_ROWS * row_stride, row_stride, head_stride, 1),
    )
