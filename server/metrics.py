"""Everything that ``/metrics`` shows: the engine's figures, and what requests experienced.

Owns: a Prometheus registry and its histograms.  Thread-safety: any thread.

Names under ``vllm:`` mean what they mean in vLLM, so that its dashboards work; our own begin with
``vmalloc_``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    PlatformCollector,
    ProcessCollector,
    generate_latest,
)

from ..engine import AsyncLLMEngine, RankReport, RequestMetrics, RequestOutput, SamplingParams
from .engine_collector import EngineCollector

TTFT_BUCKETS = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
TOKEN_BUCKETS = (
    *(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0),
)
REQUEST_BUCKETS = (
    *(0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0),
    *(120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0),
)
HTTP_BUCKETS = (0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1.0, 5.0, 10.0, 60.0, 600.0)
MAX_COUNTED_TOKENS = 1_000_000
"""Largest bucket of token counts; vLLM ends at the model's context, not known before it loads."""

HTTP_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE"})

FINISH_REASONS = ("stop", "length", "abort", "error")


def token_count_buckets(limit: int = MAX_COUNTED_TOKENS) -> Iterator[int]:
    """1, 2, 5, 10, 20, 50, ... up to ``limit``."""
    scale = 1
    while scale <= limit:
        yield from (step * scale for step in (1, 2, 5) if step * scale <= limit)
        scale *= 10


class ServerMetrics:
    """The metrics of one served model.

    Args:
        engine: read at each scrape, started or not.
        model_name: label ``model_name``.
        version: of vmalloc.
    """

    def __init__(self, engine: AsyncLLMEngine, *, model_name: str, version: str) -> None:
        self._registry = CollectorRegistry()
        self._labels = {"model_name": model_name, "engine": "0"}
        self._cache_info: dict[str, str] = {}
        self._collector = EngineCollector(engine, model_name, self._cache_info)
        self._registry.register(self._collector)
        ProcessCollector(registry=self._registry)
        PlatformCollector(registry=self._registry)
        Gauge("vmalloc_build_info", "Always 1", ["version"], registry=self._registry).labels(
            version
        ).set(1)
        self._make_request_histograms()
        self._make_counters()

    def _make_request_histograms(self) -> None:
        make = self._histogram
        self._ttft = make("time_to_first_token_seconds", "Until the first token", TTFT_BUCKETS)
        self._itl = make(
            "inter_token_latency_seconds", "Between tokens of a streamed request", TOKEN_BUCKETS
        )
        self._tpot = make(
            "request_time_per_output_token_seconds",
            "Mean time of a request's tokens after the first",
            TOKEN_BUCKETS,
        )
        self._e2e = make("e2e_request_latency_seconds", "From arrival to end", REQUEST_BUCKETS)
        self._queue = make("request_queue_time_seconds", "Until the first step", REQUEST_BUCKETS)
        self._prefill = make(
            "request_prefill_time_seconds", "First step to first token", REQUEST_BUCKETS
        )
        self._decode = make(
            "request_decode_time_seconds", "First token to last token", REQUEST_BUCKETS
        )
        self._inference = make(
            "request_inference_time_seconds", "First step to last token", REQUEST_BUCKETS
        )
        counts = tuple(token_count_buckets())
        self._prompt_tokens = make("request_prompt_tokens", "Tokens of a prompt", counts)
        self._generation_tokens = make(
            "request_generation_tokens", "Tokens written for a request", counts
        )
        self._most_generated = make(
            "request_max_num_generation_tokens", "Tokens of a request's longest completion", counts
        )
        self._max_tokens = make("request_params_max_tokens", "The parameter max_tokens", counts)
        self._prefill_computed = make(
            "request_prefill_kv_computed_tokens", "Prompt tokens that were not cached", counts
        )
        self._n = make("request_params_n", "The parameter n", (1, 2, 5, 10, 20))
        self._num_preemptions = make(
            "request_num_preemptions", "Preemptions of a request", (1, 2, 3, 4, 5, 10, 20)
        )

    def _make_counters(self) -> None:
        registry = self._registry
        success = Counter(
            "vllm:request_success",
            "Requests that ended, by why",
            [*self._labels, "finished_reason"],
            registry=registry,
        )
        self._ended = {
            reason: success.labels(*self._labels.values(), reason) for reason in FINISH_REASONS
        }
        self._admission_rejections = Counter(
            "vllm:admission_rejections",
            "Requests refused as the queue was full",
            [*self._labels, "reason"],
            registry=registry,
        ).labels(*self._labels.values(), "max_num_queued_reqs")
        self._rejected = Counter(
            "vmalloc_requests_rejected",
            "Requests that the engine did not take, by why",
            ["reason"],
            registry=registry,
        )
        self._aborted = Counter(
            "vmalloc_requests_aborted",
            "Prompts that were given up, by why",
            ["reason"],
            registry=registry,
        )
        self._aborted.labels("disconnect")
        self._http_requests = Counter(
            "vmalloc_http_requests",
            "HTTP responses",
            ["method", "route", "status"],
            registry=registry,
        )
        self._http_seconds = Histogram(
            "vmalloc_http_request_seconds",
            "From a request's head to the end of its response",
            ["route"],
            buckets=HTTP_BUCKETS,
            registry=registry,
        )

    def _histogram(self, name: str, help: str, buckets: tuple[float, ...]) -> Histogram:
        family = Histogram(
            f"vllm:{name}", help, list(self._labels), buckets=buckets, registry=self._registry
        )
        child: Histogram = family.labels(*self._labels.values())
        return child

    def set_cache_info(self, info: Mapping[str, object]) -> None:
        """Labels of ``vllm:cache_config_info``, once the engine knows them."""
        self._cache_info.update({name: str(value) for name, value in info.items()})

    def observe_output(self, times: RequestMetrics, previous_token_time: float | None) -> None:
        """A streamed prompt has new tokens; ``previous_token_time``: when it last had some."""
        if previous_token_time is None:
            if times.first_token_time is not None:
                self._ttft.observe(times.first_token_time - times.arrival_time)
        elif times.last_token_time is not None and times.last_token_time > previous_token_time:
            self._itl.observe(times.last_token_time - previous_token_time)

    def observe_finished(
        self, output: RequestOutput, params: SamplingParams, tokens_by_choice: Mapping[int, int]
    ) -> None:
        """A prompt ended by itself. ``tokens_by_choice``: tokens of each completion."""
        times = output.metrics
        num_tokens = sum(tokens_by_choice.values())
        self._ended[_reason(output)].inc()
        ended = times.finished_time or times.last_token_time or times.arrival_time
        self._e2e.observe(ended - times.arrival_time)
        self._observe_phases(times, max(tokens_by_choice.values(), default=0))
        num_prompt_tokens = len(output.prompt_token_ids)
        self._prompt_tokens.observe(num_prompt_tokens)
        self._prefill_computed.observe(num_prompt_tokens - (output.num_cached_tokens or 0))
        self._generation_tokens.observe(num_tokens)
        self._most_generated.observe(max(tokens_by_choice.values(), default=0))
        self._n.observe(params.n)
        if params.max_tokens is not None:
            self._max_tokens.observe(params.max_tokens)
        self._num_preemptions.observe(times.num_preemptions)

    def _observe_phases(self, times: RequestMetrics, num_tokens: int) -> None:
        started, first, last = (
            times.first_scheduled_time,
            times.first_token_time,
            times.last_token_time,
        )
        if started is None:
            return
        self._queue.observe(started - times.arrival_time)
        if first is None or last is None:
            return
        self._prefill.observe(first - started)
        self._decode.observe(last - first)
        self._inference.observe(last - started)
        if num_tokens > 1:
            self._tpot.observe((last - first) / (num_tokens - 1))

    def observe_abort(self, reason: str, num_prompts: int = 1) -> None:
        """Prompts were given up: ``"disconnect"``, ``"queue_timeout"``, ``"request_timeout"``,
        ``"aborted"`` (by name), ``"engine"`` or ``"error"``."""
        self._aborted.labels(reason).inc(num_prompts)
        self._ended["abort"].inc(num_prompts)

    def observe_rejection(self, reason: str) -> None:
        """A request was refused: ``"queue_full"``, ``"invalid"`` or the state of the engine."""
        self._rejected.labels(reason).inc()
        if reason == "queue_full":
            self._admission_rejections.inc()

    def observe_http(self, method: str, route: str, status: int, seconds: float) -> None:
        """A response is over. ``route``: the path as declared, so that there are few.

        Methods that nobody knows are counted as ``other``: any word may be one.
        """
        method = method if method in HTTP_METHODS else "other"
        self._http_requests.labels(method, route, str(status)).inc()
        self._http_seconds.labels(route).observe(seconds)

    def render(self, rank_reports: Sequence[RankReport] = ()) -> bytes:
        """The figures in Prometheus' text format; ``rank_reports``: the latest, where ranks are.

        Not in OpenMetrics', which would turn ``vllm:`` into ``vllm_``.
        """
        self._collector.rank_reports = rank_reports
        return generate_latest(self._registry)


def _reason(output: RequestOutput) -> str:
    if output.error is not None:
        return "error"
    reasons = [one.finish_reason for one in output.outputs if one.finish_reason is not None]
    return reasons[0] if reasons and reasons[0] in FINISH_REASONS else "stop"
