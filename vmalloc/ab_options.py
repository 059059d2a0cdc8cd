"""The options of ``vmalloc ab``.

Owns: nothing.  Thread-safety: immutable.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

_LOAD = "Load"
_OUTPUT = "Output"

Backends = Annotated[
    list[str] | None,
    typer.Option(
        "--backends",
        metavar="NAME",
        help="Sides to compare, commas between them or repeated: virtual, paged, and what older "
        "systems reserve: max_length, power_of_two, oracle. Ratios are the first over each of the "
        "others. Default: virtual,paged.",
        show_default=False,
    ),
]
Workloads = Annotated[
    list[str] | None,
    typer.Option(
        "--workload",
        "-w",
        metavar="NAME",
        help="offline: chat-like lengths, all at once. long: prompts of half the context and more. "
        "prefix: one long shared beginning. parallel: 4 samples of each prompt. beam: beams of "
        "width 4. bursty: chat-like, in bursts. mixed: all of it, at random times. Repeatable; "
        "default: all, or none with --trace.",
        rich_help_panel=_LOAD,
        show_default=False,
    ),
]
Traces = Annotated[
    list[Path] | None,
    typer.Option(
        "--trace",
        metavar="FILE",
        help="CSV file with the columns arrival_s,prompt_tokens,output_tokens, served as it says. "
        "Repeatable.",
        rich_help_panel=_LOAD,
        show_default=False,
    ),
]
Quick = Annotated[
    bool,
    typer.Option(
        "--quick",
        help="Fewer and shorter requests, 4 runs: a minute or two with the demo model.",
        rich_help_panel=_LOAD,
    ),
]
Repeats = Annotated[
    int | None,
    typer.Option(
        help="Timed runs of each side. Default: 5, with --quick 4.",
        rich_help_panel=_LOAD,
        show_default=False,
    ),
]
Seed = Annotated[
    int, typer.Option(help="Same seed, same requests and samples.", rich_help_panel=_LOAD)
]
KVCacheMemoryBytes = Annotated[
    int | None,
    typer.Option(
        help="Hard cap on physical KV memory in every run, of each rank. Default: for a workload "
        "half of what its requests would hold together, so that memory limits its batches; bursty "
        "has room for all.",
        rich_help_panel=_LOAD,
        show_default=False,
    ),
]
Json = Annotated[
    Path,
    typer.Option("--json", metavar="FILE", help="All figures go here.", rich_help_panel=_OUTPUT),
]
Html = Annotated[
    Path,
    typer.Option(
        "--html",
        metavar="FILE",
        help="And here a page with tables and pictures, which opens from disk.",
        rich_help_panel=_OUTPUT,
    ),
]
