"""Which attention kernels work on a KV cache: chosen once at start, by device and cache layout.

Owns: nothing.  Thread-safety: any thread; the kernels say themselves what they allow.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import torch

from ..errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

    from ..backend import KVBatchView
    from ..config import LayerKVSpec


class AttentionKernels(Protocol):
    """Cache writes and attention over one cache's views, on one kind of device."""

    @property
    def name(self) -> str:
        """``"cpu"``, ``"cuda-slots"`` (one address range a sequence) or ``"cuda-blocks"``."""
        ...

    @property
    def lookahead_rows(self) -> int:
        """Rows past a sequence's end that a kernel may read; the cache must back as many."""
        ...

    @property
    def is_graph_safe(self) -> bool:
        """Whether batches of one new row a sequence may be captured into a CUDA graph."""
        ...

    def append_kv(
        self, key: Tensor, value: Tensor, k_cache: Tensor, v_cache: Tensor, view: KVBatchView
    ) -> None:
        """Write the packed new rows ``[total_q, num_kv_heads, head_dim]`` where they belong."""
        ...

    def varlen_attention(
        self,
        query: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        view: KVBatchView,
        *,
        softmax_scale: float,
        window_left: int = -1,
        softcap: float = 0.0,
        sinks: Tensor | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        """Attend ``query [total_q, num_heads, k_head_dim]`` to the cached rows up to its own.

        Rows past ``view.cu_seqlens_q[-1]`` are padding and give 0. ``window_left`` -1: all keys;
        ``softcap`` 0: no cap; ``sinks``: ``[num_heads]`` float32, one more logit a head.
        """
        ...

    def kernel_name(self, view: KVBatchView) -> str:
        """Which kernel attends such a batch in the first layer, without soft-cap or sinks."""
        ...


def select_kernels(
    layers: Sequence[LayerKVSpec],
    *,
    device: torch.device | str,
    has_block_table: bool,
    num_heads: int | None = None,
    prefer: Sequence[str] = (),
) -> AttentionKernels:
    """Choose the kernels for a cache of ``layers``.

    Args:
        layers: what the cache stores.
        device: where its tensors live.
        has_block_table: whether batches come with a block table (the paged backend).
        num_heads: query heads; None: as many as KV heads.
        prefer: names of kernels to use instead of the default order, the first that takes a call;
            a call that none of them takes is a ``ConfigError``. Empty: the default order.

    Raises:
        ConfigError: an unknown device or kernel, or no kernel that takes these layers.
    """
    kind = torch.device(device).type
    if kind == "cpu":
        if prefer:
            raise ConfigError(f"prefer is {list(prefer)}; the CPU kernels leave no choice")
        from .cpu import CpuKernels

        return CpuKernels()
    if kind != "cuda":
        raise ConfigError(f"device is {str(device)!r}; there are kernels for cpu and cuda")
    if has_block_table:
        from .paged import PagedKernels

        return PagedKernels(prefer)
    from .contiguous.dispatch import ContiguousKernels

    return ContiguousKernels(layers, device, num_heads=num_heads, prefer=prefer)
