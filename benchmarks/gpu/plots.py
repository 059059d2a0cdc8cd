"""Figures of the GPU results for the docs.

    python -m benchmarks.gpu.plots benchmarks/results/gpu_results.json docs/figures

Writes ``gpu-attention.svg``, ``gpu-driver-calls.svg``, ``gpu-commit-jitter.svg``,
``gpu-layout.svg`` and ``gpu-serving.svg``, each where its section has results; needs
``vmalloc[bench]``. A dry run's results are refused: they are no measurements.

Owns: nothing.  Thread-safety: none; one thread.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vmalloc.measuring.figures import COLORS, LENGTH_COLORS, new_panels, save_figure

Row = dict[str, Any]
CONTIGUOUS, PAGED = COLORS["virtual"], COLORS["paged"]
GREY = COLORS["never filled"]


def draw_all(results: Row, folder: Path) -> list[Path]:
    """Draw what there is; the files written.

    Raises:
        ValueError: the results are a dry run's.
    """
    if results["dry_run"]:
        raise ValueError("results of a dry run are no measurements; there is nothing to draw")
    written = []
    for name, draw in FIGURES.items():
        result = results["sections"].get(name, {}).get("result", {})
        if not (result.get("rows") or result.get("runs")):
            continue
        path = folder / f"gpu-{name.replace('_', '-')}.svg"
        draw(result, path)
        written.append(path)
    return written


def draw_attention(result: Row, path: Path) -> None:
    """Decode over contiguous rows and over blocks: bars a case, as shares of copy bandwidth."""
    rows = [row for row in result["rows"] if row["phase"] == "decode"]
    rows.sort(key=lambda row: (row["length"], row["batch"]))
    figure, (axes,) = new_panels(1, 1, width=7.5, height=3.2)
    names = [name for row in rows for name, one in row["kernels"].items() if "roofline" in one]
    names = list(dict.fromkeys(names))
    for place, name in enumerate(names):
        color = PAGED if "blocks" in name else GREY if "dense" in name else CONTIGUOUS
        shares = [row["kernels"].get(name, {}).get("roofline", 0.0) for row in rows]
        width = 0.85 / len(names)
        places = [idx + (place - (len(names) - 1) / 2) * width for idx in range(len(rows))]
        alpha = 1.0 if name.startswith("ours") else 0.55
        axes.bar(places, shares, width * 0.9, color=color, alpha=alpha, label=name)
    axes.set_xticks(range(len(rows)), [f"{row['batch']} x {row['length']:,}" for row in rows])
    axes.set_ylabel("read bytes / time, as share of a copy's")
    axes.set_title("Decode attention: one range a sequence (blue), block table (orange)")
    axes.legend(ncols=2, loc="upper left", bbox_to_anchor=(0, -0.12))
    save_figure(figure, path)


def draw_driver_calls(result: Row, path: Path) -> None:
    """Microseconds a page by run length, on an idle and a busy stream."""
    streams = list(dict.fromkeys(row["stream"] for row in result["runs"]))
    figure, panels = new_panels(1, len(streams), width=7.5, height=2.8, sharey=True)
    base = min(row["page_bytes"] for row in result["runs"])
    for axes, stream in zip(panels, streams, strict=True):
        rows = [
            row for row in result["runs"] if row["stream"] == stream and row["page_bytes"] == base
        ]
        rows.sort(key=lambda row: row["num_pages"])
        pages = [row["num_pages"] for row in rows]
        for color, (key, label) in zip(
            LENGTH_COLORS, (("map_us", "map, set access"), ("unmap_us", "unmap")), strict=False
        ):
            axes.plot(
                pages,
                [row[key]["median"] / row["num_pages"] for row in rows],
                marker="o",
                color=color,
                label=label,
            )
        axes.plot(
            pages,
            [row["create_us"]["median"] for row in rows],
            marker="o",
            color=LENGTH_COLORS[2],
            label="create",
        )
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_title(f"{stream} stream")
        axes.set_xlabel("pages in one call")
    panels[0].set_ylabel("us a page")
    panels[0].legend()
    save_figure(figure, path)


def draw_commit(result: Row, path: Path) -> None:
    """The allocator's share of a step: median, 99th percentile and maximum."""
    rows = result["rows"]
    figure, (axes,) = new_panels(1, 1, width=6.0, height=2.6)
    labels = []
    for idx, row in enumerate(rows):
        value = row["allocator_us"]
        color = CONTIGUOUS if row["commit_ahead_tokens"] else PAGED
        axes.plot([idx, idx], [value["p50"], value["max"]], color=color, linewidth=1)
        for key, marker in (("p50", "o"), ("p99", "s"), ("max", "_")):
            axes.plot(idx, value[key], marker=marker, color=color)
        ahead = "ahead" if row["commit_ahead_tokens"] else "inline"
        labels.append(f"{ahead},\n{row['pool']}")
    axes.set_xticks(range(len(rows)), labels)
    axes.set_yscale("log")
    axes.set_ylabel("allocator, us a step")
    axes.set_title("Median (circle), 99th percentile (square), maximum")
    save_figure(figure, path)


def draw_layout(result: Row, path: Path) -> None:
    """Attention time and waste over the dial, a line a page size."""
    figure, panels = new_panels(1, 2, width=7.5, height=2.8)
    sizes = sorted({row["page_bytes"] for row in result["rows"]})
    for color, size in zip(LENGTH_COLORS * 2, sizes, strict=False):
        rows = [row for row in result["rows"] if row["page_bytes"] == size]
        rows.sort(key=lambda row: row["layers_per_group"])
        groups = [row["layers_per_group"] for row in rows]
        label = f"{size >> 20} MiB"
        times = [row["attention_us"]["median"] / 1e3 for row in rows]
        panels[0].plot(groups, times, marker="o", color=color, label=label)
        waste = [100 * row["waste"] for row in rows]
        panels[1].plot(groups, waste, marker="o", color=color, label=label)
    for axes, title in zip(panels, ("attention of a step, ms", "waste, %"), strict=True):
        axes.set_xscale("log", base=2)
        axes.set_ylim(bottom=0)
        axes.set_xlabel("layers a group")
        axes.set_title(title)
    panels[0].legend(title="page")
    save_figure(figure, path)


def draw_serving(result: Row, path: Path) -> None:
    """Throughput and peak memory, virtual beside paged."""
    figure, panels = new_panels(1, 2, width=7.5, height=2.6)
    cases = list(dict.fromkeys((run["cuda_graphs"], run["kv_backend"]) for run in result["runs"]))
    cases.sort(key=lambda case: (not case[0], case[1] != "virtual"))
    for idx, (has_graphs, kind) in enumerate(cases):
        runs = [
            run
            for run in result["runs"]
            if (run["cuda_graphs"], run["kv_backend"]) == (has_graphs, kind)
        ]
        rates = sorted(run["output_tokens_per_s"] for run in runs)
        panels[0].bar(idx, rates[len(rates) // 2], 0.7, color=COLORS[kind])
        panels[0].plot([idx, idx], [rates[0], rates[-1]], color="#24292f", linewidth=1)
        created = max(run["created_bytes"] for run in runs) / 2**30
        live = max(run["peak_live_bytes"] for run in runs) / 2**30
        panels[1].bar(idx, created, 0.7, color=GREY)
        panels[1].bar(idx, live, 0.7, color=COLORS[kind])
    labels = [f"{kind},\n{'graphs' if has_graphs else 'eager'}" for has_graphs, kind in cases]
    for axes in panels:
        axes.set_xticks(range(len(cases)), labels)
    panels[0].set_title("output tokens/s (range over runs)")
    panels[1].set_title("KV GiB: tokens at the peak, and memory held (grey)")
    save_figure(figure, path)


FIGURES: dict[str, Callable[[Row, Path], None]] = {
    "attention": draw_attention,
    "driver_calls": draw_driver_calls,
    "commit_jitter": draw_commit,
    "layout": draw_layout,
    "serving": draw_serving,
}


if __name__ == "__main__":
    for drawn in draw_all(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])):
        print(drawn)
