"""One OpenTelemetry span for each request, sent to an OTLP collector; off unless asked for.

Owns: the exporter and its thread.  Thread-safety: any thread.

Nothing of OpenTelemetry is imported before a tracer is made. No span holds a prompt, a text or a
key.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import Scope

from .. import __version__
from ..engine import ConfigError
from .logs import QUIET_PATHS
from .request_record import RequestRecord

TRACES_PATH = "/v1/traces"
CLOSE_SECONDS = 3.0
"""Time that spans which are not sent yet get when the server ends."""

_OPERATIONS = {
    "/v1/completions": "text_completion",
    "/v1/chat/completions": "chat",
    "/v1/responses": "chat",
}
_PARAMS = {
    "max_tokens": "max_tokens",
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "frequency_penalty": "frequency_penalty",
    "presence_penalty": "presence_penalty",
    "seed": "seed",
    "n": "choice.count",
}
"""Sampling parameters, and their names behind ``gen_ai.request.``."""


class RequestTracer:
    """Makes spans and sends them.

    Args:
        endpoint: URL of the collector; without a path it gets ``/v1/traces``.
        model_name: the name that responses report.
        exporter: where finished spans go instead, at once; for tests.

    Raises ``ConfigError`` for a URL that is none, and if OpenTelemetry is not installed.
    """

    def __init__(self, endpoint: str, model_name: str, *, exporter: Any = None) -> None:
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor, SimpleSpanProcessor
            from opentelemetry.trace import SpanKind, Status, StatusCode
            from opentelemetry.trace.propagation.tracecontext import (
                TraceContextTextMapPropagator,
            )
        except ImportError as error:
            raise ConfigError(
                f"otlp_traces_endpoint is {endpoint!r}; traces need OpenTelemetry: "
                f"pip install 'vmalloc[otel]' ({error})"
            ) from error
        processor: Any
        if exporter is None:
            exporter = OTLPSpanExporter(endpoint=_traces_url(endpoint))
            processor = BatchSpanProcessor(exporter)
        else:
            processor = SimpleSpanProcessor(exporter)
        self._exporter = exporter
        resource = Resource.create({"service.name": "vmalloc", "service.version": __version__})
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(processor)
        self._tracer = self._provider.get_tracer("vmalloc.server", __version__)
        self._propagator = TraceContextTextMapPropagator()
        self._kind = SpanKind.SERVER
        self._failed = Status(StatusCode.ERROR)
        self._model_name = model_name

    @contextmanager
    def span(
        self, scope: Scope, record: RequestRecord, status: Callable[[], int]
    ) -> Iterator[None]:
        """Trace what happens in the block; ``status`` tells the response's at its end.

        A client's ``traceparent`` makes it part of the client's trace.
        """
        if record.path in QUIET_PATHS or record.path.startswith("/page"):
            yield
            return
        parent = self._propagator.extract(dict(Headers(scope=scope).items()))
        span = self._tracer.start_span(
            f"{record.method} {record.path}", context=parent, kind=self._kind
        )
        try:
            yield
        except BaseException as error:
            span.record_exception(error)
            raise
        finally:
            span.set_attributes(self._attributes(scope, record, status()))
            route = _route(scope)
            span.update_name(f"{record.method} {route}" if route else record.method)
            if status() >= 500:
                span.set_status(self._failed)
            span.end()

    def close(self) -> None:
        """Send what is left, for a while, and end the thread."""
        # The SDK's own limits do not hold while an export is tried again.
        giving_up = threading.Timer(CLOSE_SECONDS, self._exporter.shutdown)
        giving_up.daemon = True
        giving_up.start()
        self._provider.shutdown()
        giving_up.cancel()

    def _attributes(self, scope: Scope, record: RequestRecord, status: int) -> dict[str, Any]:
        attributes: dict[str, Any] = {
            "http.request.method": record.method,
            "url.path": record.path,
            "http.response.status_code": status,
        }
        if (route := _route(scope)) is not None:
            attributes["http.route"] = route
        if record.request_id is None or record.params is None:
            return attributes
        attributes |= {
            "gen_ai.operation.name": _OPERATIONS.get(record.path, "generate_content"),
            "gen_ai.provider.name": "vmalloc",
            "gen_ai.request.model": self._model_name,
            "gen_ai.response.model": self._model_name,
            "gen_ai.response.id": record.request_id,
            "gen_ai.usage.input_tokens": record.num_prompt_tokens,
            "gen_ai.usage.cache_read.input_tokens": record.num_cached_tokens,
            "gen_ai.usage.output_tokens": record.num_generated_tokens,
            "gen_ai.response.finish_reasons": list(record.finish_reasons),
            "vmalloc.num_preemptions": record.num_preemptions,
        }
        for name, suffix in _PARAMS.items():
            value = getattr(record.params, name)
            if value is not None:
                attributes[f"gen_ai.request.{suffix}"] = value
        if record.time_to_first_token_s is not None:
            attributes["gen_ai.latency.time_to_first_token"] = record.time_to_first_token_s
        if record.queue_time_s is not None:
            attributes["gen_ai.latency.time_in_queue"] = record.queue_time_s
        if record.abort_reason is not None:
            attributes["vmalloc.abort_reason"] = record.abort_reason
        return attributes


def _route(scope: Scope) -> str | None:
    route: str | None = getattr(scope.get("route"), "path", None)
    return route


def _traces_url(endpoint: str) -> str:
    parts = urlsplit(endpoint)
    if parts.scheme not in ("http", "https") or not parts.netloc:
        raise ConfigError(
            f"otlp_traces_endpoint is {endpoint!r}; it must be a URL that starts with http:// or "
            "https://"
        )
    return endpoint if parts.path not in ("", "/") else endpoint.rstrip("/") + TRACES_PATH
