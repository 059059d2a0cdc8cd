"""Settings of the HTTP server: validated and frozen.

Owns: nothing.  Thread-safety: immutable.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

from ..errors import ConfigError

LogFormat = Literal["text", "json"]

MAX_PORT = 65535


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerConfig:
    """How a server listens, and what it lets in.

    Attributes:
        host, port: where it listens; port 0 takes a free one.
        uds: a Unix socket to listen at instead.
        api_keys: keys of which a request must bring one; empty: no key is asked for.
        admin_api_keys: keys for ``/admin``; empty: the API keys. With neither, ``/admin`` is shut.
        served_model_names: names that requests may give the model; the first is reported. Empty:
            the name it was loaded by.
        chat_template: file with the Jinja template of a chat. None: the tokenizer's own.
        max_queued_requests: prompts that may wait for their first step; more are refused with 429.
        queue_timeout_s: most seconds that a request waits for its first step.
        request_timeout_s: most seconds that a request takes in all.
        max_body_bytes: longest body of a request.
        body_timeout_s: most seconds that a body takes to arrive.
        allowed_origins: origins whose pages may call the server (CORS); ``"*"``: all.
        sse_keep_alive_s: a comment is sent after so many seconds without an event. 0: never.
        shutdown_timeout_s: most seconds that running requests get to end after SIGTERM.
        health_timeout_s: seconds at one step after which ``/health`` calls the engine stuck.
        release_idle_after_s: seconds without work after which free KV pages go back to the system.
            None: they are kept.
        root_path: path under which a proxy serves it.
        ssl_certfile, ssl_keyfile: PEM files for HTTPS.
        log_format: ``"text"``, or ``"json"`` with one object a line.
        log_requests: log the beginning of each prompt too.
        log_stats: log throughput and memory now and then.
        otlp_traces_endpoint: URL that OpenTelemetry traces are sent to. None: no traces.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    uds: str | None = None
    api_keys: tuple[str, ...] = field(default=(), repr=False)
    admin_api_keys: tuple[str, ...] = field(default=(), repr=False)
    served_model_names: tuple[str, ...] = ()
    chat_template: str | None = None
    max_queued_requests: int = 512
    queue_timeout_s: float | None = None
    request_timeout_s: float | None = None
    max_body_bytes: int = 8 << 20
    body_timeout_s: float = 30.0
    allowed_origins: tuple[str, ...] = ()
    sse_keep_alive_s: float = 15.0
    shutdown_timeout_s: float = 60.0
    health_timeout_s: float = 120.0
    release_idle_after_s: float | None = 30.0
    root_path: str = ""
    ssl_certfile: str | None = None
    ssl_keyfile: str | None = None
    log_format: LogFormat = "text"
    log_requests: bool = False
    log_stats: bool = True
    otlp_traces_endpoint: str | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.port <= MAX_PORT:
            raise ConfigError(f"port is {self.port}; it must be between 0 and {MAX_PORT}")
        for name in ("max_queued_requests", "max_body_bytes"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be at least 1")
        for name in (
            "queue_timeout_s",
            "request_timeout_s",
            "body_timeout_s",
            "health_timeout_s",
            "release_idle_after_s",
        ):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ConfigError(f"{name} is {value}; it must be above 0")
        for name in ("sse_keep_alive_s", "shutdown_timeout_s"):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be 0 or more")
        for name in ("api_keys", "admin_api_keys", "served_model_names"):
            if any(not value for value in getattr(self, name)):
                raise ConfigError(f"{name} holds an empty string")
        if self.log_format not in get_args(LogFormat):
            raise ConfigError(f"log_format is {self.log_format!r}; supported: text, json")
        if (self.ssl_certfile is None) != (self.ssl_keyfile is None):
            raise ConfigError("ssl_certfile and ssl_keyfile go together; one of them is missing")
        for name in ("chat_template", "ssl_certfile", "ssl_keyfile"):
            path = getattr(self, name)
            if path is not None and not Path(path).is_file():
                raise ConfigError(f"{name} is {path!r}; there is no such file")
