"""Several servers in one terminal.

Owns: nothing.  Thread-safety: pure functions, and values of one thread.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from .top_view import (
    bytes_by_kind,
    capacity_bar,
    cut,
    format_bytes,
    slot_lines,
    spark_line,
    state_of,
)

NUM_RATES = 120
NUM_SPARKS = 16

_BLOCK_LINES = 4
"""Of a server without its slots: its name, its figures, its memory, and an empty one."""

_TOTAL_LINES = 2


@dataclass(slots=True)
class SeenServer:
    """What is known of one server.

    Attributes:
        url: where it is.
        frame: its newest page map; None before the first.
        rates: tokens a second of the frames so far, oldest first.
        note: what is wrong with it, or empty.
    """

    url: str
    frame: dict[str, Any] | None = None
    rates: deque[float] = field(default_factory=lambda: deque(maxlen=NUM_RATES))
    note: str = ""

    def take(self, frame: dict[str, Any]) -> None:
        """It sent a page map."""
        self.frame, self.note = frame, ""
        self.rates.append(frame["totals"]["tokens_per_s"])


def fleet_view(
    servers: Sequence[SeenServer], *, width: int, height: int | None = None
) -> RenderableType:
    """A block for each server and a line for all; slots where there is room for them.

    Args:
        height: lines there are; None: any number.
    """
    max_rows: int | None = None
    is_short = False
    if height is not None:
        room = height - _TOTAL_LINES - _BLOCK_LINES * len(servers)
        max_rows, is_short = max(0, room // len(servers) - 1), room < 0
    parts: list[RenderableType] = [cut(_total_line(servers), width), Text()]
    for server in servers:
        parts += _block(server, width, max_rows, is_short=is_short)
    return Group(*parts)


def _total_line(servers: Sequence[SeenServer]) -> Text:
    frames = [server.frame for server in servers if server.frame is not None and not server.note]
    totals = [frame["totals"] for frame in frames]
    return Text.assemble(
        ("vmalloc top", "bold"),
        f"  {len(frames)} of {len(servers)} servers  ",
        (format_bytes(sum(sum(_sizes(frame).values()) for frame in frames)), "bold"),
        f" of {format_bytes(sum(one['capacity_bytes'] for one in totals))} in use  ",
        f"running {sum(one['running_seqs'] for one in totals)}  ",
        f"waiting {sum(one['waiting'] for one in totals)}  ",
        (f"{sum(one['tokens_per_s'] for one in totals):.1f} tokens/s", "bold"),
    )


def _block(
    server: SeenServer, width: int, max_rows: int | None, *, is_short: bool
) -> list[RenderableType]:
    frame = server.frame
    title = Text(server.url, "bold")
    if frame is None:
        title.append(f"  {server.note}", "red")
        return [cut(title, width)] if is_short else [cut(title, width), Text()]
    title.append(f"  {frame['model']}  ", "")
    title.append(state_of(frame), "bold")
    if frame.get("ranks"):
        title.append(f"  {len(frame['ranks'])} ranks", "bright_black")
    if server.note:
        title.append(f"  {server.note}", "red")
    lines: list[RenderableType] = [cut(title, width), cut(_figure_line(server, frame), width)]
    if is_short:
        return lines
    lines.append(capacity_bar(_sizes(frame), frame["totals"]["capacity_bytes"], width))
    if max_rows is None or max_rows > 0:
        lines += slot_lines(frame["map"], width, max_rows)
    return [*lines, Text()]


def _figure_line(server: SeenServer, frame: dict[str, Any]) -> Text:
    totals = frame["totals"]
    queried = totals["prefix_queried_tokens"]
    hits = f"{totals['prefix_hit_tokens'] / queried:.0%}" if queried else "-"
    in_use, capacity = sum(_sizes(frame).values()), totals["capacity_bytes"]
    return Text.assemble(
        f"{format_bytes(in_use)} of {format_bytes(capacity)}",
        f"  running {totals['running_seqs']}  waiting {totals['waiting']}",
        f"  prefix hits {hits}  preemptions {totals['preemptions']}",
        f"  {totals['tokens_per_s']:.1f} tokens/s ",
        (spark_line(list(server.rates), NUM_SPARKS), "blue"),
    )


def _sizes(frame: dict[str, Any]) -> dict[str, int]:
    return bytes_by_kind(frame["map"], frame["totals"])
