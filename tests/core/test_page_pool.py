"""The pool's ledger: references, retirement, the cap, and which page is handed out."""

import pytest

from vmalloc import DriverError, InvariantError, _core


@pytest.fixture
def pool():
    return _core.PagePool(_core.make_null_driver(4096), 64)


def counts(pool):
    stats = pool.stats()
    assert stats["created_pages"] == (
        stats["free_pages"] + stats["in_use_pages"] + stats["retired_pages"]
    )
    return (
        stats["created_pages"],
        stats["free_pages"],
        stats["in_use_pages"],
        stats["retired_pages"],
    )


def check(pool, live=(), retired=(), cached=(), held=()):
    size = 1 + max([*live, *retired, *cached, *held, 0])
    pool.check_invariants(
        *([list(pages).count(i) for i in range(size)] for pages in (live, held, cached, retired))
    )


def test_acquire_is_all_or_nothing(pool):
    assert pool.try_acquire(65) is None
    assert counts(pool) == (0, 0, 0, 0)
    pages = pool.try_acquire(64)
    assert len(set(pages)) == 64
    assert pool.try_acquire(1) is None
    assert pool.available() == 0
    check(pool, live=pages)


def test_released_page_is_free_and_comes_back(pool):
    (page,) = pool.try_acquire(1)
    pool.release(page)
    assert counts(pool) == (1, 1, 0, 0)
    assert pool.try_acquire(1) == [page]


def test_retired_page_is_not_handed_out_before_it_is_settled():
    pool = _core.PagePool(_core.make_null_driver(4096), 1)
    (page,) = pool.try_acquire(1)
    pool.retire(page)
    assert counts(pool) == (1, 0, 0, 1)
    assert pool.available() == 0
    assert pool.try_acquire(1) is None
    check(pool, retired=[page])
    pool.settle(page)
    assert pool.try_acquire(1) == [page]


def test_restored_page_is_in_use_again(pool):
    (page,) = pool.try_acquire(1)
    pool.retire(page)
    pool.restore(page)
    assert counts(pool) == (1, 0, 1, 0)
    check(pool, live=[page])


@pytest.mark.parametrize("method", ["release", "retire"])
def test_dropping_what_nobody_holds_is_an_invariant_error(pool, method):
    (page,) = pool.try_acquire(1)
    pool.release(page)
    with pytest.raises(InvariantError, match="nobody holds"):
        getattr(pool, method)(page)


@pytest.mark.parametrize("method", ["restore", "settle"])
def test_only_retired_pages_are_restored_or_settled(pool, method):
    (page,) = pool.try_acquire(1)
    with pytest.raises(InvariantError, match="was not retired"):
        getattr(pool, method)(page)


def test_successors_are_preferred(pool):
    first = pool.try_acquire(3)
    assert first == [first[0], first[0] + 1, first[0] + 2]
    assert pool.try_acquire(2, after=first[-1]) == [first[-1] + 1, first[-1] + 2]


def test_sequences_that_grow_in_turn_keep_their_pages_together():
    pool = _core.PagePool(_core.make_null_driver(4096), 8 * 64)
    last = [None] * 64
    num_breaks = 0
    for _ in range(8):
        for i in range(64):
            (page,) = pool.try_acquire(1, after=last[i])
            num_breaks += last[i] is not None and page != last[i] + 1
            last[i] = page
    assert num_breaks == 0


def test_free_pages_are_used_before_new_ones_are_created(pool):
    pages = pool.try_acquire(10)
    for page in pages:
        pool.release(page)
    pool.try_acquire(10)
    assert counts(pool) == (10, 0, 10, 0)


def test_trim_destroys_free_pages_only(pool):
    pages = pool.try_acquire(10)
    for page in pages[:6]:
        pool.release(page)
    assert pool.trim(2) == 4
    assert counts(pool) == (6, 2, 4, 0)
    check(pool, live=pages[6:])


def test_lower_cap_destroys_pages_as_they_become_free(pool):
    pages = pool.try_acquire(10)
    pool.release(pages[0])
    pool.set_max_pages(5)
    assert counts(pool) == (9, 0, 9, 0)
    assert pool.available() == 0
    for page in pages[1:]:
        pool.release(page)
    assert counts(pool) == (5, 5, 0, 0)
    pool.set_max_pages(64)
    assert pool.available() == 64


def test_check_invariants_names_a_page_whose_references_differ(pool):
    (page,) = pool.try_acquire(1)
    with pytest.raises(InvariantError, match=f"page {page} has 1 live"):
        check(pool)


@pytest.mark.parametrize("fault", [_core.Fault.OUT_OF_MEMORY, _core.Fault.ERROR])
def test_failed_creation_takes_nothing(fault):
    driver = _core.FaultDriver(_core.make_null_driver(4096))
    pool = _core.PagePool(driver, 64)
    driver.fail_call(3, fault)
    if fault == _core.Fault.ERROR:
        with pytest.raises(Exception, match="INJECTED"):
            pool.try_acquire(5)
    else:
        assert pool.try_acquire(5) is None
    check(pool)
    assert pool.stats()["in_use_pages"] == 0
    assert len(pool.try_acquire(64)) == 64


def test_destroying_the_pool_destroys_every_page():
    driver = _core.make_null_driver(4096)
    pool = _core.PagePool(driver, 64)
    pages = pool.try_acquire(10)
    pool.retire(pages[0])
    pool.release(pages[1])
    del pool
    counters = driver.counters()
    assert counters["create_calls"] == counters["destroy_calls"] == 10


def test_references_of_four_kinds_keep_a_page(pool):
    (page,) = pool.try_acquire(1)
    assert pool.try_share(page)
    assert pool.try_hold(page)
    assert pool.try_cache(page)
    check(pool, live=[page, page], held=[page], cached=[page])
    assert (pool.stats()["shared_refs"], pool.stats()["cached_pages"]) == (1, 0)
    pool.retire(page)
    pool.release(page)
    check(pool, retired=[page], held=[page], cached=[page])
    assert (pool.stats()["in_use_pages"], pool.stats()["cached_pages"]) == (1, 0)
    pool.unhold(page)
    assert (pool.stats()["in_use_pages"], pool.stats()["cached_pages"]) == (1, 1)
    assert pool.uncache(page)  # nobody needs it, though a kernel may still read it
    assert counts(pool) == (1, 0, 0, 1)
    pool.settle(page)
    assert counts(pool) == (1, 1, 0, 0)
    for take in (pool.try_share, pool.try_hold, pool.try_cache):
        assert not take(page)
        assert not take(12345)
    check(pool)


@pytest.mark.parametrize("call", ["unhold", "uncache"])
def test_dropping_what_was_not_taken_is_an_invariant_error(pool, call):
    (page,) = pool.try_acquire(1)
    with pytest.raises(InvariantError):
        getattr(pool, call)(page)


def test_granted_pages_are_there_and_no_more_are_created_on_demand(pool):
    assert pool.try_grant(10)
    assert counts(pool) == (10, 0, 10, 0)  # kept from use until every pool has its own
    pool.end_grant(10, keeps_pages=True)
    assert counts(pool) == (10, 10, 0, 0)
    pages = pool.try_acquire(10)
    assert pool.try_acquire(1) is None
    assert pool.available() == 54  # what a larger grant would bring
    for page in pages:
        pool.release(page)
    assert pool.try_grant(7)  # there are more already
    pool.end_grant(12, keeps_pages=True)
    assert counts(pool) == (10, 10, 0, 0)
    assert pool.try_acquire(13) is None
    assert len(pool.try_acquire(12)) == 12
    check(pool, live=range(12))


def test_a_grant_that_others_did_not_get_leaves_nothing(pool):
    first = pool.try_acquire(3)
    assert pool.try_grant(8)
    pool.end_grant(3, keeps_pages=False)
    assert counts(pool) == (3, 0, 3, 0)
    assert pool.try_acquire(1) is None
    check(pool, live=first)


def test_a_grant_stops_at_the_cap(pool):
    assert pool.try_grant(1000)
    pool.end_grant(1000, keeps_pages=True)
    assert counts(pool) == (64, 64, 0, 0)


def test_a_grant_lies_side_by_side(pool):
    assert pool.try_grant(6)
    pool.end_grant(6, keeps_pages=True)
    pages = pool.try_acquire(6)
    assert pages == list(range(pages[0], pages[0] + 6))


@pytest.mark.parametrize("fault", [_core.Fault.OUT_OF_MEMORY, _core.Fault.ERROR])
def test_a_grant_that_the_driver_cannot_meet_changes_nothing(fault):
    driver = _core.FaultDriver(_core.make_null_driver(4096))
    pool = _core.PagePool(driver, 64)
    pages = pool.try_acquire(2)
    driver.fail_call(3, fault)
    if fault == _core.Fault.ERROR:
        with pytest.raises(DriverError):
            pool.try_grant(10)
    else:
        assert not pool.try_grant(10)
    assert counts(pool) == (2, 0, 2, 0)
    check(pool, live=pages)
    assert len(pool.try_acquire(4)) == 4  # and what is not granted is created as it was before
