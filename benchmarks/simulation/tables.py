"""Tables of the studies, for people.

Owns: nothing.  Thread-safety: stateless.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.table import Table

Row = dict[str, Any]
Column = tuple[str, Callable[[Row], str]]


def _name(key: str) -> Callable[[Row], str]:
    return lambda row: str(row["names"].get(key, ""))


def _bytes_text(num_bytes: int | None) -> str:
    if num_bytes is None:
        return ""
    return f"{num_bytes >> 20} MiB" if num_bytes >= 1 << 20 else f"{num_bytes >> 10} KiB"


def _sharing_text(row: Row) -> str:
    names = row["names"]
    if "samples" in names:
        return f"{names['samples']} samples of each prompt"
    return f"{names['shared_tokens']} tokens before each prompt"


def held_bytes(row: Row) -> float:
    """KV memory that the device has no other use for: all that was created, or all there is."""
    if row["setting"]["kind"] == "paged":
        return float(row["capacity_bytes"])
    return float(row["mean_created_bytes"])


TOKENS: Column = ("tokens/s", lambda row: f"{row['decoded_tokens_per_s']:,.0f}")
SEQS: Column = ("sequences", lambda row: f"{row['mean_seqs']:,.0f}")
STEP: Column = ("step, ms", lambda row: f"{row['step_ms']:.1f}")
STALLS: Column = ("waits for pages", lambda row: f"{row['stall_share']:.1%}")
WORST: Column = (
    "a wait, ms, median (99%)",
    lambda row: (
        "-"
        if row["stall_ms"] is None
        else f"{row['stall_ms']['p50']:.2f} ({row['stall_ms']['p99']:.2f})"
    ),
)
WORKER: Column = ("worker busy", lambda row: f"{row['worker_share']:.1%}")
WASTE: Column = ("waste", lambda row: f"{row['waste']:.1%}")
HOST: Column = ("host, us a step", lambda row: f"{row['host_us_per_step']:,.0f}")
PREEMPTED: Column = ("preempted", lambda row: f"{row['counters']['preempt_recompute']:,}")

COLUMNS: dict[str, list[Column]] = {
    "million": [
        ("lengths", _name("lengths")),
        ("backend", _name("backend")),
        ("requests", lambda row: f"{row['num_requests']:,}"),
        ("steps", lambda row: f"{row['num_steps']:,}"),
        ("simulated, s", lambda row: f"{row['simulated_s']:,.0f}"),
        TOKENS,
        SEQS,
        STALLS,
        WORKER,
        PREEMPTED,
        HOST,
        ("requests/CPU s", lambda row: f"{row['requests_per_cpu_s']:,.0f}"),
    ],
    "scale": [
        ("limit", _name("max_num_seqs")),
        ("backend", _name("backend")),
        TOKENS,
        SEQS,
        STEP,
        STALLS,
        WORKER,
        WASTE,
        ("held, GB", lambda row: f"{held_bytes(row) / 1e9:.1f}"),
        HOST,
    ],
    "stalls": [
        ("memory", _name("room")),
        ("driver calls take", lambda row: f"{row['names']['latency']}x"),
        ("commit-ahead", _name("ahead")),
        ("low watermark", lambda row: f"{row['setting']['low_watermark']:.0%}"),
        TOKENS,
        STALLS,
        ("of steps", lambda row: f"{row['stalled_steps_share']:.1%}"),
        WORST,
        WORKER,
    ],
    "layout": [
        ("model", _name("model")),
        ("backend", _name("backend")),
        ("page", lambda row: _bytes_text(row["names"].get("page_bytes"))),
        ("layers a group", _name("layers_per_group")),
        TOKENS,
        SEQS,
        WASTE,
        STALLS,
        WORKER,
    ],
    "sharing": [
        ("backend", _name("backend")),
        ("", _sharing_text),
        ("shares", lambda row: "yes" if row["names"]["shares"] else "no"),
        TOKENS,
        SEQS,
        STEP,
        ("saved, GB", lambda row: f"{row['mean_bytes']['shared_bytes'] / 1e9:.1f}"),
        ("cached tokens", lambda row: f"{hit_share(row):.1%}"),
        STALLS,
    ],
}


def hit_share(row: Row) -> float:
    """Share of the looked-up prompt tokens that were cached."""
    counters = row["counters"]
    return counters["hit_tokens"] / max(1, counters["queried_tokens"])


def print_table(study: str, rows: list[Row], console: Console) -> None:
    """One study's runs."""
    columns = COLUMNS[study]
    table = Table(*[name for name, _ in columns], title=f"{study}: simulated, not measured")
    for row in rows:
        table.add_row(*[text(row) for _, text in columns])
    console.print(table)


def markdown_table(study: str, rows: list[Row]) -> str:
    """The same for a page of the documentation."""
    columns = COLUMNS[study]
    lines = ["| " + " | ".join(name for name, _ in columns) + " |"]
    lines.append("|" + "|".join("---" for _ in columns) + "|")
    lines += ["| " + " | ".join(text(row) for _, text in columns) + " |" for row in rows]
    return "\n".join(lines)
