"""Time in a backend's calls and memory by state: by hand, and on real backends."""

import pytest

from vmalloc import KVCacheConfig, LayerKVSpec, SequenceGroupSpec, create_kv_backend
from vmalloc.engine.ab.instruments import (
    MEMORY_CALLS,
    STATES,
    VIEW_CALLS,
    Instruments,
    MemorySample,
    StateBytes,
    memory_use,
    worker_cpu_seconds,
)

LAYERS = (LayerKVSpec(num_kv_heads=2, k_head_dim=16, v_head_dim=16),) * 4


def make_backend(kind="virtual", **settings):
    return create_kv_backend(
        KVCacheConfig(
            layers=LAYERS,
            max_num_seqs=4,
            max_seq_len=4096,
            capacity_bytes=64 << 20,
            page_bytes=None if kind == "paged" else 4096,
            **settings,
        ),
        kind,
    )


def sample(time_s, num_seqs, **state):
    return MemorySample(time_s, num_seqs, StateBytes(**{**dict.fromkeys(STATES, 0), **state}))


def test_means_are_over_time_and_over_steps_by_hand():
    use = memory_use(
        [
            sample(11.0, 1, live=100, held=400),  # for one second
            sample(14.0, 2, live=200, held=400),  # for three
            sample(18.0, 0, live=0, held=200),  # nothing ran for four
        ],
        started_s=10.0,
    )
    assert use.mean["live"] == pytest.approx((100 + 3 * 200) / 8)
    assert use.mean["held"] == pytest.approx((400 + 3 * 400 + 4 * 200) / 8)
    assert use.mean_seqs == pytest.approx((1 + 3 * 2) / 8)
    assert use.step_mean["live"] == 150
    assert use.step_mean["held"] == 400
    assert (use.peak["live"], use.peak["held"], use.peak["ahead"]) == (200, 400, 0)


def test_a_run_without_samples_used_nothing():
    use = memory_use([], started_s=1.0)
    assert set(use.mean.values()) == set(use.step_mean.values()) == {0.0}


@pytest.mark.parametrize("kind", ["virtual", "paged"])
def test_calls_are_counted_and_timed_and_each_step_is_sampled_before_it_ends(kind):
    with make_backend(kind) as backend:
        watch = Instruments(backend)
        assert backend.try_admit(SequenceGroupSpec((0,), 20)) is not None
        for num_tokens in (21, 22, 23):
            assert backend.try_extend([0], [num_tokens])
            step = backend.begin_step()
            backend.batch_view([0], [1])
            backend.end_step(step)
        backend.free([0])
        watch.observe()
        counts = {name: call.num_calls for name, call in watch.calls.items() if call.num_calls}
        assert counts == {
            "try_admit": 1, "try_extend": 3, "begin_step": 3, "batch_view": 3, "end_step": 3,
            "free": 1,
        }  # fmt: skip
        memory, views = watch.total(MEMORY_CALLS), watch.total(VIEW_CALLS)
        assert (memory.num_calls, views.num_calls) == (11, 3)
        assert memory.seconds > 0
        assert memory.cpu_seconds > 0
        row_bytes = backend.config.token_bytes
        assert [one.state.live for one in watch.samples] == [
            21 * row_bytes, 22 * row_bytes, 23 * row_bytes, 0,
        ]  # fmt: skip
        assert [one.num_seqs for one in watch.samples] == [1, 1, 1, 0]


@pytest.mark.parametrize("kind", ["virtual", "paged"])
def test_held_memory_is_the_sum_of_its_states(kind):
    with make_backend(kind) as backend:
        watch = Instruments(backend)
        backend.try_admit(SequenceGroupSpec((0,), 300))
        backend.try_admit(SequenceGroupSpec((1,), 50))
        backend.end_step(backend.begin_step())
        backend.free([0])
        backend.end_step(backend.begin_step())
        backend.wait_worker()
        watch.observe()
        state = watch.samples[-1].state
        parts = (state.committed, state.ahead, state.parked, state.cached)
        assert state.held == sum(parts) + state.retired + state.free > 0


def test_a_call_that_raises_is_counted_and_the_next_one_too():
    with make_backend() as backend:
        watch = Instruments(backend)
        for _ in range(2):
            with pytest.raises(Exception, match="not live"):
                backend.try_extend([7], [8])
        assert watch.calls["try_extend"].num_calls == 2


def test_the_workers_cpu_time_is_found_by_the_threads_name():
    before = worker_cpu_seconds()
    if before is None:
        pytest.skip("this kernel does not tell the CPU time of threads")
    with make_backend(commit_ahead_tokens=64) as backend:
        backend.try_admit(SequenceGroupSpec((0,), 1))
        for num_tokens in range(2, 4000, 50):
            assert backend.try_extend([0], [num_tokens])
            backend.end_step(backend.begin_step())
        backend.wait_worker()
        assert backend.stats().background_pages > 0
        assert worker_cpu_seconds() > before
