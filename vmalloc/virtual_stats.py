"""The arena's counts in the words of the protocol.

Owns: nothing.  Thread-safety: stateless.
"""

from __future__ import annotations

from collections.abc import Mapping

from . import _core
from .backend import KVCacheStats
from .page_map import PageMap, SlotPages, read_runs


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


def virtual_page_map(
    arena: _core.KVArena,
    num_slots: int,
    seq_of: Mapping[int, tuple[int, int]],
    *,
    padding_slot: int | None,
    is_asleep: bool,
) -> PageMap:
    """``KVArena.page_map()`` as ``PageMap``.

    Args:
        seq_of: the sequence in a slot, and its tokens.
        padding_slot: the slot that padded batches write to, if it is taken.
    """
    # The counts first: what the worker maps in between then shows in the slots, not nowhere.
    raw = arena.stats()
    slots = []
    for slot_idx, runs in arena.page_map():
        seq_id, num_tokens = seq_of.get(slot_idx, (None, 0))
        slots.append(
            SlotPages(
                slot_idx,
                seq_id,
                num_tokens,
                tuple(map(read_runs, runs)),
                is_padding=slot_idx == padding_slot,
            )
        )
    regions = range(arena.num_regions)
    return PageMap(
        backend="virtual",
        is_asleep=is_asleep,
        page_bytes=raw["page_bytes"],
        row_bytes=tuple(arena.region_row_bytes(idx) for idx in regions),
        slot_pages=tuple(arena.region_slot_bytes(idx) // raw["page_bytes"] for idx in regions),
        num_slots=num_slots,
        shared_refs=raw["shared_refs"],
        held_pages=raw["held_pages"],
        cached_pages=raw["cached_pages"],
        slots=tuple(slots),
    )
