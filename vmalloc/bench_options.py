"""The options of ``vmalloc bench``; names follow vLLM's ``bench serve``.

Owns: nothing.  Thread-safety: immutable.
"""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

_LOAD = "Load"
_OUTPUT = "Output"


class Endpoint(str, Enum):
    """What is asked for, as the option lists it."""

    COMPLETIONS = "completions"
    CHAT = "chat"


Url = Annotated[
    str, typer.Argument(metavar="URL", help="Base URL of the server, e.g. http://localhost:8000.")
]
EndpointOption = Annotated[Endpoint, typer.Option(help="/v1/completions or /v1/chat/completions.")]
Model = Annotated[
    str, typer.Option("--model", "-m", help="Name to ask for; auto: the first that is served.")
]
ApiKey = Annotated[
    str | None,
    typer.Option(help="Key of the server.", envvar="VMALLOC_API_KEY", show_default=False),
]

NumPrompts = Annotated[int, typer.Option(help="Requests in all.", rich_help_panel=_LOAD)]
RequestRate = Annotated[
    float,
    typer.Option(
        help="Mean requests a second, arriving at random (a Poisson process); inf: all at once.",
        rich_help_panel=_LOAD,
    ),
]
MaxConcurrency = Annotated[
    int | None, typer.Option(help="Most requests at a time.", rich_help_panel=_LOAD)
]
Seed = Annotated[
    int, typer.Option(help="Same seed, same arrivals and prompts.", rich_help_panel=_LOAD)
]
InputLen = Annotated[int, typer.Option(help="Median tokens of a prompt.", rich_help_panel=_LOAD)]
OutputLen = Annotated[int, typer.Option(help="Median tokens of an answer.", rich_help_panel=_LOAD)]
LengthSpread = Annotated[
    float,
    typer.Option(help="Sigma of the log-normal lengths; 0: all the same.", rich_help_panel=_LOAD),
]
IgnoreEos = Annotated[
    bool,
    typer.Option(
        "--ignore-eos/--no-ignore-eos",
        help="Have answers go on to their full lengths. Off for servers that do not know it.",
        rich_help_panel=_LOAD,
    ),
]
TimeLimit = Annotated[
    float, typer.Option(help="Seconds after which it stops.", rich_help_panel=_LOAD)
]
RequestTimeout = Annotated[
    float,
    typer.Option(help="Seconds a request waits for its next bytes.", rich_help_panel=_LOAD),
]

Goodput = Annotated[
    list[str] | None,
    typer.Option(
        metavar="METRIC:MS",
        help="Count requests that stay below this: ttft:500, tpot:50, e2el:2000. Repeatable.",
        rich_help_panel=_OUTPUT,
    ),
]
AsJson = Annotated[
    bool,
    typer.Option(
        "--json",
        help="Print one JSON object on stdout instead of a table.",
        rich_help_panel=_OUTPUT,
    ),
]
Output = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Write the JSON object there too.", rich_help_panel=_OUTPUT),
]
