"""The page map for a terminal.

Owns: nothing.  Thread-safety: pure functions.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

STYLES = {
    # Kind -> character and style: told apart without colours too.
    "live": ("█", "blue"),
    "shared": ("▚", "yellow"),
    "ahead": ("□", "bright_cyan"),
    "parked": ("░", "bright_black"),
    "cached": ("▤", "green"),
    "retired": ("x", "magenta"),
    "free": ("·", "bright_black"),
}
SLOT_KINDS = ("live", "shared", "ahead", "parked", "retired")
"""In this order one of them stands for several pages in one place."""

SMALLEST_AXIS = 16
LABEL_WIDTH = 26
NUM_FIXED_LINES = 14
SPARKS = "▁▂▃▄▅▆▇█"

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")
_OWN_PREFIXES = ("chatcmpl-", "cmpl-", "resp_")


def page_map_view(
    frame: dict[str, Any],
    url: str,
    rates: Sequence[float] = (),
    *,
    width: int,
    height: int | None = None,
    note: str = "",
) -> RenderableType:
    """One frame of ``GET /page-map``.

    Args:
        rates: tokens a second of the last frames, oldest first.
        height: lines there are; slots beyond it are counted only. None: any number.
        note: said beside the state, e.g. that the connection was lost.
    """
    page_map, totals = frame["map"], frame["totals"]
    title = Text.assemble(
        ("vmalloc top", "bold"),
        f"  {frame['model']}  ",
        (url, "bright_black"),
        "  ",
        (state_of(frame), "bold"),
    )
    if note:
        title.append(f"  {note}", "red")
    sizes = bytes_by_kind(page_map, totals)
    ranks = _rank_lines(frame.get("ranks", []), width)
    max_rows = None if height is None else max(1, height - NUM_FIXED_LINES - len(ranks))
    return Group(
        cut(title, width),
        Text(),
        _capacity_line(sum(sizes.values()), totals),
        capacity_bar(sizes, totals["capacity_bytes"], width),
        _legend(sizes, width),
        Text(),
        *slot_lines(page_map, width, max_rows),
        Text(),
        _figures(totals, rates, width),
        *ranks,
    )


def state_of(frame: dict[str, Any]) -> str:
    """What the server is doing."""
    return "asleep" if frame["map"]["is_asleep"] else str(frame["state"])


def bytes_by_kind(page_map: dict[str, Any], totals: dict[str, Any]) -> dict[str, int]:
    """Physical memory by kind, every page once."""
    num_shared = sum(
        num_pages
        for slot in page_map["slots"]
        for runs in slot["runs"]
        for kind, num_pages in runs
        if kind == "shared"
    )
    shared = (num_shared - page_map["shared_refs"]) * page_map["page_bytes"]
    return {
        "live": max(0, totals["committed_bytes"] - shared),
        "shared": shared,
        "ahead": totals["ahead_bytes"],
        "parked": totals["parked_bytes"],
        "cached": totals["cached_bytes"],
        "retired": totals["retired_pages"] * page_map["page_bytes"],
    }


def format_bytes(num_bytes: float) -> str:
    """``1536`` -> ``"1.5 KiB"``."""
    value, unit = float(num_bytes), 0
    while value >= 1024 and unit < len(_UNITS) - 1:
        value, unit = value / 1024, unit + 1
    return f"{value:.0f} B" if unit == 0 else f"{value:.1f} {_UNITS[unit]}"


def _rank_lines(ranks: Sequence[dict[str, Any]], width: int) -> list[Text]:
    """What may differ from rank to rank: a line for each, under their names."""
    if not ranks:
        return []
    names = ("in use", "created", "ahead", "parked", "waited for", "stalled", "peak RSS")
    rows = [("", *names)]
    for rank in ranks:
        totals, page_bytes = rank["totals"], rank["map"]["page_bytes"]
        rows.append(
            (
                f"rank {rank['rank']}",
                format_bytes(totals["in_use_pages"] * page_bytes),
                format_bytes(totals["created_pages"] * page_bytes),
                format_bytes(totals["ahead_bytes"]),
                format_bytes(totals["parked_bytes"]),
                f"{totals['critical_pages']} pages",
                f"{totals['stall_us'] / 1e3:.1f} ms",
                format_bytes(rank["peak_rss_bytes"]),
            )
        )
    widths = [max(len(row[idx]) for row in rows) for idx in range(len(rows[0]))]
    lines = [Text()]
    for idx, row in enumerate(rows):
        cells = (cell.rjust(size) for cell, size in zip(row, widths, strict=True))
        lines.append(cut(Text("  ".join(cells), "" if idx else "bright_black"), width))
    return lines


def _capacity_line(in_use: int, totals: dict[str, Any]) -> Text:
    return Text.assemble(
        (format_bytes(in_use), "bold"),
        f" of {format_bytes(totals['capacity_bytes'])} in use, ",
        f"{format_bytes(totals['reserved_bytes'])} of addresses reserved",
    )


def capacity_bar(sizes: dict[str, int], capacity: int, width: int) -> Text:
    """Memory by kind, over the whole width."""
    whole = max(capacity, sum(sizes.values()), 1)
    cells: list[str] = []
    for kind, size in sizes.items():
        if size:
            cells += [kind] * max(1, round(size / whole * width))
    return _cells([*cells, *["free"] * width][:width])


def _legend(sizes: dict[str, int], width: int) -> Text:
    """Kinds and their sizes, broken between two of them where they are too long."""
    lines = [Text()]
    for kind, size in sizes.items():
        character, style = STYLES[kind]
        entry = Text.assemble(
            (character * 2, style), f" {kind} ", (f"{format_bytes(size):<12}", "bright_black")
        )
        if len(lines[-1]) + len(entry.plain.rstrip()) > width:
            lines.append(Text())
        lines[-1].append(entry)
    return Text("\n").join(lines)


def slot_lines(page_map: dict[str, Any], width: int, max_rows: int | None) -> list[Text]:
    """A line a slot; those beyond ``max_rows`` are counted."""
    slots = page_map["slots"]
    if not slots:
        return [Text("no slot has pages", "bright_black")]
    bar_width = max(8, width - LABEL_WIDTH)
    longest = max(_num_pages(runs) for slot in slots for runs in slot["runs"])
    pages_per_cell = -(-max(longest, SMALLEST_AXIS) // bar_width)
    shown = slots if max_rows is None else slots[:max_rows]
    lines = [_slot_line(slot, pages_per_cell, width) for slot in shown]
    if len(shown) < len(slots):
        lines.append(Text(f"and {len(slots) - len(shown)} more slots", "bright_black"))
    return lines


def _slot_line(slot: dict[str, Any], pages_per_cell: int, width: int) -> Text:
    if slot["is_padding"]:
        label = "padding"
    elif slot["seq_id"] is None:
        label = "free"
    else:
        label = slot["request_id"] or f"sequence {slot['seq_id']}"
        for prefix in _OWN_PREFIXES:
            label = label.removeprefix(prefix)
    name = label if len(label) <= 12 else f"{label[:11]}…"
    line = Text(f"{slot['slot_idx']:>4} ", "bright_black")
    line.append(f"{name:<12}", "" if slot["seq_id"] is not None else "bright_black")
    line.append(f"{slot['num_tokens'] or '':>7}  ", "bright_black")
    line.append(_cells(_kinds(slot["runs"], pages_per_cell)))
    return cut(line, width)


def _kinds(regions: Sequence[Sequence[tuple[str, int]]], pages_per_cell: int) -> list[str]:
    """What each cell of a slot shows, over all its regions."""
    pages: list[set[str]] = []
    for runs in regions:
        page = 0
        for kind, num_pages in runs:
            last = (page + num_pages - 1) // pages_per_cell
            while len(pages) <= last:
                pages.append(set())
            for cell in range(page // pages_per_cell, last + 1):
                pages[cell].add(kind)
            page += num_pages
    return [next((kind for kind in SLOT_KINDS if kind in cell), "free") for cell in pages]


def _figures(totals: dict[str, Any], rates: Sequence[float], width: int) -> Table:
    grid = Table.grid(padding=(0, 3))
    columns = (
        ("running", f"{totals['running_seqs']} sequences"),
        ("waiting", f"{totals['waiting']} requests"),
        ("live", format_bytes(totals["live_bytes"])),
        ("committed", format_bytes(totals["committed_bytes"])),
        ("saved by sharing", format_bytes(totals["shared_bytes"])),
        ("swapped out", format_bytes(totals["swapped_bytes"])),
        ("prefix hits", _share(totals["prefix_hit_tokens"], totals["prefix_queried_tokens"])),
        ("preemptions", str(totals["preemptions"])),
        ("pages mapped/s", f"{totals['pages_mapped_per_s']:.1f}"),
        ("tokens/s", f"{totals['tokens_per_s']:.1f}"),
    )
    num_columns = 2 if width < 100 else 3
    for first in range(0, len(columns), num_columns):
        cells: list[Text] = []
        for name, value in columns[first : first + num_columns]:
            cells += [Text(name, "bright_black"), Text(value)]
        if first + num_columns >= len(columns) and rates:
            cells.append(Text(spark_line(rates, 24), "blue"))
        grid.add_row(*cells)
    return grid


def spark_line(values: Sequence[float], width: int) -> str:
    """The last ``width`` values as blocks of eight heights."""
    recent = list(values)[-width:]
    top = max(recent, default=0.0)
    if top <= 0:
        return SPARKS[0] * len(recent)
    return "".join(SPARKS[min(7, int(value / top * 7.999))] for value in recent)


def _cells(kinds: Iterable[str]) -> Text:
    text = Text()
    for kind, run in groupby(kinds):
        character, style = STYLES[kind]
        text.append(character * len(list(run)), style)
    return text


def cut(line: Text, width: int) -> Text:
    """The line, no longer than the terminal is wide."""
    line.truncate(width, overflow="ellipsis")
    line.no_wrap = True
    return line


def _num_pages(runs: Sequence[tuple[str, int]]) -> int:
    return sum(num_pages for _, num_pages in runs)


def _share(part: int, whole: int) -> str:
    return f"{100 * part / whole:.0f}%" if whole else "-"
