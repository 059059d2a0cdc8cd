"""What the engine is doing, as Prometheus reads it: from its latest snapshot, at each scrape.

Owns: nothing but the tables of names.  Thread-safety: any thread; a snapshot never changes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import accumulate
from typing import get_args

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from ..engine import (
    STEP_TOKEN_BOUNDS,
    AsyncLLMEngine,
    EngineSnapshot,
    EngineState,
    KVCacheStats,
    RankReport,
    TokenStats,
)
from .rank_families import plan_families, rank_families

KV_GAUGES = {
    "reserved_bytes": "Address space reserved for K and V; it costs no memory",
    "capacity_bytes": "Hard cap on physical KV memory",
    "page_bytes": "One physical page (paged backend: one block)",
    "committed_bytes": "Pages that hold rows of live sequences",
    "live_bytes": "K and V of tokens that exist; shared ones count once",
    "logical_bytes": "The same with shared ones counted for each sequence",
    "ahead_bytes": "Pages mapped past the ends of sequences, before they are needed",
    "parked_bytes": "Pages still mapped in free slots, warm for the next sequence",
    "cached_bytes": "Pages that only the prefix cache refers to",
    "shared_bytes": "Memory that sharing saves now",
    "swapped_bytes": "Host memory that swapped-out sequences take",
    "peak_committed_bytes": "Highest committed bytes so far",
    "peak_live_bytes": "Highest live bytes so far",
    "created_pages": "Pages that the driver holds",
    "free_pages": "Created pages that nothing uses",
    "in_use_pages": "Created pages that something uses",
    "retired_pages": "Created pages that wait for the step that may still read them",
}
"""``KVCacheStats`` fields that are exported as ``vmalloc_kv_FIELD``."""

KV_COUNTERS = {
    "map_calls": "Driver calls that map pages",
    "unmap_calls": "Driver calls that unmap pages",
    "critical_pages": "Pages mapped while the engine waited",
    "background_pages": "Pages mapped by the worker while the engine computed",
    "adopted_pages": "Parked pages that a new sequence took over, mapped already",
    "reclaimed_pages": "Ahead and parked pages taken back for another sequence",
    "aliased_pages": "References to pages that somebody else had already",
    "cow_copies": "Pages copied so that a sequence could write to its own",
    "swap_out_pages": "Pages copied to host memory",
    "swap_in_pages": "Pages copied back",
}
"""``KVCacheStats`` fields that are exported as ``vmalloc_kv_FIELD_total``."""


class EngineCollector(Collector):
    """Reads an engine's snapshot.

    Args:
        engine: whose figures.
        model_name: label of every figure with vLLM's name, beside ``engine="0"``.
        cache_info: labels of ``vllm:cache_config_info``; filled in once they are known.

    Attributes:
        rank_reports: of every rank; whoever asks for the figures brings them up to date before.
    """

    def __init__(
        self, engine: AsyncLLMEngine, model_name: str, cache_info: Mapping[str, str]
    ) -> None:
        self._engine = engine
        self._labels = {"model_name": model_name, "engine": "0"}
        self._cache_info = cache_info
        self.rank_reports: Sequence[RankReport] = ()

    def describe(self) -> Iterable[Metric]:
        """Nothing: what there is depends on whether the engine started."""
        return ()

    def collect(self) -> Iterator[Metric]:
        """Every family that there are figures for."""
        yield from self._server_families()
        snapshot = self._engine.snapshot
        if snapshot is not None:
            yield from self._vllm_families(snapshot)
            yield from _kv_families(snapshot.kv)
            yield from _scheduling_families(snapshot)
            yield _gauge(
                "vmalloc_tensor_parallel_size",
                "Ranks: processes that compute together",
                snapshot.num_ranks,
            )
            yield from plan_families(snapshot)
            yield from rank_families(self.rank_reports)

    def _server_families(self) -> Iterator[Metric]:
        engine = self._engine
        state = GaugeMetricFamily(
            "vmalloc_engine_state", "1 for what the engine is doing", labels=["state"]
        )
        for name in get_args(EngineState):
            state.add_metric([name], float(engine.state == name))
        yield state
        startup = GaugeMetricFamily(
            "vmalloc_startup_seconds", "What the start took, by phase", labels=["phase"]
        )
        for phase in engine.startup:
            startup.add_metric([phase.name], phase.seconds)
        yield startup
        yield _gauge("vmalloc_queue_length", "Prompts that no step took up yet", engine.num_queued)
        limit = engine.max_queued_requests
        yield _gauge(
            "vmalloc_queue_limit",
            "Prompts that may wait; more are refused",
            float("inf") if limit is None else limit,
        )
        yield _gauge("vmalloc_live_requests", "Prompts that have not ended", engine.num_live)
        if engine.last_step_age_s is not None:
            yield _gauge(
                "vmalloc_last_step_age_seconds", "Since the last step ended", engine.last_step_age_s
            )
        yield _gauge(
            "vmalloc_step_age_seconds",
            "How long the engine has been at one step or command; 0 while it waits for work",
            engine.loop_age_s or 0.0,
        )

    def _vllm_families(self, snapshot: EngineSnapshot) -> Iterator[Metric]:
        scheduler, kv, prefix, tokens = (
            *(snapshot.scheduler, snapshot.kv),
            *(snapshot.prefix, snapshot.tokens),
        )
        num_waiting = scheduler.num_waiting + scheduler.num_swapped
        yield self._vllm_gauge(
            "num_requests_running", "Requests in the running batch", scheduler.num_running
        )
        yield self._vllm_gauge(
            "num_requests_waiting",
            "Requests that wait to start, or to go on after a preemption",
            num_waiting,
        )
        yield self._vllm_gauge(
            "kv_cache_usage_perc",
            "Committed share of the KV cap, 0 to 1",
            kv.committed_bytes / kv.capacity_bytes if kv.capacity_bytes else 0.0,
        )
        for name, help, value in (
            (
                "num_preemptions",
                "Requests preempted",
                scheduler.preempt_swap + scheduler.preempt_recompute,
            ),
            ("prefix_cache_queries", "Tokens looked up in the prefix cache", prefix.queried_tokens),
            ("prefix_cache_hits", "Tokens found in the prefix cache", prefix.hit_tokens),
            ("prompt_tokens", "Tokens of prompts computed", tokens.prompt_tokens),
            ("prompt_tokens_cached", "Tokens of prompts found cached", prefix.hit_tokens),
            ("generation_tokens", "Tokens written", tokens.generation_tokens),
        ):
            yield self._vllm_counter(name, help, value)
        yield self._sleep_state(snapshot.is_asleep)
        yield self._step_tokens(tokens)
        if self._cache_info:
            labels = {**self._cache_info, **self._labels}
            info = GaugeMetricFamily(
                "vllm:cache_config_info", "How the KV cache is set up", labels=list(labels)
            )
            info.add_metric(list(labels.values()), 1.0)
            yield info

    def _sleep_state(self, is_asleep: bool) -> Metric:
        labels = [*self._labels, "sleep_state"]
        family = GaugeMetricFamily(
            "vllm:engine_sleep_state", "Whether the KV memory was given back for now", labels=labels
        )
        for name, is_on in (
            ("awake", not is_asleep),
            ("weights_offloaded", False),
            ("discard_all", False),
        ):
            family.add_metric([*self._labels.values(), name], float(is_on))
        return family

    def _step_tokens(self, tokens: TokenStats) -> Metric:
        family = HistogramMetricFamily(
            "vllm:iteration_tokens_total", "Tokens computed a step", labels=list(self._labels)
        )
        bounds = [*(str(float(bound)) for bound in STEP_TOKEN_BOUNDS), "+Inf"]
        family.add_metric(
            list(self._labels.values()),
            buckets=list(zip(bounds, accumulate(tokens.steps_by_tokens), strict=True)),
            sum_value=tokens.computed_tokens,
        )
        return family

    def _vllm_gauge(self, name: str, help: str, value: float) -> Metric:
        family = GaugeMetricFamily(f"vllm:{name}", help, labels=list(self._labels))
        family.add_metric(list(self._labels.values()), value)
        return family

    def _vllm_counter(self, name: str, help: str, value: float) -> Metric:
        family = CounterMetricFamily(f"vllm:{name}", help, labels=list(self._labels))
        family.add_metric(list(self._labels.values()), value)
        return family


def _kv_families(kv: KVCacheStats) -> Iterator[Metric]:
    for field, help in KV_GAUGES.items():
        yield _gauge(f"vmalloc_kv_{field}", help, getattr(kv, field))
    for field, help in KV_COUNTERS.items():
        yield _counter(f"vmalloc_kv_{field}", help, getattr(kv, field))
    yield _counter(
        "vmalloc_kv_stall_seconds", "Time the engine waited for pages", kv.stall_us / 1e6
    )
    yield _gauge("vmalloc_kv_live_sequences", "Sequences with a slot", kv.num_live_seqs)
    yield _gauge(
        "vmalloc_kv_worker_failed",
        "1 if the worker that maps ahead stopped with an error",
        float(bool(kv.worker_error)),
    )


def _scheduling_families(snapshot: EngineSnapshot) -> Iterator[Metric]:
    scheduler, prefix = snapshot.scheduler, snapshot.prefix
    preemptions = CounterMetricFamily(
        "vmalloc_preemptions", "Requests that gave up their memory, by how", labels=["kind"]
    )
    preemptions.add_metric(["swap"], scheduler.preempt_swap)
    preemptions.add_metric(["recompute"], scheduler.preempt_recompute)
    yield preemptions
    yield _counter(
        "vmalloc_preempted_tokens",
        "Computed tokens that preemption dropped",
        scheduler.preempted_tokens,
    )
    yield _counter(
        "vmalloc_preemption_swapped_bytes",
        "Bytes that preemption copied to host memory",
        scheduler.swapped_bytes,
    )
    yield _gauge(
        "vmalloc_swapped_requests", "Requests whose KV is in host memory", scheduler.num_swapped
    )
    yield _gauge(
        "vmalloc_running_sequences", "Sequences of running requests", scheduler.num_running_seqs
    )
    yield _counter("vmalloc_prefix_lookups", "Prompts looked up", prefix.num_lookups)
    yield _counter("vmalloc_prefix_hit_tokens", "Prompt tokens found cached", prefix.hit_tokens)
    misses = CounterMetricFamily(
        "vmalloc_prefix_misses",
        "Lookups that did not find the whole prompt, by reason",
        labels=["reason"],
    )
    for reason, count in prefix.misses.items():
        misses.add_metric([reason], count)
    yield misses
    yield _gauge("vmalloc_prefix_cached_pages", "Pages of cached prefixes", prefix.cached_pages)
    yield _gauge("vmalloc_prefix_pinned_pages", "Of those, pinned ones", prefix.pinned_pages)
    yield _counter(
        "vmalloc_prefix_evicted_pages", "Pages dropped for lack of memory", prefix.evicted_pages
    )
    yield _counter("vmalloc_engine_steps", "Steps of the engine", snapshot.num_steps)
    yield _counter(
        "vmalloc_computed_tokens",
        "Rows that went through the model, recomputed ones too",
        snapshot.tokens.computed_tokens,
    )


def _gauge(name: str, help: str, value: float) -> Metric:
    return GaugeMetricFamily(name, help, value=value)


def _counter(name: str, help: str, value: float) -> Metric:
    return CounterMetricFamily(name, help, value=value)
