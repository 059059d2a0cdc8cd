"""Attention of one new row per sequence over slots or block tables, split over the keys.

A short sequence is one program per KV head; a long one is cut into splits whose partial results a
second kernel joins (split-K, as in Flash-Decoding, Dao et al., 2023). Where a sequence is cut
depends on its own length alone, so batch mates cannot change its bits. Proven under Triton's
interpreter; not yet run on a GPU.

Owns: nothing.  Thread-safety: launches go to the caller's current stream.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from .device_address import pointer_of
from .triton_tiles import LOG2_E, add_sinks, attend, load_rows, store_rows, table_of, tile_sizes

if TYPE_CHECKING:
    from torch import Tensor

    from .attention_call import AttentionCall

MAX_SPLITS = tl.constexpr(64)
"""Bounds the partial results: longer sequences get longer splits instead of more of them."""

MIN_SPLIT_KEYS = tl.constexpr(256)
"""Splits are multiples of this, and it of every tile. 8 KV heads and 4096 keys fill 128 SMs."""


def launch_decode(call: AttentionCall, out: Tensor) -> None:
    """Enqueue attention of every sequence with one new row; other rows stay as they are.

    ``out`` is as ``call.out_shape`` says; ``call`` was checked.
    """
    query, view = call.query, call.view
    k_cache, v_cache = call.k_cache, call.v_cache
    table, block_size = table_of(view, k_cache)
    batch, num_heads = view.seqused_k.numel(), query.shape[1]
    num_kv_heads, v_dim = k_cache.shape[2], v_cache.shape[3]
    group = num_heads // num_kv_heads
    tiles = tile_sizes(k_cache, v_cache)
    group_rows = min(64, tiles.queries, max(16, triton.next_power_of_2(group)))
    num_splits = max_splits(view.max_seqlen_k, call.window_left, tiles.keys)
    device = query.device
    partial_shape = (batch, num_heads, num_splits) if num_splits > 1 else (0, 0, 0)
    partial_out = torch.empty((*partial_shape, v_dim), dtype=torch.float32, device=device)
    partial_max = torch.empty(partial_shape, dtype=torch.float32, device=device)
    partial_sum = torch.empty(partial_shape, dtype=torch.float32, device=device)
    decode_kernel[(num_splits, num_kv_heads * triton.cdiv(group, group_rows), batch)](
        out,
        partial_out,
        partial_max,
        partial_sum,
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
        num_splits,
        table.stride(0),
        *out.stride()[:2],
        *query.stride()[:2],
        *k_cache.stride()[:3],
        *v_cache.stride()[:3],
        NUM_HEADS=num_heads,
        GROUP=group,
        GROUP_ROWS=group_rows,
        K_DIM=k_cache.shape[3],
        V_DIM=v_dim,
        BLOCK_K_DIM=tiles.k_dim,
        BLOCK_V_DIM=tiles.v_dim,
        BLOCK_KEYS=tiles.keys,
        BLOCK_SIZE=block_size,
        HAS_WINDOW=call.window_left >= 0,
        HAS_SOFTCAP=call.softcap > 0,
        num_stages=2,
    )
    if num_splits == 1:
        return
    join_splits_kernel[(num_heads, batch)](
        out,
        partial_out,
        partial_max,
        partial_sum,
        view.cu_seqlens_q,
        view.seqused_k,
        call.sinks,
        call.window_left,
        num_splits,
        *out.stride()[:2],
        NUM_HEADS=num_heads,
        V_DIM=v_dim,
        BLOCK_V_DIM=tiles.v_dim,
        BLOCK_KEYS=tiles.keys,
        HAS_WINDOW=call.window_left >= 0,
    )


def max_splits(max_seqlen_k: int, window_left: int, block_keys: int) -> int:
    """Most splits that ``plan_splits`` makes of a sequence of up to ``max_seqlen_k`` rows."""
    num_keys = max(1, max_seqlen_k)
    if window_left >= 0:
        # The first tile begins up to a tile before the first key that is seen.
        num_keys = min(num_keys, window_left + block_keys)
    return int(min(MAX_SPLITS.value, triton.cdiv(num_keys, MIN_SPLIT_KEYS.value)))


@triton.jit
def plan_splits(length, window_left, BLOCK_KEYS: tl.constexpr, HAS_WINDOW: tl.constexpr):
    """Where a sequence's keys begin, rounded down to a tile, and how many a split takes."""
    first = 0
    if HAS_WINDOW:
        first = tl.maximum(length - 1 - window_left, 0) // BLOCK_KEYS * BLOCK_KEYS
    per_split = tl.cdiv(tl.cdiv(length - first, MAX_SPLITS), MIN_SPLIT_KEYS) * MIN_SPLIT_KEYS
    return first, per_split


@triton.jit(do_not_specialize=["window_left", "num_splits"])
def decode_kernel(
    out,
    partial_out,
    partial_max,
    partial_sum,
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
    num_splits,
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
    NUM_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_ROWS: tl.constexpr,
    K_DIM: tl.constexpr,
    V_DIM: tl.constexpr,
    BLOCK_K_DIM: tl.constexpr,
    BLOCK_V_DIM: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
):
    """Program ``(split, kv_head and part of its group, sequence)``.

    A sequence of one split is finished here; the others leave ``[batch, NUM_HEADS, num_splits]``
    partial results: the unnormalised output, the largest score and the sum of the weights.
    """
    seq = tl.program_id(2)
    token = tl.load(cu_seqlens_q + seq).to(tl.int64)
    if tl.load(cu_seqlens_q + seq + 1) - token != 1:
        return
    length = tl.load(seqused_k + seq)
    first, per_split = plan_splits(length, window_left, BLOCK_KEYS, HAS_WINDOW)
    split = tl.program_id(0)
    start = first + split * per_split
    if start >= length:
        return
    parts: tl.constexpr = (GROUP + GROUP_ROWS - 1) // GROUP_ROWS
    kv_head = tl.program_id(1) // parts
    in_group = tl.program_id(1) % parts * GROUP_ROWS + tl.arange(0, GROUP_ROWS)
    is_row = in_group < GROUP
    heads = (kv_head * GROUP + in_group).to(tl.int64)
    oldest = 0
    if HAS_WINDOW:
        oldest = tl.maximum(length - 1 - window_left, 0)
    queries = load_rows(
        query + token * query_row_stride, heads * query_head_stride, is_row, K_DIM, BLOCK_K_DIM
    )
    acc, row_max, row_sum = attend(
        queries,
        tl.full([GROUP_ROWS], length - 1, tl.int32),
        tl.zeros([GROUP_ROWS, BLOCK_V_DIM], tl.float32),
        tl.full([GROUP_ROWS], -float("inf"), tl.float32),
        tl.zeros([GROUP_ROWS], tl.float32),
        k_cache + kv_head.to(tl.int64) * k_head_stride,
        v_cache + kv_head.to(tl.int64) * v_head_stride,
        block_table + seq.to(tl.int64) * table_stride,
        start,
        tl.minimum(start + per_split, length),
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
    if length - first <= per_split:
        if sinks is not None:
            row_sum, decay = add_sinks(row_max, row_sum, sinks, heads, is_row)
            acc *= decay[:, None]
        store_rows(
            out + token * out_row_stride,
            heads * out_head_stride,
            is_row,
            acc / row_sum[:, None],
            V_DIM,
            BLOCK_V_DIM,
        )
    else:
        partial = (seq.to(tl.int64) * NUM_HEADS + heads) * num_splits + split
        tl.store(partial_max + partial, row_max, mask=is_row)
        tl.store(partial_sum + partial, row_sum, mask=is_row)
        store_rows(partial_out, partial * V_DIM, is_row, acc, V_DIM, BLOCK_V_DIM)


@triton.jit(do_not_specialize=["window_left", "num_splits"])
def join_splits_kernel(
    out,
    partial_out,
    partial_max,
    partial_sum,
    cu_seqlens_q,
    seqused_k,
    sinks,
    window_left,
    num_splits,
    out_row_stride,
    out_head_stride,
    NUM_HEADS: tl.constexpr,
    V_DIM: tl.constexpr,
    BLOCK_V_DIM: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
):
    """Program ``(head, sequence)`` joins a sequence's splits, always as a tile of MAX_SPLITS."""
    seq = tl.program_id(1)
    token = tl.load(cu_seqlens_q + seq).to(tl.int64)
    if tl.load(cu_seqlens_q + seq + 1) - token != 1:
        return
    length = tl.load(seqused_k + seq)
    first, per_split = plan_splits(length, window_left, BLOCK_KEYS, HAS_WINDOW)
    if length - first <= per_split:
        return
    head = tl.program_id(0)
    splits = tl.arange(0, MAX_SPLITS)
    is_split = splits < tl.cdiv(length - first, per_split)
    partial = (seq.to(tl.int64) * NUM_HEADS + head) * num_splits + splits
    split_max = tl.load(partial_max + partial, mask=is_split, other=-float("inf"))
    split_sum = tl.load(partial_sum + partial, mask=is_split, other=0.0)
    acc = load_rows(partial_out, partial * V_DIM, is_split, V_DIM, BLOCK_V_DIM)

    row_max = tl.max(split_max, 0)
    sink = -float("inf")
    if sinks is not None:
        sink = tl.load(sinks + head) * LOG2_E
        row_max = tl.maximum(row_max, sink)
    decay = tl.exp2(split_max - row_max)
    row_sum = tl.sum(split_sum * decay, 0)
    if sinks is not None:
        row_sum += tl.exp2(sink - row_max)
    row = tl.sum(acc * decay[:, None], 0) / row_sum
    dims = tl.arange(0, BLOCK_V_DIM)
    tl.store(
        out + token * out_row_stride + head * out_head_stride + dims,
        row.to(out.dtype.element_ty),
        mask=dims < V_DIM,
    )
