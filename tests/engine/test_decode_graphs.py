"""Decodes through recordings over static inputs write what decodes launched one by one write.

Where there is no GPU the recordings are calls of the function that would have been captured, on the
very tensors that were static when it was: what is not written into them is not seen.
"""

from __future__ import annotations

import copy
import types
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from tests.engine.agreement import (
    KINDS,
    METHODS,
    ROW_SHAPES,
    SHAPES,
    Engines,
    Reference,
    assert_agree,
    assert_shared,
    make_reference,
    run,
    with_common_starts,
    workload,
)
from tests.engine.running import PAGE, all_tokens, assert_no_page_is_lost, run_out, step
from tests.engine.test_backends_agree_preemption import preempting
from vmalloc.engine import (
    EngineConfig,
    LLMEngine,
    SamplingParams,
    compiled_model,
    decode_graphs,
    kv_attention,
)
from vmalloc.engine.decode_graphs import CaptureError, EagerRecorder, Run, batch_sizes
from vmalloc.engine.packed_forward import PackedForward
from vmalloc.errors import ConfigError

PLAIN = {"batch_invariant": False, "fused": "off"}
GREEDY = SamplingParams(temperature=0.0, max_tokens=9)


@pytest.fixture(scope="module")
def engines(tiny_model: Any) -> Iterator[Engines]:
    engines = Engines(tiny_model, EagerRecorder())
    yield engines
    engines.close()


@pytest.fixture(scope="module")
def reference(tiny_model: Any) -> Reference:
    return make_reference(tiny_model)


@pytest.fixture(params=KINDS)
def make(request: pytest.FixtureRequest, tiny_model: Any) -> Iterator[Callable[..., LLMEngine]]:
    """``make(recorder, max_num_seqs=4)``: an engine over a tiny llama, on each backend."""
    engines: list[LLMEngine] = []

    def make(recorder: Any = None, name: str = "llama", **settings: Any) -> LLMEngine:
        model = copy.deepcopy(tiny_model(name))
        defaults = {"kv_backend": request.param, "page_size": PAGE, "max_num_seqs": 8}
        defaults["layers_per_group"] = model.config.num_hidden_layers  # pools count its pages
        config = EngineConfig(**{**defaults, "fused": "off", **settings})
        engines.append(LLMEngine(model, None, config, recorder=recorder))
        return engines[-1]

    yield make
    for engine in engines:
        engine.close()


def graphs(engine: LLMEngine) -> decode_graphs.DecodeGraphs:
    assert engine.decode_graphs is not None
    return engine.decode_graphs


def add(engine: LLMEngine, prompts: list[list[int]], params: SamplingParams = GREEDY) -> None:
    for idx, prompt in enumerate(prompts):
        engine.add_request(str(idx), prompt, params)


class TestWhatIsWritten:
    @pytest.mark.parametrize("shape", ROW_SHAPES)
    @pytest.mark.parametrize("method", METHODS)
    def test_each_method(
        self, method: str, shape: str, engines: Engines, reference: Reference
    ) -> None:
        requests = workload(3, [method])
        runs = {}
        for kind in KINDS:
            engine = engines(shape, kind, **PLAIN)
            before = graphs(engine).num_replayed
            runs[kind] = run(engine, [requests])
            assert graphs(engine).num_replayed > before
            if METHODS[method](0).width > 1:
                assert_shared(runs[kind])
        assert_agree(runs, reference(SHAPES[shape][0], requests))

    @pytest.mark.parametrize("shape", SHAPES)
    @pytest.mark.parametrize("seed", range(3))
    def test_all_methods_with_shared_prefixes_in_a_crowd(
        self, seed: int, shape: str, engines: Engines, reference: Reference
    ) -> None:
        first = workload(seed)
        second = with_common_starts(seed, first)
        runs = {}
        for kind in KINDS:
            engine = engines(shape, kind, **PLAIN)
            before = graphs(engine).num_replayed
            runs[kind] = run(engine, [first, second], steps_between=4)
            assert graphs(engine).num_replayed > before
            assert_shared(runs[kind])
        assert_agree(runs, reference(SHAPES[shape][0], {**first, **second}))

    @pytest.mark.parametrize("mode", ["swap", "recompute"])
    @pytest.mark.parametrize("seed", range(3))
    def test_preemption_at_random_steps(
        self, seed: int, mode: str, engines: Engines, reference: Reference
    ) -> None:
        first = workload(seed)
        second = with_common_starts(seed, first)
        runs = {}
        for kind in KINDS:
            preempted: Counter[str] = Counter()
            engine = engines(
                "5x3x40", kind, preemption_mode=mode, max_num_batched_tokens=30, **PLAIN
            )
            before = graphs(engine).num_replayed
            disturb = preempting(seed, preempted)
            runs[kind] = run(engine, [first, second], steps_between=9, disturb=disturb)
            assert graphs(engine).num_replayed > before
            assert preempted["several"] > 0
            assert getattr(runs[kind], f"preempt_{mode}") > 2
        assert_agree(runs, reference("llama-5x3x40", {**first, **second}))

    def test_ragged_greedy_as_the_model_alone(
        self,
        make: Any,
        tiny_model: Any,
        reference: Reference,
        prompts: list[list[int]],
        assert_token_exact: Any,
    ) -> None:
        engine = make(EagerRecorder(), max_num_seqs=11)
        requests = {
            str(idx): (prompt, SamplingParams(temperature=0.0, max_tokens=4 + idx % 9))
            for idx, prompt in enumerate(prompts)
        }
        for name, request in requests.items():
            engine.add_request(name, *request)
        written = all_tokens(run_out(engine))
        ours = [written[name][0] for name in requests]
        theirs = [found[0].token_ids for found in reference("llama", requests).values()]
        assert_token_exact(tiny_model("llama"), prompts, ours, theirs)
        assert graphs(engine).num_replayed > graphs(engine).num_recorded > 2


@pytest.mark.parametrize("name", ["gemma2", "gpt2", "gpt-oss", "mixtral"])
def test_models_of_other_kinds(name: str, make: Any) -> None:
    written = []
    for recorder in (None, EagerRecorder()):
        engine = make(recorder, name=name)
        add(engine, [[1, 2, 3], [4] * 20, [5, 6]])
        written.append(all_tokens(run_out(engine)))
    assert written[0] == written[1]
    assert graphs(engine).num_replayed > 0


def test_sequences_that_grow_past_a_bucket_go_to_the_next(make: Any) -> None:
    prompts = [[7] * 248, [8, 9] * 120]
    written = []
    for recorder in (None, EagerRecorder()):
        engine = make(recorder, name="llama-5x3x40", max_num_seqs=2)
        add(engine, prompts, SamplingParams(temperature=0.0, max_tokens=12))
        written.append(all_tokens(run_out(engine)))
    assert written[0] == written[1]
    assert list(graphs(engine)._recordings) == [(2, 256), (2, 512)]


def test_static_inputs_never_move_while_pages_come_and_go(
    make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make(EagerRecorder())
    views: list[tuple[int, ...]] = []
    forward = PackedForward.__call__

    def noting(self: Any, *args: Any) -> torch.Tensor:
        token_ids, positions, rows, view = args
        tensors = [token_ids, positions, rows, view.seqused_k, view.cu_seqlens_q]
        tensors.append(view.cache_batch_idx if view.block_table is None else view.block_table)
        if view.max_seqlen_q == 1:
            views.append((len(token_ids), *(tensor.data_ptr() for tensor in tensors)))
        return forward(self, *args)

    monkeypatch.setattr(PackedForward, "__call__", noting)
    add(engine, [[1] * 10, [2] * 30, [3, 4]], SamplingParams(temperature=0.0, max_tokens=40))
    before = engine.kv_stats().map_calls
    run_out(engine)
    add(engine, [[4] * 12])
    run_out(engine)
    assert engine.kv_stats().map_calls > before or engine.backend.name == "paged"
    assert len(views) > 40
    assert len(set(views)) == len({size for size, *_ in views})


def test_sleep_and_wake_leave_recordings_good(make: Any) -> None:
    written = []
    for recorder in (None, EagerRecorder()):
        engine = make(recorder, swap_space_bytes=1 << 24)
        add(engine, [[1, 2, 3], [4] * 20])
        finished: dict[str, Any] = {}
        for _ in range(4):
            step(engine, finished)
        recorded = 0 if recorder is None else graphs(engine).num_recorded
        engine.sleep()
        assert engine.kv_stats().created_pages == 0
        assert engine.wake()
        written.append(all_tokens(run_out(engine, finished)))
    assert written[0] == written[1]
    assert graphs(engine).num_recorded == recorded > 0
    assert graphs(engine).num_replayed > 4


@pytest.mark.parametrize("num_pages", [9, 11, 13])
def test_a_pool_that_is_short_of_pages_for_all(num_pages: int, make: Any) -> None:
    """The place that batches are padded with is taken before the first request needs the room."""
    written = []
    for recorder in (None, EagerRecorder()):
        engine = make(
            recorder, kv_cache_memory_bytes=num_pages * PAGE, block_size=4, commit_ahead_tokens=0
        )
        add(engine, [[idx + 1] * 9 for idx in range(5)])
        written.append(all_tokens(run_out(engine)))
    assert written[0] == written[1]
    assert engine.stats().preempt_swap + engine.stats().preempt_recompute > 0


def test_a_request_that_fills_the_pool_leaves_room_for_the_padding(make: Any) -> None:
    engine = make(
        EagerRecorder(), kv_cache_memory_bytes=12 * PAGE, block_size=4, commit_ahead_tokens=0
    )
    room = engine.backend.max_seq_tokens()
    assert room < engine.config.max_model_len
    params = SamplingParams(temperature=0.0, max_tokens=2)
    engine.add_request("all of it", [1 + idx % 90 for idx in range(room - 1)], params)
    engine.add_request("beside it", [3], params)
    outputs = run_out(engine)
    assert [output.error for output in outputs.values()] == [None, None]
    assert graphs(engine).num_recorded > 0


def test_prefills_mixed_batches_and_scored_prompts_go_the_plain_way(make: Any) -> None:
    engine = make(EagerRecorder(), max_num_batched_tokens=8)
    scored = SamplingParams(temperature=0.0, max_tokens=3, prompt_logprobs=0)
    add(engine, [[5] * 20, [3]], scored)
    step(engine, {})
    assert graphs(engine).num_recorded == 0
    outputs = run_out(engine)
    assert [len(outputs[name].prompt_logprobs) for name in ("0", "1")] == [20, 1]
    assert graphs(engine).num_recorded > 0


def test_larger_batches_than_recorded_go_the_plain_way(make: Any) -> None:
    engine = make(EagerRecorder(), cuda_graph_sizes=(2, 1))
    assert graphs(engine).sizes == (1, 2)
    add(engine, [[idx + 1] * 5 for idx in range(4)])
    run_out(engine)
    assert graphs(engine).num_recorded == 0
    engine.add_request("alone", [1, 2], GREEDY)
    run_out(engine)
    assert list(graphs(engine)._recordings) == [(1, 160)]


def test_the_recordings_used_least_lately_are_dropped(
    make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decode_graphs, "MAX_RECORDINGS", 1)
    engine = make(EagerRecorder())
    for wave in range(3):
        count = wave % 2 + 1
        add(engine, [[idx + 1] * 4 for idx in range(count)])
        run_out(engine)
        assert [size for size, _ in graphs(engine)._recordings] == [count]
    assert graphs(engine).num_recorded == 3


class Uncapturable:
    """Takes some shapes, and fails at the next, as a model may that reads back what it computes."""

    def __init__(self, num_good: int) -> None:
        self._num_good = num_good

    def record(self, run: Run) -> Run:
        self._num_good -= 1
        if self._num_good < 0:
            raise CaptureError("operation not permitted when stream is capturing")
        return run


@pytest.mark.parametrize("num_good", [0, 1])
def test_what_cannot_be_captured_runs_the_plain_way(
    num_good: int, make: Any, caplog: pytest.LogCaptureFixture
) -> None:
    written = []
    for recorder in (None, Uncapturable(num_good)):
        engine = make(recorder)
        add(engine, [[1, 2, 3], [4] * 20])
        engine.add_request("short", [5], SamplingParams(temperature=0.0, max_tokens=3))
        written.append(all_tokens(run_out(engine)))
    assert written[0] == written[1]
    assert graphs(engine).num_recorded == num_good
    assert caplog.text.count("not permitted when stream is capturing") == 1


def test_the_place_to_pad_with_is_given_back_at_the_end_only(make: Any) -> None:
    engine = make(EagerRecorder())
    add(engine, [[1, 2, 3]])
    run_out(engine)
    engine.flush_prefix_cache()
    engine.backend.trim()
    engine.backend.check_invariants()
    stats = engine.kv_stats()
    assert stats.live_bytes == 0
    assert stats.in_use_pages == stats.created_pages > 0
    plain = make()
    add(plain, [[1, 2, 3]])
    run_out(plain)
    assert_no_page_is_lost(plain)


def test_batch_sizes_leave_few_rows_unused() -> None:
    assert batch_sizes(1) == (1,)
    assert batch_sizes(6) == (1, 2, 4, 6)
    assert batch_sizes(32) == (1, 2, 4, 8, 16, 24, 32)
    assert batch_sizes(37) == (1, 2, 4, 8, 16, 24, 32, 37)
    for most in range(1, 300):
        sizes = batch_sizes(most)
        assert sizes[-1] == most
        for count in range(1, most + 1):
            size = next(size for size in sizes if size >= count)
            assert size - count < 8


class TestCompilation:
    @pytest.fixture(autouse=True)
    def _forget(self) -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(kv_attention, "_registered", kv_attention.vmalloc_attention)
            yield
        torch._dynamo.reset()
        kv_attention.register_attention()

    @pytest.mark.parametrize("make", ["virtual"], indirect=True)
    def test_a_compiled_model_writes_the_same(
        self, make: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        num_compiled, num_called = 0, 0

        def counting(module: Any, _: Any) -> Any:
            nonlocal num_compiled
            num_compiled += 1

            def call(*args: Any) -> Any:
                nonlocal num_called
                num_called += 1
                return module.forward(*args)

            return call

        monkeypatch.setattr(compiled_model, "BACKEND", counting)
        prompts = [[1, 2, 3], [4] * 20]
        plain = make()
        add(plain, prompts)
        expected = all_tokens(run_out(plain))
        engine = make(compile=True, cuda_graph_sizes=(2,))
        assert graphs(engine).num_recorded == 1
        compiled_at_start, called_at_start = num_compiled, num_called
        assert compiled_at_start > 0
        add(engine, prompts)
        assert all_tokens(run_out(engine)) == expected
        assert num_compiled == compiled_at_start
        assert num_called > called_at_start

    @pytest.mark.parametrize("make", ["virtual"], indirect=True)
    def test_a_model_that_cannot_be_compiled_is_named_at_start(
        self, make: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def broken(*_: Any) -> Any:
            raise RuntimeError("no code for this\nand more")

        monkeypatch.setattr(compiled_model, "BACKEND", broken)
        with pytest.raises(ConfigError, match=r"LlamaForCausalLM cannot be compiled.*no code"):
            make(max_num_seqs=1, compile=True)


class PretendedCuda:
    """What ``CudaGraphRecorder`` calls of ``torch.cuda``; the first capture fails as it ends."""

    def __init__(self) -> None:
        self.captures: list[object] = []
        self.pools_ended: list[tuple[object, object]] = []

    def Stream(self, device: object) -> Any:
        return types.SimpleNamespace(wait_stream=lambda other: None)

    def current_stream(self) -> Any:
        return types.SimpleNamespace(wait_stream=lambda other: None)

    def graph_pool_handle(self) -> tuple[int, int]:
        return (0, 1)

    def synchronize(self, device: object = None) -> None:
        pass

    def CUDAGraph(self) -> Any:
        return types.SimpleNamespace(replay=lambda: None)

    @contextmanager
    def stream(self, stream: object) -> Iterator[None]:
        yield

    @contextmanager
    def graph(self, graph: object, **_: object) -> Iterator[None]:
        self.captures.append(graph)
        yield
        if len(self.captures) == 1:
            raise RuntimeError("operation failed due to a previous error during capture\nmore")


def test_a_failed_capture_is_followed_by_one_that_ends_well(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """torch 2.11 refuses random numbers on the device until then."""
    cuda = PretendedCuda()
    for name in ("Stream", "current_stream", "graph_pool_handle", "synchronize", "CUDAGraph"):
        monkeypatch.setattr(torch.cuda, name, getattr(cuda, name))
    monkeypatch.setattr(torch.cuda, "stream", cuda.stream)
    monkeypatch.setattr(torch.cuda, "graph", cuda.graph)
    end = lambda device, pool: cuda.pools_ended.append((device, pool))  # noqa: E731
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", end, raising=False)
    recorder = decode_graphs.CudaGraphRecorder(torch.device("cpu", 0))
    with pytest.raises(CaptureError, match=r"previous error during capture$"):
        recorder.record(lambda: torch.zeros(1))
    assert len(cuda.captures) == 2
    assert cuda.pools_ended == [(0, (0, 1))]
    recorder.record(lambda: torch.zeros(1))()
    assert len(cuda.captures) == 3
