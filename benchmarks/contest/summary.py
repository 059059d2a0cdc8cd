"""Medians over runs, ratios between peers, and whose tokens are equal.

Owns: nothing.  Thread-safety: pure functions.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vmalloc.measuring.provenance import spread

from .peers import CONTINUOUS_BATCHING, PEERS

OURS = "vmalloc"
CONTINUOUS_TARGET = 3.0
TARGETS = {
    ("tiny", "offline"): 1.5,
    ("tiny", "parallel"): 1.5,
    ("tiny", "prefix"): 1.2,
    ("small", "offline"): 1.15,
}
"""Output tokens per second of ours over those of the best other peer."""

Cell = tuple[str, str]
Run = dict[str, Any]


def summarize(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """A row for each shape, workload and peer, over its quiet runs, or all if none was quiet."""
    groups: dict[tuple[str, str, str], list[Run]] = {}
    for run in runs:
        groups.setdefault((run["shape"], run["workload"], run["peer"]), []).append(run)
    return [
        {"shape": shape, "workload": workload, "peer": peer, **_row(group)}
        for (shape, workload, peer), group in groups.items()
    ]


def _row(runs: list[Run]) -> dict[str, Any]:
    quiet = [run for run in runs if run["is_quiet"]]
    kept = quiet or runs
    numbers = ("tokens_per_s", "tokens_per_cpu_s", "wall_s", "import_s", "construct_s", "ready_s")
    return {
        "num_runs": len(runs),
        "num_quiet": len(quiet),
        "foreign_cores": spread([run["foreign_cores"] for run in kept]),
        **{name: spread([run[name] for run in kept]) for name in numbers},
        "peak_rss_bytes": spread([run["peak_rss_bytes"] for run in kept]),
        "ttft_ms": _medians([run["ttft_ms"] for run in kept]),
        "tpot_ms": _medians([run["tpot_ms"] for run in kept]),
        "kv": _medians([run["kv"] for run in kept]),
        "output_tokens": kept[0]["output_tokens"],
    }


def _medians(values: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {name: statistics.median(value[name] for value in values) for name in values[0]}


def vital_signs(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """What of ours has limits of its own: start, memory of the process, KV beyond the tokens."""
    said = []
    for row in rows:
        if not PEERS[row["peer"]].is_ours:
            continue
        kv = row["kv"]
        said.append(
            f"{row['shape']} {row['workload']}, {PEERS[row['peer']].summary}: constructed in "
            f"{row['construct_s']['median']:.2f} s, peak RSS "
            f"{row['peak_rss_bytes']['median'] / 2**20:,.0f} MiB, committed KV over live KV "
            f"{kv['committed'] / kv['live']:.3f} at the peaks, "
            f"{kv['committed_byte_steps'] / kv['live_byte_steps']:.3f} over all steps"
        )
    return said


@dataclass(frozen=True)
class Ratio:
    """Ours over a rival's tokens per second in one shape and workload."""

    shape: str
    workload: str
    rival: str
    median: float
    lowest: float
    highest: float
    target: float | None

    def __str__(self) -> str:
        text = f"{self.shape} {self.workload}: {self.median:.2f}x"
        if self.highest > self.lowest:
            text += f" ({self.lowest:.2f}..{self.highest:.2f})"
        text += f" of {PEERS[self.rival].summary}"
        if self.target is None:
            return text
        return (
            f"{text}; target {self.target:g}x {'met' if self.median >= self.target else 'MISSED'}"
        )


def ratios(runs: Sequence[Run]) -> list[Ratio]:
    """Against the best rival, and against continuous batching, in every shape and workload."""
    rows = {(row["shape"], row["workload"], row["peer"]): row for row in summarize(runs)}
    found = []
    for shape, workload in dict.fromkeys((run["shape"], run["workload"]) for run in runs):
        rivals = {
            peer: row["tokens_per_s"]["median"]
            for (*cell, peer), row in rows.items()
            if cell == [shape, workload] and not PEERS[peer].is_ours
        }
        if not rivals or (shape, workload, OURS) not in rows:
            continue
        best = max(rivals, key=lambda peer: rivals[peer])
        target = TARGETS.get((shape, workload))
        found.append(_ratio(runs, shape, workload, best, target))
        if CONTINUOUS_BATCHING in rivals and best != CONTINUOUS_BATCHING:
            target = CONTINUOUS_TARGET if shape != "nano" else None
            found.append(_ratio(runs, shape, workload, CONTINUOUS_BATCHING, target))
    return found


def _ratio(
    runs: Sequence[Run], shape: str, workload: str, rival: str, target: float | None
) -> Ratio:
    """Of the medians; its range is that of the rounds, since those ran side by side."""
    speeds: dict[str, dict[int, float]] = {OURS: {}, rival: {}}
    for run in _kept([run for run in runs if (run["shape"], run["workload"]) == (shape, workload)]):
        if run["peer"] in speeds:
            speeds[run["peer"]][run["round"]] = run["tokens_per_s"]
    mine, theirs = speeds[OURS], speeds[rival]
    median = statistics.median(mine.values()) / statistics.median(theirs.values())
    by_round = [mine[number] / theirs[number] for number in mine if number in theirs] or [median]
    return Ratio(shape, workload, rival, median, min(by_round), max(by_round), target)


def _kept(runs: Sequence[Run]) -> list[Run]:
    """Each peer's quiet runs, or all of them if none was."""
    has_quiet = {run["peer"] for run in runs if run["is_quiet"]}
    return [run for run in runs if run["is_quiet"] or run["peer"] not in has_quiet]


def compare_tokens(
    reference: Sequence[Sequence[int]], tokens: Sequence[Sequence[int]]
) -> dict[str, Any]:
    """How many streams are equal, and after how many tokens the others part."""
    parted = [
        _common_prefix(one, other)
        for one, other in zip(reference, tokens, strict=True)
        if list(one) != list(other)
    ]
    return {"num_equal": len(reference) - len(parted), "num": len(reference), "parted_at": parted}


def _common_prefix(one: Sequence[int], other: Sequence[int]) -> int:
    pairs = enumerate(zip(one, other, strict=False))
    return next((idx for idx, (a, b) in pairs if a != b), min(len(one), len(other)))
