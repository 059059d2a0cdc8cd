"""The simulator against the real engine: the same admissions, preemptions and pages, each step."""

from __future__ import annotations

import copy
import dataclasses
from collections import Counter
from functools import cache
from pathlib import Path
from types import MethodType
from typing import Any

import numpy as np
import pytest
import torch
from simulation.clock import DriverTime, SimulatedClock
from simulation.engine import SimulatedEngine, work_of
from simulation.hardware import DEVICES, DriverLatency
from simulation.log import StepLog, log_step
from simulation.models import MODELS, Deployment, StepWork
from simulation.replay import replay, simulate
from simulation.run import run
from simulation.setting import Setting
from simulation.trace import Trace, draw_trace, read_trace
from transformers import LlamaConfig, LlamaForCausalLM
from workload import ALPACA

from vmalloc import PagedKVCache, VirtualKVCache, _core
from vmalloc.engine import EngineConfig, LLMEngine, SamplingParams
from vmalloc.engine.scheduler import Scheduler
from vmalloc.engine.sequence import Sequence

PAGE = 4096  # eight tokens of the model
VOCAB_SIZE = 97
HOST_BANDWIDTH = 2e9
# By the page: in how many calls a run is mapped depends on the driver.
LATENCY = DriverLatency(create_us=200, map_us=40, set_access_us=0, unmap_us=30)


@cache
def model() -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=640,
        bos_token_id=None,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config).eval()


def make_trace(num_requests: int = 24, seed: int = 0, **settings: Any) -> Trace:
    """Ragged requests that come faster than they can be served, then with gaps."""
    rng = np.random.default_rng(seed)
    arrivals = np.cumsum(rng.exponential(4e-3, num_requests))
    arrivals[-3:] += np.arange(1, 4) * 0.5
    return Trace(
        name="test",
        arrival_s=arrivals,
        prompt_tokens=rng.integers(1, 70, num_requests),
        output_tokens=rng.integers(1, 30, num_requests),
        **settings,
    )


def prompt_ids(trace: Trace, idx: int) -> list[int]:
    """The prompt of a request, in tokens of the model."""
    return [token % VOCAB_SIZE for token in trace.prompt(idx)]


def step_seconds(work: StepWork) -> float:
    return 1e-3 + 1e-5 * work.num_tokens + 1e-6 * work.attended_pairs


class RealEngine:
    """An ``LLMEngine`` for which a forward pass takes as long as ``step_seconds`` says."""

    def __init__(self, engine: LLMEngine, clock: SimulatedClock, driver: DriverTime) -> None:
        self.engine = engine
        self.log: list[StepLog] = []
        self.written: dict[tuple[str, int], list[int]] = {}
        self._clock, self._driver = clock, driver
        self._compute_s = 0.0
        scheduler, runner, backend = engine.scheduler, engine._runner, engine.backend
        schedule, forward, end_step = scheduler.schedule, runner.forward, backend.end_step

        def noted_schedule(_: Any) -> Any:
            self._batch = schedule()
            self._compute_s = 0.0
            return self._batch

        def timed_forward(_: Any, *args: Any) -> Any:
            started = clock()
            clock.advance(step_seconds(work_of(self._batch)))
            self._compute_s = clock() - started
            return forward(*args)

        def timed_end_step(_: Any, step: Any) -> None:
            end_step(step)
            clock.advance(driver.take_stall_seconds())
            driver.run_worker(self._compute_s)

        scheduler.schedule = MethodType(noted_schedule, scheduler)  # type: ignore[method-assign]
        runner.forward = MethodType(timed_forward, runner)  # type: ignore[method-assign]
        backend.end_step = MethodType(timed_end_step, backend)  # type: ignore[method-assign]

    @property
    def has_unfinished(self) -> bool:
        return self.engine.has_unfinished_requests()

    def add(self, idx: int, prompt: list[int], num_output_tokens: int, width: int) -> None:
        params = SamplingParams(
            n=width, max_tokens=num_output_tokens, ignore_eos=True, temperature=1.0, seed=idx
        )
        tokens = [token % VOCAB_SIZE for token in prompt]
        self.engine.add_request(str(idx), {"prompt_token_ids": tokens}, params)

    def step(self) -> None:
        for output in self.engine.step():
            for choice in output.outputs:
                self.written[output.request_id, choice.index] = list(choice.token_ids)
        self.log.append(log_step(self._batch, self.engine.scheduler, self.engine.backend))


def run_real(trace: Trace, config: EngineConfig) -> tuple[RealEngine, Any]:
    clock = SimulatedClock()
    with LLMEngine(copy.deepcopy(model()), config=config, clock=clock) as engine:
        backend = engine.backend
        clock.watch(backend, HOST_BANDWIDTH)
        cache = backend if isinstance(backend, VirtualKVCache) else None
        driver = DriverTime(cache, None if cache is None else cache._driver, LATENCY)
        real = RealEngine(engine, clock, driver)
        for _ in replay(trace, real, clock):
            backend.check_invariants()
        return real, backend.config


def run_simulated(
    trace: Trace, config: EngineConfig, kv_config: Any, written: dict[tuple[str, int], list[int]]
) -> list[StepLog]:
    kv_config = dataclasses.replace(kv_config, driver="null")
    core_driver = _core.make_null_driver(PAGE)
    is_virtual = config.kv_backend == "virtual"
    backend = (
        VirtualKVCache(kv_config, driver=core_driver) if is_virtual else PagedKVCache(kv_config)
    )
    with backend:
        clock = SimulatedClock()
        clock.watch(backend, HOST_BANDWIDTH)
        scheduler = Scheduler(
            backend,
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.step_tokens,
            preemption_mode=config.preemption_mode,
            clock=clock,
        )

        def next_token(seq: Sequence) -> int:
            return written[seq.request_id, seq.choice_idx][seq.num_output_tokens]

        engine = SimulatedEngine(
            backend,
            scheduler,
            clock,
            DriverTime(backend if is_virtual else None, core_driver, LATENCY),
            step_seconds,
            next_token,
        )
        log = []
        in_model_tokens = _InModelTokens(engine)
        for _ in replay(trace, in_model_tokens, clock):
            log.append(log_step(in_model_tokens.batch, scheduler, backend))
        return log


class _InModelTokens:
    """A simulated engine that is given prompts in tokens of the model."""

    def __init__(self, engine: SimulatedEngine) -> None:
        self._engine = engine

    @property
    def has_unfinished(self) -> bool:
        return self._engine.has_unfinished

    def add(self, idx: int, prompt: list[int], num_output_tokens: int, width: int) -> None:
        prompt = [token % VOCAB_SIZE for token in prompt]
        self._engine.add(idx, prompt, num_output_tokens, width)

    def step(self) -> None:
        self.batch = self._engine.step().batch


def assert_same_steps(ours: list[StepLog], theirs: list[StepLog]) -> None:
    for idx, pair in enumerate(zip(ours, theirs, strict=False)):
        our, their = (dataclasses.asdict(log) for log in pair)
        our, their = ({**log.pop("pages"), **log.pop("counts"), **log} for log in (our, their))
        del our["map_calls"], their["map_calls"]
        different = {name: (our[name], their[name]) for name in our if our[name] != their[name]}
        assert not different, f"step {idx}: (simulated, real)"
    assert len(ours) == len(theirs)


CASES: dict[str, tuple[dict[str, Any], dict[str, Any], set[str]]] = {
    # Settings, trace, and what must have happened.
    "recompute": ({"preemption_mode": "recompute"}, {}, {"preempt_recompute"}),
    "swap": (
        {"preemption_mode": "swap", "swap_space_bytes": 14 * PAGE},
        {},
        {"preempt_swap"},
    ),
    "auto": (
        {"preemption_mode": "auto", "swap_space_bytes": 32 * PAGE},
        {},
        {"preempt_swap"},
    ),
    "shared prefixes": (
        {"preemption_mode": "recompute", "enable_prefix_caching": True},
        {"shared_tokens": 18, "shared_group": np.arange(24) % 3},
        {"aliased_pages", "preempt_recompute"},
    ),
    "four samples": (
        {"preemption_mode": "swap", "swap_space_bytes": 32 * PAGE},
        {"width": 4},
        {"aliased_pages", "cow_copies", "preempt_swap"},
    ),
    "no commit-ahead": (
        {"preemption_mode": "recompute", "commit_ahead_tokens": 0},
        {},
        {"preempt_recompute"},
    ),
}


@pytest.mark.parametrize("kind", ["virtual", "paged"])
@pytest.mark.parametrize("case", CASES)
def test_each_step_is_that_of_the_real_engine(case: str, kind: str) -> None:
    settings, trace_settings, events = CASES[case]
    trace = make_trace(**trace_settings)
    config = EngineConfig(
        **{
            "kv_backend": kind,
            "kv_cache_memory_bytes": 32 * PAGE,
            "page_size": PAGE if kind == "virtual" else None,
            "block_size": 8,
            "max_model_len": 128,
            "max_num_seqs": 12,
            "max_num_batched_tokens": 48,
            "enable_prefix_caching": False,
            "swap_space_bytes": 0,
            **settings,
        }
    )
    real, kv_config = run_real(trace, config)
    simulated = run_simulated(trace, config, kv_config, real.written)
    assert_same_steps(simulated, real.log)
    last = real.log[-1]
    counts = Counter({**dataclasses.asdict(last.counts), **last.pages})
    assert all(counts[event] > 0 for event in events), counts
    assert any(step.waiting for step in real.log)
    assert any(max((count for *_, count in step.computed), default=0) > 1 for step in real.log)


NOT_OF_A_STEP = {"num_steps", "live_byte_steps", "committed_byte_steps", "peak_live_bytes"}


def run_setting(setting: Setting, trace: Trace, *, skips: bool) -> dict[int, Any]:
    """What is known after each step that was not skipped, by its number."""
    with setting.engine(trace.max_seq_len) as (engine, clock):
        log, num_steps = {}, 0
        for step in simulate(trace, engine, clock, skips=skips):
            num_steps += step.num_steps
            state = log_step(step.batch, engine.scheduler, engine.backend)
            pages = {name: state.pages[name] for name in state.pages if name not in NOT_OF_A_STEP}
            ended = tuple(group.request_id for group in step.ended)
            log[num_steps] = (clock(), ended, state.running, state.waiting, state.counts, pages)
            engine.backend.check_invariants()
        return log


@pytest.mark.parametrize("prefix_caching", [False, True])
@pytest.mark.parametrize("kind", ["virtual", "paged"])
def test_steps_done_at_once_change_nothing(kind: str, prefix_caching: bool) -> None:
    rng = np.random.default_rng(3)
    trace = Trace(
        name="test",
        arrival_s=np.cumsum(rng.exponential(0.05, 40)),
        prompt_tokens=rng.integers(1, 300, 40),
        output_tokens=rng.integers(1, 200, 40),
        shared_tokens=40,
        shared_group=np.arange(40) % 3,
    )
    setting = Setting(
        kind=kind,  # type: ignore[arg-type]
        max_num_seqs=6,
        capacity_bytes=90 << 20 if kind == "virtual" else 60 << 20,
        layers_per_group=16,  # pages of 32 tokens
        block_size=32,
        prefix_caching=prefix_caching,
    )
    every, some = (run_setting(setting, trace, skips=skips) for skips in (False, True))
    assert len(some) < len(every) / 2
    assert {step: every[step] for step in some} == some
    assert any(log[3] for log in some.values())  # some had to wait
    assert list(some.values())[-1][4].preempt_recompute > 0


def test_a_slot_that_comes_free_in_a_quiet_step_is_warmed_in_the_next() -> None:
    rng = np.random.default_rng(0)
    trace = Trace(
        name="test",
        arrival_s=np.cumsum(rng.exponential(0.05, 45)),
        prompt_tokens=rng.integers(1, 300, 45),
        output_tokens=rng.integers(1, 250, 45),
    )
    setting = Setting(
        max_num_seqs=4,
        capacity_bytes=285 << 20,
        page_bytes=1 << 18,
        layers_per_group=1,
        commit_ahead_tokens=16,
        low_watermark=0.1,
        prefix_caching=True,
        latency=DriverLatency().times(10),
    )
    every, some = (run_setting(setting, trace, skips=skips) for skips in (False, True))
    assert len(some) < len(every)
    assert {step: every[step] for step in some} == some


def test_counters_are_of_the_same_steps_as_times() -> None:
    trace = draw_trace(ALPACA, 100, seed=0)
    setting = Setting(max_num_seqs=16, capacity_bytes=2 << 30)
    stats = []
    num_ended = 0
    with setting.engine(trace.max_seq_len) as (engine, clock):
        for step in simulate(trace, engine, clock):
            num_ended += len(step.ended)
            if num_ended >= (20, 80, 101)[len(stats)]:
                stats.append(engine.backend.stats())
    result = run(setting, trace)
    for name in ("map_calls", "background_pages", "adopted_pages", "critical_pages"):
        before, after = (getattr(stat, name) for stat in stats)
        assert result["counters"][name] == after - before, name


def test_a_worker_without_time_leaves_its_work_to_the_engine() -> None:
    trace = draw_trace(ALPACA, 200, seed=0)
    setting = Setting(max_num_seqs=64, capacity_bytes=2 << 30)
    slow = dataclasses.replace(setting, latency=setting.latency.times(1000))
    fast_result, slow_result = run(setting, trace), run(slow, trace)
    assert fast_result["stall_share"] < 0.1 < slow_result["stall_share"]
    assert fast_result["worker_share"] > 0
    for name in ("num_steps", "mean_bytes"):
        assert fast_result[name]
    counters = [result["counters"] for result in (fast_result, slow_result)]
    assert counters[0]["critical_pages"] < counters[1]["critical_pages"]
    assert counters[0]["background_pages"] > counters[1]["background_pages"]


def test_a_step_is_as_long_as_its_bytes_and_its_products() -> None:
    deployment = Deployment(MODELS["Llama-3.1-8B"], DEVICES["H200"])
    assert deployment.model.weight_bytes == pytest.approx(2 * 8.03e9, rel=0.01)
    assert deployment.model.token_bytes == 128 * 1024
    assert Deployment(MODELS["Llama-3.1-70B"], DEVICES["H200"], 2).model.weight_bytes == (
        pytest.approx(2 * 70.6e9, rel=0.01)
    )
    lone = deployment.step_seconds(StepWork(1, 1, 1, 1))
    assert lone == pytest.approx(2 * 7.5e9 / 4.8e12, rel=0.01)  # reads the weights once
    crowd = deployment.step_seconds(StepWork(10_000, 10_000, 10_000, 10_000))
    assert crowd == pytest.approx(2 * 7.5e9 * 10_000 / 989.5e12, rel=0.02)
    context = deployment.step_seconds(StepWork(1, 1, 100_000, 100_000)) - lone
    assert context == pytest.approx(100_000 * 128 * 1024 / 4.8e12, rel=0.01)
    with pytest.raises(ValueError, match="num_devices is 3"):
        Deployment(MODELS["Llama-3.1-8B"], DEVICES["H200"], 3)
    with pytest.raises(ValueError, match="room for fewer"):
        Deployment(MODELS["Llama-3.1-70B"], DEVICES["H100"])


def test_a_trace_can_be_read_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    path.write_text("arrival_s,prompt_tokens,output_tokens\n2.5,7,3\n1,4,2\n")
    trace = read_trace(path)
    assert trace.arrival_s.tolist() == [1.0, 2.5]
    assert trace.prompt_tokens.tolist() == [4, 7]
    assert trace.max_seq_len == 10
    path.write_text("arrival_s,prompt_tokens,output_tokens\n1,4,0\n")
    with pytest.raises(ValueError, match="line 2"):
        read_trace(path)
    path.write_text("arrival_s,prompt_tokens,output_tokens\n")
    with pytest.raises(ValueError, match="no requests"):
        read_trace(path)
