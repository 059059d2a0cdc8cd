"""Sleep and wake where room is short: whoever falls asleep can wake within its cap, losing nothing.

Swapping a group in again is the same matter: where nothing else runs, all pages are there for it.
"""

from contextlib import suppress

import pytest

from vmalloc import ConfigError, DriverError, SequenceGroupSpec, _core

from .backends import BASES, GIVE_BACK, KINDS, Engine, books, make_cache
from .faulty import FaultyEngine

A, B, _ = BASES
PAGE = 4096
ROWS = 4  # of the shape "power of two", in a page

each_kind = pytest.mark.parametrize("kind", KINDS)
each_that_gives_back = pytest.mark.parametrize("kind", GIVE_BACK)


def small_engine(kind, num_pages=20, **changes):
    """An engine with a small cap, a large part of which new sequences leave to running ones."""
    settings = {"capacity_bytes": num_pages * PAGE, "low_watermark": 0.25, **changes}
    return Engine(kind, "power of two", **settings)


def pages_in_use(cache):
    return cache.stats().in_use_pages


class TestFullCache:
    """Every page of the cap is committed."""

    @pytest.mark.parametrize("lookahead", [0, 9])
    @each_that_gives_back
    def test_it_wakes_with_the_place_that_batches_are_padded_with(self, kind, lookahead):
        engine = small_engine(kind, lookahead_tokens=lookahead)
        engine.cache.batch_view([], [], pad_to=1)
        num_tokens = engine.cache.max_seq_tokens() - 10
        assert engine.admit(0, A[:num_tokens]) is not None
        assert engine.extend(0, *B[:10])
        assert pages_in_use(engine.cache) == 20
        before = books(engine.cache)
        assert engine.cache.try_sleep()
        assert engine.cache.try_wake()
        assert books(engine.cache) == before
        engine.check()
        assert engine.cache.batch_view([0], [0], pad_to=2) is not None

    @each_that_gives_back
    def test_it_wakes_under_a_cap_that_was_lowered_to_what_it_has(self, kind):
        engine = small_engine(kind, num_pages=40)
        engine.cache.batch_view([], [], pad_to=1)
        engine.admit(0, A[: 9 * ROWS])
        engine.admit(1, B[: 8 * ROWS])
        engine.cache.resize(18 * PAGE)
        assert engine.cache.try_sleep()
        assert engine.cache.try_wake()
        engine.check()
        assert engine.cache.stats().capacity_bytes == 18 * PAGE

    @each_that_gives_back
    def test_a_padded_batch_that_found_no_page_asks_for_none_on_waking(self, kind):
        engine = small_engine(kind)
        engine.admit(0, A[: 20 * ROWS])
        with pytest.raises(ConfigError, match="left"):
            engine.cache.batch_view([0], [0], pad_to=2)
        assert engine.cache.try_sleep()
        assert engine.cache.try_wake()
        engine.check()
        engine.truncate(0, 10)
        assert engine.cache.batch_view([0], [0], pad_to=2) is not None

    @each_kind
    def test_a_group_alone_comes_back_beside_the_place_that_batches_are_padded_with(self, kind):
        engine = small_engine(kind)
        engine.cache.batch_view([], [], pad_to=1)
        assert engine.admit(0, A[: 18 * ROWS]) is not None
        assert engine.extend(0, *B[:ROWS])
        assert engine.swap_out(0)
        assert engine.swap_in(0)
        engine.check()


class TestRefused:
    """What cannot wake does not fall asleep."""

    @each_that_gives_back
    def test_above_a_lowered_cap(self, kind):
        engine = small_engine(kind)
        engine.admit(0, A[: 10 * ROWS])
        engine.admit(1, B[: 5 * ROWS])
        engine.cache.resize(12 * PAGE)
        before = books(engine.cache)
        assert not engine.cache.try_sleep()
        assert books(engine.cache) == before
        engine.check()
        engine.free(1)
        assert engine.cache.try_sleep()
        assert engine.cache.try_wake()
        engine.check()

    @each_kind
    def test_while_a_step_is_open(self, kind):
        engine = small_engine(kind)
        engine.admit(0, A[: 10 * ROWS])
        step = engine.cache.begin_step()
        for num_pages in (6, 20):  # also where it would be refused for lack of room
            engine.cache.resize(num_pages * PAGE)
            before = books(engine.cache)
            with pytest.raises(ConfigError, match="is still open"):
                engine.cache.try_sleep()
            assert books(engine.cache) == before
        engine.cache.end_step(step)
        if kind in GIVE_BACK:
            assert engine.cache.try_sleep()
            assert engine.cache.try_wake()
        engine.check()

    @pytest.mark.parametrize("has_live", [False, True])
    def test_where_the_host_has_no_memory_for_a_page(self, has_live):
        """Those that swapped-out groups hold go too, so they count as much as the live ones."""
        num_refusals = 0
        for call in range(40):
            engine = FaultyEngine()
            engine.admit(0, A[: 3 * ROWS + 1])
            engine.fork(0, 1)
            assert engine.swap_out(1)  # holds the full pages of the other
            if not has_live:
                engine.free(0, keep_prefix=False)
            before = books(engine.cache)
            engine.driver.fail_call(call, _core.Fault.OUT_OF_MEMORY)
            is_asleep = engine.cache.try_sleep()
            assert is_asleep == (engine.driver.num_calls() <= call)  # no call failed
            engine.driver.fail_call(0, _core.Fault.NONE)
            if is_asleep:
                assert engine.cache.stats().created_pages == 0
                assert engine.cache.try_wake()
            else:
                num_refusals += 1
                assert books(engine.cache) == before
            engine.cache.check_invariants()
            assert engine.swap_in(1)
            engine.check(1)
            if has_live:
                engine.check(0)
            if is_asleep:
                break
        assert num_refusals >= 4  # three pages at least, and reading them


class TestAsleep:
    @each_that_gives_back
    def test_the_cap_stays_where_it_is(self, kind):
        engine = small_engine(kind)
        engine.admit(0, A[:30])
        assert engine.cache.try_sleep()
        for call in (
            lambda: engine.cache.resize(2 * PAGE),
            lambda: engine.cache.trim(),
            lambda: engine.cache.can_admit(1),
        ):
            with pytest.raises(ConfigError, match="asleep"):
                call()
        assert engine.cache.stats().capacity_bytes == 20 * PAGE
        assert engine.cache.try_wake()
        engine.check()

    def test_waking_that_finds_no_memory_leaves_none_behind(self):
        num_failures = 0
        for call in range(80):
            engine = FaultyEngine()
            engine.cache.batch_view([], [], pad_to=1)
            engine.admit(0, A[: 3 * ROWS])
            engine.fork(0, 1, num_tokens=2 * ROWS + 1)
            before = books(engine.cache)
            assert engine.cache.try_sleep()
            engine.driver.fail_call(call, _core.Fault.OUT_OF_MEMORY)
            is_awake = engine.cache.try_wake()
            if not is_awake:
                num_failures += 1
                stats = engine.cache.stats()
                assert stats.created_pages == stats.retired_pages == 0
                assert engine.cache.page_map().is_asleep
                engine.driver.fail_call(0, _core.Fault.NONE)
                assert engine.cache.try_wake()
            assert books(engine.cache) == before
            engine.check()
            if is_awake and engine.driver.num_calls() <= call:
                break
        assert num_failures >= 5

    @pytest.mark.parametrize("kind", ["virtual(cuda)"])
    def test_the_worker_creates_no_page_that_it_was_told_to_before(self, kind):
        for _ in range(5):
            cache = make_cache(kind, "power of two", commit_ahead_tokens=8)
            for seq_id in range(8):
                assert cache.try_admit(SequenceGroupSpec((seq_id,), 4 + seq_id)) is not None
                assert cache.try_extend([seq_id], [9 + seq_id])  # spare pages for those to come
            assert cache.try_sleep()
            cache._core_arena.wait_worker()  # asleep, the cache itself is not to be asked
            assert cache.stats().created_pages == 0
            cache.close()

    def test_kernels_that_still_read_only_delay_it(self):
        engine = FaultyEngine(capacity_bytes=20 * PAGE)
        engine.admit(0, A[: 12 * ROWS])
        engine.driver.hold_fences(True)
        engine.step()
        assert engine.cache.try_sleep()
        assert engine.cache.stats().created_pages == engine.cache.stats().retired_pages == 12
        assert not engine.cache.try_wake()  # 12 pages wait, and there is room for eight
        engine.driver.hold_fences(False)
        assert engine.cache.try_wake()
        engine.check()


def test_a_resize_that_raises_has_moved_the_cap_for_good():
    engine = FaultyEngine(capacity_bytes=20 * PAGE, low_watermark=0.25)
    engine.cache.batch_view([], [], pad_to=1)
    engine.admit(0, A[: 15 * ROWS])
    engine.free(0, keep_prefix=False)  # parks its pages
    engine.driver.fail_release_call(0)
    with pytest.raises(DriverError):
        engine.cache.resize(8 * PAGE)
    for _ in range(2):
        assert engine.cache.stats().capacity_bytes == 8 * PAGE
        assert engine.cache.max_seq_tokens() == 7 * ROWS
        assert not engine.cache.can_admit(8 * ROWS)  # alone: what is kept for others is nobody's
        assert engine.cache.can_admit(7 * ROWS)
    group = SequenceGroupSpec((1,), 7 * ROWS)
    with suppress(DriverError):
        assert engine.cache.try_admit(group) is not None
    assert engine.cache.stats().capacity_bytes == 8 * PAGE
    engine.cache.check_invariants()
