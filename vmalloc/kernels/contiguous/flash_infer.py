"""flashinfer's paged kernels over slots, through identity pages.

Its FA2-style kernels load K and V under a mask per row and fill with zeros, so with the length of
the last page they read nothing past a sequence's end. Strides are unsigned 32-bit elements, hence
small pages and never a page per slot. ``plan`` reads the lengths on the host: a call waits for the
GPU once per batch, so it cannot be captured, and decodes prefer every other GPU kernel. Kernels are
compiled when first used. Its backends for Hopper are not looked at; ``backend="fa2"`` it is.

Owns: a workspace, and the plan of the last batch.
Thread-safety: none; one engine thread. Not yet run on a GPU.
"""

from __future__ import annotations

import importlib
from functools import cache
from typing import TYPE_CHECKING, Any, Final

import torch

from ...errors import ConfigError
from .case import AttentionCase, aligned, flash_refusal
from .flash_attn_3 import PAGE_ROWS, as_pages, page_refusal

if TYPE_CHECKING:
    from torch import Tensor

    from ...backend import KVBatchView
    from ..attention_call import AttentionCall

HEAD_DIMS: Final = (64, 128, 256)
WORKSPACE_BYTES: Final = 128 << 20
UINT32_LIMIT: Final = 2**32


@cache
def load_flashinfer() -> Any | None:
    """The module, or None where it is absent or does not load."""
    try:
        module = importlib.import_module("flashinfer")
    except (ImportError, OSError, RuntimeError):  # RuntimeError: it looks for a CUDA toolkit
        return None
    return module if hasattr(module, "BatchPrefillWithPagedKVCacheWrapper") else None


class FlashInfer:
    """``SlotKernel``; ``module`` is ``flashinfer``, or None to look for it."""

    name: Final = "flashinfer"
    lookahead_rows: Final = 0
    is_graph_safe: Final = False

    def __init__(self, module: Any = None) -> None:
        self._module: Any = module or load_flashinfer()
        self._planned: tuple[KVBatchView, tuple[object, ...]] | None = None
        self._wrapper: Any = None
        self._num_rows = 0

    def absence(self) -> str | None:
        return None if self._module is not None else "flashinfer is not installed or does not load"

    def refusal(self, case: AttentionCase) -> str | None:
        return flash_refusal(case) or paging_refusal(case)

    def attend(self, call: AttentionCall) -> Tensor:
        if call.query.is_cuda and torch.cuda.is_current_stream_capturing():
            raise ConfigError("flashinfer plans on the host; it cannot be captured into a graph")
        self._plan(call)
        out = call.query.new_zeros(call.out_shape) if call.out is None else call.out
        out[self._num_rows :] = 0
        if self._num_rows:
            pages = (as_pages(call.k_cache), as_pages(call.v_cache))
            out[: self._num_rows] = self._wrapper.run(aligned(call.query)[: self._num_rows], pages)
        return out

    def _plan(self, call: AttentionCall) -> None:
        """Plan the batch, unless the last call, of another layer, was of the same view."""
        shape = (*call.query.shape[1:], *call.k_cache.shape, call.k_cache.stride(0))
        settings = (*shape, call.softmax_scale, call.window_left, call.softcap, call.query.dtype)
        planned = self._planned
        if planned is not None and planned[0] is call.view and planned[1] == settings:
            return
        pages = _pages(call)
        self._num_rows = int(pages["qo_indptr"][-1])
        self._planned = (call.view, settings)
        if self._num_rows == 0:
            return
        if self._wrapper is None:
            workspace = torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=call.query.device)
            self._wrapper = self._module.BatchPrefillWithPagedKVCacheWrapper(
                workspace, "NHD", backend="fa2"
            )
        self._wrapper.plan(
            **pages,
            num_qo_heads=call.query.shape[1],
            num_kv_heads=call.k_cache.shape[2],
            head_dim_qk=call.query.shape[2],
            page_size=PAGE_ROWS,
            causal=True,
            sm_scale=call.softmax_scale,
            window_left=call.window_left,
            logits_soft_cap=call.softcap,
            q_data_type=call.query.dtype,
            kv_data_type=call.k_cache.dtype,
        )


def _pages(call: AttentionCall) -> dict[str, Tensor]:
    """The batch in flashinfer's words. Sequences without new rows are left out."""
    view = call.view
    slot_pages = call.k_cache.stride(0) // call.k_cache.stride(1) // PAGE_ROWS
    bounds = view.cu_seqlens_q.tolist()
    slots, lengths = view.cache_batch_idx.tolist(), view.seqused_k.tolist()
    qo_indptr, kv_indptr = [0], [0]
    indices: list[int] = []
    last: list[int] = []
    for slot, length, start, end in zip(slots, lengths, bounds, bounds[1:], strict=False):
        if end == start:
            continue
        first, num_pages = slot * slot_pages, -(-length // PAGE_ROWS)
        indices += range(first, first + num_pages)
        qo_indptr.append(end)
        kv_indptr.append(len(indices))
        last.append(length - (num_pages - 1) * PAGE_ROWS)
    return {
        "qo_indptr": torch.tensor(qo_indptr, dtype=torch.int32),
        "paged_kv_indptr": torch.tensor(kv_indptr, dtype=torch.int32),
        "paged_kv_indices": torch.tensor(indices, dtype=torch.int32, device=view.seqused_k.device),
        "paged_kv_last_page_len": torch.tensor(last, dtype=torch.int32),
    }


def paging_refusal(case: AttentionCase) -> str | None:
    """Why the slots cannot be seen as flashinfer's pages, None if they can."""
    if case.k_head_dim not in HEAD_DIMS:
        return f"head_dim is {case.k_head_dim}, must be one of {HEAD_DIMS}"
    if case.k_strides != case.v_strides:
        return "strides of K and V differ"
    if case.k_strides[1] * PAGE_ROWS >= UINT32_LIMIT:
        return (
            f"a page spans {case.k_strides[1] * PAGE_ROWS} elements, must be below {UINT32_LIMIT}"
        )
    return page_refusal(case)
