"""The pictures of a report: SVG to be put into a page, whose colours they take on.

Needs matplotlib, which ``vmalloc[bench]`` brings. The overview as a file of its own:

    python -m vmalloc.engine.ab.plots benchmarks/results/ab.json docs/figures/ab.svg

Owns: nothing.  Thread-safety: none; one thread.
"""

from __future__ import annotations

import html
import io
import json
import re
from pathlib import Path
from typing import Any

import typer
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ...measuring.figures import new_panels, save_figure
from .metrics import METRICS

ARM_COLORS = {
    "virtual": "#2f81f7",
    "paged": "#d4813a",
    "max_length": "#8250df",
    "power_of_two": "#1a7f37",
    "oracle": "#bf3989",
}
TIE_COLOR = "#8c959f"
STATE_COLORS = {
    "tokens": "#2f81f7",
    "in pages of tokens, empty": "#9ecbff",
    "ahead": "#a371f7",
    "parked": "#bf8700",
    "cached prefixes": "#4ac26b",
    "retired": "#fa7970",
    "free": "#c4ccd4",
}
PAGE_COLORS = {"#000000": "var(--ink)", "#57606a": "var(--muted)", "#ffffff": "var(--paper)"}
"""What the page's style decides: the same picture serves a light and a dark one."""

WIDTH, HEIGHT = 4.8, 2.5
OVERVIEW = ("output_tokens_per_s", "ttft_p50_ms", "tpot_p50_ms", "mean_held_bytes")
LATENCIES = (
    *("ttft_p50_ms", "ttft_p99_ms", "tpot_p50_ms", "tpot_p99_ms"),
    *("itl_p50_ms", "itl_p99_ms"),
)
MIB = 2**20
MIN_REACH = 1.25
TICKS = (1.05, 1.1, 1.25, 1.5, 2.0, 3.0, 5.0, 10.0, 20.0, 50.0, 100.0)


def overview(summary: dict[str, Any], other: str) -> str:
    """How far the first side is ahead of another, by workload, with spreads."""
    first = next(iter(summary["backends"]))
    return _svg(_overview(summary, other), f"Ratios of {first} and {other} by workload")


def _overview(summary: dict[str, Any], other: str) -> Figure:
    first = next(iter(summary["backends"]))
    metrics = {metric["name"]: metric for metric in summary["metrics"]}
    workloads = summary["workloads"]
    height = 0.9 + 0.27 * len(workloads)
    figure, axes = new_panels(1, len(OVERVIEW), width=9.6, height=height, sharey=True)
    for axis, name in zip(axes, OVERVIEW, strict=True):
        metric = metrics[name]
        for place, workload in enumerate(workloads):
            ratio = _line(workload, name)["ratios"][other]
            if ratio["median"]:
                _draw_ratio(axis, place, ratio, metric["better"], first, other)
        axis.axvline(1.0, color="#57606a", lw=0.8, zorder=0)
        axis.set_xscale("log")
        _center_on_one(axis)
        axis.set_title(metric["words"])
    _label_rows(axes[0], [one["name"] for one in workloads])
    axes[0].set_ylim(len(workloads) - 0.5, -0.5)
    sides = f"\u2190 {other} ahead", f"{first} ahead \u2192"
    figure.supxlabel("   |   ratio, log scale   |   ".join(sides), size=8)
    return figure


def _draw_ratio(
    axis: Axes, place: int, ratio: dict[str, Any], better: str, first: str, other: str
) -> None:
    values = [ratio[name] for name in ("low", "median", "high")]
    if better == "lower":  # so that the right is good for the first side everywhere
        values = [1 / value if value else 1.0 for value in reversed(values)]
    low, median, high = values
    color = {"better": ARM_COLORS[first], "worse": ARM_COLORS[other]}.get(
        ratio["verdict"], TIE_COLOR
    )
    is_tie = color == TIE_COLOR
    axis.plot([low, high], [place, place], color=color, lw=1.6, solid_capstyle="round")
    face = "#ffffff" if is_tie else color
    axis.plot([median], [place], "o", ms=5.5, color=color, markerfacecolor=face)


def throughput(workload: dict[str, Any]) -> str:
    """Output tokens per second of every run, the medians marked."""
    values = _line(workload, "output_tokens_per_s")["values"]
    figure, (axis,) = new_panels(1, 1, width=WIDTH, height=0.9 + 0.34 * len(values))
    for place, (arm, value) in enumerate(values.items()):
        color = ARM_COLORS[arm]
        runs = [run for run in value["runs"] if run is not None]
        axis.plot(runs, [place] * len(runs), "o", ms=5, color=color, alpha=0.55, mew=0)
        axis.plot([value["median"]] * 2, [place - 0.3, place + 0.3], color=color, lw=2)
    _name_rows(axis, list(values))
    axis.set_xlim(left=0)
    axis.set_xlabel("output tokens/s")
    return _svg(figure, f"Throughput of {workload['name']}")


def latency(workload: dict[str, Any]) -> str:
    """Percentiles of latencies with their spreads over runs."""
    arms = list(workload["table"][0]["values"])
    lines = {name: _line(workload, name)["values"] for name in LATENCIES}
    lines = {name: values for name, values in lines.items() if values[arms[0]]["median"]}
    figure, (axis,) = new_panels(1, 1, width=WIDTH, height=0.9 + 0.3 * len(lines))
    step = 0.6 / max(1, len(arms) - 1) if len(arms) > 1 else 0.0
    for idx, arm in enumerate(arms):
        places = [place - 0.3 * (len(arms) > 1) + idx * step for place in range(len(lines))]
        spreads = [values[arm] for values in lines.values()]
        for place, value in zip(places, spreads, strict=True):
            if value["median"] is not None:
                axis.plot([value["low"], value["high"]], [place] * 2, color=ARM_COLORS[arm], lw=1.6)
        axis.plot(
            [value["median"] for value in spreads], places, "o", ms=4, color=ARM_COLORS[arm],
            label=arm,
        )  # fmt: skip
    axis.set_xscale("log")
    words = {metric.name: metric.words for metric in METRICS}
    _name_rows(axis, [words[name] for name in lines])
    axis.set_xlabel("ms, log scale")
    figure.legend(loc="outside upper center", ncols=len(arms))
    return _svg(figure, f"Latencies of {workload['name']}")


def memory_over_time(workload: dict[str, Any]) -> str:
    """Held and live bytes as the first run went, under the cap."""
    figure, (axis,) = new_panels(1, 1, width=WIDTH, height=HEIGHT)
    for arm, points in workload["memory"].items():
        times = [point[0] for point in points]
        color = ARM_COLORS[arm]
        axis.plot(times, [point[3] / MIB for point in points], color=color, lw=1.4, label=arm)
        axis.plot(times, [point[1] / MIB for point in points], ":", color=color, lw=1.4)
    _draw_cap(axis, workload, is_vertical=False)
    axis.set_ylim(bottom=0)
    axis.set_xlim(left=0)
    axis.set_xlabel("seconds of the first run")
    axis.set_ylabel("MiB")
    figure.legend(loc="outside upper center", ncols=len(workload["memory"]))
    return _svg(figure, f"KV memory of {workload['name']} over time")


def memory_by_state(workload: dict[str, Any]) -> str:
    """What held memory was for, averaged over time."""
    arms = list(workload["table"][0]["values"])
    figure, (axis,) = new_panels(1, 1, width=WIDTH, height=1.35 + 0.34 * len(arms))
    for place, arm in enumerate(arms):
        left = 0.0
        for state, num_bytes in _states(workload, arm).items():
            axis.barh(
                place, num_bytes / MIB, 0.62, left=left, color=STATE_COLORS[state],
                label=state if place == 0 else None,
            )  # fmt: skip
            left += num_bytes / MIB
    _name_rows(axis, arms)
    _draw_cap(axis, workload, is_vertical=True)
    axis.set_xlabel("MiB")
    figure.legend(loc="outside upper center", ncols=3, fontsize=7)
    return _svg(figure, f"KV memory of {workload['name']} by state")


def _states(workload: dict[str, Any], arm: str) -> dict[str, float]:
    def mean(state: str) -> float:
        found = _line(workload, f"mean_{state}_bytes")["values"][arm]["median"]
        return float(found or 0.0)

    return {
        "tokens": mean("live"),
        "in pages of tokens, empty": max(0.0, mean("committed") - mean("live")),
        "ahead": mean("ahead"),
        "parked": mean("parked"),
        "cached prefixes": mean("cached"),
        "retired": mean("retired"),
        "free": mean("free"),
    }


def _draw_cap(axis: Axes, workload: dict[str, Any], *, is_vertical: bool) -> None:
    """The cap, unless it is so far away that it would only flatten the picture."""
    cap = workload["cap_bytes"] / MIB
    low, high = axis.get_xlim() if is_vertical else axis.get_ylim()
    if cap > 2 * high:
        return
    draw = axis.axvline if is_vertical else axis.axhline
    draw(cap, color="#57606a", lw=0.8, ls=(0, (4, 3)))
    (axis.set_xlim if is_vertical else axis.set_ylim)(low, max(high, 1.08 * cap))


def _name_rows(axis: Axes, names: list[str]) -> None:
    _label_rows(axis, names)
    axis.set_ylim(len(names) - 0.5, -0.5)
    axis.tick_params(axis="y", length=0)


def _label_rows(axis: Axes, names: list[str]) -> None:
    """Names as they are: a file's may have dollar signs, which would be mathematics."""
    axis.set_yticks(range(len(names)), names, parse_math=False)


def _center_on_one(axis: Axes) -> None:
    """Equal room on both sides of 1, and three ticks with plain numbers."""
    low, high = axis.get_xlim()
    reach = max(1 / low, high, MIN_REACH)
    axis.set_xlim(1 / reach, reach)
    tick = max((value for value in TICKS if value <= reach**0.9), default=reach)
    axis.set_xticks([1 / tick, 1.0, tick], [f"{value:.2g}" for value in (1 / tick, 1.0, tick)])
    axis.minorticks_off()


def _line(workload: dict[str, Any], name: str) -> dict[str, Any]:
    found: dict[str, Any] = next(one for one in workload["table"] if one["metric"] == name)
    return found


def _svg(figure: Figure, words: str) -> str:
    """An ``<svg>`` element without a size of its own, in the page's colours, with no reference to
    anything outside."""
    buffer = io.StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.savefig(buffer, format="svg", metadata=nothing, transparent=True)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    head, rest = text.split(">", 1)
    view_box = re.search(r'viewBox="[^"]*"', head)
    assert view_box is not None
    width = float(view_box[0].strip('"').split()[2])
    for color, variable in PAGE_COLORS.items():
        rest = rest.replace(color, variable)
    return (
        f'<svg {view_box[0]} role="img" aria-label="{html.escape(words)}" '
        f'style="max-width: {1.4 * width:.0f}px">{rest.strip()}'
    )


def main(json_file: Path, figure: Path) -> None:
    """Draw the overview of a comparison, of its first side and the second."""
    summary = json.loads(json_file.read_text(encoding="utf-8"))
    save_figure(_overview(summary, next(iter(summary["score"]))), figure)


if __name__ == "__main__":
    typer.run(main)
