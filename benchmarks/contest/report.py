"""Results as tables on the terminal, as a Markdown table and as a figure.

Owns: nothing.  Thread-safety: one thread.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from .peers import PEERS
from .summary import Ratio, vital_signs

MIB = 2**20
OUR_COLOR, OTHER_COLOR = "#2f81f7", "#8c959f"
HEADINGS = (
    "peer",
    "runs",
    "output tok/s",
    "tok per CPU s",
    "wall s",
    "TTFT ms, p50/p99",
    "TPOT ms, p50/p99",
    "ready s",
    "constructor s",
    "peak RSS MiB",
    "KV MiB, committed/reserved",
)
Row = dict[str, Any]


def cells_of(rows: Sequence[Row]) -> list[tuple[str, str]]:
    """Shape and workload of each table, in the order of the rows."""
    return list(dict.fromkeys((row["shape"], row["workload"]) for row in rows))


def fastest_first(rows: Sequence[Row], cell: tuple[str, str]) -> list[Row]:
    """Rows of one shape and workload."""
    chosen = [row for row in rows if (row["shape"], row["workload"]) == cell]
    return sorted(chosen, key=lambda row: -row["tokens_per_s"]["median"])


def print_tables(console: Console, result: Row) -> None:
    """Tables of a result, then what else it says."""
    rows = result["rows"]
    for cell in cells_of(rows):
        table = Table(*HEADINGS, title=" ".join(cell))
        for row in fastest_first(rows, cell):
            texts = [row["peer"], *_texts(row)[1:]]
            table.add_row(*texts, style="bold" if PEERS[row["peer"]].is_ours else None)
        console.print(table)
    if rows:
        note = "Median (lowest..highest) of quiet runs; * of noisy ones, as none was quiet."
        console.print(note, style="dim")
    for check in result["greedy_check"]:
        console.print(_check_line(check), highlight=False)
    for failure in result["left_out"]:
        place = " ".join(filter(None, [failure["shape"], failure["workload"]]))
        console.print(f"[yellow]{failure['peer']} left out[/] of {place}: ", end="")
        console.print(failure["reason"], markup=False, highlight=False)
    for line in [*vital_signs(rows), *(str(Ratio(**ratio)) for ratio in result["ratios"])]:
        console.print(line, highlight=False)


def _check_line(check: Row) -> str:
    line = (
        f"{check['shape']}, {PEERS[check['peer']].summary}: greedy tokens of {check['num_equal']} "
        f"of {check['num']} requests equal {PEERS[check['reference']].summary}'s"
    )
    return line + (f"; others part after {check['parted_at']}" if check["parted_at"] else "")


def markdown(rows: Sequence[Row]) -> str:
    """The same table as documentation has it."""
    lines = [
        "| model, workload | " + " | ".join(HEADINGS) + " |",
        "|---|---|" + "---:|" * (len(HEADINGS) - 1),
    ]
    for cell in cells_of(rows):
        for number, row in enumerate(fastest_first(rows, cell)):
            texts = _texts(row)
            if PEERS[row["peer"]].is_ours:
                texts[0] = f"**{texts[0]}**"
            lines.append(f"| {' '.join(cell) if number == 0 else ''} | {' | '.join(texts)} |")
    return "\n".join(lines) + "\n"


def _texts(row: Row) -> list[str]:
    kv = row["kv"]
    return [
        PEERS[row["peer"]].summary,
        f"{row['num_quiet']} of {row['num_runs']}" + ("" if row["num_quiet"] else "*"),
        _spread(row["tokens_per_s"], 0),
        f"{row['tokens_per_cpu_s']['median']:,.0f}",
        _spread(row["wall_s"], 2),
        _percentiles(row["ttft_ms"], 0),
        _percentiles(row["tpot_ms"], 1),
        f"{row['ready_s']['median']:.1f}",
        f"{row['construct_s']['median']:.2f}",
        f"{row['peak_rss_bytes']['median'] / MIB:,.0f}",
        f"{kv['committed'] / MIB:,.0f} / {kv['reserved'] / MIB:,.0f}",
    ]


def _spread(value: dict[str, float], digits: int) -> str:
    low, high = value["min"], value["max"]
    text = f"{value['median']:,.{digits}f}"
    return text if low == high else f"{text} ({low:,.{digits}f}..{high:,.{digits}f})"


def _percentiles(values: dict[str, float], digits: int) -> str:
    return " / ".join(f"{value:,.{digits}f}" for value in values.values())


def draw_figure(rows: Sequence[Row], path: Path) -> None:
    """Output tokens per second by peer, one panel for each shape and workload."""
    from vmalloc.measuring.figures import new_panels, save_figure

    cells = cells_of(rows)
    shapes = list(dict.fromkeys(shape for shape, _ in cells))
    workloads = list(dict.fromkeys(workload for _, workload in cells))
    figure, axes = new_panels(
        len(shapes), len(workloads), width=3.6 * len(workloads), height=2.3 * len(shapes)
    )
    for axis, (shape, workload) in zip(
        axes, ((shape, workload) for shape in shapes for workload in workloads), strict=True
    ):
        chosen = fastest_first(rows, (shape, workload))
        medians = [row["tokens_per_s"]["median"] for row in chosen]
        reach = [
            [mid - row["tokens_per_s"]["min"] for mid, row in zip(medians, chosen, strict=True)],
            [row["tokens_per_s"]["max"] - mid for mid, row in zip(medians, chosen, strict=True)],
        ]
        peers = [PEERS[row["peer"]] for row in chosen]
        axis.barh(
            [peer.name for peer in peers],
            medians,
            color=[OUR_COLOR if peer.is_ours else OTHER_COLOR for peer in peers],
            xerr=reach,
            error_kw={"elinewidth": 0.8},
        )
        axis.invert_yaxis()
        axis.set_title(f"{shape}, {workload}")
        axis.set_xlabel("output tokens/s")
    save_figure(figure, path)
