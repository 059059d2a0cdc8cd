"""Fused reshape-and-write: packed new K and V rows into their slots or blocks, in one launch.

The first of the three kernels that the PagedAttention paper names (Kwon et al., 2023, section
5.1). Proven under Triton's interpreter; not yet run on a GPU.

Owns: nothing.  Thread-safety: launches go to the caller's current stream.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl

from .device_address import pointer_of
from .triton_tiles import find_rows, find_tile, max_tiles, table_of

if TYPE_CHECKING:
    from torch import Tensor

    from ..backend import KVBatchView


def launch_append(
    key: Tensor, value: Tensor, k_cache: Tensor, v_cache: Tensor, view: KVBatchView
) -> None:
    """Enqueue the write. Shapes as in ``paged_gpu.append_kv``, which checks them."""
    table, block_size = table_of(view, k_cache)
    num_tokens, num_kv_heads, k_dim = key.shape
    batch = view.seqused_k.numel()
    rows = 1 if view.max_seqlen_q == 1 else 16
    append_kernel[(max_tiles(num_tokens, batch, 1, rows),)](
        key,
        value,
        pointer_of(k_cache),
        pointer_of(v_cache),
        view.cu_seqlens_q,
        view.seqused_k,
        table,
        batch,
        table.stride(0),
        *key.stride()[:2],
        *value.stride()[:2],
        *k_cache.stride()[:3],
        *v_cache.stride()[:3],
        NUM_HEADS=num_kv_heads,
        K_DIM=k_dim,
        V_DIM=value.shape[2],
        BLOCK_SIZE=block_size,
        ROWS=rows,
        COLUMNS=1024 if rows == 1 else 128,
    )


@triton.jit(do_not_specialize=["batch"])
def append_kernel(
    key,
    value,
    k_cache,
    v_cache,
    cu_seqlens_q,
    seqused_k,
    block_table,
    batch,
    table_stride,
    key_row_stride,
    key_head_stride,
    value_row_stride,
    value_head_stride,
    k_block_stride,
    k_row_stride,
    k_head_stride,
    v_block_stride,
    v_row_stride,
    v_head_stride,
    NUM_HEADS: tl.constexpr,
    K_DIM: tl.constexpr,
    V_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """A program writes ``ROWS`` new rows of one sequence, all heads."""
    seq, tile = find_tile(cu_seqlens_q, tl.program_id(0), batch, 1, ROWS)
    first_token = tl.load(cu_seqlens_q + seq)
    num_new = tl.load(cu_seqlens_q + seq + 1) - first_token
    first_new = tile * ROWS
    if first_new >= num_new:
        return
    new = first_new + tl.arange(0, ROWS)
    is_new = new < num_new
    rows = tl.load(seqused_k + seq) - num_new + new
    table = block_table + seq.to(tl.int64) * table_stride
    block, place = find_rows(table, rows, is_new, BLOCK_SIZE)
    tokens = (first_token + new).to(tl.int64)
    copy_rows(
        key + tokens * key_row_stride,
        key_head_stride,
        k_cache + block * k_block_stride + place * k_row_stride,
        k_head_stride,
        is_new,
        NUM_HEADS,
        K_DIM,
        COLUMNS,
    )
    copy_rows(
        value + tokens * value_row_stride,
        value_head_stride,
        v_cache + block * v_block_stride + place * v_row_stride,
        v_head_stride,
        is_new,
        NUM_HEADS,
        V_DIM,
        COLUMNS,
    )


@triton.jit
def copy_rows(
    sources,
    source_head_stride,
    targets,
    target_head_stride,
    is_row,
    NUM_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Copy ``[NUM_HEADS, DIM]`` from each source address to its target."""
    for start in range(0, NUM_HEADS * DIM, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        head = (column // DIM).to(tl.int64)
        dim = column % DIM
        mask = is_row[:, None] & (column < NUM_HEADS * DIM)[None, :]
        data = tl.load(
            sources[:, None] + (head * source_head_stride + dim)[None, :], mask=mask, other=0.0
        )
        tl.store(targets[:, None] + (head * target_head_stride + dim)[None, :], data, mask=mask)
