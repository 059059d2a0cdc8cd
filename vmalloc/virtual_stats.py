"""The arena's counts in the words of the protocol.

Owns: nothing.  Thread-safety: stateless.
"""

from __future__ import annotations

from . import _core
from .backend import KVCacheStats


def virtual_stats(raw: _core.ArenaStats, num_live_seqs: int, peak_live_seqs: int) -> KVCacheStats:
    """``KVArena.stats()`` as ``KVCacheStats``: pages become bytes."""
    page = raw["page_bytes"]
    return KVCacheStats(
        reserved_bytes=raw["reserved_bytes"],
        capacity_bytes=raw["max_pages"] * page,
        page_bytes=page,
        created_pages=raw["created_pages"],
        free_pages=raw["free_pages"],
        in_use_pages=raw["in_use_pages"],
        retired_pages=raw["retired_pages"],
        live_bytes=raw["live_bytes"],
        logical_bytes=raw["logical_bytes"],
        committed_bytes=raw["committed_pages"] * page,
        ahead_bytes=raw["ahead_pages"] * page,
        parked_bytes=raw["parked_pages"] * page,
        cached_bytes=raw["cached_pages"] * page,
        shared_bytes=raw["shared_refs"] * page,
        swapped_bytes=raw["swapped_bytes"],
        peak_committed_bytes=raw["peak_committed_pages"] * page,
        peak_live_bytes=raw["peak_live_bytes"],
        num_live_seqs=num_live_seqs,
        peak_live_seqs=peak_live_seqs,
        map_calls=raw["map_calls"],
        unmap_calls=raw["unmap_calls"],
        critical_pages=raw["critical_pages"],
        background_pages=raw["background_pages"],
        adopted_pages=raw["adopted_pages"],
        reclaimed_pages=raw["reclaimed_pages"],
        aliased_pages=raw["aliased_pages"],
        cow_copies=raw["cow_copies"],
        swap_out_pages=raw["swap_out_pages"],
        swap_in_pages=raw["swap_in_pages"],
        stall_us=raw["stall_us"],
        num_steps=raw["num_steps"],
        live_byte_steps=raw["live_byte_steps"],
        committed_byte_steps=raw["committed_byte_steps"],
        worker_error=raw["worker_error"],
    )
