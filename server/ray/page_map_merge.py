"""Puts the page maps of several replicas side by side, as if they were one.

Owns: nothing.  Thread-safety: pure functions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

Frame = dict[str, Any]

_SUMMED = ("shared_refs", "held_pages", "cached_pages", "num_slots")


def merge_frames(frames: Sequence[Frame]) -> Frame:
    """One frame: all slots, numbered on from replica to replica, and sums of all counts. A rank is
    that rank of every replica.

    Page sizes are those of the first; replicas of one application have the same.
    """
    whole = _side_by_side(frames)
    whole["time"] = max(frame["time"] for frame in frames)
    whole["ranks"] = [
        {**_side_by_side(ranks), "peak_rss_bytes": max(one["peak_rss_bytes"] for one in ranks)}
        for ranks in zip(*(frame["ranks"] for frame in frames), strict=True)
    ]
    return whole


def _side_by_side(parts: Sequence[Frame]) -> Frame:
    """The first one, with the ``map`` and ``totals`` of all."""
    first = parts[0]
    slots, num_slots = [], 0
    for part in parts:
        slots += [
            {**slot, "slot_idx": slot["slot_idx"] + num_slots} for slot in part["map"]["slots"]
        ]
        num_slots += part["map"]["num_slots"]
    sums = {name: sum(part["map"][name] for part in parts) for name in _SUMMED}
    is_asleep = all(part["map"]["is_asleep"] for part in parts)
    totals = {name: sum(part["totals"][name] for part in parts) for name in first["totals"]}
    page_map = {**first["map"], **sums, "is_asleep": is_asleep, "slots": slots}
    return {**first, "map": page_map, "totals": totals}
