"""The tables that the GPU benchmark prints last, from its results file.

    python -m benchmarks.gpu.summary benchmarks/results/gpu_results.json

Owns: nothing.  Thread-safety: prints only.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def print_summary(results: Row) -> None:
    """What ran, then the chief numbers of every section that measured some."""
    sections = results["sections"]
    print()
    print_rows(
        f"sections, {results['wall_s']:.0f} s of {results['budget_s']:.0f}",
        ("section", "status", "seconds", "driver", "left out", "reason"),
        [
            (
                name,
                entry["status"],
                f"{entry['wall_s']:.1f}",
                entry.get("driver", "none"),
                str(len(entry.get("skipped", {}))),
                _cut(entry.get("reason", "")),
            )
            for name, entry in sections.items()
        ],
    )
    if results["dry_run"]:
        print("A dry run: nothing above was measured on a GPU.")
        return
    for name, table in TABLES.items():
        entry = sections.get(name)
        if entry is None or not entry.get("result"):
            continue
        try:
            table(entry["result"])
        except (KeyError, TypeError, ValueError, IndexError) as error:
            # A section that was cut short; its numbers are in the file all the same.
            print(f"{name}: incomplete ({type(error).__name__}: {error})")


def print_rows(title: str, columns: Iterable[str], rows: Iterable[Iterable[str]]) -> None:
    """A plain table: no colour, no box, nothing cut."""
    table = [list(columns), *([str(cell) for cell in row] for row in rows)]
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    print(f"-- {title}")
    for row in table:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
        print("  ".join(cells).rstrip())
    print()


def _facts(result: Row) -> None:
    device, ceilings = result["device"], result["ceilings"]
    print_rows(
        "device",
        ("name", "granularity", "runs unmapped at once", "runs granted at once", "read-only",
         "copy GB/s", "bf16 TFLOP/s"),
        [
            (
                device["device_name"],
                str(device["granularity_bytes"]),
                str(device["unmap_runs"]),
                str(device["access_runs"]),
                str(device["read_only"]),
                f"{ceilings['copy_gb_per_s']['median']:.0f}",
                f"{ceilings['bf16_tflop_per_s']['median']:.0f}",
            )
        ],
    )  # fmt: skip


def _tests(result: Row) -> None:
    print_rows(
        "tests",
        ("suite", "passed", "failed", "skipped", "seconds"),
        [
            (name, one["passed"], one["failed"], one["skipped"], one["seconds"])
            for name, one in result["suites"].items()
        ],
    )
    for failure in result.get("failures", [])[:8]:
        print(f"  failed: {failure['test']}: {_cut(failure['message'], 120)}")


def _probes(result: Row) -> None:
    print_rows(
        "kernels over rows past the end",
        ("kernel", "length", "expected", "found", "rel. error", "as expected"),
        [
            (
                row["kernel"],
                row["length"],
                row["expected"],
                _cut(row["found"], 40),
                f"{row['rel_error']:.1e}" if row.get("rel_error") is not None else "",
                row["is_as_expected"],
            )
            for row in result["rows"]
        ],
    )


def _driver_calls(result: Row) -> None:
    print_rows(
        "driver calls on runs of pages, us: median (p90)",
        ("stream", "page MiB", "pages", "create one", "map new", "map", "unmap", "map / page"),
        [
            (
                row["stream"],
                row["page_bytes"] >> 20,
                row["num_pages"],
                _spread(row["create_us"]),
                _spread(row["map_new_us"]),
                _spread(row["map_us"]),
                _spread(row["unmap_us"]),
                f"{row['map_us']['median'] / row['num_pages']:.2f}",
            )
            for row in result["runs"]
        ],
    )


def _attention(result: Row) -> None:
    copy = result["copy_gb_per_s"]["median"]
    titles = {
        "decode": f"decode attention, us a layer (share of the copy bandwidth, {copy:.0f} GB/s)",
        "prefill": "prefill attention, us a layer (TFLOP/s)",
    }
    for phase, title in titles.items():
        rows = [row for row in result["rows"] if row["phase"] == phase]
        names = dict.fromkeys(name for row in rows for name in row["kernels"])
        cases = [f"{row['batch']} x {row['length']}" for row in rows]
        table = [
            (name, *(_attention_cell(row["kernels"].get(name, {})) for row in rows))
            for name in names
        ]
        print_rows(title, ("kernel", *cases), table)


def _attention_cell(one: Row) -> str:
    if "us" not in one:
        return "error" if one else ""
    rate = one.get("roofline", one.get("tflop_per_s", 0.0))
    return f"{one['us']['median']:.1f} ({rate:.2f})"


def _layout(result: Row) -> None:
    print_rows(
        "layout dial",
        ("layers a group", "page MiB", "attention us", "pages a step", "maps a step", "waste"),
        [
            (
                row["layers_per_group"],
                row["page_bytes"] >> 20,
                _spread(row["attention_us"]),
                f"{row['pages_per_step']:.2f}",
                f"{row['map_calls_per_step']:.2f}",
                f"{row['waste']:.1%}",
            )
            for row in result["rows"]
        ],
    )


def _jitter(result: Row) -> None:
    print_rows(
        "commits, ms a step",
        ("commit-ahead", "pages", "step p50", "p99", "max", "allocator p50 us", "p99 us", "hidden"),
        [
            (
                row["commit_ahead_tokens"],
                row["pool"],
                f"{row['step_ms']['p50']:.2f}",
                f"{row['step_ms']['p99']:.2f}",
                f"{row['step_ms']['max']:.2f}",
                f"{row['allocator_us']['p50']:.1f}",
                f"{row['allocator_us']['p99']:.1f}",
                f"{row['hidden_share']:.0%}",
            )
            for row in result["rows"]
        ],
    )


def _serving(result: Row) -> None:
    print_rows(
        "serving",
        (
            "backend",
            "graphs",
            "tokens/s",
            "TPOT p50 ms",
            "ITL p50",
            "p99",
            "of copy bandwidth",
            "peak KV GiB",
            "held GiB",
            "used",
        ),
        [
            (
                row["kv_backend"],
                row["cuda_graphs"],
                f"{row['output_tokens_per_s']:.0f}",
                f"{row['tpot_ms']['p50']:.2f}",
                f"{row['itl_ms']['p50']:.2f}",
                f"{row['itl_ms']['p99']:.2f}",
                f"{row['roofline']:.2f}",
                f"{row['peak_committed_bytes'] / 2**30:.2f}",
                f"{row['created_bytes'] / 2**30:.2f}",
                f"{row['utilisation']:.1%}",
            )
            for row in result["runs"]
        ],
    )
    print(f"  greedy outputs, by pair: {result.get('agreement')}")


def _peers(result: Row) -> None:
    print_rows(
        "allocators, us a page of 2 MiB (median, p90)",
        ("allocator", "pages", "grow, new pages", "give back", "grow, pooled", "to the pool"),
        [
            (
                row["allocator"],
                row["num_pages"],
                *(
                    _spread(row[key], row["num_pages"]) if row.get(key) else ""
                    for key in ("grow_us", "give_back_us", "grow_pooled_us", "to_pool_us")
                ),
            )
            for row in result["rows"]
        ],
    )


TABLES: dict[str, Callable[[Row], None]] = {
    "facts": _facts,
    "tests": _tests,
    "kernel_probes": _probes,
    "driver_calls": _driver_calls,
    "attention": _attention,
    "layout": _layout,
    "commit_jitter": _jitter,
    "peers": _peers,
    "serving": _serving,
}


def _spread(value: dict[str, float], parts: int = 1) -> str:
    return f"{value['median'] / parts:.1f} ({value['p90'] / parts:.1f})"


def _cut(text: str, width: int = 90) -> str:
    line = text.replace("\n", " ")
    return line if len(line) <= width else line[: width - 3] + "..."


if __name__ == "__main__":
    print_summary(json.loads(Path(sys.argv[1]).read_text()))
