"""torch's scaled_dot_product_attention, one sequence after the other: where nothing else can.

Slices are cut to each sequence's length, so nothing past its end is read. Lengths are read on the
host and shapes follow them: a call waits for the GPU and cannot be captured into a graph.

Owns: nothing.  Thread-safety: any thread.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import torch
from torch.nn.functional import scaled_dot_product_attention

from .case import AttentionCase

if TYPE_CHECKING:
    from torch import Tensor

    from ..attention_call import AttentionCall


class SdpaPerSequence:
    """``SlotKernel``."""

    name: Final = "sdpa"
    lookahead_rows: Final = 0
    is_graph_safe: Final = False

    def absence(self) -> str | None:
        return None

    def refusal(self, case: AttentionCase) -> str | None:
        if case.has_softcap or case.has_sinks:
            return "it knows neither soft-cap nor sinks"
        return None

    def attend(self, call: AttentionCall) -> Tensor:
        out = call.zeroed_out()
        bounds = call.view.cu_seqlens_q.tolist()
        lengths = call.view.seqused_k.tolist()
        for i, slot in enumerate(call.view.cache_batch_idx.tolist()):
            new = slice(bounds[i], bounds[i + 1])
            if new.stop > new.start:
                out[new] = _attend_one(call, call.query[new], slot, lengths[i])
        return out


def _attend_one(call: AttentionCall, query: Tensor, slot: int, length: int) -> Tensor:
    """``[num_new, num_heads, v_head_dim]`` of one sequence."""
    num_new = query.shape[0]
    first = 0 if call.window_left < 0 else max(0, length - num_new - call.window_left)
    positions = torch.arange(length - num_new, length, device=query.device)[:, None]
    keys = torch.arange(first, length, device=query.device)[None]
    mask = keys <= positions
    if call.window_left >= 0:
        mask &= keys >= positions - call.window_left
    attended = scaled_dot_product_attention(
        query.transpose(0, 1)[None],
        call.k_cache[slot, first:length].transpose(0, 1)[None],
        call.v_cache[slot, first:length].transpose(0, 1)[None],
        attn_mask=mask,
        scale=call.softmax_scale,
        enable_gqa=True,
    )
    return attended[0].transpose(0, 1)
