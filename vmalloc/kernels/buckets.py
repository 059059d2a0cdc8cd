"""How far a cache view is cut before a kernel gets it: few lengths, so that few graphs do.

Owns: nothing.  Thread-safety: functions without state.
"""

from __future__ import annotations

from typing import Final

SMALLEST_BUCKET: Final = 256


def bucket_rows(max_seqlen_k: int, num_rows: int) -> int:
    """Rows that a view of slots of ``num_rows`` is cut to for sequences of ``max_seqlen_k``.

    The next power of two, at least ``SMALLEST_BUCKET``, at most ``num_rows``. Kernels choose their
    splits by the length of the view that they see, so a short sequence in a long view would get
    few of them; one CUDA graph serves each (batch, bucket).
    """
    return min(num_rows, max(SMALLEST_BUCKET, 1 << (max_seqlen_k - 1).bit_length()))
