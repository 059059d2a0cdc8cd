"""One attention call, checked: what every GPU kernel is handed.

Owns: nothing.  Thread-safety: immutable.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from ..backend import KVBatchView


@dataclass(frozen=True, slots=True)
class AttentionCall:
    """The arguments of ``select.AttentionKernels.varlen_attention``.

    Attributes:
        query: ``[total_q, num_heads, k_head_dim]``, rows past ``view.cu_seqlens_q[-1]`` padding.
        k_cache, v_cache: ``[num_slots, rows, num_kv_heads, head_dim]``, one layer's views, or
            ``[num_blocks, block_size, ...]`` where ``view`` has a block table.
        softmax_scale, window_left, softcap, sinks: -1, 0 and None for no window, cap and sinks.
        out: ``[total_q, num_heads, v_head_dim]`` to write to, or None.
    """

    query: Tensor
    k_cache: Tensor
    v_cache: Tensor
    view: KVBatchView
    softmax_scale: float
    window_left: int
    softcap: float
    sinks: Tensor | None
    out: Tensor | None

    @property
    def out_shape(self) -> tuple[int, int, int]:
        return (self.query.shape[0], self.query.shape[1], self.v_cache.shape[3])

    @property
    def is_empty(self) -> bool:
        """Whether there is no row to attend, padding aside."""
        return (
            self.query.shape[0] == 0
            or self.view.max_seqlen_q == 0
            or self.view.seqused_k.shape[0] == 0
        )

    def zeroed_out(self) -> Tensor:
        """``out``, or a new tensor in its place, full of zeros."""
        if self.out is None:
            return self.query.new_zeros(self.out_shape)
        return self.out.zero_()


def on_device(device: torch.device) -> AbstractContextManager[Any]:
    """Make ``device`` the current one, which is where Triton and others launch."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
