"""The arena: transactional growth, epochs, parking, reclaim order, watermarks, the worker."""

import os
import subprocess
import sys
import threading

import pytest

from tests.arenas import admit, extend, free, make_arena, pages
from tests.drivers import PAGE, make_driver
from vmalloc import ClosedError, ConfigError, _core

pytestmark = pytest.mark.usefixtures("each_driver")


class TestGrowth:
    def test_nothing_is_taken_at_start(self):
        arena = make_arena()
        assert pages(arena) == (0, 0, 0, 0, 0)
        assert arena.stats()["reserved_bytes"] == 4 * 64 * 512

    def test_pages_follow_rows(self):
        arena = make_arena()
        slot = admit(arena, 8)
        assert pages(arena) == (1, 0, 0, 0, 0)
        assert extend(arena, slot, 9)
        assert pages(arena) == (2, 0, 0, 0, 0)
        assert extend(arena, slot, 64)
        assert pages(arena) == (8, 0, 0, 0, 0)

    def test_try_extend_changes_nothing_when_the_pool_is_empty(self):
        arena = make_arena(max_pages=6)
        a, b = arena.try_admit(2, 16)
        before = arena.stats()
        assert not arena.try_extend([a, b], [32, 40])  # needs 5 more, has 2
        arena.check_invariants()
        after = arena.stats()
        assert {k: v for k, v in after.items() if k != "stall_us"} == {
            k: v for k, v in before.items() if k != "stall_us"
        }
        assert arena.try_extend([a, b], [24, 24])

    def test_try_admit_is_all_or_nothing_over_slots(self):
        arena = make_arena(max_pages=6)
        assert arena.try_admit(3, 24) is None  # 9 pages
        assert pages(arena) == (0, 0, 0, 0, 0)
        assert arena.try_admit(5, 1) is None  # 4 slots
        assert len(arena.try_admit(4, 8)) == 4

    def test_all_regions_or_none(self):
        arena = make_arena(num_layers=3, layers_per_group=1, max_pages=8)
        slot = admit(arena, 16)  # 2 pages in each of 3 regions
        assert not extend(arena, slot, 24)  # 3 more, has 2
        assert pages(arena) == (6, 0, 0, 0, 0)

    def test_rows_that_straddle_pages(self):
        arena = make_arena(row_bytes=4800, max_rows=40, max_pages=64)
        slot = admit(arena, 1)
        assert pages(arena)[0] == 2  # 4800 bytes
        for num_rows in range(2, 41):
            assert extend(arena, slot, num_rows)
            assert pages(arena)[0] == -(-num_rows * 4800 // PAGE)
            assert arena.mapped_rows(slot) >= num_rows
        assert arena.region_slot_bytes(0) % PAGE == 0
        assert arena.region_slot_bytes(0) % 4800 == 0

    def test_kv_split_puts_keys_and_values_apart(self):
        arena = make_arena(kv_split=True)
        assert arena.num_regions == 2
        assert [arena.region_row_bytes(i) for i in range(2)] == [256, 256]

    def test_lookahead_rows_are_backed_up_to_the_end(self):
        arena = make_arena(lookahead_rows=9)
        slot = admit(arena, 1)
        assert arena.mapped_rows(slot) >= 10
        assert pages(arena)[0] == 2
        assert extend(arena, slot, 64)
        assert pages(arena)[0] == 8

    def test_max_slot_rows_is_bounded_by_pool_and_slot(self):
        assert make_arena(max_pages=4).max_slot_rows() == 32
        assert make_arena(max_pages=16).max_slot_rows() == 64
        assert make_arena(max_pages=4, lookahead_rows=8).max_slot_rows() == 24


class TestBadInput:
    @pytest.mark.parametrize(
        ("settings", "words"),
        [
            ({"layers_per_group": 0}, "layers_per_group is 0"),
            ({"layers_per_group": 2}, "number of layers, 1"),
            ({"num_slots": 0}, "num_slots is 0"),
            ({"max_rows": 0}, "max_rows is 0"),
            ({"layers": []}, "layers is empty"),
            ({"max_pages": 1}, "holds 1 pages of 4096.*at least 2"),
            (
                {"num_slots": 1 << 30, "max_rows": 1 << 30},
                "cannot hold 1073741824 slots of 1073741824",
            ),
            ({"num_slots": 1 << 24, "max_rows": 1 << 20}, "address space"),
        ],
    )
    def test_config_error_names_value_and_limit(self, settings, words):
        with pytest.raises(ConfigError, match=words):
            make_arena(**settings)

    def test_refused_arena_leaves_no_reservation(self):
        with open("/proc/self/maps") as file:
            before = len(file.readlines())
        for _ in range(20):
            with pytest.raises(ConfigError):
                make_arena(max_pages=1)
        with open("/proc/self/maps") as file:
            assert len(file.readlines()) <= before + 5

    def test_calls_with_bad_slots_or_rows_change_nothing(self):
        arena = make_arena()
        slot = admit(arena, 8)
        idle = (slot + 1) % 4
        bad_calls = [
            (lambda: arena.try_extend([idle], [8]), f"slot {idle} is not live"),
            (lambda: arena.try_extend([-1], [8]), "slot -1 is not live"),
            (lambda: arena.try_extend([99], [8]), "slot 99 is not live; there are 4"),
            (lambda: arena.try_extend([slot], [7]), "between the current 8 and the maximum, 64"),
            (lambda: arena.try_extend([slot], [65]), "extended to 65 rows"),
            (lambda: arena.try_extend([slot], [-5]), "extended to -5 rows"),
            (lambda: arena.try_extend([slot, idle], [64, 64]), "is not live"),
            (lambda: arena.try_extend([slot], [9, 10]), "1 slots but 2 row counts"),
            (lambda: arena.truncate(slot, 9), "num_rows is 9.*the slot has, 8"),
            (lambda: arena.truncate(idle, 0), "is not live"),
            (lambda: arena.free([idle]), "is not live"),
            (lambda: arena.free([slot, slot]), "named twice"),
            (lambda: arena.try_extend([slot, slot], [9, 9]), "named twice"),
            (lambda: arena.free([slot, idle]), "is not live"),
            (lambda: arena.try_admit(1, 65), "num_rows is 65.*rows of a slot, 64"),
            (lambda: arena.resize(1), "at least 2"),
            (lambda: arena.end_step(1), "step 1 is not open"),
            (lambda: arena.mapped_rows(4), "slot is 4.*number of slots, 4"),
        ]
        for call, words in bad_calls:
            with pytest.raises(ConfigError, match=words):
                call()
            arena.check_invariants()
            assert pages(arena) == (1, 0, 0, 0, 0)

    def test_steps_do_not_nest(self):
        arena = make_arena()
        epoch = arena.begin_step()
        with pytest.raises(ConfigError, match="step 1 is still open"):
            arena.begin_step()
        arena.end_step(epoch)
        with pytest.raises(ConfigError, match="step 1 is not open"):
            arena.end_step(epoch)

    def test_closed_arena_says_so_and_closing_twice_is_fine(self):
        driver = make_driver()
        arena = make_arena(driver)
        admit(arena, 20)
        arena.close()
        arena.close()
        counters = driver.counters()
        assert counters["create_calls"] == counters["destroy_calls"] == 3
        with pytest.raises(ClosedError, match="closed"):
            arena.try_admit(1, 1)


class TestParking:
    def test_freed_pages_stay_mapped_and_are_adopted_without_a_call(self):
        arena = make_arena()
        slot = admit(arena, 30)
        free(arena, slot)
        assert pages(arena) == (0, 0, 4, 0, 0)
        before = arena.stats()
        assert admit(arena, 30) == slot
        after = arena.stats()
        assert after["map_calls"] == before["map_calls"]
        assert after["adopted_pages"] == 4
        assert pages(arena) == (4, 0, 0, 0, 0)

    def test_smallest_warm_slot_that_fits_is_adopted(self):
        arena = make_arena()
        big, small = arena.try_admit(2, 8)
        assert arena.try_extend([big, small], [64, 24])
        free(arena, big, small)
        assert admit(arena, 20) == small
        assert admit(arena, 20) == big

    def test_surplus_of_an_adopted_slot_counts_as_ahead(self):
        arena = make_arena(num_slots=1)
        free(arena, admit(arena, 40))
        admit(arena, 8)
        assert pages(arena) == (1, 4, 0, 0, 0)

    def test_truncate_gives_back_whole_pages(self):
        arena = make_arena()
        slot = admit(arena, 40)
        arena.truncate(slot, 9)
        arena.check_invariants()
        assert pages(arena) == (2, 0, 0, 3, 0)
        assert arena.mapped_rows(slot) == 16


class TestReclaim:
    def test_parked_pages_are_used_before_new_ones_are_created_longest_parked_first(self):
        arena = make_arena(max_pages=16, num_slots=4)
        a, b, c = arena.try_admit(3, 24)  # 9 pages
        free(arena, b)
        free(arena, c)
        assert extend(arena, a, 40)  # 2 more: from b
        assert arena.stats()["created_pages"] == 9
        assert (arena.mapped_rows(b), arena.mapped_rows(c)) == (8, 24)
        assert extend(arena, a, 64)  # 3 more: b's last, two of c's
        assert (arena.mapped_rows(b), arena.mapped_rows(c)) == (0, 8)
        assert pages(arena) == (8, 0, 1, 0, 0)
        assert arena.stats()["reclaimed_pages"] == 5

    def test_a_slot_promised_to_a_coming_sequence_is_left_alone(self):
        arena = make_arena(max_pages=16, num_slots=2, ahead_rows=1)
        a = admit(arena, 7)
        arena.prefetch(32)
        arena.wait_worker()
        assert pages(arena) == (1, 0, 4, 0, 0)
        assert extend(arena, a, 40)
        assert pages(arena)[2] == 4

    def test_parked_pages_and_the_surplus_of_warm_slots_go_before_any_is_created(self):
        arena = make_arena(max_pages=8, num_slots=3)
        free(arena, admit(arena, 32))  # 4 pages
        admit(arena, 8)  # adopts them: 1 needed, 3 too many
        b = admit(arena, 8)  # takes one of those
        c = admit(arena, 8)  # and another
        free(arena, c)  # 1 parked
        assert pages(arena) == (2, 1, 1, 0, 0)
        assert extend(arena, b, 40)  # needs 4: 1 parked, 1 surplus, 2 new
        assert pages(arena) == (6, 0, 0, 0, 0)
        assert arena.stats()["created_pages"] == 6
        assert arena.stats()["reclaimed_pages"] == 4

    def test_surplus_of_slots_being_admitted_is_reclaimed_for_each_other(self):
        arena = make_arena(max_pages=12, num_slots=2)
        a, b = arena.try_admit(2, 32)
        assert extend(arena, a, 64)  # 8 + 4 pages: all of them
        free(arena, a, b)
        assert arena.try_admit(2, 48) is not None  # 6 each: two of the first go to the second
        arena.check_invariants()

    def test_reclaim_never_takes_rows_of_a_live_sequence(self):
        arena = make_arena(max_pages=4)
        a = admit(arena, 16)
        b = admit(arena, 16)
        assert not extend(arena, a, 17)
        assert arena.mapped_rows(b) == 16

    def test_a_sequence_keeps_its_own_ahead_pages_when_it_grows_into_them(self):
        arena = make_arena(max_pages=5, num_slots=2)
        a = admit(arena, 24)
        free(arena, a)
        a = admit(arena, 8)  # 1 needed, 2 ahead
        assert extend(arena, a, 40)  # all five, its own two among them
        assert pages(arena) == (5, 0, 0, 0, 0)
        assert arena.stats()["reclaimed_pages"] == 0


class TestEpochs:
    """A page leaves a slot only when the kernels that may read it are done."""

    @pytest.fixture
    def driver(self):
        return _core.FaultDriver(make_driver())

    def test_pages_freed_in_an_open_step_wait_for_its_fence(self, driver):
        arena = make_arena(driver, num_slots=2, max_pages=4)
        a = admit(arena, 32)
        epoch = arena.begin_step()
        arena.truncate(a, 8)
        assert pages(arena) == (1, 0, 0, 0, 3)
        assert admit(arena, 8) is None  # the three pages are still readable
        arena.end_step(epoch)
        assert pages(arena) == (1, 0, 0, 3, 0)
        assert admit(arena, 8) is not None

    def test_pages_wait_as_long_as_the_fence_does(self, driver):
        arena = make_arena(driver, num_slots=2, max_pages=4)
        a = admit(arena, 32)
        driver.hold_fences(True)
        arena.end_step(arena.begin_step())
        arena.truncate(a, 8)
        assert pages(arena)[4] == 3
        arena.end_step(arena.begin_step())
        assert pages(arena)[4] == 3
        driver.hold_fences(False)
        arena.end_step(arena.begin_step())
        assert pages(arena) == (1, 0, 0, 3, 0)

    def test_retired_pages_are_taken_back_by_their_own_slot(self, driver):
        arena = make_arena(driver)
        a = admit(arena, 32)
        driver.hold_fences(True)
        arena.end_step(arena.begin_step())
        arena.truncate(a, 8)
        before = arena.stats()["map_calls"]
        assert extend(arena, a, 24)
        assert pages(arena) == (3, 0, 0, 0, 1)
        assert extend(arena, a, 48)
        assert pages(arena) == (6, 0, 0, 0, 0)
        assert arena.stats()["map_calls"] == before + 1

    def test_growth_past_a_retired_tail_whose_fence_just_passed_leaves_no_hole(self, driver):
        arena = make_arena(driver, num_slots=2, max_pages=9)
        a, b = arena.try_admit(2, 24)  # 3 + 3 pages
        driver.hold_fences(True)
        arena.end_step(arena.begin_step())
        arena.truncate(a, 8)  # two pages retire
        free(arena, b)
        driver.hold_fences(False)
        assert extend(arena, a, 64)  # 8 pages: short, so others are reclaimed on the way
        _tensor(arena)[a, :64] = 1.0

    def test_parked_pages_are_unmapped_for_another_slot_only_after_the_fence(self, driver):
        arena = make_arena(driver, num_slots=2, max_pages=4)
        a, b = arena.try_admit(2, 16)
        driver.hold_fences(True)
        arena.end_step(arena.begin_step())
        free(arena, a)
        assert not extend(arena, b, 32)
        assert pages(arena) == (2, 0, 0, 0, 2)
        driver.hold_fences(False)
        assert extend(arena, b, 32)

    def test_waiting_pages_stop_further_reclaim(self, driver):
        arena = make_arena(driver, num_slots=4, max_pages=8)
        a, b, c, d = arena.try_admit(4, 16)
        driver.hold_fences(True)
        arena.end_step(arena.begin_step())
        free(arena, a, b, c)
        for _ in range(3):  # asks again and again; only two pages are missing
            assert not extend(arena, d, 32)
        assert pages(arena) == (2, 0, 4, 0, 2)

    def test_ahead_pages_that_no_kernel_saw_need_no_fence(self, driver):
        arena = make_arena(driver, num_slots=2, max_pages=4, ahead_rows=8)
        a = admit(arena, 8)
        arena.wait_worker()
        assert pages(arena) == (1, 1, 0, 0, 0)
        b = admit(arena, 8)
        arena.wait_worker()
        arena.end_step(arena.begin_step())  # whoever cleared the pages is done
        driver.hold_fences(True)
        arena.end_step(arena.begin_step())
        assert extend(arena, b, 24)  # takes a's ahead page at once
        assert pages(arena)[0] == 4
        assert a != b


class TestWatermarks:
    def test_admission_stops_below_low_while_others_run(self):
        arena = make_arena(max_pages=8, low_pages=3)
        a = admit(arena, 32)  # 4 of 8
        assert not arena.can_admit(1, 16)
        assert admit(arena, 16) is None
        assert arena.can_admit(1, 8)
        assert extend(arena, a, 64)  # a running sequence may use everything

    def test_low_is_ignored_when_nothing_runs(self):
        arena = make_arena(max_pages=8, low_pages=8)
        assert arena.can_admit(1, 64)
        assert admit(arena, 64) is not None

    def test_what_lives_commits_ahead_from_below_low(self):
        arena = make_arena(max_pages=4, low_pages=3, ahead_rows=8)
        admit(arena, 8)
        arena.wait_worker()
        assert pages(arena)[:2] == (1, 1)  # that is what the pages were kept for
        assert not arena.can_admit(1, 8)

    def test_nothing_is_warmed_from_below_low(self):
        arena = make_arena(max_pages=4, low_pages=3, ahead_rows=1)
        admit(arena, 7)
        arena.prefetch(8)
        arena.wait_worker()
        assert pages(arena) == (1, 0, 0, 0, 0)

    def test_commit_ahead_takes_no_page_that_is_not_there(self):
        arena = make_arena(max_pages=2, low_pages=2, ahead_rows=8)
        admit(arena, 16)
        arena.wait_worker()
        assert pages(arena) == (2, 0, 0, 0, 0)

    def test_pages_above_high_go_back_to_the_system_longest_parked_first(self):
        arena = make_arena(max_pages=16, high_pages=3)
        a, b = arena.try_admit(2, 16)
        free(arena, a)
        free(arena, b)
        arena.end_step(arena.begin_step())
        arena.check_invariants()
        assert arena.stats()["created_pages"] == 3
        assert arena.mapped_rows(b) == 16
        assert arena.mapped_rows(a) == 8

    def test_trim_gives_everything_unneeded_back(self):
        arena = make_arena(ahead_rows=8)
        a, b = arena.try_admit(2, 16)
        arena.wait_worker()
        free(arena, a)
        assert pages(arena) == (2, 1, 3, 0, 0)
        assert arena.trim(0) == 4
        arena.check_invariants()
        assert pages(arena) == (2, 0, 0, 0, 0)
        assert arena.mapped_rows(b) == 16

    def test_resize_down_takes_effect_as_pages_are_freed(self):
        arena = make_arena(max_pages=16)
        a, b = arena.try_admit(2, 32)
        free(arena, a)
        arena.resize(6)
        arena.check_invariants()
        assert arena.stats()["created_pages"] == 6
        assert not extend(arena, b, 64)
        arena.resize(3)
        arena.check_invariants()
        assert arena.stats()["created_pages"] == 4  # b needs them
        arena.truncate(b, 8)
        arena.check_invariants()
        assert arena.stats()["created_pages"] == 3
        arena.resize(16)
        assert extend(arena, b, 64)


class TestWorker:
    def test_worker_backs_the_next_page_before_it_is_needed(self):
        arena = make_arena(ahead_rows=4)
        slot = admit(arena, 4)
        arena.wait_worker()
        assert pages(arena) == (1, 0, 0, 0, 0)  # row 8 still fits
        assert extend(arena, slot, 5)
        arena.wait_worker()
        assert pages(arena) == (1, 1, 0, 0, 0)
        for num_rows in range(6, 65):
            assert extend(arena, slot, num_rows)
            arena.wait_worker()
        stats = arena.stats()
        assert stats["critical_pages"] == 1
        assert stats["background_pages"] == 7
        assert stats["worker_error"] == ""

    def test_prefetch_warms_one_idle_slot(self):
        arena = make_arena(ahead_rows=4)
        for _ in range(5):  # the same hint every step
            arena.prefetch(32)
        arena.wait_worker()
        arena.check_invariants()
        assert pages(arena) == (0, 0, 4, 0, 0)
        admit(arena, 32)
        stats = arena.stats()
        assert stats["critical_pages"] == 0
        assert stats["adopted_pages"] == 4

    def test_jobs_of_a_paused_worker_wait_until_they_are_asked_for(self):
        arena = make_arena(_core.make_null_driver(PAGE), ahead_rows=4)
        arena.pause_worker()
        a, b, c = arena.try_admit(3, 8)
        assert pages(arena) == (3, 0, 0, 0, 0)
        assert arena.run_worker(2) == 2
        assert pages(arena) == (3, 2, 0, 0, 0)
        assert extend(arena, c, 9)  # what the worker did not get to is done here
        stats = arena.stats()
        assert (stats["critical_pages"], stats["background_pages"]) == (4, 2)
        assert arena.run_worker(5) == 1
        assert arena.run_worker(5) == 0
        assert extend(arena, a, 13)
        assert extend(arena, b, 13)
        arena.wait_worker()
        assert pages(arena) == (6, 2, 0, 0, 0)
        arena.close()

    def test_a_worker_without_commit_ahead_has_no_jobs(self):
        arena = make_arena(_core.make_null_driver(PAGE))
        arena.pause_worker()
        admit(arena, 8)
        assert arena.run_worker(5) == 0

    def test_a_worker_whose_driver_works_on_its_own_cannot_be_paused(self):
        driver = make_driver()
        arena = make_arena(driver, ahead_rows=4)
        if not driver.is_async:
            arena.pause_worker()
            return
        with pytest.raises(ConfigError, match="'cuda' driver cannot be paused"):
            arena.pause_worker()

    def test_worker_failure_ends_background_work_only(self):
        driver = _core.FaultDriver(make_driver())
        arena = make_arena(driver, ahead_rows=8)
        slot = admit(arena, 4)
        arena.wait_worker()
        arena.end_step(arena.begin_step())  # what has a fence has got it
        driver.fail_call(0, _core.Fault.ERROR)
        assert arena.try_extend([slot], [9])  # backed already; the next page is the worker's
        arena.wait_worker()
        driver.fail_call(0, _core.Fault.NONE)
        arena.check_invariants()
        assert "INJECTED" in arena.stats()["worker_error"]
        assert extend(arena, slot, 64)
        arena.check_invariants()

    def test_nobody_waits_for_spare_pages_that_a_failed_worker_will_not_create(self):
        driver = _core.FaultDriver(make_driver())
        arena = make_arena(driver, ahead_rows=8, spare_pages=2)
        slot = admit(arena, 4)
        arena.wait_worker()
        assert arena.stats()["free_pages"] == 2
        arena.end_step(arena.begin_step())  # what has a fence has got it
        driver.fail_call(0, _core.Fault.ERROR)
        assert arena.try_extend([slot], [9])
        arena.wait_worker()
        assert "INJECTED" in arena.stats()["worker_error"]
        assert arena.try_extend([slot], [64])  # takes the spare ones, and asks for new ones
        waiter = threading.Thread(target=arena.check_invariants, daemon=True)
        waiter.start()
        waiter.join(timeout=20)
        assert not waiter.is_alive()


class TestScrub:
    def _fill_and_recycle(self, **settings):
        arena = make_arena(num_slots=1, **settings)
        slot = admit(arena, 16)
        tensor = _tensor(arena)
        tensor[slot, :16] = float("nan")
        free(arena, slot)
        assert admit(arena, 16) == slot
        return tensor[slot, :16].clone()

    def test_zero_on_reuse_clears_adopted_pages(self):
        assert (self._fill_and_recycle(zero_on_reuse=True) == 0).all()

    def test_without_it_old_contents_are_left(self):
        assert self._fill_and_recycle(zero_on_reuse=False).isnan().all()

    def test_zero_on_reuse_clears_pages_that_moved_to_another_slot(self):
        arena = make_arena(num_slots=2, max_pages=3, zero_on_reuse=True)
        a = admit(arena, 16)
        tensor = _tensor(arena)
        tensor[a, :16] = float("nan")
        free(arena, a)
        b, c = admit(arena, 16), admit(arena, 8)
        assert (tensor[b, :16] == 0).all()
        assert (tensor[c, :8] == 0).all()


class TestProcess:
    def test_forked_child_gets_a_clear_error_and_harms_nothing(self):
        arena = make_arena(ahead_rows=8)
        slot = admit(arena, 20)
        tensor = _tensor(arena)
        tensor[slot, :20] = 7.0
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                arena.try_admit(1, 1)
                os.write(writer, b"no error")
            except ClosedError as error:
                os.write(writer, str(error).encode())
            del arena, tensor  # destructors in the child must not touch the parent's pages
            os._exit(0)
        os.close(writer)
        message = os.read(reader, 1000).decode()
        os.close(reader)
        assert os.waitpid(child, 0)[1] == 0
        assert "parent of this forked process" in message
        arena.check_invariants()
        assert (tensor[slot, :20] == 7.0).all()

    def test_tensor_outlives_the_arena(self):
        arena = make_arena(_core.make_host_driver(PAGE))  # a GPU's would fault
        slot = admit(arena, 8)
        tensor = _tensor(arena)
        tensor[slot, :8] = 1.0
        arena.close()
        del arena
        assert tensor.sum() == 0  # addresses are still reserved, and backed by nothing

    def test_interpreter_exit_with_everything_alive_is_clean(self):
        script = """
import sys
import threading
sys.path.insert(0, '.')
from tests.arenas import admit, make_arena
arena = make_arena(ahead_rows=8)
admit(arena, 20)
print("ok")
"""
        result = subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, check=False
        )
        assert (result.returncode, result.stdout, result.stderr) == (0, "ok\n", "")


def _tensor(arena):
    import torch

    slot_elements = arena.region_slot_bytes(0) // 4
    row_elements = arena.region_row_bytes(0) // 4
    num_slots = arena.stats()["reserved_bytes"] // arena.region_slot_bytes(0)
    capsule = arena.tensor_capsule(
        0,
        0,
        "float32",
        [num_slots, slot_elements // row_elements, row_elements],
        [slot_elements, row_elements, 1],
    )
    return torch.from_dlpack(capsule)


def test_surplus_of_an_adopted_slot_is_taken_before_pages_are_created():
    arena = make_arena(max_pages=32, ahead_rows=8)
    free(arena, admit(arena, 64))  # 8 pages, parked
    a = admit(arena, 8)  # adopts them: 1 to hold its rows, 1 ahead, 6 too many
    b = admit(arena, 8)
    arena.wait_worker()
    assert extend(arena, b, 40)
    arena.wait_worker()
    assert arena.stats()["created_pages"] == 8
    assert arena.mapped_rows(a) >= 16  # what is ahead of it stays
    assert extend(arena, b, 64)
    arena.wait_worker()
    assert arena.stats()["created_pages"] == 10
