"""The arena's page map: kinds by region, and what waits for a fence."""

import pytest

from tests.arenas import admit, extend, free, make_arena, pages
from tests.drivers import make_driver
from vmalloc import ClosedError, _core

pytestmark = pytest.mark.usefixtures("each_driver")


def kinds(arena, slot):
    """Per region the runs of one slot."""
    return dict(arena.page_map()).get(slot)


def check(arena):
    """The equations of kv_arena.h."""
    arena.wait_worker()
    stats = arena.stats()
    count = dict.fromkeys(("live", "shared", "ahead", "parked", "retired"), 0)
    for _, regions in arena.page_map():
        for runs in regions:
            for kind, num_pages in runs:
                count[kind] += num_pages
    needed = count["live"] + count["shared"] - stats["shared_refs"] + stats["held_pages"]
    assert needed == stats["committed_pages"]
    assert count["ahead"] == stats["ahead_pages"]
    assert count["parked"] == stats["parked_pages"]
    assert count["retired"] >= stats["retired_pages"]


def test_rows_that_straddle_pages_count_for_both():
    arena = make_arena(row_bytes=3000, max_rows=8)  # 4,096 bytes a page
    slot = admit(arena, 2)  # 6,000 bytes
    assert kinds(arena, slot) == [[("live", 2)]]
    assert extend(arena, slot, 3)  # 9,000 bytes
    assert kinds(arena, slot) == [[("live", 3)]]
    check(arena)


@pytest.mark.parametrize("settings", [{"layers_per_group": 1}, {"kv_split": True}])
def test_every_region_has_its_own_runs(settings):
    arena = make_arena(num_layers=2, max_pages=32, **settings)
    slot = admit(arena, 20)
    per_region = 20 * arena.region_row_bytes(0) // 4096 + 1
    assert arena.num_regions == 2
    assert kinds(arena, slot) == [[("live", per_region)], [("live", per_region)]]
    check(arena)


def test_shared_pages_are_those_of_several_live_slots():
    arena = make_arena()
    parent = admit(arena, 20)
    arena.cache_pages(parent, [0], [0])
    assert kinds(arena, parent) == [[("live", 3)]]  # the index is no slot
    (child,) = arena.try_fork(parent, 1, 12)
    assert kinds(arena, parent) == [[("shared", 1), ("live", 2)]]
    assert kinds(arena, child) == [[("shared", 1), ("live", 1)]]
    check(arena)
    arena.free([parent])
    assert kinds(arena, child) == [[("live", 2)]]
    check(arena)


def test_ahead_parked_and_gone():
    arena = make_arena(ahead_rows=16)
    slot = admit(arena, 8)
    arena.wait_worker()
    assert kinds(arena, slot) == [[("live", 1), ("ahead", 2)]]
    check(arena)
    free(arena, slot)
    assert kinds(arena, slot) == [[("parked", 3)]]
    check(arena)
    arena.trim(0)
    assert arena.page_map() == []
    check(arena)


def test_reserved_and_lookahead_rows_are_live():
    arena = make_arena(lookahead_rows=8)
    (slot,) = arena.try_admit(1, 4, 16)
    assert kinds(arena, slot) == [[("live", 3)]]
    check(arena)


def test_a_page_whose_fence_has_not_passed_is_retired():
    driver = _core.FaultDriver(make_driver())
    arena = make_arena(driver)
    slot = admit(arena, 24)
    arena.end_step(arena.begin_step())
    driver.hold_fences(True)
    arena.end_step(arena.begin_step())
    arena.truncate(slot, 8)
    assert kinds(arena, slot) == [[("live", 1), ("retired", 2)]]
    assert pages(arena)[-1] == 2
    check(arena)
    driver.hold_fences(False)
    arena.end_step(arena.begin_step())
    assert extend(arena, slot, 9)
    check(arena)
    assert kinds(arena, slot)[0][0][0] == "live"


def test_swapped_out_groups_hold_what_others_share():
    arena = make_arena(swap_bytes=1 << 20)
    parent = admit(arena, 20)
    (child,) = arena.try_fork(parent, 1, 20)
    group = arena.try_swap_out([child])
    assert kinds(arena, child) is None
    assert kinds(arena, parent) == [[("live", 3)]]
    check(arena)
    free(arena, parent)
    assert arena.stats()["held_pages"] == 2
    check(arena)
    (child,) = arena.try_swap_in(group)
    assert kinds(arena, child) == [[("live", 3)]]
    check(arena)


def test_a_closed_arena_has_no_map():
    arena = make_arena()
    arena.close()
    with pytest.raises(ClosedError):
        arena.page_map()
