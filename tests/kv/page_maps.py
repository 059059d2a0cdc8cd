"""What must hold between a page map and the statistics of the same moment."""

import itertools


def check_page_map(page_map, stats):
    """Requires: the background worker has nothing to do."""
    page = stats.page_bytes
    assert page_map.page_bytes == page
    num_needed = page_map.num_pages("live") + page_map.num_pages("shared")
    num_committed = num_needed - page_map.shared_refs + page_map.held_pages
    assert num_committed * page == stats.committed_bytes
    assert page_map.shared_refs * page == stats.shared_bytes
    assert page_map.num_pages("ahead") * page == stats.ahead_bytes
    assert page_map.num_pages("parked") * page == stats.parked_bytes
    assert page_map.cached_pages * page == stats.cached_bytes
    assert page_map.num_pages("retired") >= stats.retired_pages
    # Of every shared page there are at least two places.
    assert page_map.num_pages("shared") <= 2 * page_map.shared_refs
    assert page_map.num_pages("shared") >= page_map.shared_refs + (page_map.shared_refs > 0)
    slot_idxs = [slot.slot_idx for slot in page_map.slots]
    assert slot_idxs == sorted(set(slot_idxs))
    assert all(idx < page_map.num_slots for idx in slot_idxs)
    for slot in page_map.slots:
        assert slot.num_pages() > 0
        assert len(slot.runs) == len(page_map.row_bytes)
        for runs, row_bytes, most in zip(
            slot.runs, page_map.row_bytes, page_map.slot_pages, strict=True
        ):
            num_needed = sum(run.num_pages for run in runs if run.kind in ("live", "shared"))
            assert num_needed * page >= slot.num_tokens * row_bytes
            assert sum(run.num_pages for run in runs) <= most
            assert all(run.num_pages > 0 for run in runs)
            assert all(a.kind != b.kind for a, b in itertools.pairwise(runs))
