"""The paged backend's numbers for people.

Owns: nothing.  Thread-safety: none; one engine thread.
"""

from __future__ import annotations

from dataclasses import dataclass

from .backend import KVCacheStats
from .block_pool import BlockPool
from .block_supply import BlockSupply
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
