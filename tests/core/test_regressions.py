"""Defects that the core once had; each test states what must hold."""

import resource
import subprocess
import sys
from contextlib import contextmanager

import pytest

from tests.arenas import admit, extend, free, make_arena, pages
from tests.core.test_kv_arena import _tensor
from tests.drivers import PAGE, make_driver
from vmalloc import (
    ConfigError,
    KVCacheConfig,
    LayerKVSpec,
    SequenceGroupSpec,
    VirtualKVCache,
    _core,
)

pytestmark = pytest.mark.usefixtures("each_driver")


def faulty():
    return _core.FaultDriver(make_driver())


def make_cache(**settings):
    layer = LayerKVSpec(num_kv_heads=1, k_head_dim=64, v_head_dim=64)  # 8 rows a page
    defaults = {
        "layers": (layer,),
        "max_num_seqs": 4,
        "max_seq_len": 256,
        "capacity_bytes": 16 * PAGE,
        "page_bytes": PAGE,
        "commit_ahead_tokens": 0,
    }
    return VirtualKVCache(KVCacheConfig(**{**defaults, **settings}))


def run(script):
    """In a process of its own: what is wrong may end it."""
    return subprocess.run(
        [
            sys.executable,
            "-c",
            "from tests.arenas import *\nfrom tests.drivers import *\nfrom vmalloc import _core\n"
            + script,
        ],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


@contextmanager
def physical_pages(count):
    """A machine that has ``count`` pages, whatever the cap says."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (count * PAGE, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


class TestNamedTwice:
    def test_extending_a_slot_twice_in_one_call_is_refused(self):
        result = run("""
from vmalloc import ConfigError
arena = make_arena(num_slots=2, max_pages=32)
a, b = arena.try_admit(2, 8)
try:
    arena.try_extend([a, a], [64, 64])
except ConfigError:
    print("refused")
arena.check_invariants()
""")
        assert (result.returncode, result.stdout) == (0, "refused\n"), result.stderr

    def test_freeing_a_slot_twice_in_one_call_changes_nothing(self):
        arena = make_arena()
        slot = admit(arena, 8)
        with pytest.raises(ConfigError):
            arena.free([slot, slot])
        assert arena.stats()["num_live"] == 1

    def test_a_refused_free_does_not_give_one_slot_to_two_sequences(self):
        cache = make_cache(num_slots=4)
        cache.try_admit(SequenceGroupSpec((1,), 8))
        with pytest.raises(ConfigError):
            cache.free([1, 1])
        cache.try_admit(SequenceGroupSpec((2,), 8))
        assert cache.slot_of(1) != cache.slot_of(2)


class TestScrub:
    def test_retired_pages_that_a_new_sequence_takes_back_are_cleared(self):
        driver = faulty()
        arena = make_arena(driver, num_slots=2, max_pages=6, zero_on_reuse=True)
        a, b = arena.try_admit(2, 24)
        tensor = _tensor(arena)
        tensor[a, :24] = 666.0
        driver.hold_fences(True)
        arena.end_step(arena.begin_step())
        free(arena, a)
        assert not extend(arena, b, 40)  # two parked pages of a retire and wait
        assert admit(arena, 8) == a
        assert extend(arena, a, 24)  # takes them back
        assert (tensor[a, :24] == 0).all()

    def test_pages_that_moved_through_the_pool_are_cleared(self):
        arena = make_arena(num_slots=2, max_pages=2, zero_on_reuse=True)
        a, b = arena.try_admit(2, 1)
        assert a != b
        tensor = _tensor(arena)
        tensor[a, :8] = 666.0
        arena.truncate(a, 0)  # back to the pool
        assert extend(arena, b, 16)
        assert (tensor[b, 8:16] == 0).all()


def test_an_adopted_tail_that_an_old_step_may_read_still_waits_for_its_fence():
    driver = faulty()
    arena = make_arena(driver, num_slots=2, max_pages=6)
    a, b = arena.try_admit(2, 24)
    driver.hold_fences(True)
    arena.end_step(arena.begin_step())
    free(arena, a)
    assert admit(arena, 8) == a
    assert not extend(arena, b, 40)  # wants two of a's surplus pages
    assert pages(arena)[4] == 2


class TestCap:
    def test_pages_freed_after_a_resize_leave(self):
        arena = make_arena()
        _, b = arena.try_admit(2, 40)
        arena.resize(6)
        free(arena, b)
        arena.end_step(arena.begin_step())
        assert arena.stats()["created_pages"] <= 6

    def test_admission_after_a_resize_stays_below_the_new_cap(self):
        arena = make_arena()
        _, b = arena.try_admit(2, 40)
        arena.resize(6)
        free(arena, b)
        assert admit(arena, 40) is None  # 5 + 5 pages

    def test_growth_after_a_resize_gets_what_the_cap_leaves(self):
        arena = make_arena()
        a, b = arena.try_admit(2, 40)
        arena.resize(6)
        free(arena, b)
        assert extend(arena, a, 48)  # the sixth page; b's five are parked

    def test_low_watermark_follows_the_cap(self):
        cache = make_cache(capacity_bytes=32 * PAGE, low_watermark=0.5)
        cache.resize(12 * PAGE)
        assert cache.try_admit(SequenceGroupSpec((1,), 8)) is not None
        assert cache.try_admit(SequenceGroupSpec((2,), 8)) is not None  # 10 of 12 pages remain

    def test_high_watermark_follows_the_cap(self):
        cache = make_cache()
        cache.resize(64 * PAGE)
        cache.try_admit(SequenceGroupSpec((1,), 256))
        cache.free([1])
        cache.end_step(cache.begin_step())
        assert cache.stats().created_pages == 32  # high_watermark is 1.0


class TestStarvation:
    def test_admission_sees_fences_that_passed_since_the_last_step(self):
        driver = faulty()
        arena = make_arena(driver, num_slots=2, max_pages=4)
        a = admit(arena, 32)
        driver.hold_fences(True)
        arena.end_step(arena.begin_step())
        arena.truncate(a, 0)
        driver.hold_fences(False)
        assert arena.can_admit(1, 32)
        assert admit(arena, 32) is not None

    def test_parked_pages_serve_when_the_machine_has_less_than_the_cap(self):
        arena = make_arena(max_pages=1000)
        with physical_pages(16):
            slots = arena.try_admit(2, 64)
            assert arena.try_admit(1, 8) is None
            free(arena, *slots)
            assert arena.try_admit(3, 40) is not None  # 15 pages; all 16 are parked
            arena.check_invariants()

    def test_parked_slots_give_up_their_kernel_mappings(self):
        result = run("""
layer = _core.LayerKVSpec(num_kv_heads=1, k_head_dim=64, v_head_dim=64, element_bytes=4)
arena = make_arena(layers=[layer] * 64, layers_per_group=1, num_slots=500, max_rows=512,
                   max_pages=10**6)
live = []
while (slots := arena.try_admit(1, 8)) is not None:
    live += slots
arena.free(live)
assert len(live) < 500
assert arena.try_admit(1, 400) is not None, "nothing is live"
""")
        assert result.returncode == 0, result.stderr

    def test_a_hint_that_met_an_empty_pool_is_taken_up_later(self):
        arena = make_arena(num_slots=3, max_pages=8, ahead_rows=4)
        a = admit(arena, 60)
        arena.wait_worker()
        arena.prefetch(16)
        arena.wait_worker()
        free(arena, a)
        arena.trim(0)
        arena.prefetch(16)
        arena.wait_worker()
        assert pages(arena) == (0, 0, 2, 0, 0)


class TestProcess:
    def test_two_drivers_share_one_mapping_budget(self):
        result = run("""
drivers = [_core.make_host_driver(PAGE) for _ in range(2)]
for driver in drivers:
    base = driver.try_reserve(80_000 * PAGE)
    for i in range(0, 80_000, 2):
        driver.try_create_page(i)
        if not driver.try_map(base + i * PAGE, [i]):
            break
limit = int(open("/proc/sys/vm/max_map_count").read())
if limit > 200_000:
    raise SystemExit(0)  # this test cannot reach it
assert sum(1 for _ in open("/proc/self/maps")) < 0.9 * limit
""")
        assert result.returncode == 0, result.stderr

    def test_empty_rows_are_a_config_error(self):
        result = run("""
from vmalloc import ConfigError
layer = _core.LayerKVSpec(num_kv_heads=0, k_head_dim=1, v_head_dim=1, element_bytes=4)
try:
    make_arena(layers=[layer], layers_per_group=1)
except ConfigError:
    print("refused")
""")
        assert (result.returncode, result.stdout) == (0, "refused\n"), result.stderr


@pytest.mark.parametrize("setting", ["ahead_rows", "lookahead_rows"])
def test_as_far_as_it_goes_is_a_valid_distance(setting):
    arena = make_arena(**{setting: 2**64 - 1})
    slot = admit(arena, 17)
    arena.wait_worker()
    arena.truncate(slot, 17)
    arena.check_invariants()


def test_a_failed_growth_unmaps_what_it_mapped():
    driver = faulty()
    arena = make_arena(driver, num_layers=2, layers_per_group=1)
    slot = admit(arena, 8)
    driver.fail_call(3, _core.Fault.OUT_OF_MEMORY)  # create, map; create, then this map
    before = arena.stats()["unmap_calls"]
    assert not extend(arena, slot, 16)
    assert arena.stats()["unmap_calls"] == before + 1  # else a slot aliases a free page
