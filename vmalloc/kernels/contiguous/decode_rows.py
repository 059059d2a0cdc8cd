"""A decode batch seen row by row: the slot and length of each query row, padding rows included.

Kernels for one new row a sequence want row ``i`` to be sequence ``i``. In a packed batch a sequence
may have no new row, and rows may follow that belong to none. So each query row is made a sequence:
it has the slot and length of its own, and a padding row has length 0, for which the kernels give 0.

Owns: nothing.  Thread-safety: launches go to the caller's current stream.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ..gpu_checks import is_interpreted, triton_absence

if TYPE_CHECKING:
    from torch import Tensor

    from ...backend import KVBatchView


@dataclass(frozen=True, slots=True)
class DecodeRows:
    """Index tensors of ``num_rows`` sequences of one row each, int32 and contiguous.

    Attributes:
        starts: ``[num_rows + 1]``, 0, 1, 2, ... as ``cu_seqlens_q``.
        slots, lengths: ``[num_rows]``.
        slot_starts: ``[num_rows + 1]`` first row of each slot among the rows of all slots; the last
            entry is a filler.
    """

    starts: Tensor
    slots: Tensor
    lengths: Tensor
    slot_starts: Tensor


def decode_rows(view: KVBatchView, num_rows: int, slot_rows: int) -> DecodeRows:
    """Row by row view of a batch of at most one new row a sequence, in one launch.

    Args:
        view: where the batch lies.
        num_rows: query rows, padding included.
        slot_rows: rows from one slot to the next.
    """
    table = view.seqused_k.new_empty((4, num_rows + 1))
    if triton_absence() is None and (table.is_cuda or is_interpreted()):
        from .triton_rows import launch_decode_rows

        launch_decode_rows(table, view, slot_rows)
    else:
        fill_decode_rows(table, view, slot_rows)
    return DecodeRows(table[0], table[1, :num_rows], table[2, :num_rows], table[3])


def fill_decode_rows(table: Tensor, view: KVBatchView, slot_rows: int) -> None:
    """What ``launch_decode_rows`` does, without Triton: shapes follow no data here either."""
    num_rows = table.shape[1] - 1
    starts, ends = view.cu_seqlens_q[:-1], view.cu_seqlens_q[1:]
    # Sequences without a row all write to the last column, which nobody reads.
    column = torch.where(ends > starts, starts, num_rows).long()
    slots = view.cache_batch_idx
    table.zero_()
    table[0] = torch.arange(num_rows + 1, dtype=torch.int32, device=table.device)
    table[1:, column] = torch.stack([slots, view.seqused_k, slots * slot_rows])
