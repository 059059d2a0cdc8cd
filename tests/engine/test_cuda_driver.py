"""The engine over the CUDA driver of the core, with the stand-in for libcuda beneath.

Tensors are the CPU's here, so what computes is the same as anywhere; what maps, copies and fences
is what will do so on a GPU.
"""

from __future__ import annotations

import copy
import gc
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest

from tests.drivers import driver_kind
from tests.engine.agreement import (
    SHAPES,
    Engines,
    assert_agree,
    assert_shared,
    make_reference,
    run,
    with_common_starts,
    workload,
)
from tests.engine.running import PAGE, all_tokens, run_out, step
from tests.engine.test_backends_agree_preemption import preempting
from tests.fakecuda import library_path
from vmalloc.engine import EngineConfig, LLMEngine, SamplingParams
from vmalloc.engine.decode_graphs import EagerRecorder

CUDA = {"kv_driver": "cuda", "batch_invariant": False}


@pytest.fixture(autouse=True)
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The stand-in; nothing of it may be left at the end."""
    monkeypatch.setenv("VMALLOC_LIBCUDA", str(library_path()))
    with driver_kind("cuda") as fake:
        yield fake
        gc.collect()
        assert fake.leaks == 0


@pytest.fixture
def engines(tiny_model: Any) -> Iterator[Engines]:
    engines = Engines(tiny_model, EagerRecorder())
    yield engines
    engines.close()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("seed", range(2))
def test_all_methods_with_shared_prefixes(
    seed: int, shape: str, engines: Engines, tiny_model: Any, stand_in: Any
) -> None:
    first = workload(seed)
    second = with_common_starts(seed, first)
    engine = engines(shape, "virtual", **CUDA)
    result = run(engine, [first, second], steps_between=4)
    assert_shared(result)
    assert engine.decode_graphs is not None
    assert engine.decode_graphs.num_replayed > 0
    assert stand_in.calls("cuMemMap") > 0
    expected = make_reference(tiny_model)(SHAPES[shape][0], {**first, **second})
    assert_agree({"cuda": result}, expected)


@pytest.mark.parametrize("mode", ["swap", "recompute"])
def test_preemption_at_random_steps(mode: str, engines: Engines, tiny_model: Any) -> None:
    requests = workload(1)
    preempted: Counter[str] = Counter()
    engine = engines("5x3x40", "virtual", preemption_mode=mode, **CUDA)
    result = run(engine, [requests], disturb=preempting(1, preempted))
    assert getattr(result, f"preempt_{mode}") > 2
    assert_agree({"cuda": result}, make_reference(tiny_model)("llama-5x3x40", requests))


def make(tiny_model: Any, **settings: Any) -> LLMEngine:
    config = EngineConfig(
        **{"kv_driver": "cuda", "kv_backend": "virtual", "max_num_seqs": 8, **settings}
    )
    model = copy.deepcopy(tiny_model("llama-4x2x16"))
    return LLMEngine(model, None, config, recorder=EagerRecorder())


def test_sleep_gives_the_devices_memory_back_and_waking_goes_on(
    tiny_model: Any, stand_in: Any
) -> None:
    written = []
    for sleeps in (False, True):
        with make(tiny_model, swap_space_bytes=1 << 24) as engine:
            for idx, prompt in enumerate([[1, 2, 3], [4] * 20]):
                engine.add_request(str(idx), prompt, SamplingParams(temperature=0.0, max_tokens=12))
            finished: dict[str, Any] = {}
            for _ in range(5):
                step(engine, finished)
            if sleeps:
                assert stand_in.used_bytes > 0
                engine.sleep()
                assert stand_in.used_bytes == 0
                assert engine.wake()
            written.append(all_tokens(run_out(engine, finished)))
    assert written[0] == written[1]


def test_a_decode_step_that_crosses_no_page_makes_no_driver_call(
    tiny_model: Any, stand_in: Any
) -> None:
    """A page of 4 KiB holds four tokens of this model, so one step in four maps something."""
    with make(tiny_model, commit_ahead_tokens=0) as engine:
        for idx, prompt in enumerate([[1, 2, 3, 4], [5] * 8]):
            engine.add_request(str(idx), prompt, SamplingParams(temperature=0.0, max_tokens=33))
        engine.step()
        assert engine.kv_stats().page_bytes == PAGE
        num_calls = []
        for _ in range(24):
            engine.backend.wait_worker()  # it may be creating pages to have at hand
            before = stand_in.total_calls
            engine.step()
            engine.backend.wait_worker()
            num_calls.append(stand_in.total_calls - before)
        assert len([count for count in num_calls if count == 0]) == 18
        assert [count > 0 for count in num_calls] == [True, False, False, False] * 6
        assert engine.decode_graphs is not None
        assert engine.decode_graphs.num_replayed == 23
