"""VirtualKVCache where kernels still run, driver calls fail, or many refer to one page."""

import threading
from contextlib import suppress

import pytest

from vmalloc import (
    ClosedError,
    ConfigError,
    DriverError,
    LayerKVSpec,
    SequenceGroupSpec,
    _core,
)

from .backends import BASES, books
from .faulty import FaultyEngine

PAGE = 4096
ROWS = 4  # of the shape "power of two", in a page


def leave_prefixes(engine, count, num_pages):
    """Let ``count`` sequences of ``num_pages`` full pages come and go; their tokens."""
    prompts = [[100 + i] * (num_pages * ROWS) for i in range(count)]
    for i, tokens in enumerate(prompts):
        engine.leave_prefix(1000 + i, tokens)
    return prompts


class FaultyRun:
    """A script of every operation; what raises has not happened, and is not followed up."""

    def __init__(self, engine):
        self.engine = engine
        self.num_faults = 0

    def attempt(self, call, *args, **settings):
        try:
            answer = call(*args, **settings)
        except DriverError as error:
            assert error.name == "INJECTED"
            self.num_faults += 1
            answer = None
        with suppress(ConfigError):  # asleep
            self.engine.cache.check_invariants()
        return answer

    def script(self):
        engine, attempt = self.engine, self.attempt
        prompt = BASES[0][:70]
        if attempt(engine.admit, 0, prompt) is None:
            return
        attempt(engine.register, 0)
        attempt(engine.step)
        attempt(engine.admit, 1, [*prompt[:60], 1, 2])
        if attempt(engine.fork, 0, 2, 3, num_tokens=61):
            attempt(engine.truncate, 2, 50)
            while not attempt(engine.extend, 2, *[3] * 11):
                pass
            attempt(engine.reorder, [2, 3], [1, 1])
            attempt(engine.step)
            if attempt(engine.swap_out, 2, 3):
                engine.check(0)
                while not attempt(engine.swap_in, 2, 3):
                    pass
            engine.check()
        attempt(engine.cache.try_sleep)
        while not attempt(engine.cache.try_wake):
            pass
        engine.check()
        attempt(engine.free, 0)
        attempt(engine.admit, 7, [*prompt, 5])
        engine.check()


class TestEvictionWhileKernelsRun:
    def test_pages_that_wait_for_a_fence_count_as_evicted(self):
        engine = FaultyEngine(capacity_bytes=20 * PAGE)
        engine.driver.hold_fences(True)
        engine.step()
        leave_prefixes(engine, 4, 4)  # 16 pages: cached, and mapped where a kernel may read them
        assert engine.admit(0, [1] * (4 * ROWS)) is not None
        assert engine.admit(1, [2] * (2 * ROWS)) is None  # must wait, whatever is evicted
        assert engine.cache.prefix_stats().evicted_pages <= 4
        assert engine.cache.stats().retired_pages >= 2  # tells the engine to wait for them
        engine.driver.hold_fences(False)
        engine.step()
        assert engine.admit(1, [2] * (2 * ROWS)) is not None

    def test_steps_do_not_drain_the_index_while_pages_wait(self):
        engine = FaultyEngine(capacity_bytes=20 * PAGE, low_watermark=0.3)
        engine.driver.hold_fences(True)
        engine.step()
        leave_prefixes(engine, 4, 5)
        for _ in range(10):
            engine.step()
        assert engine.cache.prefix_stats().evicted_pages <= 12

    def test_parked_pages_go_before_cached_ones(self):
        engine = FaultyEngine(capacity_bytes=20 * PAGE, low_watermark=0.3, commit_ahead_tokens=1)
        engine.leave_prefix(0, [1] * (10 * ROWS))
        assert engine.admit(1, [2] * (9 * ROWS), None) is not None
        engine.free(1)  # parks its pages
        assert engine.cache.stats().parked_bytes >= 9 * PAGE
        engine.step()
        assert engine.cache.prefix_stats().evicted_pages == 0

    def test_the_watermark_is_that_of_the_current_cap(self):
        engine = FaultyEngine(capacity_bytes=40 * PAGE, low_watermark=0.4)
        engine.cache.resize(20 * PAGE)
        engine.leave_prefix(0, [1] * (11 * ROWS))
        engine.step()
        assert engine.cache.prefix_stats().evicted_pages == 0


def test_running_out_of_mappings_evicts_nothing():
    engine = FaultyEngine(capacity_bytes=40 * PAGE)
    leave_prefixes(engine, 4, 4)
    engine.driver.fail_call(1, _core.Fault.OUT_OF_MEMORY)
    engine.cache.trim(0)
    before = engine.cache.prefix_stats().evicted_pages
    engine.driver.fail_call(1, _core.Fault.OUT_OF_MEMORY)  # creates a page, cannot map it
    engine.admit(0, [1] * ROWS)
    assert engine.cache.prefix_stats().evicted_pages == before


class TestFaultsInMidCall:
    def test_a_reorder_that_raises_leaves_no_slot_behind(self):
        engine = FaultyEngine(max_num_seqs=4)
        tokens = [[i] * 6 for i in range(4)]
        for seq_id in range(4):
            engine.admit(seq_id, tokens[seq_id])
        before = books(engine.cache)
        num_failed = 0
        for call in range(12):
            engine.driver.fail_call(call, _core.Fault.ERROR)
            try:
                done = engine.reorder([0, 1, 2, 3], [0, 0, 2, 2])
            except DriverError:
                num_failed += 1
                engine.driver.fail_call(0, _core.Fault.NONE)
                assert books(engine.cache)[-1] == before[-1], f"call {call} left a slot behind"
                engine.check()
            else:
                assert done
                break
        engine.driver.fail_call(0, _core.Fault.NONE)
        assert num_failed > 2
        engine.check()

    def test_a_truncate_that_cannot_unmap_has_happened_all_the_same(self):
        engine = FaultyEngine()
        engine.admit(0, [1] * 40)
        engine.step()
        engine.driver.fail_release_call(0)
        engine.truncate(0, 10)
        assert engine.extend(0, *[2] * 10)
        engine.check()
        engine.step()
        engine.check()

    @pytest.mark.parametrize("call", range(12))
    def test_a_sleep_that_raises_can_be_woken_from(self, call):
        engine = FaultyEngine()
        engine.admit(0, [1] * 20)
        engine.fork(0, 1)
        engine.swap_out(1)
        engine.step()
        engine.driver.fail_release_call(call)
        with suppress(DriverError):
            assert engine.cache.try_sleep()
        engine.driver.fail_release_call(1 << 40)
        assert engine.cache.try_wake()
        engine.cache.check_invariants()
        engine.check(0)
        assert engine.swap_in(1)
        engine.check()

    @pytest.mark.parametrize("call", range(6))
    def test_waking_that_raises_can_be_tried_again(self, call):
        engine = FaultyEngine()
        engine.admit(0, [1] * 20)
        assert engine.cache.try_sleep()
        engine.driver.fail_release_call(call)
        with suppress(DriverError):
            engine.cache.try_wake()
        engine.driver.fail_release_call(1 << 40)
        assert engine.cache.try_wake()
        engine.check()

    @pytest.mark.parametrize("shape", ["odd", "wide and thin"])
    @pytest.mark.parametrize("kind", ["error", "out of memory", "release"])
    def test_any_failing_call_leaves_sound_books_and_contents(self, shape, kind):
        num_faults = 0
        for call in range(0, 300, 11):
            engine = FaultyEngine(
                shape, capacity_bytes=1 << 20, protect_shared=True, zero_on_reuse=True
            )
            run = FaultyRun(engine)
            if kind == "release":
                engine.driver.fail_release_call(call)
            else:
                fault = _core.Fault.ERROR if kind == "error" else _core.Fault.OUT_OF_MEMORY
                engine.driver.fail_call(call, fault)
            run.script()
            num_faults += run.num_faults
            engine.cache.free(list(engine.tokens))
            engine.cache.flush_prefixes()
            for _ in range(2):
                run.attempt(engine.step)
            run.attempt(engine.cache.trim)
            engine.driver.fail_release_call(1 << 40)
            engine.cache.trim()
            assert engine.cache.stats().created_pages == 0, f"call {call} lost a page"
            engine.cache.close()
        assert num_faults > 5 or kind == "out of memory"  # which is a value

    def test_a_page_that_cannot_be_protected_is_not_cached(self):
        engine = FaultyEngine("odd, per layer", protect_shared=True)
        engine.admit(0, BASES[0][:40])
        for call in range(5):
            engine.driver.fail_release_call(call)
            with pytest.raises(DriverError):
                engine.register(0)
            engine.driver.fail_release_call(1 << 40)
            engine.cache.check_invariants()
        engine.register(0)
        engine.check()

    def test_pages_that_stay_protected_after_a_swap_are_copied_before_a_write(self):
        engine = FaultyEngine(protect_shared=True)
        for call in range(8):
            engine.admit(0, [1] * 10)
            assert engine.swap_out(0)
            engine.driver.fail_release_call(call)
            try:
                done = engine.swap_in(0)
            except DriverError:
                done = False
            engine.driver.fail_release_call(1 << 40)
            assert done or engine.swap_in(0)
            assert engine.extend(0, *[2] * 10), call
            engine.check()
            engine.free(0)

    def test_closing_while_a_swap_waits_for_the_worker_is_reported(self):
        engine = FaultyEngine(commit_ahead_tokens=20)
        engine.driver.delay_maps(100_000)
        engine.driver.fail_call(0, _core.Fault.NONE)
        engine.cache.try_admit(SequenceGroupSpec((0,), 4))
        while engine.driver.num_calls() <= 2:  # a page, a mapping; then the worker's
            pass
        outcomes = []

        def swap_out():
            try:
                outcomes.append(engine.cache.try_swap_out([0]))  # the worker was done before
            except ClosedError as error:
                outcomes.append(error)

        thread = threading.Thread(target=swap_out)
        thread.start()
        engine.cache.close()
        thread.join()
        assert outcomes


class TestPeaks:
    def test_beams_that_move_do_not_count_twice(self):
        engine = FaultyEngine()
        for seq_id in range(4):
            engine.admit(seq_id, [seq_id] * 6)
        assert engine.reorder([0, 1, 2, 3], [0, 0, 0, 0])
        assert engine.cache.stats().peak_live_seqs == 4

    def test_a_sequence_that_moves_before_a_write_does_not_count_twice(self):
        engine = FaultyEngine()
        engine.admit(0, [1] * 10)
        engine.fork(0, 1)
        engine.truncate(1, 5)
        assert engine.extend(1, 7)
        assert engine.cache.stats().cow_copies == 2
        assert engine.cache.stats().peak_live_seqs == 2

    def test_pins_count_in_the_peak(self):
        engine = FaultyEngine()
        prompts = leave_prefixes(engine, 4, 4)
        for tokens in prompts:
            assert engine.cache.pin_prefix(tokens) == len(tokens)
        stats = engine.cache.stats()
        assert stats.committed_bytes == 16 * PAGE
        assert stats.peak_committed_bytes >= stats.committed_bytes

    def test_what_a_cut_page_hid_counts_once_it_shows(self):
        engine = FaultyEngine()
        engine.admit(0, [1] * (2 * ROWS))
        engine.fork(0, 1)
        engine.truncate(1, ROWS + 1)
        engine.extend(0, *[2] * ROWS)
        engine.free(1)
        stats = engine.cache.stats()
        assert stats.live_bytes <= stats.peak_live_bytes


@pytest.mark.parametrize("num_pages", [5, 6])
def test_sleepers_and_a_group_that_holds_their_pages_share_the_copies(num_pages):
    engine = FaultyEngine(swap_bytes=num_pages * PAGE)
    engine.admit(0, [1] * (6 * ROWS))
    engine.fork(0, 1)
    assert engine.swap_out(1)  # holds the six pages of the other
    before = books(engine.cache)
    if num_pages < 6:
        assert not engine.cache.try_sleep()
        assert books(engine.cache) == before
    else:
        assert engine.cache.try_sleep()
        assert engine.cache.stats().created_pages == 0
        assert engine.cache.try_wake()
    assert engine.swap_in(1)
    engine.check(0, 1)
    assert engine.cache.stats().swapped_bytes == 0


def test_a_hit_whose_end_does_not_fit_keeps_its_full_pages():
    engine = FaultyEngine(capacity_bytes=12 * PAGE)
    tokens = [1] * (9 * ROWS + 2)
    engine.leave_prefix(0, tokens)  # 9 full pages and a part
    assert engine.admit(1, [2] * ROWS, None) is not None
    # Ten pages and the end to copy from would make 11 with the copy; 2 more are needed.
    assert engine.admit(2, [*tokens, *[3] * ROWS]) in (9 * ROWS, 9 * ROWS + 2)


def test_a_long_hit_is_cut_back_at_once_where_pages_fill_at_different_tokens():
    """Regions of 16 and 1,024 bytes a row: of a live sequence, few tokens are whole in both."""
    thin = LayerKVSpec(num_kv_heads=1, k_head_dim=2, v_head_dim=2)
    wide = LayerKVSpec(num_kv_heads=4, k_head_dim=32, v_head_dim=32)
    engine = FaultyEngine(layers=(thin, wide), layers_per_group=1, max_seq_len=2048)
    tokens = [i % 97 for i in range(1000)]
    engine.admit(0, tokens)
    engine.register(0)
    hit = engine.cache.match_prefix([*tokens, 1])
    assert hit.num_tokens == 1000
    reservation = engine.cache.try_admit(SequenceGroupSpec((1,), 1001), hit)
    assert reservation.num_cached_tokens == 768  # 3 pages of the thin region
