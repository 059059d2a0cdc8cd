"""What the Triton attention kernels share: the loop over cached keys, and how a row ends.

A program holds a tile of query rows and walks the keys with the online softmax of FlashAttention
(Dao et al., 2022); K and V are found row by row through the block table (PagedAttention, Kwon et
al., 2023), or one after the other in a slot. Scores, sums and outputs are float32 whatever the
inputs; float32 inputs are multiplied as such, never as TF32. Proven under Triton's interpreter; not
yet run on a GPU, and not tuned.

Owns: nothing.  Thread-safety: immutable.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import triton
import triton.language as tl

if TYPE_CHECKING:
    from torch import Tensor

    from ..backend import KVBatchView

INTERPRETED: Final = bool(triton.knobs.runtime.interpret)
"""Whether this process runs kernels in Triton's interpreter; fixed when they are decorated."""

_INTERPRETED = tl.constexpr(INTERPRETED)

LOG2_E = tl.constexpr(1.4426950408889634)
"""Exponentials are taken to base 2, for which GPUs have an instruction."""


@dataclass(frozen=True, slots=True)
class TileSizes:
    """How a kernel cuts its work. From the element size and the head dimensions alone: tiles that
    followed the batch would let batch mates change a row's bits.

    Attributes:
        queries: query rows of a prefill program, counted once per query head.
        keys: cached rows per turn of the loop.
        k_dim, v_dim: head dimensions rounded up to a power of two.
        num_warps: of a prefill program.
    """

    queries: int
    keys: int
    k_dim: int
    v_dim: int
    num_warps: int


def tile_sizes(k_cache: Tensor, v_cache: Tensor) -> TileSizes:
    """Tiles for caches ``[num_blocks, block_size, num_kv_heads, head_dim]``."""
    k_dim, v_dim = padded_dim(k_cache.shape[3]), padded_dim(v_cache.shape[3])
    # The largest that ptxas fits into the registers of sm_90.
    if k_cache.element_size() == 4:
        return TileSizes(16, 16, k_dim, v_dim, 4)
    if max(k_dim, v_dim) <= 128:
        return TileSizes(128, 64, k_dim, v_dim, 8)
    return TileSizes(64, 32, k_dim, v_dim, 8)


def padded_dim(head_dim: int) -> int:
    """The power of two that holds ``head_dim``; matrix units take no fewer than 16."""
    return max(16, int(triton.next_power_of_2(head_dim)))


def max_tiles(num_tokens: int, batch: int, per_token: int, block: int) -> int:
    """Programs that ``find_tile`` needs for a packed batch of ``num_tokens`` rows."""
    return num_tokens * per_token // block + batch


def table_of(view: KVBatchView, k_cache: Tensor) -> tuple[Tensor, int]:
    """Block table and block size. A slot is one block of any length: size 0, its number alone."""
    if view.block_table is None:
        return view.cache_batch_idx.unsqueeze(1), 0
    return view.block_table, k_cache.shape[1]


@triton.jit
def find_tile(cu_seqlens_q, tile, batch, PER_TOKEN: tl.constexpr, BLOCK: tl.constexpr):
    """The sequence that a program works on, and which of its tiles of ``BLOCK`` rows.

    Each token has ``PER_TOKEN`` rows. Sequence ``i`` owns the tiles from
    ``cu_seqlens_q[i] * PER_TOKEN // BLOCK + i`` on, which are as many as it needs or one more, so
    the grid follows the packed rows and not the longest sequence times the batch.
    """
    seq = tile * 0
    count = batch
    while count > 1:  # a binary search for the last sequence that begins at or before the tile
        half = count // 2
        probe = seq + half
        start = tl.load(cu_seqlens_q + probe) * PER_TOKEN // BLOCK + probe
        seq = tl.where(start <= tile, probe, seq)
        count -= half
    return seq, tile - (tl.load(cu_seqlens_q + seq) * PER_TOKEN // BLOCK + seq)


@triton.jit
def load_rows(source, offsets, is_row, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr):
    """Rows at ``offsets`` as a ``[rows, BLOCK_DIM]`` tile; what is no row is not touched."""
    dims = tl.arange(0, BLOCK_DIM)
    mask = is_row[:, None] & (dims < DIM)[None, :]
    # Zeros, not garbage: a weight of 0 times NaN would still be NaN.
    return tl.load(source + offsets[:, None] + dims[None, :], mask=mask, other=0.0)


@triton.jit
def find_rows(table, rows, readable, BLOCK_SIZE: tl.constexpr):
    """Block of each row and the row's place in it, in 64 bits: caches exceed 2**31 elements.

    ``BLOCK_SIZE`` 0: the sequence is one block, whose number is all of its table.
    """
    if BLOCK_SIZE == 0:
        block = tl.load(table).to(tl.int64)
        place = rows.to(tl.int64)
    else:
        block = tl.load(table + rows // BLOCK_SIZE, mask=readable, other=0).to(tl.int64)
        place = (rows % BLOCK_SIZE).to(tl.int64)
    return block, place


@triton.jit
def dot(a, b, acc):
    """``acc + a @ b`` in float32."""
    if _INTERPRETED:
        # The interpreter would multiply the bit patterns of bfloat16 numbers as integers.
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def capped(scores, softcap):
    """``softcap * tanh(scores / softcap)``, by an exponential that cannot overflow."""
    decay = tl.exp2(tl.abs(scores) * (-2.0 * LOG2_E / softcap))
    size = softcap * (1.0 - decay) / (1.0 + decay)
    return tl.where(scores < 0, -size, size)


@triton.jit
def attend(
    queries,
    positions,
    acc,
    row_max,
    row_sum,
    k_cache,
    v_cache,
    table,
    start,
    stop,
    oldest,
    k_block_stride,
    k_row_stride,
    v_block_stride,
    v_row_stride,
    softmax_scale,
    softcap,
    window_left,
    K_DIM: tl.constexpr,
    V_DIM: tl.constexpr,
    BLOCK_K_DIM: tl.constexpr,
    BLOCK_V_DIM: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Add keys ``[start, stop)`` of one sequence and one KV head to a tile of query rows.

    ``start`` is a multiple of ``BLOCK_KEYS``, so a row meets its keys in the same tiles wherever
    the loop begins. ``queries`` is ``[rows, BLOCK_K_DIM]``, ``positions`` their places in the
    sequence. ``row_max`` is in units of log 2. Without ``MASKED`` every row sees every key and
    ``stop`` is a multiple as well. No row below ``oldest`` is read.
    """
    no_scores = tl.zeros([queries.shape[0], BLOCK_KEYS], tl.float32)
    for first in range(start, stop, BLOCK_KEYS):
        rows = first + tl.arange(0, BLOCK_KEYS)
        readable = tl.full([BLOCK_KEYS], 1, tl.int1)
        if MASKED:
            readable = (rows >= oldest) & (rows < stop)
        block, place = find_rows(table, rows, readable, BLOCK_SIZE)
        keys = load_rows(
            k_cache, block * k_block_stride + place * k_row_stride, readable, K_DIM, BLOCK_K_DIM
        )
        scores = dot(queries, tl.trans(keys), no_scores) * softmax_scale
        if HAS_SOFTCAP:
            scores = capped(scores, softcap)
        scores *= LOG2_E
        if MASKED:
            visible = (rows[None, :] <= positions[:, None]) & readable[None, :]
            if HAS_WINDOW:
                visible &= rows[None, :] >= positions[:, None] - window_left
            scores = tl.where(visible, scores, -float("inf"))
        new_max = tl.maximum(row_max, tl.max(scores, 1))
        # A row that has seen no key yet has a maximum of -inf, and -inf - -inf is NaN.
        base = tl.where(new_max == -float("inf"), 0.0, new_max)
        weights = tl.exp2(scores - base[:, None])
        decay = tl.exp2(row_max - base)
        values = load_rows(
            v_cache, block * v_block_stride + place * v_row_stride, readable, V_DIM, BLOCK_V_DIM
        )
        acc *= decay[:, None]
        acc = dot(weights.to(values.dtype), values, acc)
        row_sum = row_sum * decay + tl.sum(weights, 1)
        row_max = new_max
    return acc, row_max, row_sum


@triton.jit
def add_sinks(row_max, row_sum, sinks, heads, is_row):
    """Add each head's sink to the denominators; also returns the factor that ``acc`` needs."""
    sink = tl.load(sinks + heads, mask=is_row, other=-float("inf")) * LOG2_E
    new_max = tl.maximum(row_max, sink)
    decay = tl.exp2(row_max - new_max)
    return row_sum * decay + tl.exp2(sink - new_max), decay


@triton.jit
def store_rows(out, offsets, is_row, tile, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr):
    """Write a ``[rows, BLOCK_DIM]`` tile to ``offsets``, in the element type of ``out``."""
    dims = tl.arange(0, BLOCK_DIM)
    mask = is_row[:, None] & (dims < DIM)[None, :]
    tl.store(out + offsets[:, None] + dims[None, :], tile.to(out.dtype.element_ty), mask=mask)
