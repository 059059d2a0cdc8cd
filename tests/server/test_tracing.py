"""Spans: one a request, with the client's trace as its parent, over a real OTLP connection too."""

from __future__ import annotations

import http.server
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from tests.server.running import DEADLINE_SECONDS, RunningServer
from vmalloc.errors import ConfigError
from vmalloc.server.config import ServerConfig
from vmalloc.server.tracing import RequestTracer

TRACE_ID = "0af7651916cd43dd8448eb211c80319c"
PARENT_ID = "b7ad6b7169203331"
PROMPT = "class Secret:"


@pytest.fixture(scope="module")
def server() -> Iterator[RunningServer]:
    running = RunningServer()
    yield running
    running.wait_idle()
    running.close()


@pytest.fixture
def spans(server: RunningServer) -> Iterator[InMemorySpanExporter]:
    exporter = InMemorySpanExporter()
    server.state.tracer = RequestTracer("http://localhost", "demo", exporter=exporter)
    yield exporter
    server.state.tracer.close()
    server.state.tracer = None


def finished(spans: InMemorySpanExporter, count: int) -> list[Any]:
    """So many spans; each ends just after its client has the response."""
    deadline = time.monotonic() + DEADLINE_SECONDS
    while len(found := spans.get_finished_spans()) < count:
        assert time.monotonic() < deadline, f"{len(found)} spans, not {count}"
        time.sleep(0.01)
    return list(found)


def test_a_request_is_one_span_in_the_clients_trace(
    server: RunningServer, spans: InMemorySpanExporter
) -> None:
    response = server.http.post(
        "/v1/completions",
        json={
            "model": "demo",
            "prompt": PROMPT,
            "max_tokens": 6,
            "temperature": 0.5,
            "seed": 3,
            "ignore_eos": True,
        },
        headers={"traceparent": f"00-{TRACE_ID}-{PARENT_ID}-01"},
    )
    answer = response.json()
    (span,) = finished(spans, 1)
    assert span.name == "POST /v1/completions"
    assert span.kind is SpanKind.SERVER
    assert f"{span.context.trace_id:032x}" == TRACE_ID
    assert f"{span.parent.span_id:016x}" == PARENT_ID
    attributes = dict(span.attributes)
    first_token = attributes.pop("gen_ai.latency.time_to_first_token")
    assert first_token > 0
    assert 0 <= attributes.pop("gen_ai.latency.time_in_queue") <= first_token
    assert attributes == {
        "http.request.method": "POST",
        "http.route": "/v1/completions",
        "http.response.status_code": 200,
        "url.path": "/v1/completions",
        "gen_ai.operation.name": "text_completion",
        "gen_ai.provider.name": "vmalloc",
        "gen_ai.request.model": "demo",
        "gen_ai.response.model": "demo",
        "gen_ai.response.id": answer["id"],
        "gen_ai.response.finish_reasons": ("length",),
        "gen_ai.usage.input_tokens": answer["usage"]["prompt_tokens"],
        "gen_ai.usage.cache_read.input_tokens": 0,
        "gen_ai.usage.output_tokens": 6,
        "gen_ai.request.max_tokens": 6,
        "gen_ai.request.temperature": 0.5,
        "gen_ai.request.top_p": 1.0,
        "gen_ai.request.top_k": attributes["gen_ai.request.top_k"],
        "gen_ai.request.frequency_penalty": 0.0,
        "gen_ai.request.presence_penalty": 0.0,
        "gen_ai.request.seed": 3,
        "gen_ai.request.choice.count": 1,
        "vmalloc.num_preemptions": 0,
    }
    assert PROMPT not in span.to_json()


def test_a_stream_is_traced_to_its_end(server: RunningServer, spans: Any) -> None:
    server.stream(model="demo", prompt=PROMPT, max_tokens=9, ignore_eos=True)
    server.wait_idle()
    (span,) = finished(spans, 1)
    assert span.attributes["gen_ai.usage.output_tokens"] == 9
    assert span.parent is None
    first = span.attributes["gen_ai.latency.time_to_first_token"]
    assert first < (span.end_time - span.start_time) / 1e9


def test_refusals_are_traced_and_only_our_own_failures_are_errors(
    server: RunningServer, spans: Any
) -> None:
    server.http.get("/no/such/path")
    server.post("/v1/completions", model="nobody", prompt="x")
    unknown, refused = finished(spans, 2)
    assert unknown.name == "GET"
    assert unknown.attributes["http.response.status_code"] == 404
    assert refused.name == "POST /v1/completions"
    assert refused.attributes["http.response.status_code"] == 404
    assert refused.status.status_code is StatusCode.UNSET
    assert "gen_ai.response.id" not in refused.attributes


def test_what_a_client_left_behind_is_marked(server: RunningServer, spans: Any) -> None:
    body = {"model": "demo", "prompt": "x", "max_tokens": 1500, "stream": True, "ignore_eos": True}
    with server.http.stream("POST", "/v1/completions", json=body) as response:
        next(response.iter_lines())
    (span,) = finished(spans, 1)
    assert span.attributes["vmalloc.abort_reason"] == "disconnect"


def test_monitors_are_not_traced(server: RunningServer, spans: Any) -> None:
    for path in ("/health", "/metrics", "/ready"):
        server.http.get(path)
    server.http.get("/v1/models")
    (span,) = finished(spans, 1)
    assert span.name == "GET /v1/models"


def test_a_client_that_samples_nothing_gets_nothing(server: RunningServer, spans: Any) -> None:
    headers = {"traceparent": f"00-{TRACE_ID}-{PARENT_ID}-00"}
    assert server.http.get("/v1/models", headers=headers).status_code == 200
    # What is no traceparent is as none.
    server.http.get("/version/", headers={"traceparent": "rubbish"})
    (span,) = finished(spans, 1)
    assert span.attributes["url.path"] == "/version/"


class Collector(http.server.ThreadingHTTPServer):
    """Takes what an OTLP exporter sends."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), CollectorHandler)
        self.requests: list[tuple[str, ExportTraceServiceRequest]] = []
        self.thread = threading.Thread(target=self.serve_forever)
        self.thread.start()

    def stop(self) -> None:
        self.shutdown()
        self.thread.join()
        self.server_close()


class CollectorHandler(http.server.BaseHTTPRequestHandler):
    """Parses the protobuf that came, and says thanks."""

    server: Collector

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        if self.headers.get("content-encoding") == "gzip":
            import gzip

            body = gzip.decompress(body)
        self.server.requests.append((self.path, ExportTraceServiceRequest.FromString(body)))
        self.send_response(200)
        self.send_header("content-type", "application/x-protobuf")
        self.send_header("content-length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.mark.parametrize("path", ["", "/v1/traces", "/custom"])
def test_spans_reach_a_collector_by_the_time_the_server_has_ended(path: str) -> None:
    collector = Collector()
    try:
        endpoint = f"http://127.0.0.1:{collector.server_port}{path}"
        running = RunningServer(ServerConfig(port=0, otlp_traces_endpoint=endpoint))
        running.complete(model="demo", prompt="def ", max_tokens=4, ignore_eos=True)
        running.close()
    finally:
        collector.stop()
    assert {seen for seen, _ in collector.requests} == {path or "/v1/traces"}
    spans = [
        (resource.resource, span)
        for _, request in collector.requests
        for resource in request.resource_spans
        for scope in resource.scope_spans
        for span in scope.spans
    ]
    ((resource, span),) = spans
    names = {entry.key: entry.value.string_value for entry in resource.attributes}
    assert names["service.name"] == "vmalloc"
    assert span.name == "POST /v1/completions"
    values = {entry.key: entry.value for entry in span.attributes}
    assert values["gen_ai.usage.output_tokens"].int_value == 4


def test_a_collector_that_is_not_there_stops_neither_requests_nor_the_end() -> None:
    config = ServerConfig(port=0, otlp_traces_endpoint="http://127.0.0.1:9")
    running = RunningServer(config)
    running.complete(model="demo", prompt="def ", max_tokens=4)
    running.close()


@pytest.mark.parametrize("endpoint", ["collector:4318", "ftp://x", "http://"])
def test_what_is_no_url_is_refused(endpoint: str) -> None:
    with pytest.raises(ConfigError, match="otlp_traces_endpoint is"):
        RequestTracer(endpoint, "demo")


SCRIPT = """
import sys
from vmalloc.engine import AsyncLLMEngine
from vmalloc.server.app import create_app
from vmalloc.server.config import ServerConfig
from vmalloc.server.state import ServerState

def make(endpoint):
    config = ServerConfig(otlp_traces_endpoint=endpoint)
    state = ServerState(AsyncLLMEngine(lambda phases: None), config, model="demo", created=0)
    create_app(state)

make(None)
print(len([name for name in sys.modules if name.startswith("opentelemetry.sdk")]))
sys.modules["opentelemetry.sdk"] = None
try:
    make("http://localhost:4318")
except Exception as error:
    print(type(error).__name__, error)
del sys.modules["opentelemetry.sdk"]
make("http://localhost:4318")
print(len([name for name in sys.modules if name.startswith("opentelemetry.sdk")]))
"""


def test_the_sdk_is_imported_only_for_traces_and_its_extra_is_named_where_it_is_missing() -> None:
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True
    )
    before, error, after = result.stdout.splitlines()
    assert int(before) == 0
    assert int(after) > 0
    assert error.startswith("ConfigError otlp_traces_endpoint is 'http://localhost:4318'")
    assert "pip install 'vmalloc[otel]'" in error
