"""One forward pass over packed rows in native code, in the place of the model's own.

Owns: a buffer for logits.  Thread-safety: none; one engine thread.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...backend import KVBackend, KVBatchView
from ...errors import ClosedError
from ...kernels.decoder_cpu import CpuDecoder, decoder_cache


class FusedForward:
    """``PackedForward`` without the model: same arguments, same result.

    Rows give the same bits whatever the batch is, so nothing has to be padded for that.

    Args:
        decoder: what computes.
        backend: where K and V live.

    Attributes:
        name: the decoder's.
    """

    def __init__(self, decoder: CpuDecoder, backend: KVBackend) -> None:
        self.name = decoder.name
        self._decoder = decoder
        num_layers = len(backend.config.layers)
        self._views = [backend.layer_views(layer_idx) for layer_idx in range(num_layers)]
        self._cache = decoder_cache(self._views)
        # Kept from step to step: fresh memory for a large vocabulary costs a page fault per 4 KiB.
        self._logits = _empty_logits(backend.config.max_num_seqs, decoder.num_logits)

    def close(self) -> None:
        """Let go of the cache's tensors, which keep its addresses reserved."""
        self._views.clear()

    def __call__(
        self, token_ids: Tensor, positions: Tensor, rows: Tensor, view: KVBatchView
    ) -> Tensor:
        """See ``PackedForward``; there is no padding, and ``rows`` ascend.

        The logits are good until the next call. Raises ``ClosedError`` after ``close``.
        """
        if not self._views:  # their addresses may be gone
            raise ClosedError("the forward pass is closed")
        num_rows = rows.shape[0]
        logits = self._logits
        if num_rows > logits.shape[0]:  # of whole prompts: rare, and not kept
            logits = _empty_logits(num_rows, logits.shape[1])
        logits = logits[:num_rows]
        self._decoder.forward(self._cache, token_ids, positions, rows, view, logits)
        return logits


def _empty_logits(num_rows: int, num_logits: int) -> Tensor:
    """Whatever torch's default dtype and device are."""
    return torch.empty(num_rows, num_logits, dtype=torch.float32, device="cpu")
