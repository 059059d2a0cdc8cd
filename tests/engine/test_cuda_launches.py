"""The engine over the CUDA driver where kernels run late and every driver call fails once."""

from __future__ import annotations

import copy
import gc
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest

from tests.engine.launches import LaunchingCache
from tests.engine.running import all_tokens, assert_no_page_is_lost, run_out
from tests.fakecuda import CudaError, FakeCuda, library_path
from vmalloc import DriverError, factory
from vmalloc.engine import EngineConfig, LLMEngine, SamplingParams

OUT_OF_MEMORY, UNKNOWN = 2, 999
TAKING = {"cuMemCreate", "cuMemMap", "cuMemSetAccess", "cuMemcpyDtoDAsync", "cuMemsetD8Async"}
COMMON = [7, 3, 9, 1, 4, 4, 2, 8, 6, 5]


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeCuda]:
    monkeypatch.setenv("VMALLOC_LIBCUDA", library_path())
    fake = FakeCuda()
    fake.reset()
    fake.start()
    yield fake
    gc.collect()
    fake.reset()


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch, fake: FakeCuda) -> FakeCuda:
    """Engines made from here on launch reads that the device comes to late."""
    monkeypatch.setattr(LaunchingCache, "fake", fake, raising=False)
    monkeypatch.setattr(LaunchingCache, "num_launches", 0)
    monkeypatch.setattr(factory, "VirtualKVCache", LaunchingCache)
    return fake


def make(tiny_model: Any, **settings: Any) -> LLMEngine:
    config = EngineConfig(
        **{
            "kv_driver": "cuda",
            "kv_backend": "virtual",
            "batch_invariant": True,
            "max_num_seqs": 8,
            "kv_cache_memory_bytes": 10 * 4096,
            "swap_space_bytes": 1 << 20,
            **settings,
        }
    )
    return LLMEngine(copy.deepcopy(tiny_model("llama-4x2x16")), None, config)


def add_requests(engine: LLMEngine) -> None:
    """Growth, parallel samples, beams and a common prefix, in a pool that is too small for all."""
    greedy = {"temperature": 0.0, "ignore_eos": True}
    engine.add_request("long", [*COMMON, 11], SamplingParams(**greedy, max_tokens=11))
    engine.add_request(
        "samples", [*COMMON, 12, 13], SamplingParams(n=2, seed=1, max_tokens=6, ignore_eos=True)
    )
    engine.add_request(
        "beams",
        [5, 6, 7],
        SamplingParams(n=2, use_beam_search=True, max_tokens=4, temperature=0.0),
    )
    engine.add_request("short", [*COMMON, 14], SamplingParams(**greedy, max_tokens=3))


def serve(engine: LLMEngine, code: int | None = None) -> tuple[dict[str, Any], list[str]]:
    """Run the requests; what was written, and the calls whose failure a step raised, at most one.

    They fail with ``code``.
    """
    add_requests(engine)
    finished: dict[str, Any] = {}
    failed: list[str] = []
    while True:
        try:
            run_out(engine, finished)
            return all_tokens(finished), failed
        except DriverError as error:
            assert (error.code, failed) == (code, [])
            failed.append(error.call)
            engine.backend.check_invariants()


@pytest.mark.parametrize("mode", ["swap", "recompute"])
def test_kernels_that_run_late_find_their_rows(
    mode: str, tiny_model: Any, late: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    with make(tiny_model, preemption_mode=mode) as engine:
        written, _ = serve(engine)
        assert LaunchingCache.num_launches > 100
        assert getattr(engine.stats(), f"preempt_{mode}") > 0
        stats = engine.kv_stats()
        assert stats.aliased_pages > 0
        assert stats.cow_copies > 0
        late.run_stream()  # no launch is left that would find nothing
        assert late.pending() == 0
        assert_no_page_is_lost(engine)
    monkeypatch.undo()
    with make(tiny_model, kv_driver="host", page_size=4096, layers_per_group=4) as engine:
        assert serve(engine)[0] == written


def test_without_the_fence_they_would_not(tiny_model: Any, late: FakeCuda) -> None:
    """The same run with fences that pass at once: the device meets an address that is gone."""
    engine = make(tiny_model)
    backend = engine.backend
    assert isinstance(backend, LaunchingCache)
    backend.fault_driver.ignore_fences(True)
    add_requests(engine)
    with pytest.raises((DriverError, CudaError), match="700"):
        run_out(engine)
    late.reset()


@pytest.mark.parametrize("part", range(4))
@pytest.mark.parametrize("code", [OUT_OF_MEMORY, UNKNOWN])
def test_any_call_of_a_serving_run_may_fail_once(
    code: int, part: int, tiny_model: Any, late: FakeCuda
) -> None:
    with make(tiny_model, commit_ahead_tokens=0) as engine:
        # The second run finds the window mapped and events made, as do all after it.
        for _ in range(2):
            before = late.total_calls
            expected, _ = serve(engine)
            assert_no_page_is_lost(engine)
        num_calls = late.total_calls - before
        assert num_calls > 100
        stats = engine.stats()
        assert stats.preempt_swap + stats.preempt_recompute > 0
        empty = late.used_bytes
        raised = Counter[str]()
        for call in range(1 + part, num_calls + 1, 4):
            late.ctl(f"*:fail={call},err={code}")
            written, failed = serve(engine, code)
            raised.update(failed)
            late.ctl("clear")
            assert written == expected, f"call {call}"
            assert_no_page_is_lost(engine)
            assert late.used_bytes == empty, f"call {call} lost memory"
    if code == OUT_OF_MEMORY:  # a value wherever the call takes memory
        assert not {*raised} & TAKING
    else:
        assert {*raised} & TAKING
    del engine
    gc.collect()
    assert late.leaks == 0


def test_a_request_waits_for_the_device_however_late_that_is(
    tiny_model: Any, late: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chunks of an aborted prompt are still computed when the next prompt needs their pages.

    Nothing runs then, and steps without work take no time: no number of them is long enough.
    """
    monkeypatch.setattr(LaunchingCache, "is_slow", True)
    with make(tiny_model, max_num_batched_tokens=16, commit_ahead_tokens=0) as engine:
        params = SamplingParams(temperature=0.0, max_tokens=2, ignore_eos=True)
        engine.add_request("aborted", list(range(1, 40)), params)
        for _ in range(2):
            engine.step()
        assert late.pending() > 0
        engine.abort_request("aborted")
        engine.add_request("next", list(range(40, 76)), params)
        assert len(all_tokens(run_out(engine))["next"][0]) == 2
        assert_no_page_is_lost(engine)
