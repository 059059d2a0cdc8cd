"""The paged backend's numbers for people.

Owns: nothing.  Thread-safety: none; one engine thread.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby

from .backend import KVCacheStats
from .block_pool import BlockPool
from .block_supply import BlockSupply
from .page_map import PageMap, PageRun, SlotPages
from .paged_sequences import PagedSequences
from .paged_swap import SwapSpace


@dataclass(slots=True)
class StepTotals:
    """Sums over the ends of steps."""

    num_steps: int = 0
    live_tokens: int = 0
    committed_blocks: int = 0


def collect_stats(
    pool: BlockPool,
    supply: BlockSupply,
    seqs: PagedSequences,
    swap: SwapSpace,
    totals: StepTotals,
    token_bytes: int,
) -> KVCacheStats:
    """A page is a block. There is no worker, nothing is parked, and no block is retired."""
    page = supply.block_bytes
    is_awake = not supply.is_asleep  # asleep, the counts say what will be there again
    live_tokens = seqs.note_live_tokens()
    return KVCacheStats(
        reserved_bytes=pool.num_blocks * page,
        capacity_bytes=pool.capacity * page,
        page_bytes=page,
        created_pages=supply.num_created * is_awake,
        free_pages=(supply.num_created - pool.num_in_use) * is_awake,
        in_use_pages=pool.num_in_use * is_awake,
        retired_pages=0,
        live_bytes=live_tokens * token_bytes * is_awake,
        logical_bytes=seqs.num_tokens * token_bytes * is_awake,
        committed_bytes=pool.num_committed * page * is_awake,
        ahead_bytes=0,
        parked_bytes=0,
        cached_bytes=(pool.num_in_use - pool.num_committed) * page * is_awake,
        shared_bytes=(pool.num_seq_refs - pool.num_live) * page * is_awake,
        swapped_bytes=(swap.num_copied + supply.num_asleep) * page,
        peak_committed_bytes=pool.peak_committed * page,
        peak_live_bytes=seqs.peak_tokens * token_bytes,
        num_live_seqs=len(seqs),
        peak_live_seqs=seqs.peak,
        map_calls=0,
        unmap_calls=supply.num_discards,
        critical_pages=supply.num_allocated,
        background_pages=0,
        adopted_pages=0,
        reclaimed_pages=0,
        aliased_pages=seqs.num_aliased,
        cow_copies=seqs.num_copies,
        swap_out_pages=swap.swap_out_pages,
        swap_in_pages=swap.swap_in_pages,
        stall_us=0.0,
        num_steps=totals.num_steps,
        live_byte_steps=float(totals.live_tokens * token_bytes),
        committed_byte_steps=float(totals.committed_blocks * page),
        worker_error="",
    )


def collect_page_map(
    pool: BlockPool, supply: BlockSupply, seqs: PagedSequences, token_bytes: int
) -> PageMap:
    """A sequence is a slot, its row of the block table, with one region; a page is a block."""
    is_asleep = supply.is_asleep
    slots = [] if is_asleep else [_slot_pages(pool, seqs, seq_id) for seq_id in seqs.ids()]
    slots.sort(key=lambda slot: slot.slot_idx)
    num_rows, max_blocks = seqs.tables.ids.shape
    return PageMap(
        backend="paged",
        is_asleep=is_asleep,
        page_bytes=supply.block_bytes,
        row_bytes=(token_bytes,),
        slot_pages=(max_blocks,),
        num_slots=num_rows,
        shared_refs=0 if is_asleep else pool.num_seq_refs - pool.num_live,
        held_pages=0 if is_asleep else pool.num_committed - pool.num_live,
        cached_pages=0 if is_asleep else pool.num_in_use - pool.num_committed,
        slots=tuple(slot for slot in slots if slot.num_pages()),
    )


def _slot_pages(pool: BlockPool, seqs: PagedSequences, seq_id: int) -> SlotPages:
    row = seqs.get(seq_id).row
    is_shared = (pool.seq_refs[seqs.tables.blocks(row)] > 1).tolist()
    runs = tuple(
        PageRun("shared" if shared else "live", len(list(run)))
        for shared, run in groupby(is_shared)
    )
    return SlotPages(row, seq_id, seqs.length(seq_id), (runs,))
