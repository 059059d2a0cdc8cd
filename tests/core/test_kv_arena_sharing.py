"""The arena maps one page into several slots: fork, copies before writes, references, swap."""

import ctypes
import subprocess
import sys

import pytest

from tests.arenas import ROW, admit, extend, free, make_arena, pages
from tests.drivers import PAGE, make_driver
from vmalloc import ConfigError, DriverError, _core

pytestmark = pytest.mark.usefixtures("each_driver")

get_pointer = ctypes.pythonapi.PyCapsule_GetPointer
get_pointer.restype = ctypes.c_void_p
get_pointer.argtypes = [ctypes.py_object, ctypes.c_char_p]


class Rows:
    """Writes and reads whole rows of one region through the addresses of a tensor capsule."""

    def __init__(self, arena, row_bytes=ROW, region=0):
        self._row_bytes = row_bytes
        self._slot_bytes = arena.region_slot_bytes(region)
        capsule = arena.tensor_capsule(
            region, 0, "float32", [1, row_bytes // 4], [row_bytes // 4, 1]
        )
        # A DLPack tensor starts with its address; importing torch for that takes seconds.
        managed = get_pointer(capsule, b"dltensor")
        self._base = ctypes.c_void_p.from_address(managed).value

    def _at(self, slot, row):
        return self._base + slot * self._slot_bytes + row * self._row_bytes

    def write(self, slot, first, end, value):
        for row in range(first, end):
            ctypes.memset(self._at(slot, row), (value + row) % 251 + 1, self._row_bytes)

    def check(self, slot, first, end, value):
        for row in range(first, end):
            expected = bytes([(value + row) % 251 + 1]) * self._row_bytes
            assert ctypes.string_at(self._at(slot, row), self._row_bytes) == expected, (slot, row)


def shared(arena):
    stats = arena.stats()
    return stats["shared_refs"], stats["cow_copies"], stats["aliased_pages"]


@pytest.fixture(params=[False, True], ids=["plain", "protected"])
def arena(request):
    return make_arena(num_slots=8, max_pages=32, swap_bytes=32 * PAGE, protect_shared=request.param)


class TestFork:
    def test_full_pages_are_shared_and_the_tail_is_copied(self, arena):
        rows, parent = Rows(arena), admit(arena, 20)  # 2 full pages and a half
        rows.write(parent, 0, 20, 0)
        children = arena.try_fork(parent, 2, 20)
        arena.check_invariants()
        assert pages(arena)[0] == 3 + 2
        assert shared(arena) == (4, 2, 4)
        for child in children:
            rows.check(child, 0, 20, 0)

    def test_what_each_writes_is_its_own(self, arena):
        rows, parent = Rows(arena), admit(arena, 20)
        rows.write(parent, 0, 20, 0)
        (child,) = arena.try_fork(parent, 1, 20)
        assert arena.try_extend([parent, child], [30, 30])
        rows.write(parent, 20, 30, 50)
        rows.write(child, 20, 30, 90)
        for slot, value in ((parent, 50), (child, 90)):
            rows.check(slot, 0, 20, 0)
            rows.check(slot, 20, 30, value)
        arena.check_invariants()

    def test_fork_at_an_earlier_row(self, arena):
        rows, parent = Rows(arena), admit(arena, 40)
        rows.write(parent, 0, 40, 0)
        (child,) = arena.try_fork(parent, 1, 11)
        assert shared(arena) == (1, 1, 1)
        rows.check(child, 0, 11, 0)
        assert extend(arena, child, 40)
        rows.write(child, 11, 40, 70)
        rows.check(parent, 0, 40, 0)

    def test_fork_at_a_page_end_copies_nothing(self, arena):
        (child,) = arena.try_fork(admit(arena, 16), 1, 16)
        assert shared(arena) == (2, 0, 2)
        assert extend(arena, child, 17)

    def test_fork_needs_rows_that_the_parent_has(self, arena):
        with pytest.raises(ConfigError, match=r"num_rows is 17.*16"):
            arena.try_fork(admit(arena, 16), 1, 17)

    def test_no_page_and_no_slot_is_a_value_and_changes_nothing(self, arena):
        parent = admit(arena, 20)
        other = admit(arena, 64)
        assert extend(arena, parent, 60)
        third = admit(arena, 64)
        fourth = admit(arena, 60)
        assert pages(arena)[0] == 32
        before = arena.stats()
        assert arena.try_fork(parent, 1, 20) is None  # no page for the tail
        assert arena.last_shortage() == 1
        arena.check_invariants()
        # The parent's pages may be read-only by now; the device was waited for before that.
        marked = {"stall_us": 0, "access_calls": 0, "wait_calls": 0}
        assert {**arena.stats(), **marked} == {**before, **marked}
        free(arena, other, third, fourth)
        assert arena.try_fork(parent, 8, 16) is None  # no slot for the eighth
        assert arena.last_shortage() == 0
        arena.check_invariants()
        assert len(arena.try_fork(parent, 7, 16)) == 7

    def test_pages_outlive_the_parent(self, arena):
        rows, parent = Rows(arena), admit(arena, 20)
        rows.write(parent, 0, 20, 0)
        (child,) = arena.try_fork(parent, 1, 20)
        free(arena, parent)
        rows.check(child, 0, 20, 0)
        newcomers = arena.try_admit(3, 24)
        for slot in newcomers:
            rows.write(slot, 0, 24, 123)
        rows.check(child, 0, 20, 0)
        free(arena, child, *newcomers)
        arena.trim(0)
        assert arena.stats()["created_pages"] == 0

    @pytest.mark.parametrize("row_bytes", [480, 4800])
    def test_rows_that_straddle_pages(self, row_bytes):
        arena = make_arena(row_bytes=row_bytes, max_rows=60, num_slots=8, max_pages=400)
        rows, parent = Rows(arena, row_bytes), admit(arena, 60)
        rows.write(parent, 0, 60, 0)
        for num_rows in range(0, 61, 7):
            (child,) = arena.try_fork(parent, 1, num_rows)
            rows.check(child, 0, num_rows, 0)
            assert extend(arena, child, 60)
            rows.write(child, num_rows, 60, 99)
            rows.check(parent, 0, 60, 0)
            free(arena, child)


class TestPrepareWrite:
    def fork_and_cut(self, arena, rows, cut_to):
        parent = admit(arena, 24)
        rows.write(parent, 0, 24, 0)
        (child,) = arena.try_fork(parent, 1, 24)
        arena.truncate(child, cut_to)
        arena.check_invariants()
        return parent, child

    @pytest.mark.parametrize("cut_to", [0, 3, 8, 12, 23])
    def test_shared_rows_are_copied_before_they_are_written(self, arena, cut_to):
        rows = Rows(arena)
        parent, child = self.fork_and_cut(arena, rows, cut_to)
        if cut_to % 8 != 0:
            with pytest.raises(ConfigError, match="prepare_write first"):
                arena.try_extend([child], [24])
        child = arena.prepare_write(child)
        arena.check_invariants()
        assert extend(arena, child, 24)
        rows.write(child, cut_to, 24, 77)
        rows.check(parent, 0, 24, 0)
        rows.check(child, 0, cut_to, 0)
        rows.check(child, cut_to, 24, 77)

    def test_what_nobody_shares_any_more_is_taken_back_in_place(self, arena):
        rows = Rows(arena)
        parent, child = self.fork_and_cut(arena, rows, 4)
        free(arena, parent)
        copies = arena.stats()["cow_copies"]
        assert arena.prepare_write(child) == child
        assert arena.stats()["cow_copies"] == copies
        assert extend(arena, child, 24)
        rows.write(child, 4, 24, 5)
        rows.check(child, 0, 4, 0)

    def test_nothing_to_do_costs_no_move(self, arena):
        slot = admit(arena, 20)
        assert arena.prepare_write(slot) == slot

    def test_no_page_for_the_copy_is_a_value(self, arena):
        rows = Rows(arena)
        _, child = self.fork_and_cut(arena, rows, 4)
        others = arena.try_admit(4, 56)
        assert admit(arena, 8) is not None
        assert arena.prepare_write(child) is None
        assert arena.last_shortage() == 1
        arena.check_invariants()
        free(arena, others[0])
        assert arena.prepare_write(child) is not None

    def test_a_page_that_a_kernel_may_read_stays_where_it_is(self):
        driver = _core.FaultDriver(make_driver())
        arena = make_arena(driver, num_slots=8, max_pages=32)
        rows = Rows(arena)
        parent, child = self.fork_and_cut(arena, rows, 24)
        driver.hold_fences(True)
        arena.end_step(arena.begin_step())
        arena.begin_step()
        arena.truncate(child, 4)
        moved = arena.prepare_write(child)
        assert moved != child
        rows.check(child, 0, 24, 0)  # a kernel under way still finds all it had
        assert arena.try_extend([moved], [24])
        rows.write(moved, 4, 24, 9)
        rows.check(child, 0, 24, 0)
        rows.check(parent, 0, 24, 0)
        arena.check_invariants()
        driver.hold_fences(False)
        arena.trim(0)
        assert arena.stats()["retired_pages"] == 0

    def test_two_slots_that_dropped_one_page_do_not_both_take_it_back(self):
        driver = _core.FaultDriver(make_driver())
        arena = make_arena(driver, num_slots=8, max_pages=32)
        rows = Rows(arena)
        driver.hold_fences(True)
        parent, child = self.fork_and_cut(arena, rows, 24)
        arena.end_step(arena.begin_step())
        arena.begin_step()
        for slot in (parent, child):
            arena.truncate(slot, 8)  # pages 1 and 2 wait, mapped in both
        parent, child = arena.prepare_write(parent), arena.prepare_write(child)
        for slot, value in ((parent, 30), (child, 60)):
            assert arena.try_extend([slot], [24])
            rows.write(slot, 8, 24, value)
        rows.check(parent, 8, 24, 30)
        rows.check(child, 8, 24, 60)
        arena.check_invariants()


class TestSlots:
    def test_a_slot_with_shared_pages_is_emptied_not_parked(self, arena):
        parent = admit(arena, 24)
        (child,) = arena.try_fork(parent, 1, 24)
        free(arena, parent)
        assert pages(arena)[2] == 0
        free(arena, child)  # the last one may park: the pages are its own now
        assert pages(arena)[2] == 3

    def test_an_emptied_slot_is_not_given_away_under_a_running_kernel(self):
        driver = _core.FaultDriver(make_driver())
        arena = make_arena(driver, num_slots=3, max_pages=32)
        rows, parent = Rows(arena), admit(arena, 24)
        rows.write(parent, 0, 24, 0)
        (child,) = arena.try_fork(parent, 1, 24)
        driver.hold_fences(True)
        arena.end_step(arena.begin_step())
        free(arena, child)
        (newcomer,) = arena.try_admit(1, 24)
        assert newcomer not in (parent, child)
        rows.write(newcomer, 0, 24, 200)
        rows.check(child, 0, 24, 0)
        assert arena.try_admit(1, 8) is None  # the only slot left is still read
        driver.hold_fences(False)
        assert arena.try_admit(1, 8) is not None
        arena.check_invariants()

    def test_a_fork_empties_a_parked_slot_that_no_kernel_reads_however_full(self):
        arena = make_arena(num_slots=4, max_pages=32)
        parent, small, large = (admit(arena, rows) for rows in (24, 8, 24))
        warm = admit(arena, 8)
        free(arena, large)  # parked with three pages before the step
        step = arena.begin_step()
        free(arena, small, warm)  # with one page each in the step, whose kernels may read them
        assert arena.try_fork(parent, 1, 24) == [large]
        arena.end_step(step)
        arena.check_invariants()

    def test_reserved_rows_stay_backed(self, arena):
        (slot,) = arena.try_admit(1, 4, 64)
        assert pages(arena)[:2] == (8, 0)
        arena.trim(0)
        assert pages(arena)[0] == 8
        assert extend(arena, slot, 64)
        arena.truncate(slot, 1)
        assert pages(arena)[0] == 8
        free(arena, slot)
        assert pages(arena)[0] == 0


class TestCachedPages:
    def test_cached_pages_outlive_their_slot_and_start_another(self, arena):
        rows, slot = Rows(arena), admit(arena, 20)
        rows.write(slot, 0, 20, 0)
        ids = arena.page_ids(slot, [0, 0, 0], [0, 1, 2])
        arena.cache_pages(slot, [0, 0, 0], [0, 1, 2])
        arena.free([slot])
        arena.check_invariants(ids)
        assert arena.stats()["cached_pages"] == 3
        prefix = _core.Prefix(num_rows=18, pages=[ids[:2]], tails=[ids[2]])
        (again,) = arena.try_admit(1, 30, prefix=prefix)
        arena.check_invariants(ids)
        rows.check(again, 0, 18, 0)
        rows.write(again, 18, 30, 40)
        assert arena.uncache_pages(ids) == 1  # the tail; two are in use
        arena.check_invariants()

    def test_cached_pages_are_not_taken_for_others(self, arena):
        slot = admit(arena, 64)
        ids = arena.page_ids(slot, [0] * 8, list(range(8)))
        arena.cache_pages(slot, [0] * 8, list(range(8)))
        arena.free([slot])
        assert len(arena.try_admit(3, 64)) == 3
        assert arena.try_admit(1, 8) is None
        assert arena.last_shortage() == 1
        assert arena.uncache_pages(ids[:1]) == 1
        assert arena.try_admit(1, 8) is not None
        arena.check_invariants(ids[1:])

    def test_a_prefix_must_be_in_use_and_of_the_right_shape(self, arena):
        slot = admit(arena, 20)
        ids = arena.page_ids(slot, [0, 0, 0], [0, 1, 2])
        free(arena, slot)
        arena.trim(0)
        gone = _core.Prefix(num_rows=18, pages=[ids[:2]], tails=[ids[2]])
        with pytest.raises(ConfigError, match="not in use"):
            arena.try_admit(1, 20, prefix=gone)
        with pytest.raises(ConfigError, match="must have 2 and a tail"):
            arena.try_admit(1, 20, prefix=_core.Prefix(num_rows=18, pages=[ids], tails=[None]))
        with pytest.raises(ConfigError, match=r"rows of the prefix is 18.*17"):
            arena.try_admit(1, 17, prefix=gone)
        with pytest.raises(ConfigError, match="below those that hold rows"):
            arena.page_ids(admit(arena, 20), [0], [3])
        arena.check_invariants()

    def test_pinned_pages_count_as_needed(self, arena):
        slot = admit(arena, 64)
        ids = arena.page_ids(slot, [0] * 8, list(range(8)))
        arena.cache_pages(slot, [0] * 8, list(range(8)))
        arena.pin_pages(ids[:3])
        arena.free([slot])
        arena.check_invariants(ids)
        assert (arena.stats()["committed_pages"], arena.stats()["cached_pages"]) == (3, 5)
        assert not arena.can_admit(5, 48)
        arena.unpin_pages(ids[:3])
        assert arena.can_admit(5, 48)
        arena.check_invariants(ids)


class TestSwap:
    def test_a_group_comes_back_with_its_rows_and_its_sharing(self, arena):
        rows, parent = Rows(arena), admit(arena, 20)
        rows.write(parent, 0, 20, 0)
        (child,) = arena.try_fork(parent, 1, 20)
        assert arena.try_extend([parent, child], [30, 26])
        rows.write(parent, 20, 30, 50)
        rows.write(child, 20, 26, 90)
        before = pages(arena)[0], shared(arena)[0]
        group = arena.try_swap_out([parent, child])
        arena.check_invariants()
        assert pages(arena)[0] == 0
        assert arena.stats()["swapped_bytes"] == 6 * PAGE  # each page once
        for slot in (others := arena.try_admit(3, 64)):
            rows.write(slot, 0, 64, 111)
        arena.free(others)
        parent, child = arena.try_swap_in(group)
        arena.check_invariants()
        assert (pages(arena)[0], shared(arena)[0]) == before
        assert arena.stats()["swapped_bytes"] == 0
        rows.check(parent, 0, 20, 0)
        rows.check(child, 0, 20, 0)
        rows.check(parent, 20, 30, 50)
        rows.check(child, 20, 26, 90)
        assert arena.try_extend([parent, child], [40, 40])
        rows.write(child, 26, 40, 1)
        rows.check(parent, 20, 30, 50)

    def test_pages_that_others_share_stay(self, arena):
        rows, parent = Rows(arena), admit(arena, 20)
        rows.write(parent, 0, 20, 0)
        (child,) = arena.try_fork(parent, 1, 20)
        group = arena.try_swap_out([child])
        assert arena.stats()["swapped_bytes"] == PAGE  # the tail
        free(arena, parent)
        assert pages(arena)[0] == 2  # held for the child
        (child,) = arena.try_swap_in(group)
        rows.check(child, 0, 20, 0)
        assert shared(arena)[0] == 0
        arena.check_invariants()

    def test_what_only_groups_hold_can_follow_them(self, arena):
        rows, parent = Rows(arena), admit(arena, 20)
        rows.write(parent, 0, 20, 0)
        (child,) = arena.try_fork(parent, 1, 20)
        groups = [arena.try_swap_out([child]), arena.try_swap_out([parent])]
        assert pages(arena)[0] == 2  # each holds them for the other
        arena.try_swap_out([], with_held=True)
        arena.check_invariants()
        assert pages(arena)[0] == 0
        assert arena.stats()["swapped_bytes"] == 4 * PAGE  # two tails, and two copies for both
        for group in groups:
            (slot,) = arena.try_swap_in(group)
            rows.check(slot, 0, 20, 0)
        arena.check_invariants()

    def test_full_swap_space_is_a_value(self, arena):
        slots = arena.try_admit(4, 64)
        first = arena.try_swap_out(slots)
        assert first is not None
        (slot,) = arena.try_admit(1, 8)
        before = pages(arena)
        assert arena.try_swap_out([slot]) is None
        assert pages(arena) == before
        for idx in range(4):
            arena.drop_swapped(first, idx)
        with pytest.raises(ConfigError, match="not swapped out"):
            arena.drop_swapped(first, 0)
        assert arena.try_swap_out([slot]) is not None
        arena.check_invariants()

    def test_a_member_can_be_dropped_while_the_group_is_away(self, arena):
        rows, parent = Rows(arena), admit(arena, 20)
        rows.write(parent, 0, 20, 0)
        (child, other) = arena.try_fork(parent, 2, 20)
        group = arena.try_swap_out([parent, child])  # two pages are held for `other`
        assert arena.stats()["swapped_bytes"] == 2 * PAGE
        arena.drop_swapped(group, 0)
        assert arena.stats()["swapped_bytes"] == PAGE
        arena.check_invariants()
        with pytest.raises(ConfigError, match="slot of the group is 0"):
            arena.drop_swapped(group, 0)
        free(arena, other)
        (child,) = arena.try_swap_in(group)
        rows.check(child, 0, 20, 0)
        arena.check_invariants()

    def test_no_room_to_come_back_is_a_value(self, arena):
        slots = arena.try_admit(2, 64)
        group = arena.try_swap_out(slots)
        others = arena.try_admit(3, 64)
        assert arena.try_swap_in(group) is None
        arena.check_invariants()
        free(arena, *others)
        assert len(arena.try_swap_in(group)) == 2

    def test_unknown_group(self, arena):
        with pytest.raises(ConfigError, match="group 7 is not swapped out"):
            arena.try_swap_in(7)


def test_a_missed_copy_faults_where_shared_pages_are_protected():
    script = """
import ctypes
from tests.arenas import make_arena
from tests.core.test_kv_arena_sharing import Rows
arena = make_arena(num_slots=8, max_pages=32, protect_shared=True)
rows = Rows(arena)
parent = arena.try_admit(1, 16)[0]
rows.write(parent, 0, 16, 0)
child = arena.try_fork(parent, 1, 16)[0]
print("before", flush=True)
rows.write({slot}, 3, 4, 9)
print("after", flush=True)
"""
    for slot in ("parent", "child"):
        result = subprocess.run(
            [sys.executable, "-c", script.format(slot=slot)], capture_output=True, text=True
        )
        assert result.stdout == "before\n", result.stderr
        assert result.returncode == -11


def sharing_script(arena, group):
    """Forks, moves, swaps and frees; takes what it is given. Returns live slots and group."""
    live = []

    def attempt(call):
        try:
            result = call()
        except DriverError as error:
            assert error.name == "INJECTED"
            result = None
        arena.check_invariants()
        return result

    live += attempt(lambda: arena.try_admit(1, 20)) or []
    for parent in list(live):
        live += attempt(lambda parent=parent: arena.try_fork(parent, 2, 20)) or []
    for i, slot in enumerate(live[:2]):
        attempt(lambda slot=slot: arena.truncate(slot, 4))
        moved = attempt(lambda slot=slot: arena.prepare_write(slot))
        if moved is not None:
            live[i] = moved
            attempt(lambda moved=moved: arena.try_extend([moved], [33]))
    if live:
        group = attempt(lambda: arena.try_swap_out(live))
        if group is not None:
            back = attempt(lambda: arena.try_swap_in(group))
            live = back or []
            group = None if back else group
    attempt(lambda: arena.end_step(arena.begin_step()))
    return live, group


@pytest.mark.parametrize("protect", [False, True])
@pytest.mark.parametrize("kind", ["out of memory", "error", "release"])
def test_any_failing_call_while_sharing_leaves_sound_books(kind, protect):
    num_struck = 0
    for call in range(90):
        inner = make_driver()
        driver = _core.FaultDriver(inner)
        arena = make_arena(
            driver,
            num_layers=2,
            layers_per_group=1,
            max_pages=60,
            num_slots=8,
            swap_bytes=100 * PAGE,
            protect_shared=protect,
        )
        driver.fail_call(0, _core.Fault.NONE)
        if kind == "release":
            driver.fail_release_call(call)
        else:
            fault = _core.Fault.ERROR if kind == "error" else _core.Fault.OUT_OF_MEMORY
            driver.fail_call(call, fault)
        live, group = sharing_script(arena, None)
        driver.fail_call(0, _core.Fault.NONE)
        driver.fail_release_call(2**63)
        arena.free(live)
        if group is not None:
            for idx in range(3):
                arena.drop_swapped(group, idx)
        num_struck += len(live) != 3
        assert len(arena.try_admit(2, 40)) == 2, f"call {call}"
        arena.check_invariants()
        arena.close()
        counters = inner.counters()
        assert counters["create_calls"] == counters["destroy_calls"], f"call {call} lost a page"
    assert num_struck > 2 or kind == "release"


def test_what_is_ahead_is_taken_before_anybody_waits_for_a_fence():
    driver = _core.FaultDriver(make_driver())
    arena = make_arena(driver, max_pages=8, ahead_rows=16)
    a = admit(arena, 8)
    arena.wait_worker()
    b = admit(arena, 8)
    arena.wait_worker()
    c = admit(arena, 16)  # the last two pages
    arena.wait_worker()
    assert pages(arena) == (4, 4, 0, 0, 0)
    arena.end_step(arena.begin_step())  # whoever cleared the pages is done
    driver.hold_fences(True)
    arena.end_step(arena.begin_step())
    ids = arena.page_ids(c, [0, 0], [0, 1])
    arena.cache_pages(c, [0, 0], [0, 1])
    arena.free([c])
    assert arena.uncache_pages(ids) == 2
    assert pages(arena) == (2, 4, 0, 0, 2)
    assert extend(arena, b, 40)  # the pages ahead of the other one, not the two that wait
    assert pages(arena) == (6, 0, 0, 0, 2)
    assert extend(arena, a, 8)
