"""Causal attention of many new rows per sequence, over slots or block tables: prefill, chunks.

Proven under Triton's interpreter; not yet run on a GPU.

Owns: nothing.  Thread-safety: launches go to the caller's current stream.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl

from .device_address import pointer_of
from .triton_tiles import (
    add_sinks,
    attend,
    find_tile,
    load_rows,
    max_tiles,
    store_rows,
    table_of,
    tile_sizes,
)

if TYPE_CHECKING:
    from torch import Tensor

    from .attention_call import AttentionCall


def launch_prefill(call: AttentionCall, out: Tensor) -> None:
    """Enqueue attention of every sequence with two or more new rows; other rows stay as they are.

    ``out`` is as ``call.out_shape`` says; ``call`` was checked.
    """
    query, view = call.query, call.view
    k_cache, v_cache = call.k_cache, call.v_cache
    table, block_size = table_of(view, k_cache)
    num_kv_heads = k_cache.shape[2]
    group = query.shape[1] // num_kv_heads
    tiles = tile_sizes(k_cache, v_cache)
    batch = view.seqused_k.numel()
    num_tiles = max_tiles(query.shape[0], batch, group, tiles.queries)
    prefill_kernel[(num_tiles, num_kv_heads)](
        out,
        query,
        pointer_of(k_cache),
        pointer_of(v_cache),
        view.cu_seqlens_q,
        view.seqused_k,
        table,
        call.sinks,
        call.softmax_scale,
        call.softcap,
        call.window_left,
        batch,
        table.stride(0),
        *out.stride()[:2],
        *query.stride()[:2],
        *k_cache.stride()[:3],
        *v_cache.stride()[:3],
        GROUP=group,
        K_DIM=k_cache.shape[3],
        V_DIM=v_cache.shape[3],
        BLOCK_K_DIM=tiles.k_dim,
        BLOCK_V_DIM=tiles.v_dim,
        BLOCK_QUERIES=tiles.queries,
        BLOCK_KEYS=tiles.keys,
        BLOCK_SIZE=block_size,
        HAS_WINDOW=call.window_left >= 0,
        HAS_SOFTCAP=call.softcap > 0,
        num_warps=tiles.num_warps,
        num_stages=2,
    )


@triton.jit(do_not_specialize=["window_left", "batch"])
def prefill_kernel(
    out,
    query,
    k_cache,
    v_cache,
    cu_seqlens_q,
    seqused_k,
    block_table,
    sinks,
    softmax_scale,
    softcap,
    window_left,
    batch,
    table_stride,
    out_row_stride,
    out_head_stride,
    query_row_stride,
    query_head_stride,
    k_block_stride,
    k_row_stride,
    k_head_stride,
    v_block_stride,
    v_row_stride,
    v_head_stride,
    GROUP: tl.constexpr,
    K_DIM: tl.constexpr,
    V_DIM: tl.constexpr,
    BLOCK_K_DIM: tl.constexpr,
    BLOCK_V_DIM: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
):
    """Program ``(tile, kv_head)``; a tile's rows are (token, query head of the group)."""
    # The last tiles of a sequence see the most keys: they go first, so that none starts last.
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    seq, tile = find_tile(cu_seqlens_q, tile, batch, GROUP, BLOCK_QUERIES)
    first_token = tl.load(cu_seqlens_q + seq)
    num_new = tl.load(cu_seqlens_q + seq + 1) - first_token
    first_row = tile * BLOCK_QUERIES
    if (num_new <= 1) | (first_row >= num_new * GROUP):
        return
    kv_head = tl.program_id(1)
    flat = first_row + tl.arange(0, BLOCK_QUERIES)
    is_row = flat < num_new * GROUP
    new = tl.minimum(flat // GROUP, num_new - 1)
    heads = (kv_head * GROUP + flat % GROUP).to(tl.int64)
    tokens = (first_token + new).to(tl.int64)
    first_position = tl.load(seqused_k + seq) - num_new
    positions = first_position + new

    oldest_query = first_position + first_row // GROUP
    newest_query = first_position + tl.minimum(
        (first_row + BLOCK_QUERIES - 1) // GROUP, num_new - 1
    )
    stop = newest_query + 1
    if HAS_WINDOW:
        oldest = tl.maximum(oldest_query - window_left, 0)
        masked_start = oldest // BLOCK_KEYS * BLOCK_KEYS
    else:
        oldest = 0
        masked_start = (oldest_query + 1) // BLOCK_KEYS * BLOCK_KEYS
    k_head = k_cache + kv_head.to(tl.int64) * k_head_stride
    v_head = v_cache + kv_head.to(tl.int64) * v_head_stride
    table = block_table + seq.to(tl.int64) * table_stride
    queries = load_rows(
        query,
        tokens * query_row_stride + heads * query_head_stride,
        is_row,
        K_DIM,
        BLOCK_K_DIM,
    )
    acc = tl.zeros([BLOCK_QUERIES, BLOCK_V_DIM], tl.float32)
    row_max = tl.full([BLOCK_QUERIES], -float("inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_QUERIES], tl.float32)
    if not HAS_WINDOW:
        acc, row_max, row_sum = attend(
            queries,
            positions,
            acc,
            row_max,
            row_sum,
            k_head,
            v_head,
            table,
            0,
            masked_start,
            0,
            k_block_stride,
            k_row_stride,
            v_block_stride,
            v_row_stride,
            softmax_scale,
            softcap,
            window_left,
            K_DIM,
            V_DIM,
            BLOCK_K_DIM,
            BLOCK_V_DIM,
            BLOCK_KEYS,
            BLOCK_SIZE,
            HAS_WINDOW,
            HAS_SOFTCAP,
            MASKED=False,
        )
    acc, row_max, row_sum = attend(
        queries,
        positions,
        acc,
        row_max,
        row_sum,
        k_head,
        v_head,
        table,
        masked_start,
        stop,
        oldest,
        k_block_stride,
        k_row_stride,
        v_block_stride,
        v_row_stride,
        softmax_scale,
        softcap,
        window_left,
        K_DIM,
        V_DIM,
        BLOCK_K_DIM,
        BLOCK_V_DIM,
        BLOCK_KEYS,
        BLOCK_SIZE,
        HAS_WINDOW,
        HAS_SOFTCAP,
        MASKED=True,
    )
    if sinks is not None:
        row_sum, decay = add_sinks(row_max, row_sum, sinks, heads, is_row)
        acc *= decay[:, None]
    store_rows(
        out,
        tokens * out_row_stride + heads * out_head_stride,
        is_row,
        acc / row_sum[:, None],
        V_DIM,
        BLOCK_V_DIM,
    )
