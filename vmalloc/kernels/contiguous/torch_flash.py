"""torch's own FlashAttention-2 over slots, decode and prefill: always there, so the default.

``aten::_flash_attention_forward`` wants one packed K, ``[total_k, num_kv_heads, head_dim]``. All
slots are seen as that, ``cum_seq_k`` holds where each sequence's slot begins, and ``seqused_k`` its
length; with lengths given the kernel reads of ``cum_seq_k`` the beginnings alone (torch 2.11,
``block_info.h``), so slots may come in any order with gaps between. Loads are masked per row as in
flash-attn 2: nothing past a sequence's end is read. It has no soft-cap, and splits the keys of a
decode only where several query heads share a KV head. A row's last bits may depend on its mates.

Torch 2.8 to 2.13 differ in what else the operator takes; what is passed here is in all of them.

Owns: nothing.  Thread-safety: launches go to the caller's current stream. Not yet run on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any, Final

import torch

from ..buckets import bucket_rows
from .case import INT32_LIMIT, AttentionCase, aligned, flash_refusal
from .decode_rows import decode_rows
from .padding import zero_padding

if TYPE_CHECKING:
    from torch import Tensor

    from ..attention_call import AttentionCall

_NEEDED: Final = ("scale", "window_size_left", "window_size_right", "seqused_k")


@cache
def operator_absence() -> str | None:
    """Why this torch's operator will not do, None if it will."""
    if not hasattr(torch.ops.aten, "_flash_attention_forward"):
        return f"torch {torch.__version__} has no _flash_attention_forward"
    schema = torch.ops.aten._flash_attention_forward.default._schema
    names = {argument.name for argument in schema.arguments}
    missing = [name for name in _NEEDED if name not in names]
    if missing:
        return f"_flash_attention_forward of torch {torch.__version__} takes no {missing[0]}"
    return None


class TorchFlash:
    """``SlotKernel``; ``operator`` is torch's, or what is called in its place."""

    name: Final = "torch"
    lookahead_rows: Final = 0
    is_graph_safe: Final = True

    def __init__(self, operator: Callable[..., Any] | None = None) -> None:
        self._operator = operator

    def absence(self) -> str | None:
        if self._operator is None and not torch.backends.cuda.is_flash_attention_available():
            return f"torch {torch.__version__} was built without FlashAttention"
        return operator_absence()

    def refusal(self, case: AttentionCase) -> str | None:
        return flash_refusal(case) or packing_refusal(case)

    def attend(self, call: AttentionCall) -> Tensor:
        view = call.view
        slot_rows = call.k_cache.stride(0) // call.k_cache.stride(1)
        if view.max_seqlen_q == 1:
            rows = decode_rows(view, call.query.shape[0], slot_rows)
            return self._run(call, rows.starts, rows.slot_starts, rows.lengths)
        slot_starts = torch.nn.functional.pad(view.cache_batch_idx * slot_rows, (0, 1))
        attended = self._run(call, view.cu_seqlens_q, slot_starts, view.seqused_k)
        return zero_padding(attended, view)

    def _run(
        self, call: AttentionCall, cu_seqlens_q: Tensor, slot_starts: Tensor, lengths: Tensor
    ) -> Tensor:
        has_window = call.window_left >= 0
        operator = self._operator or torch.ops.aten._flash_attention_forward
        attended: Tensor = operator(
            aligned(call.query),
            as_packed(call.k_cache),
            as_packed(call.v_cache),
            cu_seqlens_q,
            slot_starts,
            call.view.max_seqlen_q,
            bucket_rows(call.view.max_seqlen_k, call.k_cache.shape[1]),
            0.0,
            True,
            False,
            scale=call.softmax_scale,
            window_size_left=call.window_left if has_window else None,
            # A right side of 0 would keep the queries of a group from sharing a tile.
            window_size_right=0 if has_window else None,
            seqused_k=lengths,
        )[0]
        return attended


def packing_refusal(case: AttentionCase) -> str | None:
    """Why the slots cannot be seen as one packed K and V, None if they can."""
    if case.has_softcap:
        return "it has no soft-cap"
    if case.slot_rows is None:
        return "slots are no whole number of rows apart, or K and V differ in it"
    if case.num_slots * case.slot_rows >= INT32_LIMIT:
        return (
            f"{case.num_slots} slots of {case.slot_rows} rows are {case.num_slots * case.slot_rows}"
            f" rows, must be less than {INT32_LIMIT}"
        )
    return None


def as_packed(cache: Tensor) -> Tensor:
    """``[total_k, num_kv_heads, head_dim]`` over the rows of all slots, gaps included."""
    num_slots, num_rows, num_kv_heads, head_dim = cache.shape
    slot_stride, row_stride, head_stride, _ = cache.stride()
    return cache.as_strided(
        ((num_slots - 1) * (slot_stride // row_stride) + num_rows, num_kv_heads, head_dim),
        (row_stride, head_stride, 1),
    )
