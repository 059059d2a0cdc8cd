"""One run: a workload through a fresh engine, and everything that was measured meanwhile.

Owns: one engine for as long as the run lasts.  Thread-safety: none; one run at a time.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise

from ..config import EngineConfig
from ..llm_engine import LLMEngine
from .instruments import (
    MEMORY_CALLS,
    SWAP_CALLS,
    VIEW_CALLS,
    Instruments,
    memory_use,
    worker_cpu_seconds,
)
from .replay import Served, ServedRequest, replay
from .statistics import percentile
from .workload import Workload

MakeEngine = Callable[[EngineConfig], LLMEngine]
"""Makes an engine over the model of a comparison, which no other engine has meanwhile."""

PERCENTILES = (50, 90, 99)
MAX_POINTS = 160
"""Moments of a run whose memory is kept for its picture."""


@dataclass(slots=True)
class Run:
    """What one run gave.

    Attributes:
        requests: what each got, in the workload's order.
        values: measurements by name, see ``metrics.METRICS``; None where there was nothing.
        kernel, driver: the attention kernel, and where pages came from.
        memory: ``[seconds, live, committed, held bytes, sequences]`` at moments of the run.
        calls: of the backend, ``{name: {"num_calls", "us", "cpu_us"}}``.
    """

    requests: list[ServedRequest]
    values: dict[str, float | None]
    kernel: str
    driver: str
    memory: list[list[float]] = field(default_factory=list)
    calls: dict[str, dict[str, float]] = field(default_factory=dict)


def run_once(
    make_engine: MakeEngine,
    config: EngineConfig,
    workload: Workload,
    *,
    has_logprobs: bool = False,
) -> Run:
    """Serve ``workload`` with an engine of its own; with several ranks memory is that of all."""
    engine = make_engine(config)
    try:
        own = getattr(engine.backend, "cache", engine.backend)  # of this rank, where are several
        kernel, driver = engine.kernel_name, getattr(own, "driver_name", "")
        instruments = Instruments(engine.backend, engine.num_ranks)
        gc.collect()
        cpu, worker = time.process_time(), worker_cpu_seconds()
        served = replay(engine, workload, has_logprobs=has_logprobs, observe=instruments.observe)
        cpu = time.process_time() - cpu
        engine.backend.wait_worker()
        worker_after = worker_cpu_seconds()
        instruments.observe()
        worker_cpu = None
        if worker is not None and worker_after is not None:
            worker_cpu = worker_after - worker
        values = {
            **_throughput(served, cpu),
            **_latencies(served),
            **_memory(engine, instruments, served),
            **_allocator(engine, instruments, served, worker_cpu),
            **_counts(engine, served),
        }
    finally:
        engine.close()
    return Run(
        served.requests,
        values,
        kernel,
        driver,
        memory=_points(instruments, served.started_s),
        calls={
            name: {
                "num_calls": spent.num_calls,
                "us": 1e6 * spent.seconds,
                "cpu_us": 1e6 * spent.cpu_seconds,
            }
            for name, spent in instruments.calls.items()
            if spent.num_calls
        },
    )


def _throughput(served: Served, cpu_seconds: float) -> dict[str, float | None]:
    num_tokens = sum(
        len(completion.token_ids) for one in served.requests for completion in one.completions
    )
    seconds = served.ended_s - served.started_s
    return {
        "output_tokens_per_s": num_tokens / seconds,
        "output_tokens_per_cpu_s": num_tokens / cpu_seconds if cpu_seconds else None,
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "output_tokens": float(num_tokens),
    }


def _latencies(served: Served) -> dict[str, float | None]:
    """Milliseconds to the first token of requests, per token of completions, between tokens."""
    ttft, tpot, itl = [], [], []
    for one in served.requests:
        if one.first_token_s is None or one.last_token_s is None:
            continue
        ttft.append(1e3 * (one.first_token_s - one.arrival_s))
        if one.is_beam:
            num_tokens = max(len(completion.token_ids) for completion in one.completions)
            if num_tokens > 1:
                tpot.append(1e3 * (one.last_token_s - one.first_token_s) / (num_tokens - 1))
            continue
        for completion in one.completions:
            times = completion.times_s
            if len(times) > 1:
                tpot.append(1e3 * (times[-1] - times[0]) / (len(times) - 1))
                itl += [1e3 * (b - a) for a, b in pairwise(times)]
    return {
        f"{name}_p{percent}_ms": percentile(values, percent)
        for name, values in (("ttft", ttft), ("tpot", tpot), ("itl", itl))
        for percent in PERCENTILES
    }


def _memory(engine: LLMEngine, instruments: Instruments, served: Served) -> dict[str, float | None]:
    use, stats = memory_use(instruments.samples, served.started_s), engine.kv_stats()
    taken = sum(use.step_mean[state] for state in ("committed", "ahead", "parked", "retired"))
    return {
        **{f"mean_{state}_bytes": value for state, value in use.mean.items()},
        **{f"peak_{state}_bytes": float(value) for state, value in use.peak.items()},
        "waste": _unused(use.step_mean["live"], use.step_mean["committed"]),
        "waste_all": _unused(use.step_mean["live"], taken),
        "largest_batch": float(stats.peak_live_seqs),
        "mean_batch": use.mean_seqs,
    }


def _unused(live_bytes: float, taken_bytes: float) -> float | None:
    return 1 - live_bytes / taken_bytes if taken_bytes else None


def _allocator(
    engine: LLMEngine, instruments: Instruments, served: Served, worker_cpu: float | None
) -> dict[str, float | None]:
    memory, views = instruments.total(MEMORY_CALLS), instruments.total(VIEW_CALLS)
    swaps, stats = instruments.total(SWAP_CALLS), engine.kv_stats()
    return {
        "allocator_ms": 1e3 * memory.seconds,
        "allocator_cpu_ms": 1e3 * memory.cpu_seconds,
        "allocator_step_us": 1e6 * memory.cpu_seconds / max(1, served.num_steps),
        "views_cpu_ms": 1e3 * views.cpu_seconds,
        "swap_ms": 1e3 * swaps.seconds,
        "stall_ms": stats.stall_us / 1e3,
        "worker_cpu_ms": None if worker_cpu is None else 1e3 * worker_cpu,
        "critical_pages": float(stats.critical_pages),
        "background_pages": float(stats.background_pages),
    }


def _counts(engine: LLMEngine, served: Served) -> dict[str, float | None]:
    stats, kv_stats = engine.stats(), engine.kv_stats()
    return {
        "preemptions": float(stats.preempt_swap + stats.preempt_recompute),
        "preempt_swap": float(stats.preempt_swap),
        "preempt_recompute": float(stats.preempt_recompute),
        "recomputed_tokens": float(stats.preempted_tokens),
        "cached_tokens": float(sum(one.num_cached_tokens for one in served.requests)),
        "aliased_pages": float(kv_stats.aliased_pages),
        "cow_copies": float(kv_stats.cow_copies),
        "failed_requests": float(sum(one.error is not None for one in served.requests)),
        "steps": float(served.num_steps),
    }


def _points(instruments: Instruments, started_s: float) -> list[list[float]]:
    """Moments of the run, evenly by number, the first and the last among them."""
    samples = instruments.samples
    count = min(MAX_POINTS, len(samples))
    places = [idx * (len(samples) - 1) // max(1, count - 1) for idx in range(count)]
    points = []
    for place in places:
        sample, state = samples[place], samples[place].state
        seconds = round(sample.time_s - started_s, 4)
        points.append([seconds, state.live, state.committed, state.held, sample.num_seqs])
    return points
