"""Page maps as they are sent.

Owns: nothing.  Thread-safety: pure functions.
"""

from __future__ import annotations

from ..engine import PageMap, RankReport
from .protocol.page_map import PageMapBody, RankEntry, RankTotals, SlotEntry


def page_map_body(page_map: PageMap) -> PageMapBody:
    """Every slot with its pages."""
    return PageMapBody(
        backend=page_map.backend,
        is_asleep=page_map.is_asleep,
        page_bytes=page_map.page_bytes,
        row_bytes=list(page_map.row_bytes),
        slot_pages=list(page_map.slot_pages),
        num_slots=page_map.num_slots,
        shared_refs=page_map.shared_refs,
        held_pages=page_map.held_pages,
        cached_pages=page_map.cached_pages,
        slots=[
            SlotEntry(
                slot_idx=slot.slot_idx,
                seq_id=slot.seq_id,
                request_id=slot.request_id,
                num_tokens=slot.num_tokens,
                is_padding=slot.is_padding,
                runs=[[(run.kind, run.num_pages) for run in runs] for runs in slot.runs],
            )
            for slot in page_map.slots
        ],
    )


def rank_entry(report: RankReport) -> RankEntry:
    """One rank beside the others."""
    stats = report.kv_stats
    return RankEntry(
        rank=report.rank,
        peak_rss_bytes=report.peak_rss_bytes,
        map=page_map_body(report.page_map),
        totals=RankTotals(**{name: getattr(stats, name) for name in RankTotals.model_fields}),
    )
