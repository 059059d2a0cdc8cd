"""Figures of the studies.

Owns: nothing.  Thread-safety: none; one thread.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from vmalloc.measuring.figures import LENGTH_COLORS, new_panels, save_figure

from .tables import Row

BACKEND_COLORS = {"virtual": "#2f81f7", "virtual, per layer": "#9ecbff", "paged": "#d4813a"}


def _pick(rows: list[Row], **names: Any) -> list[Row]:
    """The runs of these names, and no others."""
    return [
        row for row in rows if all(row["names"].get(key) == value for key, value in names.items())
    ]


def draw_scale(rows: list[Row], path: Path) -> None:
    """Rate, waits and memory held, by the number of sequences."""
    figure, (rate, waits, held) = new_panels(1, 3, width=10.0, height=3.2)
    for backend, color in BACKEND_COLORS.items():
        line = _pick(rows, backend=backend)
        limits = [row["names"]["max_num_seqs"] for row in line]
        settings: dict[str, Any] = {"color": color, "label": backend, "ms": 4}
        rate.plot(limits, [row["decoded_tokens_per_s"] for row in line], "o-", **settings)
        waits.plot(limits, [100 * row["stall_share"] for row in line], "o-", **settings)
        memory = [
            row["capacity_bytes"] if backend == "paged" else row["mean_created_bytes"]
            for row in line
        ]
        held.plot(limits, [num_bytes / 1e9 for num_bytes in memory], "o-", **settings)
    for axis, title in ((rate, "tokens/s"), (waits, "time that waits for pages, %")):
        axis.set_title(title)
    held.set_title("KV memory held, GB")
    for axis in (rate, waits, held):
        axis.set_xscale("log")
        axis.set_xlabel("sequences at once, at most")
        axis.set_ylim(bottom=0)
    figure.legend(*rate.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    save_figure(figure, path)


def draw_stalls(rows: list[Row], path: Path) -> None:
    """Waits by the driver's pace and by commit-ahead."""
    figure, (pace, ahead) = new_panels(1, 2, width=9.0, height=3.2)
    for room, color in zip(("full", "room to spare"), LENGTH_COLORS, strict=False):
        line = _pick(rows, room=room, ahead=4, low_watermark=None)
        line.sort(key=lambda row: row["names"]["latency"])
        factors = [row["names"]["latency"] for row in line]
        pace.plot(factors, [100 * row["stall_share"] for row in line], "o-", color=color, ms=4,
                  label=f"waits for pages, memory {room}")  # fmt: skip
        pace.plot(factors, [100 * row["worker_share"] for row in line], "--", color=color,
                  label=f"worker busy, memory {room}")  # fmt: skip
        line = _pick(rows, room=room, latency=1, low_watermark=None)
        line.sort(key=lambda row: row["names"]["ahead"])
        names = [str(row["names"]["ahead"]) for row in line]
        ahead.plot(names, [100 * row["stall_share"] for row in line], "o-", color=color, ms=4)
    pace.set_xscale("log", base=2)
    pace.set_xticks([1, 2, 4, 8, 16], ["1x", "2x", "4x", "8x", "16x"])
    pace.set_xlabel("how long driver calls take")
    ahead.set_xlabel("tokens committed ahead")
    pace.set_ylabel("time, %")
    ahead.set_ylabel("time that waits for pages, %")
    pace.set_ylim(bottom=0)
    ahead.set_ylim(bottom=0)
    figure.legend(*pace.get_legend_handles_labels(), loc="outside lower center", ncols=2)
    save_figure(figure, path)


def draw_layout(rows: list[Row], path: Path) -> None:
    """Rate against paged, and waste, by page size and layers a group, for each model."""
    models = list(dict.fromkeys(row["names"]["model"] for row in rows))
    figure, axes = new_panels(2, len(models), width=9.0, height=6.0)
    for column, model in enumerate(models):
        (paged,) = _pick(rows, model=model, backend="paged")
        virtual = _pick(rows, model=model, backend="virtual")
        best = paged["decoded_tokens_per_s"]
        _draw_grid(
            axes[column],
            virtual,
            lambda row, best=best: 100 * row["decoded_tokens_per_s"] / best,
            f"{model}: tokens/s, % of paged",
            "Blues",
        )
        _draw_grid(
            axes[len(models) + column],
            virtual,
            lambda row: 100 * row["waste"],
            f"{model}: committed memory without tokens, %",
            "Oranges",
        )
    save_figure(figure, path)


def _draw_grid(
    axis: Any, rows: list[Row], value: Callable[[Row], float], title: str, colors: str
) -> None:
    sizes = sorted({row["names"]["page_bytes"] for row in rows})
    groups = sorted({row["names"]["layers_per_group"] for row in rows})
    grid = [
        [value(_pick(rows, page_bytes=size, layers_per_group=group)[0]) for size in sizes]
        for group in groups
    ]
    axis.imshow(grid, cmap=colors, aspect="auto", origin="lower")
    middle = (min(map(min, grid)) + max(map(max, grid))) / 2
    for y, line in enumerate(grid):
        for x, number in enumerate(line):
            color = "white" if number > middle else "#24292f"
            axis.text(x, y, f"{number:.0f}", ha="center", va="center", fontsize=8, color=color)
    axis.set_xticks(range(len(sizes)), [_size(size) for size in sizes])
    axis.set_yticks(range(len(groups)), [str(group) for group in groups])
    axis.set_xlabel("page")
    axis.set_ylabel("layers a group")
    axis.set_title(title)


def _size(num_bytes: int) -> str:
    return f"{num_bytes >> 20} MiB" if num_bytes >= 1 << 20 else f"{num_bytes >> 10} KiB"


def draw_sharing(rows: list[Row], path: Path) -> None:
    """Rate with and without sharing."""
    figure, axes = new_panels(1, 2, width=9.0, height=3.2, sharey=True)
    for axis, backend in zip(axes, ("virtual", "paged"), strict=True):
        for shares, color, offset in (
            (False, "#d0d7de", -0.2),
            (True, BACKEND_COLORS[backend], 0.2),
        ):
            line = _pick(rows, backend=backend, shares=shares)
            values = [row["decoded_tokens_per_s"] for row in line]
            places = [idx + offset for idx in range(len(line))]
            label = f"{backend}, shared" if shares else "each its own"
            bars = axis.bar(places, values, 0.4, color=color, label=label)
            axis.bar_label(bars, [f"{value / 1e3:.1f}k" for value in values], fontsize=7)
        axis.set_xticks(range(len(line)), [_sharing_name(row) for row in line])
        axis.legend(loc="upper left")
    axes[0].set_ylabel("tokens/s")
    axes[0].set_ylim(top=1.25 * max(row["decoded_tokens_per_s"] for row in rows))
    save_figure(figure, path)


def _sharing_name(row: Row) -> str:
    names = row["names"]
    if "samples" in names:
        return f"{names['samples']} samples"
    return f"{names['shared_tokens']} tokens\nin common"


PLOTS: dict[str, Callable[[list[Row], Path], None]] = {
    "scale": draw_scale,
    "stalls": draw_stalls,
    "layout": draw_layout,
    "sharing": draw_sharing,
}
