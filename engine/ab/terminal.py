"""A comparison for the terminal: a table a workload, a progress bar meanwhile.

Owns: one rich progress display.  Thread-safety: none; one thread.
"""

from __future__ import annotations

import sys
from types import TracebackType
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from .experiment import Turn
from .metrics import HEADLINES
from .summary import chance_words, fewest_runs

# Columns that the parts of a table take: without ranges beside medians, and with them.
_WORDS_WIDTH = 36
_VALUE_WIDTHS = 12, 26
_RATIO_WIDTHS = 14, 28

_STYLES = {"better": "green", "worse": "red", "tie": "yellow", "unknown": "dim"}


class ABProgress:
    """Counts runs, and says which one is under way; on stderr where that is a terminal."""

    def __init__(self, num_runs: int) -> None:
        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            disable=not sys.stderr.isatty(),
        )
        self._task = self._progress.add_task("", total=num_runs)
        self._is_first = True

    def next(self, turn: Turn) -> None:
        """Another run begins."""
        what = f"run {turn.round_idx}" if turn.round_idx else "warm-up"
        self._progress.update(
            self._task,
            advance=0 if self._is_first else 1,
            description=f"{turn.workload}, {turn.arm}, {what}",
        )
        self._is_first = False

    def __enter__(self) -> ABProgress:
        self._progress.start()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        if exc_type is None:
            self._progress.update(self._task, advance=1)
        self._progress.stop()


def ab_report(summary: dict[str, Any], *, width: int = 80) -> Group:
    """The headline figures of every workload, and what they come to."""
    first, *others = summary["backends"]
    parts: list[RenderableType] = []
    for workload in summary["workloads"]:
        # A table for all sides where there is room for it, else one for each pair.
        groups = [others] if _fits(width, len(others)) else [[other] for other in others]
        for group in groups:
            is_wide = _fits(width, len(group), is_wide=True)
            parts += [_workload_table(workload, summary, [first, *group], is_wide=is_wide), ""]
    parts.append(_conclusion(summary))
    return Group(*parts)


def _fits(width: int, num_others: int, *, is_wide: bool = False) -> bool:
    """Whether a screen of ``width`` columns has room for the first side and so many others."""
    needed = (1 + num_others) * _VALUE_WIDTHS[is_wide] + num_others * _RATIO_WIDTHS[is_wide]
    return width >= _WORDS_WIDTH + needed


def _workload_table(
    workload: dict[str, Any], summary: dict[str, Any], arms: list[str], *, is_wide: bool
) -> Table:
    others = arms[1:]
    table = Table(
        title=Text(f"{workload['name']}: {workload['summary']}"),  # a name may look like markup
        title_justify="left",
        title_style="bold",
        caption=_caption(workload, summary),
        caption_justify="left",
        pad_edge=False,
    )
    table.add_column("", no_wrap=True)
    for arm in arms:
        table.add_column(arm, justify="right")
    for other in others:
        # One ratio needs no second name: it is the first over the second.
        table.add_column("ratio" if len(others) == 1 else f"/{other}", justify="right")
    lines = {line["metric"]: line for line in workload["table"]}
    group = HEADLINES[0].group
    for metric in HEADLINES:
        if metric.group != group:
            table.add_section()
            group = metric.group
        line = lines[metric.name]
        cells = [_value(line["values"][arm], is_wide) for arm in arms]
        ratios = [_ratio(line["ratios"][other], is_wide) for other in others]
        unit = f", {metric.unit}" if metric.unit in ("ms", "us") else ""
        table.add_row(f"{metric.words}{unit}", *cells, *ratios)
    return table


def _caption(workload: dict[str, Any], summary: dict[str, Any]) -> str:
    requests = f"{workload['num_requests']} requests"
    if workload["num_completions"] != workload["num_requests"]:
        requests += f", {workload['num_completions']} completions"
    cap = f"cap {workload['cap_bytes'] / 2**20:.2f} MiB, {workload['cap_words']}"
    return f"{requests}; {cap}; {workload['num_runs']} runs" + (
        f". {workload['unserved']}" if workload["unserved"] else ""
    )


def _value(value: dict[str, Any], is_wide: bool) -> str:
    if is_wide and value["spread_text"]:
        return f"{value['text']} ({value['spread_text']})"
    return str(value["text"])


def _ratio(ratio: dict[str, Any], is_wide: bool) -> Text:
    verdict = ratio["verdict"]
    text = ratio["text"]
    if is_wide and ratio["spread_text"]:
        text += f" ({ratio['spread_text']})"
    if verdict != "unknown":
        text += f" {verdict}"
    return Text(text, style=_STYLES[verdict])


def _conclusion(summary: dict[str, Any]) -> Group:
    first = next(iter(summary["backends"]))
    equality = summary["equality"]
    lines = [
        Text(equality["words"] + ".", style="bold green" if equality["is_equal"] else "bold red")
    ]
    lines += [Text(f"  {difference}") for difference in equality["differences"]]
    if summary["stopped"]:
        lines.append(Text(summary["stopped"], style="bold red"))
    if summary["ranks"]:
        lines.append(Text(summary["ranks"]))
    for other, score in summary["score"].items():
        lines.append(
            Text.assemble(
                f"{first} against {other}: ",
                (f"{score['better']} better", _STYLES["better"]),
                ", ",
                (f"{score['tie']} ties", _STYLES["tie"]),
                ", ",
                (f"{score['worse']} worse", _STYLES["worse"]),
                f", over all figures of {len(summary['workloads'])} workloads.",
            )
        )
    rule = "Medians; the ratio is the first side over the other, round by round. Where the ranges "
    rule += "of the runs overlap, it is a tie. " + chance_words(fewest_runs(summary))
    lines.append(Text(rule, style="dim"))
    return Group(*lines)
