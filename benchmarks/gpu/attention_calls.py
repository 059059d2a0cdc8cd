"""Kernel libraries called as they are, over one address range a sequence and over block tables.

Our own dispatch is measured beside these; they are the yardstick that has none of our code in it.

Owns: nothing.  Thread-safety: calls go to the caller's current stream.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vmalloc.backend import KVBatchView

from .caches import ModelShape

FLASH_ATTN_BLOCK = 256
"""flash-attn 2 wants blocks of a multiple of this."""


@dataclass(frozen=True)
class Batch:
    """Sequences of ``num_new`` new rows each over a cache, and every index tensor kernels ask for.

    Attributes:
        query: ``[batch * num_new, num_heads, head_dim]``.
        lengths: rows of each sequence, the new ones included.
        num_new: new rows of each.
        slots: slot of each.
        lens, slot_idx, cu_seqlens_q: the same as int32 tensors.
    """

    query: Tensor
    lengths: tuple[int, ...]
    num_new: int
    lens: Tensor
    slot_idx: Tensor
    cu_seqlens_q: Tensor

    @property
    def size(self) -> int:
        """Sequences."""
        return len(self.lengths)

    @property
    def scale(self) -> float:
        """Factor of the dot products."""
        return float(self.query.shape[2]) ** -0.5

    def view(self, max_seqlen_k: int, block_table: Tensor | None = None) -> KVBatchView:
        """What our kernels are handed."""
        slots = self.slot_idx if block_table is None else torch.zeros_like(self.slot_idx)
        return KVBatchView(
            slots, self.cu_seqlens_q, self.lens, self.num_new, max_seqlen_k, block_table
        )


def make_batch(
    shape: ModelShape, slots: Sequence[int], lengths: Sequence[int], num_new: int, device: str
) -> Batch:
    """A batch with a random query over sequences that are in the cache already."""

    def int32(values: Sequence[int]) -> Tensor:
        return torch.tensor(list(values), dtype=torch.int32, device=device)

    size = len(lengths)
    query = torch.randn(
        size * num_new, shape.num_heads, shape.head_dim, dtype=shape.torch_dtype, device=device
    )
    starts = range(0, (size + 1) * num_new, num_new)
    return Batch(query, tuple(lengths), num_new, int32(lengths), int32(slots), int32(starts))


def make_block_table(
    lengths: Sequence[int], block_size: int, num_blocks: int, device: str, seed: int = 0
) -> Tensor:
    """Blocks of every sequence, drawn without order: int32 ``[batch, max_blocks]``."""
    counts = [-(-length // block_size) for length in lengths]
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randperm(num_blocks, generator=generator, dtype=torch.int64)[: sum(counts)]
    table = torch.zeros(len(lengths), max(counts), dtype=torch.int32)
    for row, blocks in zip(table, drawn.split(counts), strict=True):
        row[: len(blocks)] = blocks.int()
    return table.to(device)


def torch_fa2(
    batch: Batch,
    k_cache: Tensor,
    v_cache: Tensor,
    max_seqlen_k: int,
    starts: Tensor | None = None,
) -> Tensor:
    """torch's own FlashAttention-2 over ``[num_slots, rows, num_kv_heads, head_dim]`` views.

    Only the start ``cum_seq_k[i]`` of a sequence and its length ``seqused_k[i]`` are read, so the
    starts may be any slots. ``starts``: what ``slot_starts`` gives; None: made here.
    """
    starts = slot_starts(batch, k_cache) if starts is None else starts
    result = torch.ops.aten._flash_attention_forward(
        batch.query,
        flat_rows(k_cache),
        flat_rows(v_cache),
        batch.cu_seqlens_q,
        starts,
        batch.num_new,
        max_seqlen_k,
        0.0,
        batch.num_new > 1,
        False,
        scale=batch.scale,
        seqused_k=batch.lens,
    )
    out: Tensor = result[0]
    return out


def slot_starts(batch: Batch, cache: Tensor) -> Tensor:
    """First row of each sequence among the rows of all slots, and one entry that nobody reads."""
    rows_per_slot = cache.stride(0) // cache.stride(1)
    return torch.nn.functional.pad(batch.slot_idx * rows_per_slot, (0, 1))


def flash_attn_slots(
    flash_attn: Any, batch: Batch, k_cache: Tensor, v_cache: Tensor, max_seqlen_k: int
) -> Tensor:
    """flash-attn over views cut to ``max_seqlen_k`` rows; a slot of each sequence."""
    out: Tensor = flash_attn.flash_attn_with_kvcache(
        batch.query.view(batch.size, batch.num_new, *batch.query.shape[1:]),
        k_cache[:, :max_seqlen_k],
        v_cache[:, :max_seqlen_k],
        cache_seqlens=batch.lens,
        cache_batch_idx=batch.slot_idx,
        softmax_scale=batch.scale,
        causal=batch.num_new > 1,
    )
    return out.flatten(0, 1)


def flash_attn_blocks(
    flash_attn: Any, batch: Batch, k_blocks: Tensor, v_blocks: Tensor, block_table: Tensor
) -> Tensor:
    """flash-attn over blocks ``[num_blocks, block_size, num_kv_heads, head_dim]``."""
    out: Tensor = flash_attn.flash_attn_with_kvcache(
        batch.query.view(batch.size, batch.num_new, *batch.query.shape[1:]),
        k_blocks,
        v_blocks,
        cache_seqlens=batch.lens,
        block_table=block_table,
        softmax_scale=batch.scale,
        causal=batch.num_new > 1,
    )
    return out.flatten(0, 1)


def flat_rows(cache: Tensor) -> Tensor:
    """All rows of all slots as one dimension; slots are whole numbers of rows apart."""
    num_slots, rows, num_kv_heads, head_dim = cache.shape
    rows_per_slot, rest = divmod(cache.stride(0), cache.stride(1))
    if rest:
        raise ValueError(f"slots are {cache.stride(0)} elements apart, rows {cache.stride(1)}")
    return cache.as_strided(
        ((num_slots - 1) * rows_per_slot + rows, num_kv_heads, head_dim), cache.stride()[1:]
    )


def on_meta(tensor: Tensor) -> Tensor:
    """A tensor of the same shape and strides that holds nothing."""
    return torch.empty_strided(
        tensor.shape, tensor.stride(), dtype=tensor.dtype, device=torch.device("meta")
    )


def check_on_meta(call: Callable[..., Tensor], batch: Batch, *caches: Any) -> None:
    """Call a kernel's schema without its memory; its output must have the query's shape."""
    twin = Batch(
        on_meta(batch.query),
        batch.lengths,
        batch.num_new,
        on_meta(batch.lens),
        on_meta(batch.slot_idx),
        on_meta(batch.cu_seqlens_q),
    )
    moved = [on_meta(one) if isinstance(one, Tensor) else one for one in caches]
    out = call(twin, *moved)
    if out.shape != batch.query.shape:
        raise RuntimeError(f"shape {tuple(out.shape)}, must be {tuple(batch.query.shape)}")
