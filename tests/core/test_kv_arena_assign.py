"""Slots go on from others' rows in place: what is shared, what is copied, what failing undoes."""

import pytest

from tests.arenas import ROW, admit, make_arena, pages
from tests.core.test_kv_arena_sharing import Rows, shared
from tests.drivers import PAGE, make_driver
from vmalloc import ConfigError, DriverError, _core

pytestmark = pytest.mark.usefixtures("each_driver")


@pytest.fixture(params=[False, True], ids=["plain", "protected"])
def arena(request):
    return make_arena(num_slots=6, max_pages=40, protect_shared=request.param)


def beams(arena, count=4, num_rows=20):
    """As many slots with rows of their own, 8 rows a page."""
    rows = Rows(arena)
    slots = [admit(arena, num_rows) for _ in range(count)]
    for slot in slots:
        rows.write(slot, 0, num_rows, 10 * slot)
    return rows, slots


class TestInPlace:
    def test_children_of_one_parent_share_its_full_pages(self, arena):
        rows, slots = beams(arena)
        assert arena.try_assign(slots, [slots[0]] * 4, 20)
        arena.check_invariants()
        assert pages(arena)[0] == 2 + 4  # two full pages once, four tails
        assert shared(arena) == (6, 3, 6)
        for slot in slots:
            rows.check(slot, 0, 20, 10 * slots[0])

    def test_a_permutation_happens_at_once(self, arena):
        rows, slots = beams(arena)
        assert arena.try_assign(slots, [slots[1], slots[0], slots[3], slots[3]], 20)
        arena.check_invariants()
        for slot, source in zip(slots, [1, 0, 3, 3], strict=True):
            rows.check(slot, 0, 20, 10 * slots[source])

    def test_what_each_writes_afterwards_is_its_own(self, arena):
        rows, slots = beams(arena)
        assert arena.try_assign(slots, [slots[2]] * 4, 20)
        assert arena.try_extend(slots, [30] * 4)
        for slot in slots:
            rows.write(slot, 20, 30, 100 + slot)
        for slot in slots:
            rows.check(slot, 0, 20, 10 * slots[2])
            rows.check(slot, 20, 30, 100 + slot)
        arena.check_invariants()

    def test_only_what_differs_is_mapped_anew(self, arena):
        rows, slots = beams(arena, num_rows=40)
        assert arena.try_assign(slots, [slots[0]] * 4, 40)
        before = arena.stats()
        assert arena.try_extend(slots, [41] * 4)
        for slot in slots:
            rows.write(slot, 40, 41, 100 + slot)
        assert arena.try_assign(slots, [slots[1], slots[1], slots[0], slots[3]], 41)
        after = arena.stats()
        assert after["aliased_pages"] == before["aliased_pages"]  # all five full pages were common
        assert after["cow_copies"] - before["cow_copies"] == 2  # the tails of the two that moved
        rows.check(slots[0], 40, 41, 100 + slots[1])
        rows.check(slots[2], 40, 41, 100 + slots[0])
        arena.check_invariants()

    def test_empty_slots_take_rows_and_give_them_up(self, arena):
        rows, slots = beams(arena, count=1)
        others = [admit(arena, 0) for _ in range(3)]
        assert arena.try_assign(others, slots * 3, 20)
        for slot in others:
            rows.check(slot, 0, 20, 10 * slots[0])
        arena.check_invariants()
        assert arena.try_assign(others, others, 0)
        arena.check_invariants()
        assert pages(arena)[0] == 3

    def test_cutting_into_a_shared_page_leaves_one_that_may_be_written(self, arena):
        rows, slots = beams(arena, count=2, num_rows=24)
        assert arena.try_assign(slots[1:], slots[:1], 24)
        assert arena.try_assign(slots[1:], slots[1:], 10)
        arena.check_invariants()
        assert arena.try_extend(slots[1:], [24])
        rows.write(slots[1], 10, 24, 200)
        rows.check(slots[0], 0, 24, 10 * slots[0])
        rows.check(slots[1], 0, 10, 10 * slots[0])
        arena.check_invariants()

    def test_cutting_what_is_its_own_copies_nothing(self, arena):
        rows, slots = beams(arena, count=1, num_rows=40)
        assert arena.try_assign(slots, slots, 10)
        arena.check_invariants()
        assert pages(arena)[0] == 2
        assert shared(arena) == (0, 0, 0)
        rows.check(slots[0], 0, 10, 10 * slots[0])


class TestRefusals:
    def test_short_of_pages_changes_nothing(self):
        arena = make_arena(num_slots=4, max_pages=12)
        rows, slots = beams(arena)
        assert arena.try_assign(slots, slots[::-1], 20) is False
        assert arena.last_shortage() == 4
        arena.check_invariants()
        for slot in slots:
            rows.check(slot, 0, 20, 10 * slot)

    def test_not_while_a_step_is_open(self, arena):
        _, slots = beams(arena)
        epoch = arena.begin_step()
        with pytest.raises(ConfigError, match=f"step {epoch} is open"):
            arena.try_assign(slots, slots[::-1], 20)
        arena.end_step(epoch)
        assert arena.try_assign(slots, slots[::-1], 20)

    def test_bad_arguments_name_the_limit(self, arena):
        _, slots = beams(arena)
        with pytest.raises(ConfigError, match="named twice"):
            arena.try_assign([slots[0], slots[0]], slots[:2], 20)
        with pytest.raises(ConfigError, match="num_rows is 21; it must be at most"):
            arena.try_assign(slots[:1], slots[1:2], 21)
        idle = next(slot for slot in range(6) if slot not in slots)
        with pytest.raises(ConfigError, match=f"slot {idle} is not live"):
            arena.try_assign(slots[:1], [idle], 1)
        with pytest.raises(ConfigError, match="sources is 1; it must be one for each of 2 slots"):
            arena.try_assign(slots[:2], slots[:1], 1)
        arena.check_invariants()

    def test_a_kernel_that_still_runs_is_waited_for_or_refused(self):
        driver = _core.FaultDriver(make_driver())
        arena = make_arena(driver, num_slots=6, max_pages=40)
        rows, slots = beams(arena)
        driver.hold_fences(True)
        arena.end_step(arena.begin_step())
        assert arena.try_assign(slots, slots[::-1], 20) is False
        for slot in slots:
            rows.check(slot, 0, 20, 10 * slot)
        driver.hold_fences(False)
        assert arena.try_assign(slots, slots[::-1], 20)
        arena.check_invariants()


@pytest.mark.parametrize("protect", [False, True])
@pytest.mark.parametrize("fault", [_core.Fault.OUT_OF_MEMORY, _core.Fault.ERROR])
def test_every_driver_call_fails_once_and_no_row_is_lost(fault, protect):
    sources = [1, 0, 3, 3]

    def attempt(fail_at, release_at=None):
        driver = _core.FaultDriver(make_driver())
        arena = make_arena(
            driver,
            num_layers=3,
            layers_per_group=1,
            row_bytes=200,  # rows straddle pages
            num_slots=6,
            max_pages=80,
            protect_shared=protect,
        )
        slots = arena.try_admit(4, 45)
        rows = [Rows(arena, 200, region) for region in range(3)]
        for region in range(3):
            for slot in slots:
                rows[region].write(slot, 0, 45, 40 * slot + region)
        assert arena.try_assign(slots[2:], slots[1:2] * 2, 45)  # some of it is shared before
        held = [slots[0], slots[1], slots[1], slots[1]]
        driver.fail_call(fail_at, fault)
        if release_at is not None:
            driver.fail_call(0, _core.Fault.NONE)
            driver.fail_release_call(release_at)
        try:
            is_done = arena.try_assign(slots, [slots[i] for i in sources], 45)
        except DriverError as error:
            assert error.name == "INJECTED"
            is_done = False
        num_calls = driver.num_calls()
        driver.fail_call(0, _core.Fault.NONE)
        driver.fail_release_call(1 << 40)
        arena.check_invariants()
        expected = [held[i] for i in sources] if is_done else held
        for region in range(3):
            for slot, value in zip(slots, expected, strict=True):
                rows[region].check(slot, 0, 45, 40 * value + region)
        assert arena.try_extend(slots, [50] * 4)
        arena.close()
        counters = driver.counters()
        assert counters["create_calls"] == counters["destroy_calls"]
        return is_done, num_calls

    is_done, num_calls = attempt(1 << 40)
    assert is_done
    assert num_calls > 6
    outcomes = [attempt(call)[0] for call in range(num_calls)]
    assert not all(outcomes)
    assert not all(attempt(1 << 40, call)[0] for call in range(6))


def test_a_page_size_of_rows(arena):
    """A slot whose rows end with a page has no tail to copy."""
    rows, slots = beams(arena, num_rows=2 * PAGE // ROW)
    assert arena.try_assign(slots, [slots[3]] * 4, 2 * PAGE // ROW)
    assert shared(arena) == (6, 0, 6)
    for slot in slots:
        rows.check(slot, 0, 16, 10 * slots[3])
    arena.check_invariants()
