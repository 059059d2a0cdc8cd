"""What a kernel must know of a call to say whether it can take it: shapes, never data.

Owns: nothing.  Thread-safety: immutable.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from ...config import LayerKVSpec
    from ..attention_call import AttentionCall

ALIGNMENT_BYTES: Final = 16
"""What vectorised loads ask of every address."""

INT32_LIMIT: Final = 2**31


@dataclass(frozen=True, slots=True)
class AttentionCase:
    """A call without its data. Equal cases are answered by the same kernel.

    Attributes:
        device: of the tensors.
        dtype: of query and caches.
        num_heads, num_kv_heads, k_head_dim, v_head_dim: of the model.
        num_slots, num_rows: of the cache views.
        k_strides, v_strides: elements between slots, rows and heads.
        is_aligned: whether every row of both caches begins at 16 bytes.
        has_window, has_softcap, has_sinks: what the call asks for.
        is_decode: whether no sequence has more than one new row.
    """

    device: torch.device
    dtype: torch.dtype
    num_heads: int
    num_kv_heads: int
    k_head_dim: int
    v_head_dim: int
    num_slots: int
    num_rows: int
    k_strides: tuple[int, int, int]
    v_strides: tuple[int, int, int]
    is_aligned: bool
    has_window: bool
    has_softcap: bool
    has_sinks: bool
    is_decode: bool

    @property
    def slot_rows(self) -> int | None:
        """Rows from one slot to the next; None where that is no whole number, or K and V differ."""
        (k_slot, k_row, _), (v_slot, v_row, _) = self.k_strides, self.v_strides
        if k_slot % k_row or v_slot % v_row or k_slot // k_row != v_slot // v_row:
            return None
        return k_slot // k_row


def case_of(call: AttentionCall) -> AttentionCase:
    """The case of a checked call."""
    k_cache, v_cache = call.k_cache, call.v_cache
    num_slots, num_rows, num_kv_heads, k_head_dim = k_cache.shape
    k_slot, k_row, k_head, _ = k_cache.stride()
    v_slot, v_row, v_head, _ = v_cache.stride()
    return AttentionCase(
        device=k_cache.device,
        dtype=k_cache.dtype,
        num_heads=call.query.shape[1],
        num_kv_heads=num_kv_heads,
        k_head_dim=k_head_dim,
        v_head_dim=v_cache.shape[3],
        num_slots=num_slots,
        num_rows=num_rows,
        k_strides=(k_slot, k_row, k_head),
        v_strides=(v_slot, v_row, v_head),
        is_aligned=is_aligned(k_cache) and is_aligned(v_cache),
        has_window=call.window_left >= 0,
        has_softcap=call.softcap > 0,
        has_sinks=call.sinks is not None,
        is_decode=call.view.max_seqlen_q <= 1,
    )


def expected_case(layer: LayerKVSpec, num_heads: int | None, device: torch.device) -> AttentionCase:
    """The case of a decode of ``layer``, before there is a cache: all that depends on it fits."""
    dtype: torch.dtype = getattr(torch, layer.dtype)
    k_strides = (0, layer.num_kv_heads * layer.k_head_dim, layer.k_head_dim)
    v_strides = (0, layer.num_kv_heads * layer.v_head_dim, layer.v_head_dim)
    row_bytes = [stride * dtype.itemsize for stride in (layer.k_head_dim, layer.v_head_dim)]
    return AttentionCase(
        device=device,
        dtype=dtype,
        num_heads=num_heads or layer.num_kv_heads,
        num_kv_heads=layer.num_kv_heads,
        k_head_dim=layer.k_head_dim,
        v_head_dim=layer.v_head_dim,
        num_slots=1,
        num_rows=ALIGNMENT_BYTES,
        k_strides=k_strides,
        v_strides=v_strides,
        is_aligned=all(size % ALIGNMENT_BYTES == 0 for size in row_bytes),
        has_window=layer.window is not None,
        has_softcap=False,
        has_sinks=False,
        is_decode=True,
    )


def is_aligned(tensor: Tensor) -> bool:
    """Whether every row of the last dimension begins at a multiple of 16 bytes."""
    size = tensor.element_size()
    steps = [tensor.data_ptr(), *(stride * size for stride in tensor.stride()[:-1])]
    return all(step % ALIGNMENT_BYTES == 0 for step in steps)


def aligned(query: Tensor) -> Tensor:
    """``query``, copied if its rows do not begin at multiples of 16 bytes."""
    return query if is_aligned(query) else query.contiguous()


def flash_refusal(case: AttentionCase) -> str | None:
    """Why kernels of the FlashAttention family, 2 and 3, cannot take a case; None if they may."""
    if case.device.type != "cuda":
        return f"it runs on cuda and the cache is on {case.device}"
    if torch.cuda.get_device_capability(case.device) < (8, 0):
        return "it needs compute capability 8.0"
    return shape_refusal(case)


def shape_refusal(case: AttentionCase) -> str | None:
    """The part of ``flash_refusal`` that asks no device."""
    if case.dtype not in (torch.float16, torch.bfloat16):
        return f"it takes float16 and bfloat16, not {case.dtype}"
    if case.has_sinks:
        return "it knows no sinks"
    if case.k_head_dim != case.v_head_dim:
        return f"head dims of K and V differ, {case.k_head_dim} and {case.v_head_dim}"
    if case.k_head_dim > 256 or case.k_head_dim % 8:
        return f"head_dim is {case.k_head_dim}, must be a multiple of 8, at most 256"
    if not case.is_aligned:
        return "rows of the cache do not begin at multiples of 16 bytes"
    widest = max(case.k_strides[1], case.v_strides[1])
    if 256 * widest >= INT32_LIMIT:  # the one product it takes in 32 bits
        return f"rows are {widest} elements apart, must be less than {INT32_LIMIT // 256}"
    return None
