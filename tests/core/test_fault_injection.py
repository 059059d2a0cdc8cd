"""Every driver call of a scripted run fails once, in both ways; nothing leaks or half-commits."""

import pytest

from tests.arenas import make_arena
from tests.drivers import make_driver
from vmalloc import DriverError, _core

pytestmark = pytest.mark.usefixtures("each_driver")


def script(arena):
    """Admissions, growth over three regions, parking, reclaim, retirement, trim; the live slots.

    Takes what it is given: a call that reports lack of memory is simply not followed up.
    """
    live = []

    def attempt(call):
        try:
            result = call()
        except DriverError as error:
            assert error.name == "INJECTED"
            result = None
        arena.check_invariants()
        return result

    for num_rows in (8, 20):
        slots = attempt(lambda rows=num_rows: arena.try_admit(2, rows))
        live += slots or []
    epoch = arena.begin_step()
    if live:
        attempt(lambda: arena.try_extend(live, [33] * len(live)))
        attempt(lambda: arena.truncate(live[0], 8))
        attempt(lambda: arena.try_extend(live[:1], [40]))
    attempt(lambda: arena.end_step(epoch))
    attempt(lambda: arena.free(live[1:2]))
    del live[1:2]
    attempt(lambda: arena.resize(30))
    attempt(lambda: arena.resize(60))
    attempt(lambda: arena.trim(1))
    slots = attempt(lambda: arena.try_admit(1, 48))
    live += slots or []
    for slot in live:
        attempt(lambda slot=slot: arena.try_extend([slot], [64]))
    return live


def make_faulty_arena(**settings):
    inner = make_driver()
    driver = _core.FaultDriver(inner)
    arena = make_arena(
        driver, num_layers=3, layers_per_group=1, max_pages=60, num_slots=5, **settings
    )
    driver.fail_call(0, _core.Fault.NONE)  # the reservations are behind us
    return inner, driver, arena


def num_calls():
    _, driver, arena = make_faulty_arena()
    script(arena)
    return driver.num_calls()


def test_the_script_is_long_enough_to_mean_something():
    assert num_calls() > 60


@pytest.mark.parametrize("fault", [_core.Fault.OUT_OF_MEMORY, _core.Fault.ERROR], ids=str)
def test_any_failing_call_leaves_a_sound_arena(fault):
    for call in range(num_calls()):
        inner, driver, arena = make_faulty_arena()
        driver.fail_call(call, fault)
        live = script(arena)
        # What was refused works once the fault is over.
        driver.fail_call(0, _core.Fault.NONE)
        arena.free(live)
        assert arena.try_admit(3, 40) is not None, f"call {call}"
        arena.check_invariants()
        arena.close()
        counters = inner.counters()
        assert counters["create_calls"] == counters["destroy_calls"], f"call {call} leaked a page"


def test_any_failing_release_leaves_sound_books():
    """Unmapping, destroying and clearing may fail too; no page is lost or used twice for it."""
    num_faults = 0
    for call in range(100):
        inner, driver, arena = make_faulty_arena(zero_on_reuse=True)
        driver.fail_release_call(call)
        live = script(arena)
        arena.free(live)
        slots = None
        for _ in range(2):  # the fault may strike here, once
            try:
                slots = slots or arena.try_admit(3, 40)
            except DriverError as error:
                assert error.name == "INJECTED"
            arena.check_invariants()
        assert slots is not None, f"call {call}"
        try:
            arena.close()
        except DriverError as error:
            assert error.name == "INJECTED"
            num_faults += 1
        del arena
        counters = inner.counters()
        assert counters["create_calls"] == counters["destroy_calls"], f"call {call} lost a page"
    assert num_faults > 20


@pytest.mark.parametrize("call", range(3))
def test_failed_reservation_is_a_config_error_and_leaks_nothing(call):
    from vmalloc import ConfigError

    driver = _core.FaultDriver(make_driver())
    driver.fail_call(call, _core.Fault.OUT_OF_MEMORY)
    with pytest.raises(ConfigError, match="address space cannot hold"):
        make_arena(driver, num_layers=3, layers_per_group=1)


@pytest.mark.parametrize("fault", [_core.Fault.OUT_OF_MEMORY, _core.Fault.ERROR], ids=str)
def test_any_failing_background_call_leaves_a_sound_arena(fault):
    for call in range(30):
        inner = make_driver()
        driver = _core.FaultDriver(inner)
        arena = make_arena(driver, num_layers=2, layers_per_group=1, max_pages=64, ahead_rows=8)
        slots = arena.try_admit(2, 4)
        arena.wait_worker()
        driver.fail_call(call, fault)
        num_rows = 4
        while num_rows < 40:
            try:
                if arena.try_extend(slots, [num_rows + 1] * 2):
                    num_rows += 1
            except DriverError as error:
                assert error.name == "INJECTED"
            arena.wait_worker()
            arena.check_invariants()
        assert arena.stats()["live_bytes"] == 2 * 2 * 40 * 512
        arena.close()
        counters = inner.counters()
        assert counters["create_calls"] == counters["destroy_calls"], f"call {call} leaked a page"
