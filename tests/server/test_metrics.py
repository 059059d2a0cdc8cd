"""``/metrics``: names, values that agree with the engine, counters that only grow."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.server.running import RunningServer
from tests.server.scraping import Samples, scrape, settled, value, wait_for
from vmalloc.engine import STEP_TOKEN_BOUNDS, AsyncLLMEngine, LLMEngine
from vmalloc.server.config import ServerConfig
from vmalloc.server.engine_collector import KV_COUNTERS, KV_GAUGES
from vmalloc.server.metrics import ServerMetrics, token_count_buckets

DOCS = Path(__file__).resolve().parents[2] / "docs" / "operations.md"
PROMPT = list(range(100, 140))


@pytest.fixture(scope="module")
def server() -> Iterator[RunningServer]:
    running = RunningServer()
    yield running
    running.wait_idle()
    running.close()


def growth(before: Samples, after: Samples, name: str, **labels: str) -> float:
    return value(after, name, **labels) - value(before, name, **labels)


def test_every_name_in_the_docs_is_exported_and_every_exported_name_is_there(
    server: RunningServer,
) -> None:
    server.complete(model="demo", prompt=PROMPT, max_tokens=2)
    server.state.metrics.observe_rejection("queue_full")  # a refusal makes its family appear
    wait_for(server, "vllm:num_requests_running", 0)
    text = ""
    while "vmalloc_last_step_age_seconds" not in text:  # a step or two late
        text = server.http.get("/metrics").text
    exported = set()
    for family in text_string_to_metric_families(text):
        suffix = "_total" if family.type == "counter" else ""
        exported.add(family.name + suffix)
    ours = {name for name in exported if name.startswith(("vllm:", "vmalloc_"))}
    ours -= {name for name in ours if name.endswith("_created")}  # when each counter began
    documented = set(re.findall(r"`((?:vllm:|vmalloc_)[a-z0-9_]+)[`{]", DOCS.read_text()))
    of_ranks = {name for name in documented if name.startswith(("vmalloc_rank_", "vmalloc_plan_"))}
    assert documented - of_ranks == ours  # test_ranks.py has those
    assert {"process_resident_memory_bytes", "process_cpu_seconds_total"} <= exported


def test_the_figures_are_those_of_the_engine(server: RunningServer) -> None:
    server.complete(model="demo", prompt=PROMPT, max_tokens=4)
    samples = settled(server)
    kv, prefix = server.on_engine(lambda engine: (engine.kv_stats(), engine.prefix_stats()))
    for field in KV_GAUGES:
        assert value(samples, f"vmalloc_kv_{field}") == getattr(kv, field)
    for field in KV_COUNTERS:
        assert value(samples, f"vmalloc_kv_{field}_total") == getattr(kv, field)
    assert value(samples, "vmalloc_kv_stall_seconds_total") == pytest.approx(kv.stall_us / 1e6)
    assert value(samples, "vllm:prefix_cache_queries_total") == prefix.queried_tokens
    assert value(samples, "vllm:prefix_cache_hits_total") == prefix.hit_tokens
    for reason, count in prefix.misses.items():
        assert value(samples, "vmalloc_prefix_misses_total", reason=reason) == count
    assert value(samples, "vllm:engine_sleep_state", sleep_state="awake") == 1.0
    assert value(samples, "vmalloc_engine_state", state="running") == 1.0
    assert value(samples, "vmalloc_queue_limit") == 512
    assert value(samples, "vmalloc_startup_seconds", phase="load weights") > 0
    assert value(samples, "vllm:num_requests_running") == 0
    assert kv.created_pages == kv.free_pages + kv.in_use_pages + kv.retired_pages > 0


def test_the_cache_is_described_with_vllms_labels(server: RunningServer) -> None:
    capacity = server.on_engine(lambda engine: engine.kv_stats().capacity_bytes)
    (labels,) = [dict(key[1]) for key in scrape(server) if key[0] == "vllm:cache_config_info"]
    assert labels["block_size"] == "16"
    assert int(labels["num_gpu_blocks"]) * 16 * int(labels["token_bytes"]) <= capacity
    assert labels["kv_backend"] == "virtual"
    assert labels["cache_dtype"] == "float32"


def test_a_streamed_request_is_counted_token_by_token(server: RunningServer) -> None:
    before = settled(server)
    prompt = list(range(200, 260))
    server.stream(model="demo", prompt=prompt, max_tokens=7, temperature=0, ignore_eos=True)
    after = settled(server)
    success = growth(before, after, "vllm:request_success_total", finished_reason="length")
    assert success == 1
    for name, expected in (
        ("vllm:prompt_tokens_total", 60),
        ("vllm:generation_tokens_total", 7),
        ("vllm:time_to_first_token_seconds_count", 1),
        ("vllm:inter_token_latency_seconds_count", 6),
        ("vllm:request_time_per_output_token_seconds_count", 1),
        ("vllm:e2e_request_latency_seconds_count", 1),
        ("vllm:request_queue_time_seconds_count", 1),
        ("vllm:request_prefill_time_seconds_count", 1),
        ("vllm:request_decode_time_seconds_count", 1),
        ("vllm:request_inference_time_seconds_count", 1),
        ("vllm:request_prompt_tokens_sum", 60),
        ("vllm:request_generation_tokens_sum", 7),
        ("vllm:request_max_num_generation_tokens_sum", 7),
        ("vllm:request_params_max_tokens_sum", 7),
        ("vllm:request_params_n_sum", 1),
        ("vllm:request_num_preemptions_sum", 0),
        ("vllm:iteration_tokens_total_count", 7),
    ):
        assert growth(before, after, name) == expected, name
    # The same request in other words: the gaps between its tokens make up its decode time.
    gaps = growth(before, after, "vllm:inter_token_latency_seconds_sum")
    decode = growth(before, after, "vllm:request_decode_time_seconds_sum")
    mean = growth(before, after, "vllm:request_time_per_output_token_seconds_sum")
    assert gaps == pytest.approx(decode)
    assert mean == pytest.approx(decode / 6)
    phases = [
        growth(before, after, f"vllm:request_{name}_time_seconds_sum")
        for name in ("queue", "prefill", "decode")
    ]
    assert sum(phases) <= growth(before, after, "vllm:e2e_request_latency_seconds_sum")


def test_a_plain_request_with_several_completions_counts_once(server: RunningServer) -> None:
    before = settled(server)
    server.complete(model="demo", prompt=PROMPT, max_tokens=5, n=3, seed=1, ignore_eos=True)
    after = settled(server)
    for name, expected in (
        ("vllm:request_params_n_sum", 3),
        ("vllm:request_generation_tokens_sum", 15),
        ("vllm:request_max_num_generation_tokens_sum", 5),
        ("vllm:request_prompt_tokens_count", 1),
        ("vllm:time_to_first_token_seconds_count", 1),
        ("vllm:generation_tokens_total", 15),
    ):
        assert growth(before, after, name) == expected, name


def test_cached_prompts_show_as_hits(server: RunningServer) -> None:
    prompt = [7] * 70
    server.complete(model="demo", prompt=prompt, max_tokens=1)
    before = settled(server)
    answer = server.complete(model="demo", prompt=prompt, max_tokens=1)
    after = settled(server)
    num_cached = answer["usage"]["prompt_tokens_details"]["cached_tokens"]
    assert num_cached > 0
    assert growth(before, after, "vllm:prefix_cache_hits_total") == num_cached
    assert growth(before, after, "vllm:prompt_tokens_cached_total") == num_cached
    computed = growth(before, after, "vllm:request_prefill_kv_computed_tokens_sum")
    assert computed == 70 - num_cached


def test_counters_only_grow(server: RunningServer) -> None:
    def counters() -> Samples:
        families = text_string_to_metric_families(server.http.get("/metrics").text)
        return {
            (sample.name, frozenset(sample.labels.items())): sample.value
            for family in families
            if family.type in ("counter", "histogram")
            for sample in family.samples
            if not sample.name.endswith("_created")
        }

    seen = counters()
    for idx in range(3):
        server.complete(model="demo", prompt=PROMPT, max_tokens=3, n=1 + idx, seed=idx)
        server.on_engine(LLMEngine.flush_prefix_cache)
        server.on_engine(lambda engine: engine.backend.trim())
        now = counters()
        assert seen.keys() <= now.keys()
        for key, number in seen.items():
            assert now[key] >= number, key
        seen = now
    server.on_engine(LLMEngine.sleep)
    server.on_engine(LLMEngine.wake)
    now = counters()
    assert all(now[key] >= number for key, number in seen.items())


def test_a_client_that_leaves_is_counted(server: RunningServer) -> None:
    before = settled(server)
    body = {"model": "demo", "prompt": PROMPT, "max_tokens": 1500, "stream": True}
    with server.http.stream("POST", "/v1/completions", json={**body, "ignore_eos": True}) as answer:
        next(answer.iter_lines())
    wait_for(
        server,
        "vmalloc_requests_aborted_total",
        value(before, "vmalloc_requests_aborted_total", reason="disconnect") + 1,
        reason="disconnect",
    )
    after = settled(server)
    assert growth(before, after, "vllm:request_success_total", finished_reason="abort") == 1
    assert growth(before, after, "vllm:e2e_request_latency_seconds_count") == 0


def test_what_is_aborted_by_name_is_counted(server: RunningServer) -> None:
    before = settled(server)
    body = {"model": "demo", "prompt": PROMPT, "max_tokens": 1500, "stream": True}
    headers = {"x-request-id": "to-be-aborted"}
    with server.http.stream("POST", "/v1/completions", json=body, headers=headers) as answer:
        lines = answer.iter_lines()
        next(lines)
        assert server.post("/abort", request_id="to-be-aborted").json() == {"num_aborted": 1}
        assert "request_aborted" in "".join(lines)
    after = settled(server)
    assert growth(before, after, "vmalloc_requests_aborted_total", reason="aborted") == 1
    assert growth(before, after, "vllm:request_success_total", finished_reason="abort") == 1


def test_methods_that_nobody_knows_make_one_series(server: RunningServer) -> None:
    """Each would else be kept for ever, and whoever reaches the port can think of a million."""
    for method in ("FIRST", "SECOND", "get"):
        server.http.request(method, "/v1/models")
    samples = settled(server)
    methods = {
        dict(labels)["method"] for name, labels in samples if name == "vmalloc_http_requests_total"
    }
    assert "other" in methods
    assert not {"FIRST", "SECOND", "get"} & methods


def test_what_takes_too_long_is_counted() -> None:
    server = RunningServer(ServerConfig(port=0, request_timeout_s=0.3))
    try:
        body = {"model": "demo", "prompt": [PROMPT, PROMPT], "max_tokens": 1900}
        answer = server.post("/v1/completions", **body, ignore_eos=True)
        assert answer.status_code == 504
        samples = settled(server)
        reason = {"reason": "request_timeout"}
        assert value(samples, "vmalloc_requests_aborted_total", **reason) == 2
        assert value(samples, "vllm:request_success_total", finished_reason="abort") == 2
    finally:
        server.close()


def test_refusals_are_counted_by_the_state_of_the_engine(server: RunningServer) -> None:
    before = settled(server)
    server.on_engine(LLMEngine.sleep)
    wait_for(server, "vllm:engine_sleep_state", 0, sleep_state="awake")
    try:
        answer = server.post("/v1/completions", model="demo", prompt=PROMPT, max_tokens=1)
        assert answer.status_code == 503
    finally:
        assert server.on_engine(LLMEngine.wake)
    wait_for(server, "vllm:engine_sleep_state", 1, sleep_state="awake")
    after = settled(server)
    assert growth(before, after, "vmalloc_requests_rejected_total", reason="sleeping") == 1
    assert growth(before, after, "vllm:request_success_total", finished_reason="error") == 0


def test_responses_are_counted_by_their_declared_path(server: RunningServer) -> None:
    before = settled(server)
    for path in ("/no/such/path", "/no/other", "/v1/models/demo", "/v1/models/nobody"):
        server.http.get(path)
    server.http.get("/v1/completions")
    after = settled(server)

    def count(method: str, route: str, status: int) -> float:
        labels = {"method": method, "route": route, "status": str(status)}
        return growth(before, after, "vmalloc_http_requests_total", **labels)

    assert count("GET", "other", 404) == 2
    assert count("GET", "/v1/models/{model:path}", 200) == 1
    assert count("GET", "/v1/models/{model:path}", 404) == 1
    assert not [key for key in after if "/no/" in str(key)]
    assert growth(before, after, "vmalloc_http_request_seconds_count", route="other") >= 2


def test_what_the_full_queue_refuses_is_counted() -> None:
    server = RunningServer(ServerConfig(port=0, max_queued_requests=1), max_num_seqs=1)
    body = {"model": "demo", "prompt": PROMPT, "max_tokens": 1800, "ignore_eos": True}
    statuses: list[int] = []

    def wait_in_the_queue() -> None:
        statuses.append(server.post("/v1/completions", **{**body, "max_tokens": 1}).status_code)

    try:
        with server.http.stream("POST", "/v1/completions", json={**body, "stream": True}) as first:
            lines = first.iter_lines()  # kept, as dropping it closes the connection
            next(lines)
            second = threading.Thread(target=wait_in_the_queue)
            second.start()
            wait_for(server, "vmalloc_queue_length", 1)
            assert server.post("/v1/completions", **body).status_code == 429
            assert lines
        second.join()
        assert statuses == [200]
        samples = scrape(server)
        assert value(samples, "vmalloc_requests_rejected_total", reason="queue_full") == 1
        assert value(samples, "vllm:admission_rejections_total", reason="max_num_queued_reqs") == 1
        assert value(samples, "vmalloc_queue_length") == 0
    finally:
        server.close()


def test_preemptions_are_counted_by_kind() -> None:
    page = 4096
    server = RunningServer(
        page_size=page,
        kv_cache_memory_bytes=100 * page,
        preemption_mode="recompute",
        enable_prefix_caching=False,
    )
    try:
        body = {"model": "demo", "prompt": [[idx] * 20 for idx in range(3, 7)], "max_tokens": 50}
        server.complete(**body, ignore_eos=True, temperature=0)
        samples = settled(server)
        stats = server.on_engine(LLMEngine.stats)
        num_recomputes = value(samples, "vmalloc_preemptions_total", kind="recompute")
        assert num_recomputes == stats.preempt_recompute > 0
        assert value(samples, "vmalloc_preemptions_total", kind="swap") == stats.preempt_swap
        assert value(samples, "vmalloc_preempted_tokens_total") == stats.preempted_tokens
        assert value(samples, "vllm:num_preemptions_total") == (
            stats.preempt_recompute + stats.preempt_swap
        )
        assert value(samples, "vllm:request_num_preemptions_sum") == stats.preempt_recompute
        assert value(samples, "vllm:generation_tokens_total") == 200
    finally:
        server.close()


def test_there_are_metrics_before_the_engine_is_there() -> None:
    engine = AsyncLLMEngine(lambda phases: pytest.fail("never started"))
    metrics = ServerMetrics(engine, model_name="later", version="1.2.3")
    text = metrics.render().decode()
    names = {family.name for family in text_string_to_metric_families(text)}
    assert "vmalloc_engine_state" in names
    assert "vmalloc_kv_committed_bytes" not in names
    assert 'vmalloc_build_info{version="1.2.3"} 1.0' in text


def test_names_keep_their_colon_whatever_a_scraper_prefers(server: RunningServer) -> None:
    accept = "application/openmetrics-text;version=1.0.0;q=0.5,text/plain;version=0.0.4;q=0.3"
    response = server.http.get("/metrics", headers={"accept": accept})
    assert response.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    assert "\nvllm:generation_tokens_total{" in response.text


def test_steps_are_in_cumulative_buckets(server: RunningServer) -> None:
    samples = scrape(server)
    name = "vllm:iteration_tokens_total_bucket"
    counts = [value(samples, name, le=str(float(bound))) for bound in STEP_TOKEN_BOUNDS]
    counts.append(value(samples, name, le="+Inf"))
    assert counts == sorted(counts)
    assert counts[-1] == value(samples, "vllm:iteration_tokens_total_count") > 0


def test_token_counts_go_up_in_ones_twos_and_fives() -> None:
    assert list(token_count_buckets(200)) == [1, 2, 5, 10, 20, 50, 100, 200]
    assert list(token_count_buckets())[-1] == 1_000_000
