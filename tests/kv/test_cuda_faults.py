"""A virtual cache on the CUDA driver comes and goes while each driver call fails once."""

import gc

import pytest

from vmalloc import SequenceGroupSpec, VmallocError

from .backends import make_cache, stand_in_driver

OUT_OF_MEMORY, UNKNOWN = 2, 999


def come_and_go():
    """Every operation once; the cache is closed at the end, whatever happened."""
    with make_cache("virtual(cuda)", "wide and thin", commit_ahead_tokens=3) as cache:
        cache.try_admit(SequenceGroupSpec((0, 1), 20))
        cache.wait_worker()
        cache.try_fork(0, [2])
        cache.end_step(cache.begin_step())
        cache.try_swap_out([1])
        cache.try_swap_in([1])
        cache.truncate(0, 3)
        cache.try_extend([0], [9])
        cache.free([0, 2])
        cache.try_sleep()
        cache.try_wake()
        cache.check_invariants()


@pytest.mark.parametrize("code", [OUT_OF_MEMORY, UNKNOWN])
def test_nothing_is_left_whichever_call_fails(code):
    with stand_in_driver() as fake:
        before = fake.total_calls
        come_and_go()
        num_calls = fake.total_calls - before
        assert num_calls > 100
        num_raised = 0
        for call in range(1, num_calls + 1):
            fake.ctl(f"*:fail={call},err={code}")
            try:
                come_and_go()
            except VmallocError:
                num_raised += 1
            fake.ctl("clear")
            gc.collect()
            assert fake.leaks == 0, f"call {call}"
        assert 20 < num_raised < num_calls
