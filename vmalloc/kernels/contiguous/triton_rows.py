"""The launch behind ``decode_rows``: one thread per sequence and per row, no search.

Proven under Triton's interpreter; not yet run on a GPU.

Owns: nothing.  Thread-safety: launches go to the caller's current stream.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import triton
import triton.language as tl

if TYPE_CHECKING:
    from torch import Tensor

    from ...backend import KVBatchView

BLOCK: Final = 256


def launch_decode_rows(table: Tensor, view: KVBatchView, slot_rows: int) -> None:
    """Fill ``table [4, num_rows + 1]`` with starts, slots, lengths and slot starts."""
    batch, num_columns = view.seqused_k.shape[0], table.shape[1]
    decode_rows_kernel[(triton.cdiv(max(batch, num_columns), BLOCK),)](
        table,
        view.cu_seqlens_q,
        view.seqused_k,
        view.cache_batch_idx,
        batch,
        num_columns,
        slot_rows,
        BLOCK=BLOCK,
    )


@triton.jit(do_not_specialize=["batch", "num_columns", "slot_rows"])
def decode_rows_kernel(
    table,
    cu_seqlens_q,
    seqused_k,
    cache_batch_idx,
    batch,
    num_columns,
    slot_rows,
    BLOCK: tl.constexpr,
):
    """Index ``i`` stands for sequence ``i``, and for row ``i`` if that is past the last sequence's.

    Every row before ``cu_seqlens_q[batch]`` belongs to one sequence, so each column has one writer.
    """
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    is_column = index < num_columns
    tl.store(table + index, index, mask=is_column)

    is_padding = is_column & (index >= tl.load(cu_seqlens_q + batch))
    zeros = tl.zeros([BLOCK], tl.int32)
    tl.store(table + num_columns + index, zeros, mask=is_padding)
    tl.store(table + 2 * num_columns + index, zeros, mask=is_padding)
    tl.store(table + 3 * num_columns + index, zeros, mask=is_padding)

    is_seq = index < batch
    start = tl.load(cu_seqlens_q + index, mask=is_seq, other=0)
    end = tl.load(cu_seqlens_q + index + 1, mask=is_seq, other=0)
    has_row = end > start
    slot = tl.load(cache_batch_idx + index, mask=has_row, other=0)
    length = tl.load(seqused_k + index, mask=has_row, other=0)
    tl.store(table + num_columns + start, slot, mask=has_row)
    tl.store(table + 2 * num_columns + start, length, mask=has_row)
    tl.store(table + 3 * num_columns + start, slot * slot_rows, mask=has_row)
