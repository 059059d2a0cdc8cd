"""The options of ``vmalloc serve`` that ``generate`` has not; names follow vLLM.

Owns: nothing.  Thread-safety: immutable.
"""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from .cli_options import SchedulingPolicy
from .config_file import read_config_option

_START = "Starting"
_HTTP = "HTTP"
_ACCESS = "Access"
_LIMITS = "Limits and timeouts"
_LOGS = "Logs and traces"
_SCHEDULING = "Scheduling"
_REPLICAS = "Replicas"


class LogFormat(str, Enum):
    """How log lines look, as the option lists them."""

    TEXT = "text"
    JSON = "json"


class Routing(str, Enum):
    """Which replica gets a request, as the option lists them."""

    PREFIX = "prefix"
    RANDOM = "random"


ModelArgument = Annotated[
    str | None,
    typer.Argument(
        metavar="MODEL",
        help="'demo' (bundled), a local folder, or a hub id; the same as --model.",
        show_default=False,
    ),
]
Model = Annotated[
    str | None,
    typer.Option("--model", "-m", help="What to serve. Default: demo.", show_default=False),
]
Config = Annotated[
    Path | None,
    typer.Option(
        "--config",
        metavar="FILE.yaml",
        help="Options as 'name: value' lines, with - or _ in the names. The command line and the "
        "environment win over it.",
        callback=read_config_option,
        is_eager=True,
        rich_help_panel=_START,
    ),
]
DryRun = Annotated[
    bool,
    typer.Option(
        "--dry-run",
        help="Print the memory plan (weights, KV cap, pages, most sequences at full length) and "
        "exit. Loads no weights, opens no port.",
        rich_help_panel=_START,
    ),
]
AsJson = Annotated[
    bool,
    typer.Option(
        "--json", help="With --dry-run: print the plan as one JSON object.", rich_help_panel=_START
    ),
]

Host = Annotated[
    str,
    typer.Option(
        help="Address to listen on; 0.0.0.0 is every one this machine has.", rich_help_panel=_HTTP
    ),
]
Port = Annotated[int, typer.Option(help="TCP port; 0: any free one.", rich_help_panel=_HTTP)]
Uds = Annotated[
    Path | None,
    typer.Option(
        "--uds",
        metavar="PATH",
        help="Listen on a Unix domain socket instead of --host and --port.",
        rich_help_panel=_HTTP,
    ),
]
ServedModelName = Annotated[
    list[str] | None,
    typer.Option(
        help="Name of the model to clients. Repeatable; the first is the one of metrics, and of "
        "answers to requests without 'model'. Default: the name in --model.",
        rich_help_panel=_HTTP,
    ),
]
ChatTemplate = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="Jinja template that makes a prompt of a chat, in place of the tokenizer's.",
        rich_help_panel=_HTTP,
    ),
]
AllowedOrigins = Annotated[
    list[str] | None,
    typer.Option(
        metavar="ORIGIN",
        help="Web page, as https://host, that a browser lets call this server; '*' is any. "
        "Repeatable. Default: none.",
        rich_help_panel=_HTTP,
    ),
]
SseKeepAliveInterval = Annotated[
    float,
    typer.Option(
        help="Seconds of silence after which a stream gets a comment line, so that proxies keep "
        "it open; 0: never.",
        rich_help_panel=_HTTP,
    ),
]
RootPath = Annotated[
    str,
    typer.Option(
        help="Path under which a proxy shows this server, e.g. /llm.", rich_help_panel=_HTTP
    ),
]
SslCertfile = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Certificate for HTTPS.", rich_help_panel=_HTTP),
]
SslKeyfile = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Its private key.", rich_help_panel=_HTTP),
]

ApiKey = Annotated[
    list[str] | None,
    typer.Option(
        help="Key that clients must send as 'Authorization: Bearer KEY'. Repeatable; in the "
        "environment separated by spaces, where process lists do not show it. Default: none is "
        "asked for.",
        envvar="VMALLOC_API_KEY",
        rich_help_panel=_ACCESS,
    ),
]
AdminApiKey = Annotated[
    list[str] | None,
    typer.Option(
        help="Key for /admin. Repeatable. Default: the API keys; with neither /admin is closed.",
        envvar="VMALLOC_ADMIN_API_KEY",
        rich_help_panel=_ACCESS,
    ),
]

MaxNumQueuedReqs = Annotated[
    int,
    typer.Option(
        help="Requests that may wait to start; one more gets 429 with Retry-After.",
        rich_help_panel=_LIMITS,
    ),
]
QueueTimeout = Annotated[
    float | None,
    typer.Option(help="Seconds a request may wait to start.", rich_help_panel=_LIMITS),
]
RequestTimeout = Annotated[
    float | None,
    typer.Option(help="Seconds a request may take in all.", rich_help_panel=_LIMITS),
]
MaxBodyBytes = Annotated[
    int,
    typer.Option(help="Longest request body; a longer one gets 413.", rich_help_panel=_LIMITS),
]
BodyTimeout = Annotated[
    float,
    typer.Option(
        help="Seconds that a request's body may take to arrive; a slower one gets 408.",
        rich_help_panel=_LIMITS,
    ),
]
MaxLogprobs = Annotated[
    int,
    typer.Option(help="Most logprobs a request may ask for a token.", rich_help_panel=_LIMITS),
]
ShutdownTimeout = Annotated[
    float,
    typer.Option(
        help="Seconds that running requests get to finish after SIGTERM.", rich_help_panel=_LIMITS
    ),
]
HealthTimeout = Annotated[
    float,
    typer.Option(
        help="Seconds that a step may take before /health answers 503.", rich_help_panel=_LIMITS
    ),
]
ReleaseIdleAfter = Annotated[
    float,
    typer.Option(
        help="Seconds without work after which free KV pages go back to the system; 0: never.",
        rich_help_panel=_LIMITS,
    ),
]

Replicas = Annotated[
    int | None,
    typer.Option(
        help="Serve with so many engines, each a process of its own, behind one address. Starts "
        "Ray Serve on this machine and shares out its cores; the other options are each "
        "replica's. Needs the extra 'ray'. Default: one engine, without Ray.",
        show_default=False,
        rich_help_panel=_REPLICAS,
    ),
]
MaxReplicas = Annotated[
    int | None,
    typer.Option(
        help="Start up to so many while requests or pages ask for it, and end them again; "
        "--replicas is then the least.",
        show_default=False,
        rich_help_panel=_REPLICAS,
    ),
]
RoutingOption = Annotated[
    Routing,
    typer.Option(
        help="Who gets a request: prefix takes the replica that has the prompt's beginning "
        "cached, unless it is busier than the others; random takes any.",
        rich_help_panel=_REPLICAS,
    ),
]

SchedulingPolicyOption = Annotated[
    SchedulingPolicy,
    typer.Option(
        help="fcfs goes by arrival, priority by a request's 'priority' (lower runs first).",
        rich_help_panel=_SCHEDULING,
    ),
]
EngineSeed = Annotated[
    int,
    typer.Option(
        "--seed",
        help="Seeds the generator that gives a seed to requests without one.",
        rich_help_panel=_SCHEDULING,
    ),
]

LogFormatOption = Annotated[
    LogFormat,
    typer.Option(help="text for people, json for machines.", rich_help_panel=_LOGS),
]
EnableLogRequests = Annotated[
    bool,
    typer.Option(
        "--enable-log-requests",
        help="Log the beginning of each prompt and its parameters. Off: no prompt is ever logged.",
        rich_help_panel=_LOGS,
    ),
]
DisableLogStats = Annotated[
    bool,
    typer.Option(
        "--disable-log-stats",
        help="No line of throughput and KV memory every 10 seconds.",
        rich_help_panel=_LOGS,
    ),
]
OtlpTracesEndpoint = Annotated[
    str | None,
    typer.Option(
        metavar="URL",
        help="Send an OpenTelemetry span of each request to this OTLP collector over HTTP, e.g. "
        "http://localhost:4318/v1/traces. Needs the extra 'otel'.",
        rich_help_panel=_LOGS,
    ),
]
