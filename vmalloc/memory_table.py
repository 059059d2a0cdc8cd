"""What the KV memory did, as a table and bars for people.

Owns: nothing.  Thread-safety: pure functions.
"""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Group
from rich.table import Table
from rich.text import Text

from .backend import KVCacheStats

_BAR_WIDTH = 36
_BAR_LABELS_WIDTH = 42
_TABLE_WIDTH = 72
_EIGHTHS = " ▏▎▍▌▋▊▉█"
_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def format_bytes(num_bytes: float) -> str:
    """``1536`` -> ``"1.5 KiB"``."""
    value = float(num_bytes)
    for unit in _UNITS[:-1]:
        if abs(value) < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} {_UNITS[-1]}"


def memory_summary(stats: KVCacheStats, max_length_bytes: int) -> dict[str, float | int]:
    """The table's figures as plain numbers: bytes, pages, calls, microseconds, shares.

    ``max_length_bytes`` is what reserving the full context for as many sequences as were live at
    once would have held.
    """
    page = stats.page_bytes
    mapped = stats.critical_pages + stats.background_pages
    return {
        "reserved_bytes": stats.reserved_bytes,
        "capacity_bytes": stats.capacity_bytes,
        "page_bytes": page,
        "created_pages": stats.created_pages,
        "committed_pages": stats.committed_bytes // page,
        "ahead_pages": stats.ahead_bytes // page,
        "parked_pages": stats.parked_bytes // page,
        "cached_pages": stats.cached_bytes // page,
        "free_pages": stats.free_pages,
        "retired_pages": stats.retired_pages,
        "peak_committed_bytes": stats.peak_committed_bytes,
        "peak_live_bytes": stats.peak_live_bytes,
        "mean_utilisation": stats.utilisation,
        "waste": 1.0 - stats.utilisation,
        "max_length_bytes": max_length_bytes,
        "peak_live_seqs": stats.peak_live_seqs,
        "map_calls": stats.map_calls,
        "unmap_calls": stats.unmap_calls,
        "critical_pages": stats.critical_pages,
        "background_pages": stats.background_pages,
        "background_share": stats.background_pages / mapped if mapped else 0.0,
        "adopted_pages": stats.adopted_pages,
        "reclaimed_pages": stats.reclaimed_pages,
        "aliased_pages": stats.aliased_pages,
        "cow_copies": stats.cow_copies,
        "shared_bytes": stats.shared_bytes,
        "swapped_bytes": stats.swapped_bytes,
        "swap_out_pages": stats.swap_out_pages,
        "swap_in_pages": stats.swap_in_pages,
        "stall_us": stats.stall_us,
    }


def memory_report(
    stats: KVCacheStats,
    max_length_bytes: int,
    max_model_len: int,
    *,
    width: int = 80,
    events: Sequence[tuple[str, int, str]] = (),
    num_ranks: int = 1,
) -> Group:
    """A table of the figures, and bars that compare the peak with a max-length reservation.

    What did not happen is left out: lines of sharing, the prefix cache and swapping whose figure is
    0, and of ``events`` (name, count, remark), which come at the end.

    With ``num_ranks`` ranks bytes are those of all, and a page is what all ranks have of it.

    On a screen narrower than the table (``width`` columns) its remarks are left out, so that no
    figure is cut.
    """
    page = stats.page_bytes
    title = "KV cache memory" if num_ranks == 1 else f"KV cache memory of {num_ranks} ranks"
    table = Table(title=title, title_justify="left", show_header=False, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    has_remarks = width >= _TABLE_WIDTH
    if has_remarks:
        table.add_column(style="dim")
    mapped = stats.critical_pages + stats.background_pages
    share = f"{stats.background_pages / mapped:.0%} of all" if mapped else ""
    rows = [
        ("Address space reserved", format_bytes(stats.reserved_bytes), "costs no memory"),
        ("Physical memory cap", format_bytes(stats.capacity_bytes), "nothing taken at start"),
        (
            "Pages created",
            str(stats.created_pages),
            f"{format_bytes(page)} each, {format_bytes(stats.created_pages * page)} in all",
        ),
        ("  committed now", str(stats.committed_bytes // page), "hold tokens of live sequences"),
        ("  ahead now", str(stats.ahead_bytes // page), "mapped before they are needed"),
        ("  parked now", str(stats.parked_bytes // page), "still mapped, warm for the next"),
        *_lines(
            ("  cached now", stats.cached_bytes // page, "prefixes of requests that ended"),
        ),
        ("  free now", str(stats.free_pages), ""),
        (
            "Peak committed",
            format_bytes(stats.peak_committed_bytes),
            f"{stats.peak_live_seqs} at once; tokens {format_bytes(stats.peak_live_bytes)}",
        ),
        ("Waste, averaged over steps", f"{1 - stats.utilisation:.1%}", "committed but not live"),
        ("Map calls", str(stats.map_calls), f"{stats.unmap_calls} unmap calls"),
        ("Pages mapped ahead of need", str(stats.background_pages), f"by the worker; {share}"),
        ("Pages mapped while waiting", str(stats.critical_pages), "on the critical path"),
        ("Pages adopted warm", str(stats.adopted_pages), "no call at all"),
        *_lines(
            ("Pages shared, not mapped anew", stats.aliased_pages, "forks and equal prefixes"),
            ("Pages copied before a write", stats.cow_copies, "whole or in part"),
            ("Pages swapped out", stats.swap_out_pages, f"{stats.swap_in_pages} back in"),
            *events,
        ),
        ("Stall time", f"{stats.stall_us / 1000:.1f} ms", "engine waited for pages"),
    ]
    for row in rows:
        table.add_row(*(row if has_remarks else row[:2]))
    bars = _bars(
        [
            (f"reserving {max_model_len} tokens each", max_length_bytes),
            ("vmalloc, at its peak", stats.peak_committed_bytes),
            ("tokens, at their peak", stats.peak_live_bytes),
        ],
        bar_width=max(1, min(_BAR_WIDTH, width - _BAR_LABELS_WIDTH)),
    )
    return Group(table, bars)


def rank_report(ranks: Sequence[tuple[KVCacheStats, int]]) -> Table:
    """What may differ from rank to rank: figures of each, and the most memory its process had."""
    table = Table(title="Each rank", title_justify="left", pad_edge=False)
    table.add_column("rank")
    for name in ("created", "in use", "mapped ahead", "while waiting", "stalled", "peak RSS"):
        table.add_column(name, justify="right")
    for rank, (stats, peak_rss_bytes) in enumerate(ranks):
        table.add_row(
            str(rank),
            format_bytes(stats.created_pages * stats.page_bytes),
            format_bytes(stats.in_use_pages * stats.page_bytes),
            f"{stats.background_pages} pages",
            f"{stats.critical_pages} pages",
            f"{stats.stall_us / 1000:.1f} ms",
            format_bytes(peak_rss_bytes),
        )
    return table


def _lines(*lines: tuple[str, int, str]) -> list[tuple[str, str, str]]:
    """The lines whose count is not 0."""
    return [(name, str(count), remark) for name, count, remark in lines if count]


def _bars(values: list[tuple[str, int]], bar_width: int) -> Table:
    longest = max((value for _, value in values), default=0) or 1
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    for label, value in values:
        eighths = round(value / longest * bar_width * 8)
        bar = _EIGHTHS[8] * (eighths // 8) + (_EIGHTHS[eighths % 8] if eighths % 8 else "")
        table.add_row(label, Text(bar or _EIGHTHS[1], style="cyan"), format_bytes(value))
    return table
