"""What a ``VirtualCache`` holds, in numbers.

Owns: nothing.  Thread-safety: immutable.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ...backend import KVCacheStats


@dataclass(frozen=True, slots=True, kw_only=True)
class VirtualCacheStats:
    """Memory of the layers that lie in virtual memory; byte counts are physical memory.

    Attributes:
        num_virtual_layers, num_other_layers: layers over our pages, and layers of the kinds that
            transformers keeps (sliding windows, recurrent states).
        batch_size, num_tokens: rows of the batch, and tokens of each.
        reserved_bytes: address space (costs no memory).
        capacity_bytes: hard cap.
        committed_bytes, peak_committed_bytes: pages that hold tokens, now and at most.
        resident_bytes: pages that the driver holds now, free ones included.
        logical_bytes: keys and values of all tokens, shared ones counted for each row.
        shared_bytes: what sharing saves now.
        aliased_pages, cow_copies: pages mapped a further time instead of copied, and pages of which
            the start was copied, so far.
        devices: the library's own statistics of each device.
    """

    num_virtual_layers: int
    num_other_layers: int
    batch_size: int
    num_tokens: int
    reserved_bytes: int
    capacity_bytes: int
    committed_bytes: int
    peak_committed_bytes: int
    resident_bytes: int
    logical_bytes: int
    shared_bytes: int
    aliased_pages: int
    cow_copies: int
    devices: Mapping[str, KVCacheStats]
