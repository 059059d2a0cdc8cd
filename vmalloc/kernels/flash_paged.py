"""flash-attn's own paged attention, where it is installed and can take the case.

Asked of flash-attn 2.8: float16 or bfloat16, blocks of a multiple of 256 rows, one head_dim up to
256 for K and V that is a multiple of 8 (others it pads by copying the whole cache), 16-byte aligned
strides, no sinks. It picks its number of splits by the batch, so unlike the Triton kernels a row's
last bits may depend on its batch mates. Not yet run on a GPU.

Owns: nothing.  Thread-safety: launches go to the caller's current stream.
"""

from __future__ import annotations

import importlib
from functools import cache
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .attention_call import AttentionCall

BLOCK_SIZE_MULTIPLE: Final = 256
MAX_HEAD_DIM: Final = 256
ALIGNMENT_BYTES: Final = 16


@cache
def load_flash_attn() -> Any | None:
    """The ``flash_attn`` module, or None where it is absent or does not load."""
    try:
        module = importlib.import_module("flash_attn")
    except (ImportError, OSError):  # a build for another torch fails with undefined symbols
        return None
    needed = ("flash_attn_varlen_func", "flash_attn_with_kvcache")
    return module if all(hasattr(module, name) for name in needed) else None


def can_attend(k_cache: Tensor, v_cache: Tensor, sinks: Tensor | None) -> bool:
    """Whether flash-attn takes this cache; says nothing about its being installed."""
    head_dim = k_cache.shape[3]
    return (
        sinks is None
        and k_cache.dtype in (torch.float16, torch.bfloat16)
        and k_cache.shape[1] % BLOCK_SIZE_MULTIPLE == 0
        and v_cache.shape[3] == head_dim
        and head_dim <= MAX_HEAD_DIM
        and _is_aligned(k_cache)
        and _is_aligned(v_cache)
    )


def attend(flash_attn: Any, call: AttentionCall) -> Tensor:
    """``call.out``, or a new tensor in its place, filled, padding rows included."""
    settings = {
        "softmax_scale": call.softmax_scale,
        "causal": True,
        "window_size": (call.window_left, 0 if call.window_left >= 0 else -1),
        "softcap": call.softcap,
        "block_table": call.view.block_table,
    }
    run = _decode if call.view.max_seqlen_q == 1 else _varlen
    attended = run(flash_attn, call, settings)
    return attended if call.out is None else call.out.copy_(attended)


def _decode(flash_attn: Any, call: AttentionCall, settings: dict[str, Any]) -> Tensor:
    """One row per sequence, by the kernel that splits the keys.

    It wants row ``i`` to be sequence ``i``, but padded batches have sequences without a row: rows
    are gathered first, and those of empty sequences end in a spare row that is dropped.
    """
    query, view = call.query, call.view
    starts, ends = view.cu_seqlens_q[:-1], view.cu_seqlens_q[1:]
    num_rows = query.shape[0]
    rows = torch.where(ends > starts, starts, num_rows).long()
    attended = flash_attn.flash_attn_with_kvcache(
        query[rows.clamp(max=num_rows - 1)].unsqueeze(1),
        call.k_cache,
        call.v_cache,
        cache_seqlens=view.seqused_k,
        **settings,
    )
    filled = query.new_zeros((num_rows + 1, *call.out_shape[1:]))
    filled[rows] = attended[:, 0]
    return filled[:num_rows]


def _varlen(flash_attn: Any, call: AttentionCall, settings: dict[str, Any]) -> Tensor:
    """Prefill and mixed batches. flash-attn leaves padding rows undefined; they become 0."""
    query, view = call.query, call.view
    cu_seqlens_k = torch.nn.functional.pad(view.seqused_k.cumsum(0, dtype=torch.int32), (1, 0))
    attended = flash_attn.flash_attn_varlen_func(
        query,
        call.k_cache,
        call.v_cache,
        cu_seqlens_q=view.cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        max_seqlen_q=view.max_seqlen_q,
        max_seqlen_k=view.max_seqlen_k,
        **settings,
    )
    is_row = torch.arange(query.shape[0], device=query.device) < view.cu_seqlens_q[-1]
    return torch.where(is_row[:, None, None], attended, 0)


def _is_aligned(cache: Tensor) -> bool:
    steps = [cache.data_ptr(), cache.shape[3] * cache.element_size()]
    steps += [stride * cache.element_size() for stride in cache.stride()[:3]]
    return all(step % ALIGNMENT_BYTES == 0 for step in steps)
