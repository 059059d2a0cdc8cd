"""One forward pass over packed rows in native code, in the place of the model's own.

Owns: a buffer for logits.  Thread-safety: none; one engine thread.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...backend import KVBackend, KVBatchView
from ...errors import ClosedError
from .native import NativeDecoder, cache_of


class FusedForward:
    """``PackedForward`` without the model: same arguments, same result.

    Rows give the same bits whatever the batch is, so nothing has to be padded for that.

    Args:
        decoder: what computes.
        backend: where K and V live.
    """

    takes_padding = False

    def __init__(self, decoder: NativeDecoder, backend: KVBackend) -> None:
        self._decoder = decoder
        self._cache = cache_of(backend)
        self._is_closed = False
        # Kept from step to step: fresh memory for a large vocabulary costs a page fault per 4 KiB.
        self._logits = torch.empty(backend.config.max_num_seqs, decoder.num_logits)

    def close(self) -> None:
        """Compute nothing any more."""
        self._is_closed = True

    def __call__(
        self, token_ids: Tensor, positions: Tensor, rows: Tensor, view: KVBatchView
    ) -> Tensor:
        """See ``PackedForward``; there is no padding, and ``rows`` ascend.

        The logits are good until the next call.
        """
        if self._is_closed:
            raise ClosedError("the forward pass is closed")
        num_rows = rows.shape[0]
        logits = self._logits
        if num_rows > len(logits):  # of whole prompts: rare, and not kept
            logits = torch.empty(num_rows, logits.shape[1])
        table = view.block_table
        self._decoder.core.forward(
            self._cache,
            token_ids.data_ptr(),
            positions.data_ptr(),
            token_ids.shape[0],
            rows.data_ptr(),
            num_rows,
            view.cu_seqlens_q.data_ptr(),
            view.seqused_k.data_ptr(),
            view.cache_batch_idx.data_ptr(),
            None if table is None else (table.data_ptr(), table.stride(0), table.shape[1]),
            view.seqused_k.shape[0],
            logits.data_ptr(),
        )
        return logits[:num_rows]
